"""The files that predictions go through: lines and records of each part of the data, and how they become one table and metrics.

Shapes: B images of a batch, N images in all, K classes.
"""

import csv
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..utils.files import telling_full_disk
from .metrics import average_precision


SEPARATOR = ";"  # of several classes of one image in CSV, as `label_separator` of `load_ufgir_dataset` reads it
CHUNK = 2**16  # records read at a time
COLUMNS = 2**24  # scores and targets in memory for mAP, unless there are more images
UNKNOWN = -1


class PredictionTable(NamedTuple):
    """How predictions look as text.

    Args:
        class_names: K names.
        top: guesses of a line, at most K.
        suffix: .csv or .jsonl.
        several: an image may have several classes.
    """

    class_names: tuple[str, ...]
    top: int
    suffix: str
    several: bool

    def head(self) -> bytes:
        """What stands before the first line."""
        guesses = (name for i in range(1, self.top + 1) for name in (f"class_{i}", f"probability_{i}"))
        return self._csv(["index", "file", "label", "prediction", *guesses]) if self.suffix == ".csv" else b""

    def line(self, index: int, file: str | None, label: Any, scores: np.ndarray, order: np.ndarray) -> bytes:
        """One image.

        Args:
            index: its number in the data set.
            label: its class, or (K,) of zeros and ones, or None.
            scores: (K,) logits, float64.
            order: (K,) classes from the highest logit to the lowest.
        """
        if self.several:
            probabilities = 1 / (1 + np.exp(-scores))
            prediction = self._names(scores > 0)
            label = None if label is None else self._names(label)
        else:
            weights = np.exp(scores - np.nanmax(scores, initial=-np.inf))
            probabilities = weights / weights.sum()
            prediction, label = self.class_names[order[0]], None if label is None else self.class_names[label]
        top = [(self.class_names[k], round(float(probabilities[k]), 6)) for k in order[: self.top]]
        if self.suffix == ".jsonl":
            guesses = [{"class": name, "probability": probability} for name, probability in top]
            row = {"index": index, "file": file or "", "label": label, "prediction": prediction, "top": guesses}
            return json.dumps(row, ensure_ascii=False).encode() + b"\n"
        label, prediction = (SEPARATOR.join(v) if isinstance(v, list) else v or "" for v in (label, prediction))
        return self._csv([index, file or "", label, prediction, *itertools.chain.from_iterable(top)])

    def _names(self, chosen: np.ndarray) -> list[str]:
        return [self.class_names[k] for k in np.flatnonzero(chosen)]

    @staticmethod
    def _csv(values: Sequence[Any]) -> bytes:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(values)
        return buffer.getvalue().encode()

    def record_type(self) -> np.dtype:
        """What is kept of an image for the metrics."""
        fields = [("bytes", "<u4"), ("label", "<i4"), ("predicted", "<i4"), ("rank", "<i4"), ("loss", "<f4")]
        if self.several:  # mAP needs all scores
            fields += [("scores", "<f4", len(self.class_names)), ("targets", "u1", len(self.class_names))]
        return np.dtype(fields)

    def records(self, count: int) -> np.ndarray:
        """Records (count,) of images that could not be read."""
        records = np.zeros(count, self.record_type())
        for name in ("label", "predicted", "rank"):
            records[name] = UNKNOWN
        return records


