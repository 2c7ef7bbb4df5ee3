"""Intermediate files of predictions: lines and records per shard, joined to a table and metrics.

Shapes: B images per batch, N images in total, K classes.
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

from ..utils.files import raise_disk_full
from .metrics import average_precision


SEPARATOR = ";"  # between the classes of one image in CSV; pass it to `load_ufgir_dataset` as `label_separator`
CHUNK = 2**16  # records read at a time
COLUMNS = 2**24  # maximum number of scores in memory for mAP (at least one class)
UNKNOWN = -1


class PredictionTable(NamedTuple):
    """Text format of predictions.

    Args:
        class_names: K names.
        top: number of classes per line, at most K.
        suffix: .csv or .jsonl.
        multi_label: whether an image may have several classes.
    """

    class_names: tuple[str, ...]
    top: int
    suffix: str
    multi_label: bool

    def header(self) -> bytes:
        """Return the header line; empty for JSONL."""
        guesses = (name for i in range(1, self.top + 1) for name in (f"class_{i}", f"probability_{i}"))
        return self._csv(["index", "file", "label", "prediction", *guesses]) if self.suffix == ".csv" else b""

    def line(self, index: int, file: str | None, label: Any, scores: np.ndarray, order: np.ndarray) -> bytes:
        """Format the line of an image.

        Args:
            index: index of the image in the data set.
            file: its file name, or None.
            label: its class, or (K,) of zeros and ones, or None.
            scores: (K,) logits, float64.
            order: (K,) classes in descending order of logits.
        """
        if self.multi_label:
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
        """Return the dtype of the record of an image, with the values that the metrics need."""
        fields = [("bytes", "<u4"), ("label", "<i4"), ("predicted", "<i4"), ("rank", "<i4"), ("loss", "<f4")]
        if self.multi_label:  # mAP needs all scores
            fields += [("scores", "<f4", len(self.class_names)), ("targets", "u1", len(self.class_names))]
        return np.dtype(fields)

    def records(self, count: int) -> np.ndarray:
        """Return `count` records for images that cannot be read."""
        records = np.zeros(count, self.record_type())
        for name in ("label", "predicted", "rank"):
            records[name] = UNKNOWN
        return records


class Shard:
    """Lines of a part of the data set, and a record per image.

    Lines are written before their records. A record contains the length of its line, or 0 if the image has no line; both files can
    therefore be truncated to the last complete image.
    """

    def __init__(self, folder: Path, number: int, table: PredictionTable) -> None:
        self.lines = folder / f"lines-{number:05d}"
        self.records = folder / f"records-{number:05d}"
        self.type = table.record_type()
        self._open: list[BinaryIO] = []

    def __len__(self) -> int:
        """Return the number of finished images."""
        return self.records.stat().st_size // self.type.itemsize if self.records.exists() else 0

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the records from `start` to `stop`, memory-mapped."""
        if len(self) == 0:
            return np.empty(0, self.type)
        return np.memmap(self.records, self.type, mode="r", shape=(len(self),))[start:stop]

    def size(self, start: int, stop: int) -> int:
        """Return the size in bytes of the lines of the images from `start` to `stop`."""
        chunks = (self.read(i, min(i + CHUNK, stop)) for i in range(start, stop, CHUNK))
        return sum(int(chunk["bytes"].sum(dtype=np.int64)) for chunk in chunks)

    def cut(self, batch_size: int) -> int:
        """Truncate incomplete lines and records, and return the number of finished images.

        The number is a multiple of the batch size, so that batches contain the same images as without an interruption.
        """
        count = len(self) // batch_size * batch_size
        size = self.size(0, count)
        if count and self.lines.stat().st_size < size:  # lines are missing, e.g. after a disk error
            count = size = 0
        for path, length in ((self.lines, size), (self.records, count * self.type.itemsize)):
            path.touch()
            os.truncate(path, length)
        return count

    def __enter__(self) -> "Shard":
        self._open = [self.lines.open("ab"), self.records.open("ab")]
        return self

    def append(self, lines: Iterable[bytes], records: np.ndarray) -> None:
        """Append lines and records; the records contain the lengths of the lines."""
        for file, content in zip(self._open, (b"".join(lines), records.tobytes()), strict=True):
            with raise_disk_full(Path(file.name), len(content)):
                file.write(content)
                file.flush()

    def __exit__(self, *exception: Any) -> None:
        for file in self._open:
            os.fsync(file.fileno())
            file.close()


def join(shards: Sequence[Shard], table: PredictionTable, temporary: Path, output: Path, block: int | None) -> int:
    """Write the lines of all shards to `output`, which appears when it is complete, and return the number of lines.

    Args:
        shards: parts of the data set, in order.
        table: text format of the lines.
        temporary: file next to `output` that is written first.
        output: the result.
        block: number of images that are assigned to the shards in turn; None if each shard has a contiguous range.
    """
    with raise_disk_full(output), temporary.open("wb") as result:
        result.write(table.header())
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
    """Yield the indices of the images without a line; shard i begins at image `starts[i]`."""
    for shard, start in zip(shards, starts, strict=True):
        for first in range(0, len(shard), CHUNK):
            yield from (start + first + np.flatnonzero(shard.read(first, first + CHUNK)["bytes"] == 0)).tolist()


def metrics(shards: Sequence[Shard], table: PredictionTable) -> dict[str, float]:
    """Compute the metrics of all images with known labels from the records; empty if there are none."""
    count, loss, hits = 0, 0.0, np.zeros(2)
    classes = len(table.class_names)
    true_positive, total = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    for chunk in _chunks(shards):
        chunk = chunk[chunk["label"] != UNKNOWN]
        count, loss = count + len(chunk), loss + float(chunk["loss"].sum(dtype=np.float64))
        if table.multi_label:
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
    if not table.multi_label:
        top = {"top1": hits[0] / count} | ({"top5": hits[1] / count} if classes > 5 else {})
        return {**{k: float(v) for k, v in top.items()}, "macro_f1": macro_f1, "loss": loss / count}
    micro_f1 = float(2 * true_positive.sum() / max(total.sum(), 1))
    precisions = np.concatenate(list(_average_precisions(shards, classes, count)))
    mean = {} if np.isnan(precisions).all() else {"map": float(np.nanmean(precisions))}
    return {**mean, "micro_f1": micro_f1, "macro_f1": macro_f1, "loss": loss / count}


def _average_precisions(shards: Sequence[Shard], classes: int, count: int) -> Iterator[np.ndarray]:
    """Yield the average precision of the classes, as many at a time as fit into memory."""
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
