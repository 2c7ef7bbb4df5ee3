"""Stream data sets: unify the classes of streams without reading them, and transform streamed images for training."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..transforms.preprocessing import ImageTransform
from .checks import DatasetError, file_of, listed, problem_of
from .labels import class_feature, is_multi_label, split_text, to_multi_hot


SHARDS = 64  # shards of local data: the maximum number of DataLoader workers that `datasets` can supply
_DECODER = datasets.Image()


class StreamedImages(IterableDataset):
    """Stream of `{"pixel_values": (3, H, W), "labels": ...}` and other outputs of the transform; `TransformedImages` is the
    counterpart for data with a length. `labels` is a class index, or a float32 vector (K,) of zeros and ones for multi-label data.

    All randomness of a transform depends on (seed, epoch, row number in the whole stream) only. Rows are assigned in blocks of
    `batch_size`: the blocks go to the ranks in turn, and within a rank to the DataLoader workers in turn. If the DataLoader has
    the same `batch_size`, its batches and their order are therefore the same for any number of workers, and a step of R ranks
    contains the rows of one batch of R x `batch_size` in a single process. Every process reads all rows, which is cheap, but
    decodes and transforms only its own.

    Trainer: pass it as `train_dataset` and set `max_steps`, or pass `num_rows`. With several processes, accelerate reads a
    stream in the main process and sends batches to the others; then leave `rank` and `world_size` at their defaults. To decode a
    share in every process instead, pass both and `drop_last`, and return `own_share_loader` from `get_train_dataloader`.

    Args:
        dataset: stream with an image and a label column, from `load_ufgir_dataset(streaming=True)`. Rows keep its order, but
            from the second epoch on `datasets` reads the files in another order; call
            `dataset.shuffle(seed=..., buffer_size=...)` before to shuffle rows as well.
        transform: `TrainTransform` or `EvalTransform`.
        seed: first part of (seed, epoch, row), a non-negative integer.
        batch_size: rows per block: the batch size of the DataLoader, per device.
        rank, world_size: rank of this process, and number of processes.
        drop_last: leave out the rows after the last complete block of world_size x batch_size, so that all ranks have the same
            number of full batches. Required for ranks that synchronize.
        num_rows: length of the whole stream, if known; `len()` is the share of this rank.
        image_column: name of the image column.
        label_column: name of the class column; None for images without labels.

    Raises:
        ValueError: if an argument is out of range, or the label column has no classes.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        seed: int = 0,
        *,
        batch_size: int = 1,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        num_rows: int | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
    ) -> None:
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` must be in 0 ... {world_size - 1} (`world_size` - 1), got {rank}.")
        features = dataset.features or {}
        if lacking := [name for name in (image_column, label_column) if name is not None and name not in features]:
            raise ValueError(f"`dataset` lacks the columns {listed(lacking)}. Available: {listed(features)}.")
        label = features.get(label_column)
        classes = class_feature(label)
        if label is not None and classes is None:
            raise ValueError(f"`label_column` {label_column!r} must contain ClassLabel, got {label}.")
        self.num_classes = None if classes is None else classes.num_classes
        self.dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self.transform = transform
        self.seed, self.batch_size, self.rank, self.world_size = seed, batch_size, rank, world_size
        self.drop_last, self.num_rows = drop_last, num_rows
        self.image_column, self.label_column = image_column, label_column
        self._multi_label = is_multi_label(label)
        # Current epoch; epoch that starts in the middle, and its number of skipped rows. In shared memory, so that persistent
        # worker processes see changes.
        self._position = torch.tensor([0, -1, 0], dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch, from 0, used for random decisions."""
        return int(self._position[0])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch in this process and all workers; a shuffled stream is reshuffled."""
        self._position[0] = epoch
        self.dataset.set_epoch(epoch)

    def skip(self, rows: int, epoch: int | None = None) -> None:
        """Start `epoch` (by default the current one) after the first `rows` rows of this rank, without decoding them.

        To resume in the middle of an epoch: `skip(steps_done * batch_size, epoch)`, and `ignore_data_skip=True` in
        TrainingArguments.
        """
        if rows < 0:
            raise ValueError(f"`rows` must not be negative, got {rows}.")
        self._position[1] = self.epoch if epoch is None else epoch
        self._position[2] = rows

    def __len__(self) -> int:
        """Return the number of rows of this rank per epoch; raise TypeError without `num_rows`."""
        if self.num_rows is None:
            raise TypeError("a stream has no length; pass `num_rows`")
        turn = self.world_size * self.batch_size
        rest = (
            0 if self.drop_last else min(max(self.num_rows % turn - self.rank * self.batch_size, 0), self.batch_size)
        )
        return self.num_rows // turn * self.batch_size + rest

    def _own_blocks(self) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """Yield the blocks of undecoded rows of this rank, with their number in this rank."""
        waiting: tuple[int, dict[str, list[Any]]] | None = None
        # not `for row in dataset`, which reads a different part of the stream in each worker process
        for number, block in enumerate(self.dataset.iter(batch_size=self.batch_size)):
            turn, rank = divmod(number, self.world_size)
            if rank == self.rank:
                waiting = turn, block
                if not self.drop_last:
                    yield waiting
            complete = rank == self.world_size - 1 and len(block[self.image_column]) == self.batch_size
            if self.drop_last and complete and waiting is not None:
                yield waiting

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, resumed, skipped = self._position.tolist()
        first = skipped if epoch == resumed else 0
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number, block in self._own_blocks():
            # after the skipped blocks, the turns start again with the first worker
            if (number - first // self.batch_size) % workers != own:
                continue
            for offset in range(max(first - number * self.batch_size, 0), len(block[self.image_column])):
                row = (number * self.world_size + self.rank) * self.batch_size + offset
                sample = self._transformed(block[self.image_column][offset], epoch, row)
                if self.label_column is not None:
                    sample["labels"] = self._labels(block[self.label_column][offset], row)
                yield sample

    def _transformed(self, raw: dict[str, Any], epoch: int, row: int) -> dict[str, Any]:
        try:
            image = _DECODER.decode_example(raw)
        except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
            name, place = file_of(raw), f"row {row} of the stream"
            why = problem_of(raw) or f"{type(error).__name__}: {error}"
            raise DatasetError(f"{f'{name} ({place})' if name else place} cannot be read: {why}.") from error
        # the same seed as in `TransformedImages` for the first copy of an image
        columns = self.transform(image, np.random.default_rng((self.seed, epoch, row, 0)))
        return columns if isinstance(columns, dict) else {"pixel_values": columns}

    def _labels(self, label: Any, row: int) -> int | torch.Tensor:
        labels = label if self._multi_label else [label]
        if outside := [value for value in labels if value is None or not 0 <= value < self.num_classes]:
            raise DatasetError(
                f"row {row} of the stream has the label {outside[0]}, but there are {self.num_classes} classes."
            )
        return to_multi_hot(label, self.num_classes) if self._multi_label else int(label)


def own_share_loader(images: StreamedImages, device: torch.device | str, **options: Any) -> DataLoader:
    """Return a DataLoader of this rank's share of a stream, for `get_train_dataloader` of a Trainer.

    It moves batches to `device` and forwards `set_epoch` like accelerate's loaders, but does not split the share again. A stream
    with its own rank must not be prepared by accelerate.

    Args:
        images: stream with `rank` and `world_size`.
        device: device of the batches.
        options: arguments of `torch.utils.data.DataLoader`, e.g. `num_workers` and `collate_fn`; the batch size is that of
            `images`.
    """
    loader = DataLoader(images, batch_size=images.batch_size, **options)
    return prepare_data_loader(
        loader, torch.device(device), num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def to_stream(splits: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    """Convert loaded splits to streams with the same rows."""
    return datasets.IterableDatasetDict(
        {name: split.to_iterable_dataset(num_shards=min(SHARDS, len(split))) for name, split in splits.items()}
    )


def _encode(
    labels: Sequence[Any], names: Sequence[str] | None, index: Mapping[str, int], separator: str | None, where: str
) -> dict[str, list[Any]]:
    """Convert a batch of labels to class indices; raise DatasetError for an unknown class."""

    def code(label: Any) -> int:
        name = names[label] if names is not None and label is not None and 0 <= label < len(names) else label
        if name is not None and str(name) in index:
            return index[str(name)]
        raise DatasetError(
            f"{where} has an image of the class {name!r}, which is not among the {len(index)} known ones."
        )

    if separator is not None:
        if None in labels:
            raise DatasetError(f"{where} has an image without a class: label None.")
        labels = [split_text(text, separator) for text in labels]
    codes = (list(dict.fromkeys(map(code, label))) if isinstance(label, list) else code(label) for label in labels)
    return {"label": list(codes)}


def unify_stream_labels(
    splits: Mapping[str, datasets.IterableDataset],
    source: str,
    class_names: Sequence[str] | None = None,
    separator: str | None = None,
) -> datasets.IterableDatasetDict:
    """Convert `label` to `ClassLabel`, or lists of it, with the same names in every split of a stream, without reading it.

    Args:
        splits: streams with the columns `image` and `label`.
        source: name of the data in messages.
        class_names: class names by index. By default those of the `ClassLabel` of the labels.
        separator: separator between the classes of one image in a text.

    Raises:
        DatasetError: if the classes are unknown without reading all labels, or differ between splits; and, during iteration,
            if a label is not in `class_names`.
    """
    kinds = {name: class_feature(split.features["label"]) for name, split in splits.items()}
    first = next(iter(kinds.values()))
    if class_names is None:
        if unknown := [name for name, kind in kinds.items() if kind is None]:
            raise DatasetError(
                f"`streaming`: the labels of {source}, {', '.join(unknown)}, are not ClassLabel, so the classes "
                "are unknown before all labels are read. Pass `class_names`, or set `streaming=False`."
            )
        if other := [name for name, kind in kinds.items() if kind.names != first.names]:
            raise DatasetError(
                f"{source}: {', '.join(other)} has other classes, or another order of them, than {next(iter(kinds))}. Pass "
                "`class_names`."
            )
    names = list(class_names if class_names is not None else first.names)
    index = {name: i for i, name in enumerate(names)}
    streams = {}
    for name, split in splits.items():
        feature = split.features["label"]
        if kinds[name] is not None and kinds[name].names == names:
            streams[name] = split
            continue
        lists = is_multi_label(feature) or separator is not None
        kind = datasets.ClassLabel(names=names)
        arguments = {"names": kinds[name] and kinds[name].names, "index": index, "separator": separator}
        encode = functools.partial(_encode, where=f"{source}: {name}", **arguments)
        features = {"image": datasets.Image(), "label": datasets.List(kind) if lists else kind}
        # map without decoding the images, and without `features`, after which a cast would have no effect
        raw = split.cast_column("image", datasets.Image(decode=False))
        streams[name] = raw.map(encode, input_columns=["label"], batched=True).cast(datasets.Features(features))
    return datasets.IterableDatasetDict(streams)
