"""Output paths that cannot be written raise errors before anything is computed; if writing fails later, the results are printed first."""

import errno
import importlib
import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import TINY
from ufgir.checkpoints.loading import warn_fields_without_effect
from ufgir.cli import analysis_options, benchmark, correlate, export, predict, profile, visualize
from ufgir.cli import entry as cli
from ufgir.cli.outputs import NotWritten, check_document, check_file, check_folder, print_before_error
from ufgir.utils import files
from ufgir.utils.text import shortened


SHAPE = {"hidden-size": 16, "num-hidden-layers": 4, "num-attention-heads": 2, "num-labels": 3, "patch-size": 8}
SHAPE = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
MEASURE = [
    "benchmark",
    *SHAPE,
    "--threads",
    "1",
    "--repetitions",
    "1",
    "--image-sizes",
    "32",
    "--methods",
    "none",
    "--dense-backends",
    "none",
]
LAYERS = ["profile", *SHAPE, "--image-size", "32", "--layers"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Save folders `dense` and `evit`, and `bare` without an image processor."""
    folder = tmp_path_factory.mktemp("models")
    for name, reduction in (("dense", None), ("evit", "evit"), ("bare", None)):
        CLCAViTForImageClassification(CLCAViTConfig(**TINY, reduction=reduction)).save_pretrained(folder / name)
        if name != "bare":
            ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / name)
    return folder


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40), "green").save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def file(tmp_path):
    """Create a file, whose path cannot be a folder."""
    (tmp_path / "file").write_text("mine")
    return tmp_path / "file"


def refused(capsys, *argv):
    """Return the error message of a command that ends with status 2 and prints nothing else."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in argv])
    assert stop.value.code == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and "Traceback" not in error
    return error


class TestChecks:
    def test_what_can_be_written_is_left_as_it_is(self, tmp_path, file):
        check_folder(tmp_path / "new" / "folder")
        check_folder(tmp_path / "new", whole=True)
        check_folder(tmp_path)
        check_file(tmp_path / "new" / "table.csv")
        check_file(file)
        check_document(file)
        assert list(tmp_path.iterdir()) == [file] and file.read_text() == "mine"

    @pytest.mark.parametrize("name", ["file", "file/inside", "file/far/inside"])
    def test_where_a_file_is(self, tmp_path, file, name):
        with pytest.raises(ValueError, match=r"`--into` must be a folder.* the file|which is a file"):
            check_folder(tmp_path / name, "--into")
        if name != "file":
            with pytest.raises(ValueError, match=r"`--trace` .*inside .*file, which is a file"):
                check_file(tmp_path / name, "--trace")

    def test_where_a_folder_is(self, tmp_path):
        with pytest.raises(ValueError, match="`--output` must be a file, got the folder"):
            check_file(tmp_path)

    @pytest.mark.parametrize(
        ("argv", "name"),
        [
            (["benchmark", "--methods", "evit", "--output"], "benchmark.json"),
            (["benchmark", "--scaling", "--output"], "scaling.png"),
            (["profile", "--layers", "--output"], "layers.csv"),
            (["data-report", "synthetic_leaves", "--output"], "report.json"),
        ],
    )
    def test_where_a_folder_has_the_name_of_a_file(self, tmp_path, capsys, argv, name):
        (tmp_path / name).mkdir()
        assert f"folder {name}" in refused(capsys, *argv, tmp_path)

    def test_other_folders_may_be_there(self, tmp_path):
        for name in ("layers", "layers.old", "report.html"):
            (tmp_path / name).mkdir()
        check_folder(tmp_path, files=["layers.csv", "report.json"])

    def test_where_nothing_can_be_made(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
        monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
        for check in (check_folder, check_file):
            for place in (tmp_path / "new", tmp_path / "new" / "inside"):
                with pytest.raises(ValueError, match=r"`--output` .*new.* cannot be written: Read-only file system\."):
                    check(place)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
    def test_where_the_system_makes_nothing(self):
        for check in (check_folder, check_file):
            with pytest.raises(ValueError, match=r"`--output` /proc/x cannot be written"):
                check("/proc/x")

    def test_names_that_are_too_long(self, tmp_path):
        for check in (check_folder, check_file, partial(check_folder, files=["report.json"])):
            with pytest.raises(ValueError, match="cannot be written: File name too long"):
                check(tmp_path / ("x" * 300))

    def test_a_disk_is_not_replaced(self):
        check_folder("/dev/shm" if Path("/dev/shm").is_mount() else ".")
        with pytest.raises(ValueError, match=r"`--output` .*mount point"):
            check_folder("/", whole=True)

    def test_what_was_done_is_kept(self):
        done = ["a table"]
        with (
            pytest.raises(NotWritten, match=r"out/a\.csv: No space left on device") as caught,
            print_before_error(done),
        ):
            done.append("wrote b.csv")
            raise OSError(errno.ENOSPC, "No space left on device", "out/a.csv")
        assert caught.value.done == "a table\n\nwrote b.csv"


class TestBeforeTheWork:
    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch):
        """Fail if anything is loaded or measured."""
        for module, name in (
            (benchmark, "_cases"),
            (benchmark, "_scaling"),
            (profile, "load_config"),
            (export, "load_config"),
            (predict, "find_images"),
            (visualize, "open_image"),
            (analysis_options, "load_config"),
            (correlate, "_scores"),
        ):
            monkeypatch.setattr(module, name, None)

    def test_of_speed(self, capsys, tmp_path, file):
        assert "`--output` must be a folder" in refused(capsys, *MEASURE, "--output", file / "x")
        assert "`--output` must be a folder" in refused(capsys, *LAYERS, "--output", file / "x")
        assert "`--trace` " in refused(capsys, *LAYERS, "--trace", file / "x.json")
        (tmp_path / "t.json").mkdir()
        assert "`--trace` must be a file" in refused(capsys, *LAYERS, "--trace", tmp_path / "t.json")
        (tmp_path / "figures").write_text("a file where the figures go")
        page = tmp_path / "page.md"
        page.write_text(
            "<!-- table: scaling -->\n<!-- end: scaling -->\n<!-- table: layers -->\n<!-- end: layers -->\n"
        )
        assert "`--into` must be a folder, got the file" in refused(capsys, *LAYERS, "--into", page)
        assert "figures" in refused(capsys, "benchmark", "--scaling", "--into", page)

    def test_of_predictions_and_exports(self, capsys, tmp_path, models, picture):
        for command, name, argv in (
            ("predict", "taken.csv", [picture]),
            ("export", "taken.onnx", []),
            ("visualize", "taken.png", [picture]),
        ):
            (tmp_path / name).mkdir()
            error = refused(capsys, command, models / "evit", *argv, "--output", tmp_path / name)
            assert "`--output` must be a file, got the folder" in error and "tmp" not in error.split("taken")[1]
        (tmp_path / "taken-keep0.5.onnx").mkdir()
        budgets = [models / "evit", "--output", tmp_path / "taken.onnx", "--keep-rates", "0.2", "0.5"]
        assert "got the folder" in refused(capsys, "export", *budgets)
        assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize("rates", [["0.1000000", "0.10000001"], ["0.2", "0.5", "0.2"]])
    def test_of_two_budgets_in_one_file(self, capsys, models, rates):
        error = refused(capsys, "export", models / "evit", "--keep-rates", *rates)
        assert "must differ in their first six digits" in error and f"model-keep{float(rates[0]):.1f}.onnx" in error

    def test_of_analyses(self, capsys, models, file):
        data = ["--dataset", "synthetic_leaves", "--output", file / "x"]
        for command in ("analyze", "compare", "embed"):
            assert "`--output` must be a folder" in refused(capsys, command, models / "evit", *data)
        seed = [*data[:2], "--output", file.parent / "x", "--seed", 2**32]
        assert f"`--seed` must be at most {2**32 - 1}, got" in refused(capsys, "embed", models / "evit", *seed)
        table = ["--results", "nowhere", "--output", file / "x.csv"]
        assert "`--output` " in refused(capsys, "correlate", "a", *table)
        assert "`--output` must be a folder" in refused(capsys, "results", "runs", "--output", file / "x")
        assert "which is a file" in refused(capsys, "results", "runs", "--output", file / "x.csv")
        assert "`--output` must be a folder" in refused(capsys, "convert", "someone/vit", "--output", file / "x")


class TestAfterTheWork:
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def ends(self, capsys, *argv):
        with pytest.raises(SystemExit) as stop:
            cli.main(list(map(str, argv)))
        assert stop.value.code == 2
        out, error = capsys.readouterr()
        last = error.splitlines()[-1]
        assert "error: could not write" in last and ("No space left" in last or "disk is full" in last)
        return out

    def test_tables_of_a_benchmark(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(benchmark, "write_report", self.full)
        assert "no reduction + CLCA" in self.ends(capsys, *MEASURE, "--output", tmp_path / "x")

    def test_tables_of_a_profile(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(profile, "write_trace", self.full)
        out = self.ends(capsys, *LAYERS, "--output", tmp_path / "x", "--trace", tmp_path / "t.json")
        assert "parameters" in out and "layer 3" in out and f"wrote {tmp_path / 'x' / 'layers.csv'}" in out

    def test_of_a_comparison(self, capsys, tmp_path, models, monkeypatch):
        monkeypatch.setattr("ufgir.cli.compare._write", self.full)
        argv = ["compare", models / "evit", models / "dense", "--dataset", "synthetic_leaves"]
        options = {"image_size": 32, "num_classes": 3, "images_per_class": 5}
        more = ["--dataset-options", json.dumps(options), "--device", "cpu"]
        out = self.ends(capsys, *argv, *more, "--output", tmp_path / "x")
        assert " images\n" in out and "cka" in out and list(tmp_path.iterdir()) == []


class TestMeaning:
    """Options without effect are named in one warning."""

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["profile", "--keep-rate", "0.1"], ["`keep_rate`", "a `reduction`"]),
            (["profile", "--clca", "--keep-tokens", "9", "3", "2"], ["`keep_tokens`", "a `reduction`"]),
            (["profile", "--reduction", "none", "--reduction-layers", "3"], ["`reduction_layers`", "`head`"]),
            ([*MEASURE, "--keep-rates", "0.1"], ["`--keep-rates`", "`--methods`"]),
        ],
    )
    def test_without_a_checkpoint(self, capsys, caplog, argv, words):
        more = [*SHAPE, "--image-size", "32", "--num-hidden-layers", "12"] if argv[0] == "profile" else []
        assert cli.main([*argv, *more]) == 0
        (warning,) = [r.getMessage() for r in caplog.records if words[0] in r.getMessage()]
        assert all(word in warning for word in words)
        capsys.readouterr()

    def test_what_the_configuration_refuses(self, capsys):
        said = refused(capsys, "profile", "--reduction", "none", "--reduction-kwargs", '{"a": 1}')
        assert "`reduction_kwargs`" in said

    def test_of_a_checkpoint(self, capsys, caplog, tmp_path, models, picture):
        for command, *argv in (
            ["profile"],
            ["export"],
            ["predict", picture],
            ["visualize", picture, "--what", "rollout"],
        ):
            for model, reduction in (("dense", []), ("evit", ["--reduction", "none"])):
                output = [] if command == "profile" else ["--output", tmp_path / "x.csv"]
                output = ["--output", tmp_path / "x.onnx"] if command == "export" else output
                output = ["--output", tmp_path / "x.png"] if command == "visualize" else output
                caplog.clear()
                words = [command, models / model, *argv, *reduction, "--keep-rate", "0.1", *output]
                assert cli.main([str(word) for word in words]) == 0
                (warning,) = [r.getMessage() for r in caplog.records if "`keep_rate`" in r.getMessage()]
                assert "a `reduction`" in warning
        capsys.readouterr()

    def test_what_means_something_passes(self, capsys):
        for argv in (
            ["--clca", "--reduction-layers", "3"],
            ["--head", "cla", "--reduction-layers", "3"],
            ["--reduction", "evit", "--reduction-layers", "2", "--keep-rate", "1.0"],
            ["--reduction", "none"],
        ):
            assert cli.main(["profile", *SHAPE, "--image-size", "32", "--num-hidden-layers", "5", *argv]) == 0
        capsys.readouterr()

    def test_something_to_one_of_several(self, capsys, caplog, tmp_path, models, picture):
        grid = ["visualize", models / "evit", picture, "--what", "grid", "--of", "rollout"]
        grid += ["--keep-rates", "0.5", "0.7", "--side", "64", "--output", tmp_path / "x.png"]
        for methods, warnings in ((["none"], 1), (["none", "evit"], 0)):
            caplog.clear()
            assert cli.main([str(word) for word in (*grid, "--methods", *methods)]) == 0
            assert sum("`keep_rate`" in r.getMessage() for r in caplog.records) == warnings
        capsys.readouterr()

    def test_the_cache(self, caplog):
        config = CLCAViTConfig(**TINY)
        warn_fields_without_effect(
            {"cache_gap": True, "keep_rate": None}, [config, CLCAViTConfig(cross_layer_cache=True)]
        )
        assert not caplog.records
        warn_fields_without_effect({"cache_gap": True}, [config])
        assert "`cache_gap`" in caplog.text and "`cross_layer_cache`" in caplog.text