class Shard:
    """The lines of a part of the data set, and a record for each of its images.

    Lines are written before their records. A record says how long the line is, 0 where the image has none: so both files can
    be cut back to the last image whose line is whole.
    """

    def __init__(self, folder: Path, number: int, table: PredictionTable) -> None:
        self.lines = folder / f"lines-{number:05d}"
        self.records = folder / f"records-{number:05d}"
        self.type = table.record_type()
        self._open: list[BinaryIO] = []

    def __len__(self) -> int:
        """Images that are done."""
        return self.records.stat().st_size // self.type.itemsize if self.records.exists() else 0

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Records from `start` to `stop`; they stay on the disk until they are looked at."""
        if len(self) == 0:
            return np.empty(0, self.type)
        return np.memmap(self.records, self.type, mode="r", shape=(len(self),))[start:stop]

    def size(self, start: int, stop: int) -> int:
        """Bytes of the lines of the images from `start` to `stop`."""
        chunks = (self.read(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK))
        return sum(int(chunk["bytes"].sum(dtype=np.int64)) for chunk in chunks)

    def cut(self, batch_size: int) -> int:
        """Cut off what was begun and not finished; how many images are done, a multiple of the batch size, so that the same
        images come into a batch as if there had been no interruption."""
        count = len(self) // batch_size * batch_size
        size = self.size(0, count)
        if count and self.lines.stat().st_size < size:  # not what this class writes, unless a disk has lost something
            count = size = 0
        for path, length in ((self.lines, size), (self.records, count * self.type.itemsize)):
            path.touch()
            os.truncate(path, length)
        return count

    def __enter__(self) -> "Shard":
        self._open = [self.lines.open("ab"), self.records.open("ab")]
        return self

    def append(self, lines: Iterable[bytes], records: np.ndarray) -> None:
        """Add images, whose records say how long their lines are."""
        for file, content in zip(self._open, (b"".join(lines), records.tobytes()), strict=True):
            with telling_full_disk(Path(file.name), len(content)):
                file.write(content)
                file.flush()

    def __exit__(self, *exception: Any) -> None:
        for file in self._open:
            os.fsync(file.fileno())
            file.close()


def join(shards: Sequence[Shard], table: PredictionTable, temporary: Path, output: Path, block: int | None) -> int:
    """Put the lines of all shards into `output`, which appears complete; the number of lines.

    Args:
        temporary: a file beside `output`, to be written first.
        block: images that the shards hold in turn; None if each holds a whole range of the data set.
    """
    with telling_full_disk(output), temporary.open("wb") as result:
        result.write(table.head())
        files = [shard.lines.open("rb") for shard in shards]
        try:
            if block is None:
                for file in files:
                    shutil.copyfileobj(file, result)
            else:
                for start in range(0, max(map(len, shards)), block):
                    for shard, file in zip(shards, files, strict=True):
                        result.write(file.read(shard.size(start, min(start + block, len(shard)))))
        finally:
            for file in files:
                file.close()
        result.flush()
        os.fsync(result.fileno())
    os.replace(temporary, output)
    return sum(int((chunk["bytes"] > 0).sum()) for chunk in _chunks(shards))


def left_out(shards: Sequence[Shard], starts: Sequence[int]) -> Iterator[int]:
    """Indices of the images without a line, where shard i begins at image `starts[i]`."""
    for shard, start in zip(shards, starts, strict=True):
        for first in range(0, len(shard), CHUNK):
            yield from (start + first + np.flatnonzero(shard.read(first, first + CHUNK)["bytes"] == 0)).tolist()


def metrics(shards: Sequence[Shard], table: PredictionTable) -> dict[str, float]:
    """What the records say about the images whose labels are known; nothing if there are none."""
    count, loss, hits = 0, 0.0, np.zeros(2)
    classes = len(table.class_names)
    true_positive, total = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for chunk in _chunks(shards):
        chunk = chunk[chunk["label"] != UNKNOWN]
        count, loss = count + len(chunk), loss + float(chunk["loss"].sum(dtype=np.float64))
        if table.several:
            predicted, targets = chunk["scores"] > 0, chunk["targets"] > 0
            true_positive += (predicted & targets).sum(axis=0)
            total += predicted.sum(axis=0) + targets.sum(axis=0)
        else:
            right = chunk["predicted"] == chunk["label"]
            true_positive += np.bincount(chunk["label"][right], minlength=classes)
            for name in ("predicted", "label"):
                total += np.bincount(chunk[name], minlength=classes)
            hits += [(chunk["rank"] < k).sum() for k in (1, 5)]
    if count == 0:
        return {}
    occurs = total > 0
    macro_f1 = float(np.mean(2 * true_positive[occurs] / total[occurs])) if occurs.any() else 0.0
    if not table.several:
        top = {"top1": hits[0] / count} | ({"top5": hits[1] / count} if classes > 5 else {})
        return {**{k: float(v) for k, v in top.items()}, "macro_f1": macro_f1, "loss": loss / count}
    micro_f1 = float(2 * true_positive.sum() / max(total.sum(), 1))
    precisions = np.concatenate(list(_average_precisions(shards, classes, count)))
    mean = {} if np.isnan(precisions).all() else {"map": float(np.nanmean(precisions))}
    return {**mean, "micro_f1": micro_f1, "macro_f1": macro_f1, "loss": loss / count}


def _average_precisions(shards: Sequence[Shard], classes: int, count: int) -> Iterator[np.ndarray]:
    """The average precision of each class, of as many at a time as fit into memory."""
    step = max(1, COLUMNS // count)
    for first in range(0, classes, step):
        columns = {"scores": [], "targets": []}
        for chunk in _chunks(shards):
            for name, column in columns.items():
                column.append(chunk[name][chunk["label"] != UNKNOWN, first : first + step])
        yield average_precision(*map(np.concatenate, columns.values()))


def _chunks(shards: Sequence[Shard]) -> Iterator[np.ndarray]:
    for shard in shards:
        for start in range(0, len(shard), CHUNK):
            yield shard.read(start, start + CHUNK)
