"""Predict any number of images: in bounded memory, in order, in several processes, with resuming after an interruption.

Each process appends to two files of its own in `_<name>.partial/` next to the output: the finished lines, and a record of
fixed size per image for the metrics (see `prediction_files`). At the end the first process joins the lines, and the output
file appears when it is complete. All processes must have access to that folder.

Shapes: B images per batch, K classes.
"""

import contextlib
import csv
import functools
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, default_data_collator

from clca.loss_clca import classification_loss

from ..data.checks import DatasetError, file_of
from ..utils.distributed import broadcast_buffers
from ..utils.files import write_text_atomically
from ..utils.locks import exclusive_lock
from ..utils.provenance import as_read
from ..utils.text import one_sentence
from .prediction_files import PredictionTable, Shard, join, left_out, metrics


logger = logging.getLogger(__name__)

ENDINGS = (".csv", ".jsonl")
STATE = "state.json"
SAMPLED = 1000  # maximum number of images whose names, sizes and dates identify a data set
HASHED = 64  # maximum number of images without files whose contents identify a data set

FileNames = Sequence[str | None] | Callable[[int], str | None]


class Predictions(NamedTuple):
    """Result of `predict_to_file`."""

    path: Path
    images: int  # lines written
    metrics: dict[str, float]  # fractions in [0, 1], and the loss; empty without labels
    broken: list[str]  # images left out
    seconds: float  # duration of this call
    predicted: int  # images predicted by this call


