"""Prediction files: lines and metrics, one batch at a time, streams, and errors."""

import itertools
import json
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.evaluation.helpers import NAMES, PROCESSOR, Pixels, Stopped, labels, rows_of
from ufgir.data.load import load_images
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.data.transformed import TransformedImages
from ufgir.evaluation.metrics import compute_metrics, compute_multilabel_metrics
from ufgir.evaluation.prediction import file_names, predict_to_file, read_predictions
from ufgir.transforms.preprocessing import EvalTransform


def logits_of(model: nn.Module, dataset: Pixels) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])).logits


# Lines


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_lines(model: nn.Module, tmp_path: Path, batch_size: int) -> None:
    data = Pixels(11, labels(11))
    files = [None if i == 3 else f"leaf, {i}.png" for i in range(11)]
    result = predict_to_file(model, data, tmp_path / "p.csv", NAMES, files=files, batch_size=batch_size)
    assert (result.images, result.predicted, result.broken) == (11, 11, [])
    probabilities = logits_of(model, data).double().softmax(dim=1)
    values, classes = probabilities.topk(5)
    rows = rows_of(result.path)
    for i, row in enumerate(rows):
        assert (row["index"], row["file"], row["label"]) == (str(i), files[i] or "", NAMES[data.labels[i]])
        assert row["prediction"] == row["class_1"]
        assert [row[f"class_{k}"] for k in range(1, 6)] == [NAMES[k] for k in classes[i]]
        said = [float(row[f"probability_{k}"]) for k in range(1, 6)]
        assert said == pytest.approx(values[i].tolist(), abs=1e-6) and "class_6" not in row
    assert len(rows) == 11
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]


def test_json_lines_have_the_same_content(model: nn.Module, tmp_path: Path) -> None:
    data = Pixels(5, labels(5))
    for name in ("p.csv", "p.jsonl"):
        predict_to_file(model, data, tmp_path / name, NAMES, top=3)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    for line, row in zip(lines, rows_of(tmp_path / "p.csv"), strict=True):
        assert (str(line["index"]), line["file"], line["label"]) == (row["index"], row["file"], row["label"])
        guesses = {"class_1": line["prediction"]}
        for k, guess in enumerate(line["top"], start=1):
            guesses |= {f"class_{k}": guess["class"], f"probability_{k}": str(guess["probability"])}
        assert guesses.items() <= row.items() and len(line["top"]) == 3
    assert read_predictions(tmp_path / "p.jsonl", [1, 3]) == {1: lines[1], 3: lines[3]}
    assert read_predictions(tmp_path / "p.csv", [4])[4]["prediction"] == lines[4]["prediction"]


def test_images_without_labels(model: nn.Module, tmp_path: Path) -> None:
    result = predict_to_file(model, Pixels(3), tmp_path / "p.csv", NAMES)
    assert result.metrics == {} and [row["label"] for row in rows_of(result.path)] == ["", "", ""]
    predict_to_file(model, Pixels(3), tmp_path / "p.jsonl", NAMES)
    assert json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])["label"] is None
    some = predict_to_file(model, Pixels(4, [2, -1, -1, 3]), tmp_path / "p.csv", NAMES)  # -1: unknown
    assert [row["label"] for row in rows_of(some.path)] == ["cedar", "", "", "date palm"]
    logits = logits_of(model, Pixels(4))[[0, 3]].numpy()
    assert some.metrics["top1"] == compute_metrics((logits, np.array([2, 3])))["top1"]


def test_the_model_is_not_changed(model: nn.Module, tmp_path: Path) -> None:
    for training in (True, False):
        predict_to_file(model.train(training), Pixels(2), tmp_path / "p.csv", NAMES)
        assert model.training is training


# Metrics


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_metrics(model: nn.Module, tmp_path: Path, batch_size: int) -> None:
    data = Pixels(23, labels(23))
    result = predict_to_file(model, data, tmp_path / "p.csv", NAMES, batch_size=batch_size)
    logits = logits_of(model, data)
    expected = compute_metrics((logits.numpy(), np.array(data.labels)))
    assert set(result.metrics) == {*expected, "loss"} == {"top1", "top5", "macro_f1", "loss"}
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert result.metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, torch.tensor(data.labels)).item(), abs=1e-6
    )


class Scripted(nn.Module):
    """Model that returns the given logits in order."""

    def __init__(self, logits: torch.Tensor, **config: Any) -> None:
        super().__init__()
        config = {"problem_type": None, "multi_label_loss": "bce"} | config
        self.config = SimpleNamespace(**config, to_dict=dict)
        self.logits, self.device = iter(logits), torch.device("cpu")

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack(list(itertools.islice(self.logits, len(pixel_values)))))


