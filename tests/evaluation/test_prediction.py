"""Predictions into a file: lines and metrics, one batch at a time, taken up after an interruption, and `ufgir predict`."""

import csv
import itertools
import json
import math
import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import TINY
from ufgir.cli.entry import main
from ufgir.data.load import load_images, load_ufgir_dataset
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.data.transformed import TransformedImages
from ufgir.evaluation.metrics import compute_metrics, compute_multilabel_metrics
from ufgir.evaluation.prediction import file_names, identity_of_data, predict_to_file, read_predictions
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor


NAMES = ["ash", "beech", "cedar", "date palm", 'elm, "wych"', "fir", "ginkgo"]  # more than five: top5 means something
PROCESSOR = make_image_processor(32)


class Pixels(torch.utils.data.Dataset):
    """Random images and labels; notes what is asked for.

    Args:
        labels: of the images, None for none.
        fatal: the image at which something is done instead.
    """

    def __init__(
        self, count: int, labels: Any = None, fatal: int | None = None, action: Callable | None = None
    ) -> None:
        self.count, self.labels, self.fatal, self.action = count, labels, fatal, action
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        if index == self.fatal:
            self.action()
        generator = torch.Generator().manual_seed(index)
        sample = {"pixel_values": torch.randn(3, 32, 32, generator=generator)}
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


def make_model(seed: int = 0, **changes: Any) -> CLCAViTForImageClassification:
    torch.manual_seed(seed)
    options = TINY | {"num_labels": len(NAMES), "reduction": "topk", "keep_rate": 0.5}
    config = CLCAViTConfig(**options, **changes)
    config.problem_type = "single_label_classification"
    return CLCAViTForImageClassification(config)


@pytest.fixture(scope="module")
def model() -> CLCAViTForImageClassification:
    return make_model()


def logits_of(model: nn.Module, dataset: Pixels) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.stack([dataset[i]["pixel_values"] for i in range(len(dataset))])).logits


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, len(NAMES), count)]


# What a line says


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


def test_json_lines_say_the_same(model: nn.Module, tmp_path: Path) -> None:
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
    some = predict_to_file(model, Pixels(4, [2, -1, -1, 3]), tmp_path / "p.csv", NAMES)  # -1: not known
    assert [row["label"] for row in rows_of(some.path)] == ["cedar", "", "", "date palm"]
    logits = logits_of(model, Pixels(4))[[0, 3]].numpy()
    assert some.metrics["top1"] == compute_metrics((logits, np.array([2, 3])))["top1"]


def test_the_model_is_left_as_it_was(model: nn.Module, tmp_path: Path) -> None:
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
    """Logits that are given, in turn."""

    def __init__(self, logits: torch.Tensor, **config: Any) -> None:
        super().__init__()
        config = {"problem_type": None, "multi_label_loss": "bce"} | config
        self.config = SimpleNamespace(**config, to_dict=dict)
        self.logits, self.device = iter(logits), torch.device("cpu")

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.stack(list(itertools.islice(self.logits, len(pixel_values)))))


def test_metrics_of_equal_scores_and_nan(tmp_path: Path) -> None:
    """As `ufgir.evaluation.metrics` counts them: of equals the lower class comes first, NaN is never among the highest."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (40, len(NAMES)), generator=generator).float()
    logits[torch.rand(logits.shape, generator=generator) < 0.1] = math.nan
    logits[7] = math.nan
    result = predict_to_file(Scripted(logits), Pixels(40, labels(40)), tmp_path / "p.csv", NAMES, batch_size=8)
    expected = compute_metrics((logits.numpy(), np.array(labels(40))))
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected, abs=1e-12)
    assert result.images == 40


@pytest.mark.parametrize("loss", ["bce", "asymmetric"])
def test_several_classes_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
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


# As much memory for many images as for few


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Three times as many images, and at most a few kilobytes more: nothing is kept of an image but what is on the disk."""

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

    peak(100)  # what is imported late
    few, many = peak(1500), peak(4500)  # of more than 1000 images, 1000 names are compared
    assert many < few + 50_000  # 3000 lines are 300 kB
    assert len(rows_of(tmp_path / "p.csv")) == 4500


# Interrupted


class Stopped(Exception):
    pass


