"""`ufgir analyze`, `compare`, `correlate` and `embed`: their files, and one-sentence errors."""

import itertools
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.analysis.helpers import CLASSES, PROCESSOR, REDUCED, float_model, picture, rows_of, shards
from tests.helpers import TINY
from ufgir.analysis.dataset_pass import RECORD, analyze
from ufgir.analysis.embedding import embed
from ufgir.cli.entry import main
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.interpret import patterns, saliency
from ufgir.transforms.preprocessing import EvalTransform
from ufgir.utils.extras import install_command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Save two models and one without reduction and CLS, with image processors, and a folder of images."""
    folder = tmp_path_factory.mktemp("models")
    settings = {"a": {}, "b": {"keep_rate": 0.25}, "plain": {"reduction": None, "keep_rate": 1.0}}
    settings["no_cls"] = {"use_class_token": False, "pooling": "mean", "num_clr_tokens": 0, "head": "linear"}
    for name, changes in settings.items():
        torch.manual_seed(0)
        names = {"id2label": dict(enumerate(CLASSES)), "label2id": {c: i for i, c in enumerate(CLASSES)}}
        config = CLCAViTConfig(**({k: v for k, v in TINY.items() if k != "num_labels"} | REDUCED | changes | names))
        CLCAViTForImageClassification(config).save_pretrained(folder / name)
        PROCESSOR.save_pretrained(folder / name)
    for i in range(21):
        place = folder / "leaves" / "test" / CLASSES[i % 7]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    return folder


# On the command line


def test_analyze_command(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ufgir", "analyze", "a model"])
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--output"]
    assert main([*arguments, str(tmp_path / "out"), "--features", "4", "--assignments", "--batch-size", "8"]) == 0
    assert "21 images" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["models"][0]["reduction"] == "evit"
    assert (record["data"]["split"], record["data"]["images"]) == ("test", 21)
    assert record["command"] == "ufgir analyze 'a model'"
    assert {"date", "host", "versions"} <= set(record)
    rows = shards(tmp_path / "out")
    assert sorted(Path(row["file"]).name for row in rows) == sorted(f"{i}.png" for i in range(21))
    assert {row["label"] for row in rows} == set(range(7))
    for name in ("depth.png", "kept.png"):
        assert Image.open(tmp_path / "out" / name).width > 300
    (checkpoints / "leaves" / "test" / "ash" / "zz.png").write_text("not a picture")
    try:
        assert main([*arguments, str(tmp_path / "broken"), "--skip-broken"]) == 1
        assert "zz.png" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            main([*arguments, str(tmp_path / "stops")])
        assert "`--skip-broken`" in capsys.readouterr().err
    finally:
        (checkpoints / "leaves" / "test" / "ash" / "zz.png").unlink()


def test_streaming_and_stopping_on_the_command_line(checkpoints, tmp_path, capsys, monkeypatch):
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--batch-size", "4"]
    arguments += ["--shard-size", "4", "--output"]
    assert main([*arguments, str(tmp_path / "whole"), "--max-images", "10", "--streaming"]) == 0
    assert [row["index"] for row in shards(tmp_path / "whole")] == [*range(10)]
    real, count = EvalTransform.__call__, itertools.count()

    def stop(self, image, generator=None):
        if next(count) == 9:
            raise KeyboardInterrupt
        return real(self, image, generator)

    with monkeypatch.context() as patch:
        patch.setattr(EvalTransform, "__call__", stop)
        assert main([*arguments, str(tmp_path / "out")]) == 130
    assert "run the same command again" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "21 images, 8 of them" in capsys.readouterr().out


def test_compare_and_correlate_commands(checkpoints, tmp_path, capsys):
    models, leaves = [str(checkpoints / "a"), str(checkpoints / "b")], ["--dataset", str(checkpoints / "leaves")]
    what = ["--what", "cka", "cka-plain", "pwcca", "norms", "patterns", "--layers", "1", "4"]
    assert main(["compare", *models, *leaves, *what, "--batch-size", "8", "--output", str(tmp_path / "0")]) == 0
    record = json.loads((tmp_path / "0" / "comparison.json").read_text())
    assert record["names"] == ["a", "b"]
    assert record["scalars"]["cka-plain_layer_4"] == pytest.approx(record["matrices"]["cka-plain"][1][1])
    assert [(r["layer_a"], r["layer_b"]) for r in rows_of(tmp_path / "0" / "pwcca.csv")] == [
        ("1", "1"),
        ("1", "4"),
        ("4", "1"),
        ("4", "4"),
    ]
    assert len(rows_of(tmp_path / "0" / "patterns.csv")) == 2
    assert len(rows_of(tmp_path / "0" / "maps.csv")) == 32
    for name in ("cka", "pwcca", "norms", "depth"):
        assert (tmp_path / "0" / f"{name}.png").exists()
    for i, (a, b) in enumerate((("a", "plain"), ("b", "plain")), start=1):  # as if they had been compared
        (tmp_path / str(i)).mkdir()
        other = {"models": [{"name": str(checkpoints / name)} for name in (a, b)], "scalars": {"cka-plain_mean": -i}}
        (tmp_path / str(i) / "comparison.json").write_text(json.dumps(other))
    results = tmp_path / "results.csv"
    lines = [f"{checkpoints / name},{top1}" for name, top1 in (("a", 0.9), ("b", 0.85), ("plain", 0.5))]
    results.write_text("\n".join(["run,test_top1", *lines]))
    capsys.readouterr()
    folders = [str(tmp_path / str(i)) for i in range(3)]
    assert main(["correlate", *folders, "--results", str(results), "--output", str(tmp_path / "gaps.csv")]) == 0
    assert "test_top1" in capsys.readouterr().out
    found = {row["measure"]: row for row in rows_of(tmp_path / "gaps.csv")}
    assert found["cka-plain_mean"]["pairs"] == "3"
    assert float(found["cka-plain_mean"]["spearman"]) == pytest.approx(-0.5)  # gaps 0.05, 0.4, 0.35
    told = json.loads((tmp_path / "gaps.json").read_text())["pairs"]
    assert [pair["gap"] for pair in told] == pytest.approx([0.05, 0.4, 0.35])


def test_embed_command(checkpoints, tmp_path, capsys, caplog):
    arguments = [
        str(checkpoints / "a"),
        "--dataset",
        str(checkpoints / "leaves"),
        "--features",
        "cla",
        "--thumbnails",
        "4",
    ]
    assert main(["embed", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert "21 images, 32 features" in capsys.readouterr().out
    for method in ("tsne", "pca"):
        rows = rows_of(tmp_path / "out" / f"{method}.csv")
        assert [int(row["index"]) for row in rows] == [*range(21)]
        assert rows[0]["label"] in CLASSES
        assert Image.open(tmp_path / "out" / f"{method}.png").width > 600
    assert not caplog.records


def test_a_layer_has_no_effect_on_features_of_another_kind(checkpoints, tmp_path, capsys, caplog):
    arguments = [str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--features", "pooled"]
    assert main(["embed", *arguments, "--layer", "99", "--method", "pca", "--output", str(tmp_path / "out")]) == 0
    assert "`--layer`" in caplog.text and "`--features`" in caplog.text
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "plain", "--assignments"], "plain reduces no tokens"),
        (["analyze", "no_cls", "--features", "1"], "no_cls has no CLS token"),
        (["analyze", "a", "--split", "train"], "has no train images; it has test"),
        (["analyze", "a", "--max-images", "0"], "`--max-images` must be at least 1, got 0"),
        (["analyze", "a", "--streaming", "--skip-broken"], "`--streaming`"),
        (["analyze", "a", "--device", "cuda:99"], "`--device` cuda:99"),
        (["analyze", "a", "--dataset-options", '{"shotz": 1}'], "Unknown argument `shotz`"),
        (["compare", "a", "--what", "patterns"], "`what` patterns needs two models"),
        (["compare", "a", "plain", "--what", "patterns"], "the second model reduces no tokens"),
        (["compare", "a", "a", "--changes-b", '{"image_size": 64}', "--what", "patterns"], "grids of 4 x 4 and 8 x 8"),
        (["compare", "a", "no_cls"], "no_cls has no CLS token"),
        (["compare", "a", "--what", "svcca"], "cka, cka-plain, pwcca"),
        (["compare", "a", "b", "--what", "cca", "--features", "tokens"], "`what` cca"),
        (["compare", "a", "b", "--layers", "7"], "got 7"),
        (["compare", "a", "--layers-b", "1"], "MODEL_B"),
        (["compare", "a", "b", "--layers-b", "7"], "`--layers-b` must name at least one layer of 0 .. 4, got 7"),
        (["compare", "a", "b", "--layers", "7"], "`--layers` must name at least one layer of 0 .. 4, got 7"),
        (
            ["compare", "a", "a", "--changes-b", '{"keep_rates": [0.25]}'],
            "no field `keep_rates`. Did you mean `keep_rate`?",
        ),
        (["compare", "a", "--changes-a", '{"xyzzy": 1}'], "`--changes-a`: a configuration has no field `xyzzy`"),
        (["compare", "a", "a", "--changes-b", "[]"], "must be a JSON object, got []"),
        (["analyze", "a", "--dataset-options", "[]"], "must be a JSON object, got []"),
        (["analyze", "a", "--features", "99"], "`--features` must name at least one layer of 0 .. 4, got 99"),
        (["embed", "a", "--layer", "99"], "`--layer` must name at least one layer of 0 .. 4, got 99"),
        (["compare", "a", "b", "--what", "cca", "--max-images", "9"], "16 channels need more than 17 images"),
        (["compare", "a", "--max-images", "3"], "at least 4 images"),
        (["compare", "nowhere"], "there is no checkpoint"),
        (["embed", "no_cls"], "no_cls has no CLS token"),
        (["embed", "no_cls", "--features", "cla"], "aggregates no CLS tokens"),
        (["embed", "a", "--max-images", "3"], "at least 4 images"),
    ],
)
def test_mistakes_get_one_sentence(checkpoints, tmp_path, capsys, monkeypatch, arguments, words):
    read = []
    monkeypatch.setattr(EvalTransform, "__call__", lambda *image: read.append(image))
    models = ("a", "b", "plain", "no_cls", "nowhere")
    arguments = [str(checkpoints / a) if a in models else a for a in arguments]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--dataset", str(checkpoints / "leaves"), "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert read == []  # it is said before any image is looked at
    assert words in told
    assert not (tmp_path / "out").exists()


def test_other_data_are_never_taken_for_those_of_a_finished_analysis(checkpoints, raw, dataset, tmp_path, capsys):
    drawn = {"num_classes": 7, "images_per_class": [1, 0, 1], "image_size": 32}
    arguments = ["analyze", str(checkpoints / "a"), "--dataset", "synthetic_leaves", "--output", str(tmp_path / "out")]
    # models of a folder of leaves know other classes than drawn ones
    config = json.loads((checkpoints / "a" / "config.json").read_text())
    config["id2label"] = {str(i): f"cultivar_{i:02d}" for i in range(7)}
    config["label2id"] = {name: int(i) for i, name in config["id2label"].items()}
    arguments[1] = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    for file in (checkpoints / "a").iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main([*arguments, "--dataset-options", json.dumps(drawn)]) == 0
    assert main([*arguments, "--dataset-options", json.dumps(drawn)]) == 0
    assert "7 of them" in capsys.readouterr().out
    for other in ({"difficulty": "hard"}, {"seed": 1}):
        with pytest.raises(SystemExit):
            main([*arguments, "--dataset-options", json.dumps(drawn | other)])
        assert "another model, other images or with other options" in capsys.readouterr().err

    def stream(rows):
        return StreamedImages(
            to_stream(datasets.DatasetDict(test=rows))["test"], EvalTransform(PROCESSOR), batch_size=5
        )

    analyze(float_model(), stream(raw), tmp_path / "stream", batch_size=5, data={"seed": 0})
    with pytest.raises(ValueError, match="another model, other images"):
        analyze(float_model(), stream(raw.select(range(9))), tmp_path / "stream", batch_size=5, data={"seed": 1})


def test_only_what_a_command_wrote_is_replaced(checkpoints, tmp_path, capsys):
    leaves, out = ["--dataset", str(checkpoints / "leaves")], tmp_path / "out"
    for command, options in (("compare", ["--what", "cka-plain"]), ("embed", ["--method", "pca"])):
        arguments = [command, str(checkpoints / "a"), *leaves, *options, "--output", str(out / command)]
        assert main(arguments) == 0
        written = {path.name for path in (out / command).iterdir()}
        assert main(arguments) == 0  # its own result is replaced
        assert {path.name for path in (out / command).iterdir()} == written
        for other in ("notes.md", "sub"):
            (out / command / other).mkdir() if other == "sub" else (out / command / other).write_text("mine")
            with pytest.raises(SystemExit):
                main(arguments)
            assert f"contains other files, such as {other}" in capsys.readouterr().err
            assert (out / command / other).exists()
            (out / command / other).rmdir() if other == "sub" else (out / command / other).unlink()


@pytest.mark.parametrize("command", ["compare", "embed"])
def test_ctrl_c_is_no_traceback(checkpoints, tmp_path, capsys, monkeypatch, command):
    def stop(self, image, generator=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(EvalTransform, "__call__", stop)
    arguments = [str(checkpoints / "a"), "--dataset", str(checkpoints / "leaves"), "--output", str(tmp_path / "out")]
    assert main([command, *arguments]) == 130
    assert capsys.readouterr().out == "interrupted\n" and list(tmp_path.iterdir()) == []


def test_models_that_were_changed_are_no_runs(checkpoints, tmp_path, capsys):
    models, out = [str(checkpoints / "a")] * 2, str(tmp_path / "pair")
    changes = ["--changes-b", '{"keep_rate": [0.25]}']
    leaves = ["--dataset", str(checkpoints / "leaves")]
    assert main(["compare", *models, *changes, *leaves, "--what", "patterns", "--output", out]) == 0
    record = json.loads((tmp_path / "pair" / "comparison.json").read_text())
    assert [model["changes"] for model in record["models"]] == [{}, {"keep_rate": [0.25]}]
    assert record["names"] == ["a", "a, keep rate 0.25"]
    (tmp_path / "results.csv").write_text(f"run,test_top1\n{checkpoints / 'a'},0.5\n")
    with pytest.raises(SystemExit):
        main(["correlate", out, "--results", str(tmp_path / "results.csv")])
    assert "keep_rate [0.25]" in capsys.readouterr().err


def test_a_run_may_be_called_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, pair in enumerate((("1", "2"), ("1", "3"), ("2", "3"))):
        Path(f"c{i}").mkdir()
        record = {"models": [{"name": name} for name in pair], "scalars": {"cka_mean": 0.1 * i}}
        Path(f"c{i}", "comparison.json").write_text(json.dumps(record))
    Path("results.csv").write_text("run,test_top1\n1,0.9\n2,0.5\n3,0.2\n")
    assert main(["correlate", "c0", "c1", "c2", "--results", "results.csv", "--output", "gaps.csv"]) == 0
    gaps = [pair["gap"] for pair in json.loads(Path("gaps.json").read_text())["pairs"]]
    assert gaps == pytest.approx([0.4, 0.7, 0.3])


def test_correlate_refuses_what_it_cannot_join(checkpoints, tmp_path, capsys):
    (tmp_path / "pair").mkdir()
    record = {"models": [{"name": "x"}, {"name": "y"}], "scalars": {"cka_mean": 0.5}}
    (tmp_path / "pair" / "comparison.json").write_text(json.dumps(record))
    (tmp_path / "results.csv").write_text("run,test_top1\nx,0.5\n")
    (tmp_path / "empty").mkdir()
    for folder, results, words in (
        ("pair", "results.csv", "compares y, which is not among the runs"),
        ("empty", "results.csv", "comparison.json"),
        ("pair", "nowhere.csv", "nowhere.csv"),
    ):
        with pytest.raises(SystemExit):
            main(["correlate", str(tmp_path / folder), "--results", str(tmp_path / results)])
        assert words in capsys.readouterr().err


def test_packages_that_are_not_there_are_named_with_the_extra(monkeypatch, checkpoints, tmp_path, capsys):
    for name in ("sklearn", "sklearn.metrics", "sklearn.decomposition", "scipy", "scipy.stats", "ot"):
        monkeypatch.setitem(sys.modules, name, None)
    square = np.eye(3) + 1
    calls = (
        lambda: saliency.earth_movers_distance(square, square),
        lambda: saliency.spearman_correlation(square, square),
        lambda: patterns.cluster_agreement(np.arange(4), np.arange(4)),
        lambda: patterns.gap_correlation([1, 2, 3], [1, 2, 3]),
        lambda: embed(np.ones((9, 5))),
    )
    for call in calls:
        with pytest.raises(ImportError, match=re.escape(install_command("analysis"))):
            call()
    with pytest.raises(SystemExit):  # before any model is loaded
        main(["embed", "nowhere", "--dataset", "nowhere", "--output", str(tmp_path / "out")])
    assert "sklearn must be installed" in capsys.readouterr().err