def predict_to_file(
    model: nn.Module,
    dataset: Dataset,
    output: str | os.PathLike,
    class_names: Sequence[str],
    *,
    files: FileNames | None = None,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]] = default_data_collator,
    batch_size: int = 64,
    num_workers: int = 0,
    top: int = 5,
    precision: torch.dtype | None = None,
    skip_broken: bool = False,
    progress: bool = False,
    data: Mapping[str, Any] | None = None,
) -> Predictions:
    """Classify every image of a data set and write one line per image: index, file, label, prediction, best classes.

    With several processes (torchrun, accelerate launch), every process must call it; the images are split between them, and all
    get the same result. An interrupted call is resumed if model, data and options are the same; otherwise it starts over.

    Args:
        model: a classifier whose forward takes `pixel_values`. It is moved to the device of this process.
        dataset: `dataset[i]` is {"pixel_values": (3, H, W)} and optionally "labels": a class, or zeros and ones (K,) for
            multi-label data, or a negative number if unknown. Or a stream, `ufgir.data.streams.StreamedImages`, with this
            process's rank and the number of processes.
        output: file that ends in .csv (columns index, file, label, prediction, class_1, probability_1, class_2, ...) or .jsonl
            (with a list `top`). Several classes of one image are separated by `;` in CSV and are lists in JSON. An existing
            file is replaced.
        class_names: K names.
        files: file names of the images by index; None for an image without a file.
        collate: function that makes a batch of samples.
        batch_size: images per step and process.
        num_workers: number of data loading workers per process.
        top: number of classes written per image, at most K.
        precision: dtype of autocast; None for no autocast.
        skip_broken: leave out images that cannot be read, with a warning, instead of raising.
        progress: show a progress bar.
        data: other properties that identify the data, such as data set, split and options; see `identity_of_data` for the
            properties that are always compared.

    Returns:
        The output path, counts and metrics: top1, top5 (with more than five classes) and macro_f1, or, for multi-label data,
        map, micro_f1 and macro_f1, as in `ufgir.evaluation.metrics`; and the mean loss.

    Raises:
        ValueError: if the file ending is unknown, a number is out of range, the data set is empty, a stream is split
            differently, or another process is writing the file.
    """
    start, state, output = time.perf_counter(), PartialState(), Path(output)
    _check(output, dataset, batch_size, top, state.num_processes)
    names = files if callable(files) else (lambda index: files[index]) if files is not None else (lambda index: None)
    multi_label = getattr(model.config, "problem_type", None) == "multi_label_classification"
    table = PredictionTable(tuple(class_names), min(top, len(class_names)), output.suffix, multi_label)
    refusal = f"{output} is being written by another process. Wait for it to finish or choose another file."
    with exclusive_lock(output, refusal) if state.is_main_process else contextlib.nullcontext():
        folder = output.with_name(f"_{output.name}.partial")
        ranges: list[Any] = [None]
        if state.is_main_process:
            same = {
                "model": hash_weights(model),
                "data": [identity_of_data(dataset, names), dict(data or {})],
                "table": table,
                "precision": str(precision),
            }
            ranges = [_begin(folder, same, dataset, state.num_processes)]
        ranges = broadcast_object_list(ranges)[0]
        if isinstance(dataset, IterableDataset) and len(ranges) != state.num_processes:
            raise ValueError(
                f"{folder} was started with {len(ranges)} processes. Use the same number, or delete the folder."
            )

        was_training, predicted = model.training, 0
        model.to(state.device).eval()
        broadcast_buffers(model)
        try:
            for number in range(state.process_index, len(ranges), state.num_processes):
                shard = Shard(folder, number, table)
                source, indices, count = _remaining(dataset, ranges[number], shard.cut(batch_size))
                loader = DataLoader(
                    GuardedImages(source) if skip_broken else source,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    collate_fn=functools.partial(separate_broken, collate=collate),
                    pin_memory=state.device.type == "cuda",
                )
                hidden = not (progress and state.is_main_process)
                with shard, tqdm(total=count, desc="Predicting", unit="image", disable=hidden) as bar:
                    for batch, size, problems in loader:
                        rows = [(index, names(index)) for index in itertools.islice(indices, size)]
                        for position, why in problems.items():
                            logger.warning("%s cannot be read and is left out: %s", name_of(*rows[position]), why)
                        good = [position for position in range(size) if position not in problems]
                        records, lines = table.records(size), []
                        if good:
                            lines, records[good] = _predict(model, batch, [rows[i] for i in good], table, precision)
                        shard.append(lines, records)
                        predicted += size
                        bar.update(size)
        finally:
            model.train(was_training)
        predicted = sum(gather_object([predicted]))  # waits until all processes are done
        answer: list[Any] = [None]
        if state.is_main_process:
            shards = [Shard(folder, number, table) for number in range(len(ranges))]
            starts = [0 if part is None else part[0] for part in ranges]
            broken = [name_of(index, names(index)) for index in left_out(shards, starts)]
            images = join(shards, table, folder / "joined", output, _block(dataset))
            answer = [(images, metrics(shards, table), broken)]
            shutil.rmtree(folder)
        images, measured, broken = broadcast_object_list(answer)[0]
        return Predictions(output, images, measured, broken, time.perf_counter() - start, predicted)


def name_of(index: int, name: str | None) -> str:
    return name or f"image {index}"


def file_names(dataset: datasets.Dataset, column: str = "image") -> Callable[[int], str | None]:
    """Return a function from index to file name for `predict_to_file(files=...)`, without decoding images."""
    raw = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return lambda index: file_of(raw[index][column])