def stop() -> None:
    raise Stopped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_goes_on_after_the_last_whole_line(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    """Stopped twice, the second time by SIGKILL, and what was written last is torn: lines and metrics as without."""
    whole = predict_to_file(model, Pixels(30, labels(30)), tmp_path / f"whole{suffix}", NAMES, batch_size=4)
    path, partial = tmp_path / f"p{suffix}", tmp_path / f"_p{suffix}.partial"
    path.write_text("of an earlier model")
    with pytest.raises(Stopped):
        predict_to_file(model, Pixels(30, labels(30), 9, stop), path, NAMES, batch_size=4)
    assert path.read_text() == "of an earlier model" and partial.is_dir()

    def killed() -> None:
        predict_to_file(model, Pixels(30, labels(30), 22, die), path, NAMES, batch_size=4)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    with (partial / "lines-00000").open("ab") as lines, (partial / "records-00000").open("ab") as records:
        lines.write(b"20,,elm,a line of which the end and the rec")
        records.write(b"ord")

    data = Pixels(30, labels(30))
    result = predict_to_file(model, data, path, NAMES, batch_size=4)
    assert data.asked == list(range(20, 30)) and result.predicted == 10
    assert path.read_bytes() == whole.path.read_bytes()
    assert result.metrics == whole.metrics and result.images == 30
    assert not partial.exists()


def test_a_line_whose_batch_is_not_whole_is_predicted_again(model: nn.Module, tmp_path: Path) -> None:
    """Batches stay as they were: what is in a batch may change the last bits of a logit."""
    with pytest.raises(Stopped):
        predict_to_file(model, Pixels(10, None, 8, stop), tmp_path / "p.csv", NAMES, batch_size=4)
    data = Pixels(10)
    predict_to_file(model, data, tmp_path / "p.csv", NAMES, batch_size=3)
    assert data.asked == [6, 7, 8, 9]


@pytest.mark.parametrize("change", ["weights", "images", "number", "names", "top", "transform"])
def test_other_models_and_data_start_again(model: nn.Module, tmp_path: Path, change: str) -> None:
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file in files:
        file.write_bytes(b"1")

    def data(*fatal: Any) -> Pixels:
        pixels = Pixels(12 if not (change == "number" and not fatal) else 11, None, *fatal)
        pixels.transform = EvalTransform(make_image_processor(32, 40 if change == "transform" and not fatal else 36))
        return pixels

    with pytest.raises(Stopped):
        predict_to_file(model, data(8, stop), tmp_path / "p.csv", NAMES, files=list(map(str, files)), batch_size=4)
    other = make_model(1) if change == "weights" else model
    if change == "images":
        files[5].write_bytes(b"12")
    names = [*NAMES[:-1], "gum"] if change == "names" else NAMES
    again = data()
    result = predict_to_file(
        other,
        again,
        tmp_path / "p.csv",
        names,
        files=list(map(str, files)),
        batch_size=4,
        top=4 if change == "top" else 5,
    )
    assert again.asked == list(range(len(again))) and result.images == len(again)
    assert len(rows_of(result.path)) == len(again)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., datasets.Dataset]:
    """Test images that are in no files: 8 of each of 3 classes."""
    cache = tmp_path_factory.mktemp("cache")

    def draw(count: int = 8, **options: Any) -> datasets.Dataset:
        numbers = {"num_classes": 3, "images_per_class": [1, 1, count], "image_size": 32}
        return load_ufgir_dataset("synthetic_leaves", **numbers, cache_dir=cache, **options)["test"]

    return draw


def identity(rows: Any) -> str:
    images = TransformedImages(rows, EvalTransform(PROCESSOR))
    if isinstance(rows, datasets.IterableDataset):
        images = StreamedImages(rows, EvalTransform(PROCESSOR), batch_size=4)
    return json.dumps(identity_of_data(images, lambda index: None))


@pytest.mark.parametrize("other", [{"difficulty": "hard"}, {"seed": 1}, {"count": 7}])
@pytest.mark.parametrize("streamed", [False, True])
def test_images_that_are_no_files_are_told_apart(drawn: Callable, other: dict[str, Any], streamed: bool) -> None:
    def rows(**options: Any) -> Any:
        split = drawn(**options)
        return to_stream(datasets.DatasetDict({"test": split}))["test"] if streamed else split

    assert identity(rows()) == identity(rows()) != identity(rows(**other))


def test_labels_tell_data_sets_apart(drawn: Callable) -> None:
    rows = drawn()
    swapped = rows.map(lambda row: {"label": 2 - row["label"]})
    assert identity(rows) != identity(swapped)
    plain = [dict(row) for row in rows]
    changed = [*plain[:-1], plain[-1] | {"label": 0}]
    assert identity(plain) == identity([dict(row) for row in plain]) != identity(changed)


def test_an_interrupted_prediction_does_not_go_on_with_other_data(
    model: nn.Module, drawn: Callable, tmp_path: Path
) -> None:
    class Fatal(TransformedImages):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return stop() if index == 9 else super().__getitem__(index)

    transform = EvalTransform(PROCESSOR)
    for rows, data in ((drawn(seed=7), None), (drawn(), {"split": "validation"})):
        with pytest.raises(Stopped):
            predict_to_file(model, Fatal(drawn(), transform), tmp_path / "p.csv", NAMES, batch_size=4)
        images = TransformedImages(rows, transform)
        result = predict_to_file(model, images, tmp_path / "p.csv", NAMES, batch_size=4, data=data)
        assert result.predicted == 24
    with pytest.raises(Stopped):
        predict_to_file(model, Fatal(drawn(), transform), tmp_path / "p.csv", NAMES, batch_size=4)
    result = predict_to_file(model, TransformedImages(drawn(), transform), tmp_path / "p.csv", NAMES, batch_size=4)
    assert result.predicted == 16


