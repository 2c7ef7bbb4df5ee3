"""Methods off the shelf: agreement with a trained ViT. Times are only checked for existence."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from clca import REDUCTIONS, CLCAViTForImageClassification
from ufgir.cli import benchmark as command
from ufgir.cli import entry as cli
from ufgir.cli.common import classes_of
from ufgir.profiling.agreement import Agreement, Answers, agreement, answers, cases_at_cost, nearest, places
from ufgir.profiling.benchmark import NO_CLASSIFIER, Benchmark, Report, Result
from ufgir.profiling.benchmark_cases import Case, Setting, case_config
from ufgir.profiling.benchmark_report import cost_panels, cost_tables, csv_rows, draw, setting_table
from ufgir.profiling.macs import count_macs
from ufgir.profiling.targets import bounded
from ufgir.transforms.preprocessing import make_image_processor


SHAPE = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 32, "num_labels": 3, "initializer_range": 0.3}
AT = Setting(32, 2)
TARGET = 0.0007  # GMACs; dense it is about 0.001
QUICK = ["--repetitions", "1", "--threads", "1", "--batch-sizes", "1", "--dense-backends", "none"]


@pytest.fixture(scope="module")
def stock():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, stock):
    """Save a stock ViT with a classifier, the same without, and images."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, model in (("whole", stock), ("bare", stock.vit)):
        model.save_pretrained(folder / name)
        make_image_processor(32).save_pretrained(folder / name)
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / "images" / f"{index}.png")
    return folder


def pictures(size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 3, size, size, generator=generator) for _ in range(2)]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["benchmark", *argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_agreement_by_hand():
    """The nearest of the first two images is the third for the dense model; for ours the first two are each other's."""
    dense = Answers(
        torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.1]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    )
    ours = Answers(
        torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    )
    assert nearest(dense.features).tolist() == [2, 2, 1] and nearest(ours.features).tolist() == [1, 0, 0]
    found = agreement(ours, dense, has_classes=True)
    assert found.top1 == pytest.approx(1 / 3) and found.neighbor == 0
    assert found.cosine == pytest.approx((1 + 0 + 1.1 / (1 + 1.1**2) ** 0.5) / 3)
    assert agreement(ours, dense, has_classes=False).top1 is None
    assert agreement(dense, dense, has_classes=True) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_nearest_ignores_length(scale):
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.linspace(1, scale, 9).unsqueeze(1)
    assert torch.equal(nearest(features), nearest(scaled))


def test_two_images_have_no_choice_of_a_neighbor():
    two = Answers(torch.eye(2), torch.eye(2))
    assert agreement(two, two, has_classes=True).neighbor is None


def test_it_is_that_of_the_checkpoint_with_the_method(folders, stock):
    """The numbers of the benchmark are those of `from_pretrained` compared with the stock model; at keep rate 1 they agree completely."""
    base = CLCAViTForImageClassification.from_pretrained(folders / "whole").config
    layers = (1, 2, 3)
    cases = [Case(AT, "evit", "base", rate, layers=layers) for rate in (0.4, 1.0)]
    benchmark = Benchmark(base, torch.device("cpu"), str(folders / "whole"), 1, 1, images=pictures)
    report = benchmark.run(cases)
    assert [r.error for r in report.results] == [None] * 3 and report.results[0].agreement is None
    options = {"reduction": "evit", "reduction_layers": list(layers), "keep_rate": 0.4}
    model = CLCAViTForImageClassification.from_pretrained(folders / "whole", **options).eval()
    read = answers(model, pictures(32))
    for batch, features in zip(pictures(32), read.features.split(3), strict=True):
        assert torch.allclose(features, model.vit(batch).pooler_output, atol=1e-5)
    expected = agreement(answers(model, pictures(32)), answers(stock, pictures(32)), has_classes=True)
    assert report.results[1].agreement.top1 == expected.top1
    assert report.results[1].agreement.neighbor == expected.neighbor
    assert report.results[1].agreement.cosine == pytest.approx(expected.cosine, abs=1e-5)
    assert expected.cosine < 0.9999
    assert report.results[2].agreement.top1 == 1 and report.results[2].agreement.cosine == pytest.approx(1, abs=1e-5)
    rows = csv_rows(report)
    assert (
        rows[1]["same_top1"] == expected.top1 and rows[1]["reduction_layers"] == "1 2 3" and rows[0]["cosine"] is None
    )
    assert rows[1]["same_neighbor"] == expected.neighbor and rows[1]["accuracy"] is None
    assert {"same top-1", "same neighbor", "cosine"} <= set(setting_table(report.results)[0])