def read_predictions(path: str | os.PathLike, indices: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
    """Read the lines with the given image indices (None: all) from a prediction file, as index -> line."""
    wanted, found = None if indices is None else set(indices), {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file) if Path(path).suffix == ".csv" else map(json.loads, file):
            if wanted is None or int(row["index"]) in wanted:
                found[int(row["index"])] = row
    return found


# Identity of model and data


def _block(dataset: Any) -> int | None:
    """Return the number of images per block of a stream; None for data with a length."""
    return dataset.batch_size if isinstance(dataset, IterableDataset) else None


def _check(output: Path, dataset: Any, batch_size: int, top: int, processes: int) -> None:
    if output.suffix not in ENDINGS:
        raise ValueError(f"`output` must end in {' or '.join(ENDINGS)}, got {output}.")
    if output.is_dir():
        raise ValueError(f"`output` must be a file, got the folder {output}.")
    for name, value in (("batch_size", batch_size), ("top", top)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not isinstance(dataset, IterableDataset):
        if len(dataset) == 0:
            raise ValueError("`dataset` must not be empty.")
    elif (dataset.batch_size, dataset.world_size) != (batch_size, processes):
        raise ValueError(
            f"`dataset` has `batch_size`={dataset.batch_size} and `world_size`={dataset.world_size}. Create it with "
            f"`batch_size`={batch_size} and `world_size`={processes}."
        )


def hash_weights(model: PreTrainedModel) -> str:
    """Return the SHA-256 of the weights and the configuration."""
    hasher = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for name, value in model.state_dict().items():
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def identity_of_data(dataset: Dataset, names: Callable[[int], str | None]) -> dict[str, Any]:
    """Return the properties that identify the images of a data set and their transform, to detect changes.

    They are the number of images and all labels; the names, sizes and dates of at most `SAMPLED` files; and the hashes of at most
    `HASHED` images without files. Of a stream, they are the first `HASHED` images and labels, and the length given by its source.
    """
    transform = vars(dataset.transform) if hasattr(dataset, "transform") else {}
    identity: dict[str, Any] = {"transform": {k: str(v) for k, v in transform.items()}}
    rows = getattr(dataset, "dataset", None)  # underlying data of TransformedImages or StreamedImages
    columns = (getattr(dataset, "image_column", None), getattr(dataset, "label_column", None))
    if isinstance(dataset, IterableDataset):
        return identity | {"count": None, **_identity_of_stream(dataset, rows, *columns)}
    images, inside = [], []
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED)).astype(int).tolist():
        name = names(index)
        images.append([name, *_about_file(name)])
        if len(images[-1]) == 1:
            inside.append(index)
    identity |= {"count": len(dataset), "images": images, "labels": _hash_labels(rows, columns[1])}
    if columns[0] is not None and inside:
        raw = _undecoded(rows, columns[0])
        chosen = np.linspace(0, len(inside) - 1, min(len(inside), HASHED)).astype(int)
        identity["contents"] = [_hash_image(raw[inside[i]][columns[0]]) for i in chosen]
    return identity


def _about_file(name: str | None) -> list[int]:
    """Return size and date of a file; empty if there is no such file."""
    try:
        about = os.stat(name or "")
    except (OSError, ValueError):
        return []
    return [about.st_size, about.st_mtime_ns]


