"""The command `ufgir`: tables, figures, and one-sentence errors."""

import struct
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from clca import CLCAViTConfig, CLCAViTForImageClassification, token_schedule
from ufgir.cli import entry as cli
from ufgir.cli import profile
from ufgir.profiling.macs import count_macs


TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TINY_OPTIONS = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
REDUCED = {"reduction": "evit", "reduction_layers": [1, 2], "keep_rate": [0.5], "cross_layer_cache": True}


@pytest.fixture
def checkpoint(tmp_path):
    """Save a CLCA model with its image processor."""
    config = CLCAViTConfig(**TINY, **REDUCED, num_clr_tokens=1, head="cla", num_labels=3)
    CLCAViTForImageClassification(config).save_pretrained(tmp_path / "model")
    save_processor(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stock_checkpoint(tmp_path):
    """Save a ViT of transformers."""
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path / "stock")
    save_processor(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.fixture
def pictures(tmp_path):
    files = [tmp_path / "a leaf.png", tmp_path / "b.jpg"]
    for file, color in zip(files, ("green", "olive"), strict=True):
        Image.new("RGB", (50, 40), color).save(file)
    return [str(file) for file in files]


def save_processor(folder):
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def table(text, first):
    """Return the cells of the line that begins with `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(first)]
    return line.removeprefix(first).split()


def refused(capsys, *argv):
    """Return the error message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_profile_of_the_paper_model(capsys):
    argv = "profile --reduction evit --keep-rate 0.1 --image-size 448 --clca --num-labels 1110"
    assert cli.main(argv.split()) == 0
    text = capsys.readouterr().out
    assert table(text, "3 ") == ["786", "81", "+6"]
    assert table(text, "6 ") == ["87", "11", "+6"]
    assert table(text, "9 ") == ["17", "4", "+6"]
    assert table(text, "10 ") == ["10", "10", "+2"]
    assert table(text, "final norm") == ["12"]
    this, dense, share = table(text, "GMACs, one image")
    assert float(this) == pytest.approx(25.18, rel=5e-3) and float(dense) == pytest.approx(78.53, rel=5e-3)
    assert share == f"{float(this) / float(dense):.1%}"


def test_profile_of_a_checkpoint(capsys, checkpoint):
    assert cli.main(["profile", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    model = CLCAViTForImageClassification.from_pretrained(checkpoint)
    schedule = token_schedule(model.config)
    for index in range(5):
        assert table(text, f"{index} ")[:2] == [str(schedule.before[index]), str(schedule.after[index])]
    assert table(text, "parameters")[0] == f"{model.num_parameters():,}"
    assert table(text, "GMACs, one image")[0] == f"{count_macs(model) / 1e9:.3f}"


def test_profile_options_replace_those_of_the_checkpoint(capsys, checkpoint, stock_checkpoint):
    cli.main(["profile", str(checkpoint), "--keep_tokens", "8", "2"])  # although it has a keep rate
    assert "8, 2 tokens kept" in capsys.readouterr().out
    cli.main(["profile", str(checkpoint), "--reduction", "none", "--no-cross-layer-cache"])
    assert "no reduction; head cla" in capsys.readouterr().out
    cli.main(["profile", str(stock_checkpoint), "--reduction", "topk", "--reduction-layers", "2", "--keep-rate=0.25"])
    text = capsys.readouterr().out
    assert "topk in layers 2, keep rate 0.25" in text and table(text, "2 ") == ["17", "5"]


def test_profile_says_where_counts_differ_by_image(capsys):
    options = ["profile", *TINY_OPTIONS, "--reduction", "ats", "--keep-rate", "0.5", "--reduction-layers", "1"]
    assert cli.main(options) == 0
    text = capsys.readouterr().out
    assert "Token counts depend on the image" in text and table(text, "GMACs, one image")[0::2] == ["-", "-"]
    assert cli.main([*options, "--reduction-kwargs", '{"pad_to_bound": true}']) == 0
    text = capsys.readouterr().out
    assert "Token counts" not in text and table(text, "GMACs, one image")[0] != "-"


def test_the_paper_table_is_within_half_a_percent(capsys):
    assert cli.main(["profile", "--paper"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if " px " in line]
    assert len(rows) == 10
    for _, _, _, ours, theirs, _, ours_clca, theirs_clca, _ in rows:
        assert float(ours) == pytest.approx(float(theirs), rel=5e-3)
        assert float(ours_clca) == pytest.approx(float(theirs_clca), rel=5e-3)


def test_visualize(capsys, tmp_path, checkpoint, pictures):
    output = tmp_path / "new folder" / "kept.png"
    assert cli.main(["visualize", str(checkpoint), *pictures, "--output", str(output), "--side", "64"]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    with Image.open(output) as image:
        assert image.width > 3 * 64 and image.height > 2 * 64


def test_visualize_a_stock_checkpoint(tmp_path, stock_checkpoint, pictures):
    output = tmp_path / "kept.png"
    options = ["--reduction", "evit", "--reduction-layers", "1", "3", "--keep-rate", "0.5"]
    assert cli.main(["visualize", str(stock_checkpoint), pictures[0], "--output", str(output), *options]) == 0
    assert output.is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["profile", "--keep-rat", "0.5"], "--keep-rat"),  # no abbreviations either
        (["profile", "--head"], "--head"),
        (["profile", "--keep-rate", "much"], "much"),
        (["profile", "--reduction", "evit", "--keep-rate", "2"], "`keep_rate` must be in (0, 1], got 2.0"),
        (["profile", "--reduction", "evitt"], "evitt"),
        (["profile", "--reduction", "evit", "--reduction-layers", "12"], "0 .. 11"),
        (["profile", "--image-size", "225"], "multiple of `patch_size`"),
        (["profile", "--reduction", "evit", "--reduction-kwargs", "{"], "JSON object"),
        (["profile", "--reduction", "evit", "--reduction-kwargs", '{"typo": 1}'], "no option `typo`"),
        (["profile", "--paper", "--head", "cla"], "--paper"),
        (["profile", "no/such/folder"], "there is no checkpoint no/such/folder"),
        (["visualize", "no/such/folder"], "IMAGE"),
        (["visualize", "no/such/folder", "missing.png"], "missing.png"),
        (["visualize", "no/such/folder", "missing.png", "--output", "kept.docx"], "kept.docx"),
        (["visualize", "no/such/folder", "missing.png", "--side", "0"], "--side"),
    ],
)
def test_mistakes_end_with_one_sentence(capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_the_table_of_commands_is_that_of_the_modules(capsys):
    folder = Path(cli.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if "\ndef configure(" in file.read_text(encoding="utf-8")}
    assert {name.replace("-", "_") for name in cli.COMMANDS} == modules
    assert "Did you mean profile?" in refused(capsys, "profil")


def test_mistakes_with_files(capsys, tmp_path, checkpoint, stock_checkpoint, pictures):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "text.png cannot be read" in refused(capsys, "visualize", str(checkpoint), str(text))
    assert "reduces no tokens" in refused(capsys, "visualize", str(stock_checkpoint), pictures[0])
    assert "got the file" in refused(capsys, "profile", str(text))
    bomb = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert "bomb.png cannot be opened" in refused(capsys, "visualize", str(checkpoint), str(bomb))
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, "visualize", str(checkpoint), pictures[0])


def test_mistakes_about_a_data_report_are_told_before_any_image_is_read(capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    assert "error: `DATASET`" in refused(capsys, "data-report", "no such data")
    monkeypatch.setattr("ufgir.cli.data_report.load_ufgir_dataset", None)
    for output in (tmp_path / "file", tmp_path / "file" / "inside"):
        error = refused(capsys, "data-report", "synthetic_leaves", "--output", str(output))
        assert "`--output` must be a folder" in error
    error = refused(capsys, "data-report", "synthetic_leaves", "--sheet-classes", "0")
    assert "`--sheet-classes` must be at least 1, got 0" in error


def test_keep_rates_are_called_as_they_were_given(capsys, checkpoint, pictures):
    for argv in (["visualize", str(checkpoint), pictures[0], "--what", "grid"], ["export", str(checkpoint)]):
        assert "`--keep-rates` must be in (0, 1], got 2.0" in refused(capsys, *argv, "--keep-rates", "0.5", "2")


def test_missing_packages_are_told_before_the_work(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(profile, "layers", None)
    for option in ("--output", "--into"):
        monkeypatch.setattr(profile, "check_place", lambda *place: None)
        error = refused(capsys, "profile", str(checkpoint), "--layers", option, str(tmp_path / "out"))
        assert "matplotlib must be installed" in error and "-m pip install" in error


def test_any_command_may_be_interrupted_or_miss_a_package(capsys, monkeypatch):
    def stop(args):
        raise KeyboardInterrupt

    def lack(args):
        raise ImportError("figures need matplotlib: pip install 'clca-vit[visualization]'")

    monkeypatch.setattr(profile, "run", stop)
    assert cli.main(["profile"]) == 130
    assert capsys.readouterr().out == "interrupted\n"
    monkeypatch.setattr(profile, "run", lack)
    assert "error: figures need matplotlib" in refused(capsys, "profile")


@pytest.mark.parametrize("argv", [["--help"], ["profile", "--help"], ["visualize", "--help"]])
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0 and "usage: ufgir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "shown"), [("export", False), ("predict", False), ("convert", True), ("profile", True)]
)
def test_help_omits_defaults_that_a_checkpoint_replaces(capsys, command, shown):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--keep-rate N" in text and ("one per stage [1]" in text) is shown