class TestMessages:
    def test_a_model_without_image_processor(self, capsys, models, picture, tmp_path):
        for command, name in (("predict", "x.csv"), ("visualize", "x.png")):
            more = ["--what", "rollout"] if command == "visualize" else []
            error = refused(capsys, command, models / "bare", picture, *more, "--output", tmp_path / name)
            assert f"{models / 'bare'} has no preprocessor_config.json" in error
            assert f"make_image_processor(32).save_pretrained('{models / 'bare'}')" in error

    def test_an_image_processor_that_is_broken(self, capsys, models, picture, tmp_path):
        copy = tmp_path / "copy"
        CLCAViTForImageClassification.from_pretrained(models / "bare").save_pretrained(copy)
        (copy / "preprocessor_config.json").write_text("[")
        error = refused(capsys, "predict", copy, picture, "--output", tmp_path / "x.csv")
        assert f"the preprocessor_config.json of {copy} cannot be read: " in error and len(error) < 400

    def test_shortened(self):
        assert shortened("short  and\n of one line") == "short and of one line"
        assert shortened("One sentence. Another that goes on.", 20) == "One sentence."
        assert shortened("one two three four", 12) == "one two ..."
        assert shortened("ends exactly. Here", 13) == "ends exactly."

    def test_an_interruption_while_a_command_starts(self, capsys, monkeypatch):
        def stop(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(importlib, "import_module", stop)
        assert cli.main(["profile"]) == 130
        assert capsys.readouterr().out == "interrupted\n"