def _undecoded(rows: Any, column: str) -> Any:
    """Return the same rows with undecoded images."""
    is_image = isinstance((getattr(rows, "features", None) or {}).get(column), datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows


def _hash_image(image: Any) -> Any:
    """Return the hash of an image's bytes or pixels; for an external file, its name, size and date."""
    if image is None:
        return None
    if isinstance(image, dict):
        if image["bytes"] is None:
            return [image["path"], *_about_file(image["path"])]
        return hashlib.sha256(image["bytes"]).hexdigest()
    pixels = np.asarray(image)
    return hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _hash_labels(rows: Any, column: str | None) -> str | None:
    """Return the hash of all labels, read in batches; None if they cannot be read without the images."""
    hasher = hashlib.sha256()
    if column is None:
        return None
    if isinstance(rows, datasets.Dataset):
        for batch in rows.select_columns([column]).iter(batch_size=SAMPLED):
            hasher.update(json.dumps(batch[column]).encode())
    elif isinstance(rows, Sequence):
        for row in rows:
            hasher.update(f"{row[column]},".encode())
    else:
        return None
    return hasher.hexdigest()


def _identity_of_stream(
    dataset: IterableDataset, rows: Any, image_column: str | None, label_column: str | None
) -> dict[str, Any]:
    """Return the properties of a stream that are known without reading all of it."""
    known: dict[str, Any] = {"rows": getattr(dataset, "num_rows", None)}
    if isinstance(rows, datasets.IterableDataset) and image_column is not None:
        splits = rows.info.splits or {}
        known |= {"shards": rows.num_shards, "split": str(rows.split)}
        known["splits"] = {str(name): split.num_examples for name, split in splits.items()}
        first = itertools.islice(_undecoded(rows, image_column), HASHED)
        known["first"] = [[_hash_image(row[image_column]), row.get(label_column)] for row in first]
    return known


def _begin(folder: Path, same: dict[str, Any], dataset: Dataset, processes: int) -> list[Any]:
    """Return the range of the data set for each shard (None for streams).

    The ranges of an interrupted call are reused if it had the same model, data and options.
    """
    same = as_read(same)
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("same") == same and isinstance(found.get("ranges"), list):
        logger.info("%s: resuming an interrupted prediction", folder)
        return found["ranges"]
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(
                f"`output`: {folder} is a file, but a folder of this name is needed for intermediate files. Move it."
            )
        logger.info("%s is deleted, because it was made with another model, other data or other options", folder)
        shutil.rmtree(folder)
    ranges: list[Any] = [None] * processes
    if not isinstance(dataset, IterableDataset):
        bounds = [len(dataset) * i // processes for i in range(processes + 1)]
        ranges = [list(pair) for pair in itertools.pairwise(bounds)]
    write_text_atomically(folder / STATE, json.dumps({"same": same, "ranges": ranges}))
    return ranges


# From images to lines and records


def _remaining(dataset: Any, part: Sequence[int] | None, done: int) -> tuple[Dataset, Iterator[int], int | None]:
    """Return the remaining data of a shard, their indices, and their number if it is known."""
    if part is not None:
        left = range(part[0] + done, part[1])
        return Subset(dataset, left), iter(left), len(left)
    dataset.skip(done)
    turns = (divmod(row, dataset.batch_size) for row in itertools.count(done))
    indices = ((turn * dataset.world_size + dataset.rank) * dataset.batch_size + offset for turn, offset in turns)
    return dataset, indices, None


class _Broken(NamedTuple):
    """Placeholder for an image that cannot be read."""

    why: str


class GuardedImages(Dataset):
    """Data set that returns `_Broken` for images that cannot be read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
            cause = error.__cause__ if isinstance(error, DatasetError) and error.__cause__ else error
            return _Broken(f"{type(cause).__name__}: {one_sentence(cause)}")


def separate_broken(samples: list[Any], collate: Callable) -> tuple[Any, int, dict[int, str]]:
    """Return a batch of the readable samples, the number of all samples, and position -> reason of the broken ones."""
    problems = {i: sample.why for i, sample in enumerate(samples) if isinstance(sample, _Broken)}
    good = [sample for sample in samples if not isinstance(sample, _Broken)]
    return collate(good) if good else None, len(samples), problems


def _predict(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    rows: Sequence[tuple[int, str | None]],
    table: PredictionTable,
    precision: torch.dtype | None,
) -> tuple[list[bytes], np.ndarray]:
    """Return lines and records of a batch; `rows` has the indices and file names of its images."""
    pixels = batch["pixel_values"].to(model.device, non_blocking=True)
    with torch.inference_mode(), torch.autocast(pixels.device.type, precision, enabled=precision is not None):
        logits = model(pixel_values=pixels).logits.float().cpu()
    labels = batch.get("labels")
    scores = logits.double().numpy()
    order = np.argsort(-scores, axis=1, kind="stable")  # ties: the lower class first; NaN last
    records = table.records(len(rows))
    lines = []
    for i, (index, file) in enumerate(rows):
        known = labels is not None and bool((labels[i] >= 0).all())
        label = (labels[i].numpy() > 0 if table.multi_label else int(labels[i])) if known else None
        lines.append(table.line(index, file, label, scores[i], order[i]))
        records[i]["bytes"], records[i]["predicted"] = len(lines[-1]), order[i, 0]
        if table.multi_label:
            records[i]["scores"] = np.nan_to_num(scores[i], nan=-np.inf)
        if known:
            records[i]["loss"] = classification_loss(logits[i : i + 1], labels[i : i + 1], model.config)
            records[i]["label"] = 0 if table.multi_label else label
            if table.multi_label:
                records[i]["targets"] = label
            elif not np.isnan(scores[i, label]):
                records[i]["rank"] = np.flatnonzero(order[i] == label)[0]
            else:  # never among the highest
                records[i]["rank"] = len(order[i])
    return lines, records