def test_accuracy_is_that_of_the_labels(folders, stock):
    """The labels are the dense model's own classes except for one."""
    base = CLCAViTForImageClassification.from_pretrained(folders / "whole").config
    labels = answers(stock, pictures(32)).logits.argmax(dim=1).tolist()
    labels[0] = (labels[0] + 1) % 3
    case = Case(AT, "topk", "base", 0.3, layers=(1, 2, 3))
    benchmark = Benchmark(base, torch.device("cpu"), str(folders / "whole"), 1, 0, images=pictures, labels=labels)
    dense, reduced = benchmark.run([case]).results
    assert dense.accuracy == pytest.approx(5 / 6)
    options = {"reduction": "topk", "reduction_layers": [1, 2, 3], "keep_rate": 0.3}
    model = CLCAViTForImageClassification.from_pretrained(folders / "whole", **options).eval()
    classes = answers(model, pictures(32)).logits.argmax(dim=1).tolist()
    assert reduced.accuracy == pytest.approx(np.mean(np.equal(classes, labels)))
    assert reduced.macs < dense.macs and reduced.peak_memory is None and reduced.seconds == []


def test_classes_of_folders(tmp_path, monkeypatch):
    label2id = {"ash": 0, "oak": 1}
    assert classes_of(["a/oak/1.png", "b/ash/2.png", "b/oak/3.png"], label2id) == [1, 0, 1]
    assert classes_of(["a/oak/1.png", "2.png"], label2id) is None
    (tmp_path / "oak").mkdir()
    monkeypatch.chdir(tmp_path / "oak")
    assert classes_of(["2.png"], label2id) == [1]


def test_cases_cost_the_same(folders):
    config = CLCAViTForImageClassification.from_pretrained(folders / "whole").config
    assert places(config) == [[1, 2, 3], [0, 1, 2, 3]]
    methods = {"evit": {}, "dpcknn": {"equal_weight": True}, "heuristic": {}}
    cases, notes = cases_at_cost(config, methods, places(config), [TARGET], [AT, AT._replace(batch_size=1)])
    assert len(cases) == 2 * 2 * 2 and len(notes) == 2 and all(note.startswith("heuristic in") for note in notes)
    assert {case.target_gmacs for case in cases} == {TARGET}
    _, (note,) = cases_at_cost(config, {"heuristic": {}}, places(config)[:1], [TARGET, 0.1], [AT])
    assert note.startswith(f"heuristic in 3 layers is left out at {TARGET:g}, 0.1 GMACs: ")
    for case in cases:
        made = case_config(config, case)
        assert made.reduction_layers == list(case.layers)
        model = CLCAViTForImageClassification(bounded(made))
        assert 0.9 * TARGET < count_macs(model) / 1e9 <= TARGET
        assert ".score" not in " ".join(name for name, _ in model.named_parameters())
    assert "dpcknn in 4 layers, 0." in str(cases[-1])


