"""Conversion of checkpoint files of the original code, one by one and by folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clca import CLCAViTForImageClassification
from tests.checkpoints.original_checkpoints import ARCHITECTURE, EVIT_NAME, Code, Golden, difference, save
from ufgir.checkpoints import convert_original
from ufgir.checkpoints.convert import MARKER
from ufgir.checkpoints.convert_original import REPORT, convert_file, convert_folder, read_class_names
from ufgir.checkpoints.from_original import (
    OriginalFile,
)
from ufgir.cli import entry as cli
from ufgir.transforms.preprocessing import read_image_processor


# Converting


def test_converted_folder(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    names = [f"cultivar {index}" for index in range(7)]
    output = tmp_path / "out" / "soygene"
    assert convert_file(evit_file, output, class_names=names)
    files = {file.name for file in output.iterdir()}
    assert files >= {"config.json", "model.safetensors", "modeling_clca.py", "preprocessor_config.json", "README.md"}
    assert [file.name for file in output.parent.iterdir()] == ["soygene"]
    assert output.stat().st_mode & 0o777 == tmp_path.joinpath("out").stat().st_mode & 0o777

    model = CLCAViTForImageClassification.from_pretrained(output)
    assert difference(model, evit) <= 1e-9
    assert list(model.config.id2label.values()) == names and model.config.label2id["cultivar 3"] == 3
    processor = read_image_processor(output)
    assert processor.resize_size == (36, 36) and dict(processor.size) == {"height": 32, "width": 32}
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]
    card = (output / "README.md").read_text()
    for words in (f"`{EVIT_NAME}`", "`evit`, keep rate 0.5", "epoch, as reported by the file | 49", "| soygene |"):
        assert words in card
    assert "accuracy" not in card.partition("## How to load")[0].partition("---\n\n")[2]


def test_other_pictures(tmp_path: Path, evit: Golden) -> None:
    payload = evit.payload(custom_mean_std=True, resize_size=40) | {"accuracy": torch.tensor(77.125)}
    path = save(tmp_path / "x.pth", payload)
    convert_file(path, tmp_path / "own size")
    processor = read_image_processor(tmp_path / "own size")
    assert list(processor.image_mean) == list(processor.image_std) == [0.5] * 3 and processor.resize_size == (40, 40)
    assert "| accuracy, as reported by the file | 77.125 |" in (tmp_path / "own size" / "README.md").read_text()
    later = save(tmp_path / "later.pth", evit.payload(resize_size=40, test_resize_size=44, test_input_size=32))
    convert_file(later, tmp_path / "later")
    assert read_image_processor(tmp_path / "later").resize_size == (44, 44)  # evaluation has its own there
    convert_file(path, tmp_path / "larger", image_size=48)
    processor = read_image_processor(tmp_path / "larger")
    assert (processor.resize_size[0], processor.size["height"]) == (int(48 / 0.875), 48)


def test_a_folder_is_written_once(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    output = tmp_path / "out"
    output.mkdir()  # empty: it may be there
    assert convert_file(evit_file, output)
    assert not convert_file(evit_file, output)
    written = (output / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"other options.*`overwrite`"):
        convert_file(evit_file, output, image_size=48)
    assert (output / "model.safetensors").stat().st_mtime_ns == written
    assert convert_file(evit_file, output, image_size=48, overwrite=True)
    assert json.loads((output / "config.json").read_text())["image_size"] == 48
    with pytest.raises(ValueError, match=r"`class_names` .*7.*2"):
        convert_file(evit_file, output, class_names=["a", "b"], overwrite=True)
    assert (output / MARKER).is_file()

    foreign = tmp_path / "foreign"
    save(foreign / "thesis.txt", 1)
    for overwrite in (False, True):  # never deleted
        with pytest.raises(ValueError, match="not written by a conversion"):
            convert_file(evit_file, foreign, overwrite=overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["foreign", "out", EVIT_NAME])


def make_folder(folder: Path, evit: Golden) -> None:
    """Write three valid files, one in a subfolder, three invalid ones, and one of another type."""
    save(folder / EVIT_NAME, evit.payload())
    save(folder / "serial_1" / "deeper" / "cotton_topk.v2.pth", Golden("topk_base").payload())
    save(folder / "serial_9" / "late.pth", Golden("vit_base").payload())
    save(folder / "serial_1" / "amaws.pth", evit.payload(model=f"amaws_{ARCHITECTURE}"))
    save(folder / "code.pth", evit.payload(hook=Code(folder / "executed")))
    (folder / "half.pth").write_bytes((folder / EVIT_NAME).read_bytes()[:20_000])
    (folder / "notes.txt").write_text("not a checkpoint")


GOOD = sorted([EVIT_NAME, "serial_1/deeper/cotton_topk.v2.pth", "serial_9/late.pth"])
BAD = ["code.pth", "half.pth", "serial_1/amaws.pth"]


def visible(folder: Path) -> set[str]:
    """Return the folders that contain files, including hidden ones, relative to `folder`."""
    return {str(path.parent.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_of_files(
    tmp_path: Path, evit: Golden, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    make_folder(source, evit)
    write_card = convert_original._card

    def failing(error: BaseException) -> None:
        def card(file: OriginalFile, *args: Any) -> str:
            if file.path.name == "late.pth":
                raise error
            return write_card(file, *args)

        monkeypatch.setattr(convert_original, "_card", card)

    # Interrupted in the middle of the last file: the others are there, of it there is nothing.
    failing(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        convert_folder(source, output)
    complete = {".", EVIT_NAME.removesuffix(".pth"), "serial_1/deeper/cotton_topk.v2"}
    assert visible(output) == complete
    report = json.loads((output / REPORT).read_text())
    assert report["converted"] == [name for name in GOOD if "late" not in name] and report["skipped"] == []

    # The disk fails: the file counts as failed.
    failing(OSError("no space left on device"))
    outcome = convert_folder(source, output)
    assert outcome.converted == [] and outcome.failed["serial_9/late.pth"] == "no space left on device"
    assert visible(output) == complete

    # It goes on where it was interrupted.
    monkeypatch.undo()
    before = (output / EVIT_NAME.removesuffix(".pth") / "model.safetensors").stat().st_mtime_ns
    assert cli.main(["convert", str(source), "--output", str(output)]) == 1
    text = capsys.readouterr().out
    assert "converted 1, skipped 2, failed 3" in text and "amaws of the later CLCA code is not supported" in text
    assert (output / EVIT_NAME.removesuffix(".pth") / "model.safetensors").stat().st_mtime_ns == before
    report = json.loads((output / REPORT).read_text())
    assert report["converted"] == ["serial_9/late.pth"] and sorted(report["failed"]) == BAD
    assert "posix.system" in report["failed"]["code.pth"] and not (source / "executed").exists()
    assert visible(output) == complete | {"serial_9/late"}

    for name in BAD:
        (source / name).unlink()
    assert cli.main(["convert", str(source), "--output", str(output)]) == 0
    assert "converted 0, skipped 3, failed 0" in capsys.readouterr().out


def test_two_files_for_one_folder(tmp_path: Path, evit: Golden) -> None:
    save(tmp_path / "in" / "a.pt", evit.payload())
    save(tmp_path / "in" / "a.pth", Golden("topk_base").payload())
    outcome = convert_folder(tmp_path / "in", tmp_path / "out")
    assert outcome.converted == ["a.pt"] and "`overwrite`" in outcome.failed["a.pth"]


def test_class_names(tmp_path: Path, evit: Golden) -> None:
    names = tmp_path / "names"
    names.mkdir()
    (names / "soygene.csv").write_text('class_id,class_name\n1,"b, c"\n0,a\n')
    (names / "cotton.txt").write_text("\n".join("tuvwxyz") + "\n")
    assert read_class_names(names / "soygene.csv") == ["a", "b, c"]
    assert read_class_names(names) == {"soygene": ["a", "b, c"], "cotton": list("tuvwxyz")}
    (tmp_path / "from one.csv").write_text("class_name,class_id\na,1\nb,2\n")
    assert read_class_names(tmp_path / "from one.csv") == ["a", "b"]
    for rows in ("0,a\n2,b", "0,a\n0,b", "x,a", "0"):
        (tmp_path / "bad.csv").write_text(f"class_id,class_name\n{rows}\n")
        with pytest.raises(ValueError, match="`class_names`"):
            read_class_names(tmp_path / "bad.csv")

    save(tmp_path / "in" / "cotton_x.pth", evit.payload())
    save(tmp_path / "in" / "soyageing_x.pth", evit.payload())
    save(tmp_path / "in" / "soygene_x.pth", evit.payload())
    outcome = convert_folder(tmp_path / "in", tmp_path / "out", read_class_names(names))
    assert outcome.converted == ["cotton_x.pth", "soyageing_x.pth"]
    assert "`class_names`" in outcome.failed["soygene_x.pth"]
    labels = json.loads((tmp_path / "out" / "cotton_x" / "config.json").read_text())["id2label"]
    assert labels["6"] == "z"


def test_the_command(tmp_path: Path, evit_file: Path, evit: Golden, capsys: pytest.CaptureFixture) -> None:
    """Convert one file; errors are one sentence with status 2, and nothing is written."""
    output = tmp_path / "out"
    argv = ["convert", str(evit_file), "--output", str(output)]
    assert cli.main(argv) == 0 and capsys.readouterr().out == f"wrote {output}\n"
    assert cli.main(argv) == 0 and "already exists" in capsys.readouterr().out
    assert cli.main([*argv, "--overwrite", "--image-size", "48"]) == 0
    capsys.readouterr()

    half, empty = tmp_path / "half.pth", tmp_path / "empty"
    half.write_bytes(evit_file.read_bytes()[:20_000])
    empty.mkdir()
    (empty / "notes.txt").write_text("none")
    code = save(tmp_path / "code.pth", {"model": Code(tmp_path / "executed")})
    other = save(tmp_path / "other.pth", evit.payload(num_classes=5))
    unknown = save(tmp_path / "unknown.pth", evit.payload(model="evit_swin_base_patch4_window7_224"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    new = ["--output", str(tmp_path / "new")]
    for argv, words in (
        (["nowhere.pth", *new], "there is no file or folder nowhere.pth"),
        ([str(empty), *new], "there is no .pth or .pt file"),
        ([str(empty / "notes.txt"), *new], "got the file"),
        ([str(half), *new], "is not complete"),
        ([str(code), *new], "posix.system"),
        ([str(other), *new], "`num_classes`"),
        ([str(unknown), *new], "unknown `architecture`"),
        ([str(evit_file), *new, "--image-size", "33"], "multiple of `patch_size`"),
        ([str(evit_file), *new, "--class-names", "nowhere.txt"], "nowhere.txt"),
        ([str(evit_file), *new, "--class-names", str(empty)], "`--class-names` must be a file"),
        ([str(evit_file)], "--output"),
        ([str(evit_file), "--output", str(output)], "set `overwrite`"),
        ([str(evit_file), "--output", str(empty)], "not written by a conversion"),
        ([str(evit_file), "--output", str(half)], "`--output` must be a folder, got the file"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", *argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1, error
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


REMOTE = """
import sys
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("clca", "ufgir", "modeling_clca", "configuration_clca"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPackage())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
model, info = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    save_file({"logits": model.double()(load_file("pixels.safetensors")["pixels"]).logits}, "logits.safetensors")
predictions = pipeline("image-classification", model="model", trust_remote_code=True)("image.png", top_k=2)
assert len(predictions) == 2 and all(p["label"].startswith("cultivar") for p in predictions), predictions
assert "transformers_modules" in type(model).__module__
"""


def test_a_converted_folder_loads_without_this_package(tmp_path: Path, evit_file: Path, evit: Golden) -> None:
    convert_file(evit_file, tmp_path / "model", class_names=[f"cultivar {index}" for index in range(7)])
    Image.new("RGB", (50, 40), "green").save(tmp_path / "image.png")
    save_file({"pixels": evit.images}, tmp_path / "pixels.safetensors")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", REMOTE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (load_file(tmp_path / "logits.safetensors")["logits"] - evit.logits).abs().max() <= 1e-9