def test_interrupted_when_all_was_done(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ufgir.evaluation.prediction.join", lambda *args: stop())
        with pytest.raises(Stopped):
            predict_to_file(model, Pixels(7, labels(7)), tmp_path / "p.csv", NAMES, batch_size=4)
    data = Pixels(7, labels(7))
    result = predict_to_file(model, data, tmp_path / "p.csv", NAMES, batch_size=4)
    assert data.asked == [4, 5, 6] and result.images == 7  # the last batch was not a whole one


# Streams, and data sets on the disk


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> Path:
    """13 noisy pictures in folders."""
    root = tmp_path_factory.mktemp("leaves")
    for i in range(13):
        folder = root / ("a", "b/c")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"leaf{i}.png")
    return root


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


# Mistakes


@pytest.mark.parametrize(
    "data, output, options, words",
    [
        (Pixels(2), "p.txt", {}, "`output` must end in .csv or .jsonl"),
        (Pixels(2), "p.csv", {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (Pixels(2), "p.csv", {"top": 0}, "`top` must be at least 1, got 0"),
        (Pixels(0), "p.csv", {}, "`dataset` is empty"),
    ],
)
def test_mistakes(model: nn.Module, tmp_path: Path, data: Pixels, output: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predict_to_file(model, data, tmp_path / output, NAMES, **options)
    assert not list(tmp_path.iterdir())


# The command


@pytest.fixture(scope="module")
def saved(model: CLCAViTForImageClassification, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def command(*argv: Any) -> int:
    return main(["predict", *map(str, argv)])


def test_command(
    saved: Path, model: CLCAViTForImageClassification, leaves: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files and folders, in the order in which they were given; those in a folder in natural order."""
    first = leaves / "b" / "c" / "leaf5.png"
    assert command(saved, first, leaves, "--output", tmp_path / "new" / "p.csv", "--batch-size", 4) == 0
    rows = rows_of(tmp_path / "new" / "p.csv")
    names = [Path(row["file"]).name for row in rows]
    assert names == [f"leaf{i}.png" for i in (5, 0, 2, 4, 6, 8, 10, 12, 1, 3, 5, 7, 9, 11)]
    assert {row["label"] for row in rows} == {""} and [row["index"] for row in rows] == [str(i) for i in range(14)]
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(EvalTransform(PROCESSOR)(Image.open(row["file"]))[None]).logits
            assert row["prediction"] == NAMES[logits.argmax()]
    assert "14 images" in capsys.readouterr().out


def test_command_names_broken_pictures(
    saved: Path, leaves: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    good, empty, cut = (tmp_path / f"{name}.png" for name in ("good", "empty", "cut"))
    content = (leaves / "a" / "leaf0.png").read_bytes()
    for file, bytes_ in ((good, content), (empty, b""), (cut, content[: len(content) // 2])):
        file.write_bytes(bytes_)
    for batch_size in (1, 8):
        assert command(saved, tmp_path, "--output", tmp_path / "p.jsonl", "--batch-size", batch_size) == 1
        out = capsys.readouterr().out
        assert "empty.png" in out and "cut.png" in out and "good.png" not in out
        (line,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
        assert (line["index"], line["file"]) == (2, str(good))
    good.unlink()
    assert command(saved, tmp_path, "--output", tmp_path / "p.jsonl") == 1
    assert (tmp_path / "p.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "argv, words",
    [
        (["MODEL", "/nowhere", "--output", "p.csv"], "/nowhere"),
        (["MODEL", "LEAVES", "--output", "p.png"], "must end in .csv or .jsonl"),
        (["MODEL", "LEAVES", "--batch-size", "0"], "`--batch-size`"),
        (["MODEL", "LEAVES", "--top", "0"], "`--top`"),
        (["MODEL", "LEAVES", "--device", "toaster"], "toaster"),
        (["LEAVES", "LEAVES"], "leaves"),
        (["MODEL"], "IMAGE"),
    ],
)
def test_mistakes_of_the_command(
    saved: Path,
    leaves: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(*({"MODEL": saved, "LEAVES": leaves}.get(a, a) for a in argv))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir())


def test_the_data_of_load_images_can_be_predicted(model: nn.Module, leaves: Path, tmp_path: Path) -> None:
    images = load_images(leaves, verify=False)
    transformed = TransformedImages(images, EvalTransform(PROCESSOR), label_column=None)
    result = predict_to_file(model, transformed, tmp_path / "p.csv", NAMES, files=images["path"])
    assert [row["file"] for row in rows_of(result.path)] == list(images["path"])