class TestCommand:
    def test_training_free_at_one_cost(self, capsys, folders, tmp_path, monkeypatch):
        few = ("ats", "dpcknn", "dyvit", "heuristic", "sit", "tome")
        monkeypatch.setattr(command, "REDUCTIONS", {name: REDUCTIONS[name] for name in few})
        argv = ["benchmark", str(folders / "whole"), "--methods", "training-free", "--target_gmacs", str(TARGET)]
        argv += ["--images", str(folders / "images"), "--output", str(tmp_path), *QUICK]
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert "to be trained: dyvit, sit." in out and "heuristic in 3 layers is left out" in out
        rows = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
        methods = {row["method"] for row in rows}
        assert methods == {"dense", "ats", "dpcknn", "tome"}
        assert {row["reduction_layers"] for row in rows[1:] if row["method"] == "tome"} == {"1 2 3", "0 1 2 3"}
        reduced = [row for row in rows if row["method"] != "dense"]
        assert all(0 <= float(row["same_top1"]) <= 1 and float(row["cosine"]) <= 1.0001 for row in reduced)
        record = json.loads((tmp_path / "benchmark.json").read_text())
        assert record["network"]["target_gmacs"] == [TARGET] and record["notes"]
        assert (tmp_path / "benchmark_agreement.png").is_file()

    def test_several_costs_without_timing(self, capsys, folders, tmp_path):
        """A table of methods and costs for each measure, and a figure over the cost; the images lie in a folder of their class."""
        place = tmp_path / "LABEL_1"
        place.mkdir()
        for file in (folders / "images").iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        argv = [str(folders / "whole"), "--methods", "topk", "--target-gmacs", "0.0009", "0.0006", "0.0009"]
        argv += ["--images", str(place), "--reduction-layers", "all", "--output", str(tmp_path / "out")]
        assert cli.main(["benchmark", *argv, "--repetitions", "0", "--threads", "1"]) == 0
        out = capsys.readouterr().out
        assert "same neighbor, reduced in 4 layers" in out and "0.0006 GMACs (" in out and "top-1" in out
        assert "images/s" not in out and "activations" not in out and "The machine was busy" not in out
        rows = list(csv.DictReader((tmp_path / "out" / "benchmark.csv").open()))
        assert [row["target_gmacs"] for row in rows] == ["", "0.0009", "0.0006"]
        assert all(row["accuracy"] and not row["seconds_median"] and not row["peak_memory"] for row in rows)
        assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"benchmark_agreement.png"}
        assert "Time was not measured" in (tmp_path / "out" / "benchmark.md").read_text()

    def test_without_a_classifier_features_are_compared(self, capsys, folders):
        argv = ["benchmark", str(folders / "bare"), "--methods", "evit", "--keep-rates", "0.5", "--count", "4"]
        assert cli.main([*argv, "--images", str(folders / "images"), *QUICK]) == 0
        out = capsys.readouterr().out
        assert NO_CLASSIFIER in out and "same top-1" not in out and "cosine" in out

    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            ("--images IMAGES", "`--images` needs a MODEL"),
            ("WHOLE --images IMAGES --methods sit", "sit would bring parameters"),
            ("WHOLE --target-gmacs 1 --keep-rates 0.5", "`--keep-rates` contradicts it"),
            ("WHOLE --target-gmacs 1 0", "`--target-gmacs` must be above 0"),
            ("WHOLE --images IMAGES --repetitions -1", "`--repetitions` must be at least 0"),
            ("WHOLE --methods evit --target-gmacs 5", "no method is left to compare"),
            ("WHOLE --images IMAGES --variants CLCA", "`--variants` but base are trained"),
            ("WHOLE --methods training-free evit", "give it alone"),
            ("--quick --target-gmacs 1", "goes with a table of combinations"),
            ("--scaling --images IMAGES", "goes with a table of combinations"),
            ("WHOLE --images NOWHERE", "do not exist"),
        ],
    )
    def test_contradictions(self, capsys, folders, argv, words):
        named = {"WHOLE": str(folders / "whole"), "IMAGES": str(folders / "images"), "NOWHERE": str(folders / "no")}
        assert words in refused(capsys, *(named.get(word, word) for word in argv.split()))


def test_the_figure(tmp_path, folders):
    """It has a marker per model, and a line for the dense one."""
    base = CLCAViTForImageClassification.from_pretrained(folders / "whole").config
    cases = [Case(AT, "topk", "base", 0.5, layers=layers) for layers in ((1, 2, 3), (0, 1, 2, 3))]
    report = Benchmark(base, torch.device("cpu"), str(folders / "whole"), 1, 1, images=pictures).run(cases)
    assert tmp_path / "x_agreement.png" in draw(report, tmp_path, "x")


def test_tables_of_costs():
    """A cell for each method and cost; a dash where a method is left out."""
    dense = Result(AT, None, "dense", macs=10**9)
    report = Report([dense], repetitions=0)
    for method, cost, cosine in (("topk", 0.9, 0.99), ("topk", 0.5, 0.6), ("evit", 0.9, 0.8)):
        case = Case(AT, method, "base", 0.7, layers=(1, 2, 3), target_gmacs=cost)
        agreed = Agreement(cosine, 0.5, None)
        report.results.append(Result(AT, case, str(case), dense, macs=int(cost * 10**9), agreement=agreed))
    ((_, results),) = cost_panels(report).items()
    found = dict(cost_tables(results))
    assert list(found) == ["cosine, reduced in 3 layers", "same neighbor, reduced in 3 layers"]
    assert found["cosine, reduced in 3 layers"] == [
        ["method", "0.9 GMACs (90%)", "0.5 GMACs (50%)"],
        ["topk", "0.9900", "0.6000"],
        ["evit", "0.8000", "-"],
    ]
    assert cost_panels(Report([dense, report.results[1], report.results[3]])) == {}  # one cost
