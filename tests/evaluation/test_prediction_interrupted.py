"""An interrupted prediction is resumed after the last complete line, and never with another model or other data."""

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from torch import nn

from tests.evaluation.helpers import NAMES, PROCESSOR, Pixels, Stopped, labels, make_model, rows_of
from ufgir.data.load import load_ufgir_dataset
from ufgir.data.streams import StreamedImages, to_stream
from ufgir.data.transformed import TransformedImages
from ufgir.evaluation.prediction import identity_of_data, predict_to_file
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor


def stop() -> None:
    raise Stopped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_resume_after_the_last_complete_line(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    """Two interruptions, the second by SIGKILL with truncated files, give the same lines and metrics."""
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


def test_a_line_of_an_incomplete_batch_is_predicted_again(model: nn.Module, tmp_path: Path) -> None:
    """Batches keep their images, because the contents of a batch may change the last bits of a logit."""
    with pytest.raises(Stopped):
        predict_to_file(model, Pixels(10, None, 8, stop), tmp_path / "p.csv", NAMES, batch_size=4)
    data = Pixels(10)
    predict_to_file(model, data, tmp_path / "p.csv", NAMES, batch_size=3)
    assert data.asked == [6, 7, 8, 9]


@pytest.mark.parametrize("change", ["weights", "images", "number", "names", "top", "transform"])
def test_other_models_and_data_start_over(model: nn.Module, tmp_path: Path, change: str) -> None:
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
    """Test images without files: 8 of each of 3 classes."""
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
def test_images_without_files_are_distinguished(drawn: Callable, other: dict[str, Any], streamed: bool) -> None:
    def rows(**options: Any) -> Any:
        split = drawn(**options)
        return to_stream(datasets.DatasetDict({"test": split}))["test"] if streamed else split

    assert identity(rows()) == identity(rows()) != identity(rows(**other))


def test_data_sets_are_distinguished_by_labels(drawn: Callable) -> None:
    rows = drawn()
    swapped = rows.map(lambda row: {"label": 2 - row["label"]})
    assert identity(rows) != identity(swapped)
    plain = [dict(row) for row in rows]
    changed = [*plain[:-1], plain[-1] | {"label": 0}]
    assert identity(plain) == identity([dict(row) for row in plain]) != identity(changed)


def test_an_interrupted_prediction_is_not_resumed_with_other_data(
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


def test_interrupted_after_the_last_image(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ufgir.evaluation.prediction.join", lambda *args: stop())
        with pytest.raises(Stopped):
            predict_to_file(model, Pixels(7, labels(7)), tmp_path / "p.csv", NAMES, batch_size=4)
    data = Pixels(7, labels(7))
    result = predict_to_file(model, data, tmp_path / "p.csv", NAMES, batch_size=4)
    assert data.asked == [4, 5, 6] and result.images == 7  # the last batch was incomplete