def test_metrics_of_equal_scores_and_nan(tmp_path: Path) -> None:
    """As in `ufgir.evaluation.metrics`: ties go to the lower class, NaN is never among the highest."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (40, len(NAMES)), generator=generator).float()
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = math.nan
    logits[7] = math.nan
    result = predict_to_file(Scripted(logits), Pixels(40, labels(40)), tmp_path / "p.csv", NAMES, batch_size=8)
    expected = compute_metrics((logits.numpy(), np.array(labels(40))))
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert result.images == 40


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_several_classes_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    from clca.loss_clca import classification_loss

    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(30, len(NAMES), generator=generator) < 0.3).float()
    targets[:, 2] = 0  # a class that no image has
    logits = torch.randn(30, len(NAMES), generator=generator).mul(4).round().div(4)  # some are equal
    config = {"problem_type": "multi_label_classification", "multi_label_loss": loss}
    monkeypatch.setattr("ufgir.evaluation.prediction_files.COLUMNS", 60)  # two classes at a time
    model = Scripted(logits, **config)
    result = predict_to_file(model, Pixels(30, targets), tmp_path / "p.csv", NAMES, batch_size=8)
    expected = compute_multilabel_metrics((logits.numpy(), targets.numpy()))
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    each = [classification_loss(logits[i : i + 1], targets[i : i + 1], model.config) for i in range(30)]
    assert result.metrics["loss"] == pytest.approx(torch.stack(each).mean().item(), rel=1e-6)

    for i, row in enumerate(rows_of(result.path)):
        assert row["label"] == ";".join(NAMES[k] for k in targets[i].nonzero())
        assert row["prediction"] == ";".join(NAMES[k] for k in (logits[i] > 0).nonzero())
        assert float(row["probability_1"]) == pytest.approx(logits[i].max().sigmoid().item(), abs=1e-6)
    predict_to_file(Scripted(logits, **config), Pixels(30, targets), tmp_path / "p.jsonl", NAMES)
    line = json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert line["label"] == [NAMES[k] for k in targets[0].nonzero()] and isinstance(line["prediction"], list)
    without = predict_to_file(Scripted(logits, **config), Pixels(30), tmp_path / "p.csv", NAMES)
    assert without.metrics == {} and rows_of(without.path)[0]["label"] == ""


# Memory


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Three times as many images need at most a few kilobytes more; results are kept on the disk only."""

    class Blank(Pixels):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": torch.zeros(1), "labels": index % 7}

    def peak(count: int) -> int:
        logits = (torch.full((7,), float(i % 3)) for i in itertools.count())
        tracemalloc.start()
        predict_to_file(Scripted(logits), Blank(count), tmp_path / "p.csv", NAMES, batch_size=50, files=str)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(100)  # lazy imports
    few, many = peak(1500), peak(4500)  # of more than 1000 images, 1000 names are compared
    assert many < few + 50_000  # 3000 lines are 300 kB
    assert len(rows_of(tmp_path / "p.csv")) == 4500


@pytest.fixture(scope="module")
def dataset(leaves: Path) -> datasets.Dataset:
    files = sorted(map(str, leaves.rglob("*.png")))
    features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": files, "label": labels(13)}, features=features)


def test_file_names(dataset: datasets.Dataset, leaves: Path) -> None:
    name = file_names(dataset)
    assert [name(i) for i in range(13)] == sorted(map(str, leaves.rglob("*.png")))


def test_streams(model: nn.Module, dataset: datasets.Dataset, tmp_path: Path) -> None:
    images = TransformedImages(dataset, EvalTransform(PROCESSOR))
    expected = predict_to_file(model, images, tmp_path / "p.csv", NAMES, batch_size=4, num_workers=2)

    def stream(transform: Any = None) -> StreamedImages:
        rows = to_stream(datasets.DatasetDict({"test": dataset}))["test"]
        return StreamedImages(rows, transform or EvalTransform(PROCESSOR), batch_size=4)

    class Fatal(EvalTransform):
        def __call__(self, image: Image.Image, generator: Any = None) -> torch.Tensor:
            if image.tobytes() == ninth:
                raise Stopped
            return super().__call__(image, generator)

    ninth = dataset[9]["image"].tobytes()
    with pytest.raises(Stopped):
        predict_to_file(
            model,
            stream(Fatal(PROCESSOR)),
            tmp_path / "s.csv",
            NAMES,
            batch_size=4,
        )
    streamed = predict_to_file(model, stream(), tmp_path / "s.csv", NAMES, batch_size=4)
    assert streamed.predicted == 5 and streamed.images == 13
    assert streamed.path.read_bytes() == expected.path.read_bytes() and streamed.metrics == expected.metrics
    with pytest.raises(ValueError, match="`batch_size`=5"):
        predict_to_file(model, stream(), tmp_path / "s.csv", NAMES, batch_size=5)


# Invalid arguments


@pytest.mark.parametrize(
    "data, output, options, words",
    [
        (Pixels(2), "p.txt", {}, "`output` must end in .csv or .jsonl"),
        (Pixels(2), "p.csv", {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (Pixels(2), "p.csv", {"top": 0}, "`top` must be at least 1, got 0"),
        (Pixels(0), "p.csv", {}, "`dataset` must not be empty"),
    ],
)
def test_invalid_arguments(
    model: nn.Module, tmp_path: Path, data: Pixels, output: str, options: dict, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        predict_to_file(model, data, tmp_path / output, NAMES, **options)
    assert not list(tmp_path.iterdir())


def test_the_data_of_load_images_can_be_predicted(model: nn.Module, leaves: Path, tmp_path: Path) -> None:
    images = load_images(leaves, verify=False)
    transformed = TransformedImages(images, EvalTransform(PROCESSOR), label_column=None)
    result = predict_to_file(model, transformed, tmp_path / "p.csv", NAMES, files=images["path"])
    assert [row["file"] for row in rows_of(result.path)] == list(images["path"])
