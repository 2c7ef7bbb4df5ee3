"""Split validation images off the training images, and limit their number per class."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from .checks import DatasetError
from .labels import is_multi_label


logger = logging.getLogger(__name__)

VALIDATION_SPLITS = ("last", "random")

Labels = Sequence[int] | Sequence[Sequence[int]]


def split_rows(labels: Labels, fraction: float, seed: int | None = None) -> tuple[list[int], list[int]]:
    """Return the row numbers of train and validation, stratified by class.

    Of the n images of a class, the first max(1, int(n * (1 - fraction))) stay in train; the others become validation. "First"
    refers to the order of the rows, or to a random order if `seed` is given.

    For multi-label data, classes are processed one by one, the rarest first, and each image is assigned with its rarest class:
    simplified from Sechidis et al., On the Stratification of Multi-label Data (ECML 2011). The shares are then approximate, but
    each class keeps an image in train. Images without a class are treated as one more class.

    Args:
        labels: per row, a class index or a list of class indices.
        fraction: share of validation, in [0, 1).
        seed: seed of the random order; None keeps the order of the rows.

    Returns:
        Row numbers of train and of validation, each in ascending order.
    """
    order = range(len(labels)) if seed is None else np.random.default_rng((seed, 0)).permutation(len(labels)).tolist()
    members: dict[int | None, list[int]] = {}
    for row in order:
        label = labels[row]
        for class_id in [label] if isinstance(label, int) else label or [None]:
            members.setdefault(class_id, []).append(row)
    in_train: dict[int, bool] = {}
    for rows in sorted(members.values(), key=len):
        wanted = max(1, int(len(rows) * (1 - fraction) + 1e-9)) - sum(in_train.get(row, False) for row in rows)
        for row in rows:
            if row not in in_train:
                in_train[row] = wanted > 0
                wanted -= 1
    for rows in members.values():  # rarer classes may have put all images of a class in validation
        if not any(in_train[row] for row in rows):
            in_train[rows[0]] = True
    return [row for row in range(len(labels)) if in_train[row]], [
        row for row in range(len(labels)) if not in_train[row]
    ]


def few_shots(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Return the row numbers, ascending, of `shots` random images per class, or of all images of a class that has fewer.

    With the same seed, the rows of fewer shots are a subset of those of more.
    """
    taken: Counter[int] = Counter()
    rows = []
    for row in np.random.default_rng((seed, 1)).permutation(len(labels)).tolist():
        if taken[labels[row]] < shots:
            taken[labels[row]] += 1
            rows.append(row)
    return sorted(rows)


def check_split_arguments(validation_fraction: float, validation_split: str, shots: int | None) -> None:
    """Raise ValueError if an argument is out of range."""
    if isinstance(validation_fraction, bool) or not 0 <= validation_fraction < 1:
        raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}.")
    if validation_split not in VALIDATION_SPLITS:
        raise ValueError(f"`validation_split` must be {' or '.join(VALIDATION_SPLITS)}, got {validation_split!r}.")
    if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
        raise ValueError(f"`shots` must be an integer of at least 1, got {shots!r}.")


def add_validation(
    splits: datasets.DatasetDict, source: str, fraction: float, validation_split: str, seed: int
) -> datasets.DatasetDict:
    """Return the splits with a validation split, made of a part of train if there is none."""
    if not fraction or "train" not in splits or "validation" in splits:
        return splits
    train = splits["train"]
    rows = split_rows(_labels_of(train), fraction, seed if validation_split == "random" else None)
    if not rows[1]:
        logger.warning("%s: no validation split, because no class has enough images", source)
        return splits
    parts = {"train": train.select(rows[0]), "validation": train.select(rows[1])}
    return datasets.DatasetDict({**parts, **{name: split for name, split in splits.items() if name != "train"}})


def limit_shots(splits: datasets.DatasetDict, source: str, shots: int, seed: int) -> datasets.DatasetDict:
    """Return the splits with at most `shots` random images per class in train."""
    if "train" not in splits:
        raise DatasetError(f"`shots` requires a train split, but {source} has only the splits {', '.join(splits)}.")
    train = splits["train"]
    if is_multi_label(train.features["label"]):
        raise DatasetError(f"`shots` requires one class per image, but {source} is multi-label. Leave it out.")
    labels = _labels_of(train)
    if fewer := sum(count < shots for count in Counter(labels).values()):
        logger.info("%s: %d classes have fewer than %d images and keep all of them", source, fewer, shots)
    chosen = train.select(few_shots(labels, shots, seed))
    return datasets.DatasetDict({name: chosen if name == "train" else split for name, split in splits.items()})


def _labels_of(split: datasets.Dataset) -> Labels:
    return split.select_columns("label")[:]["label"]


def random_subset(dataset: Any, count: int | None, seed: int, name: str = "count") -> Any:
    """Return `count` random rows of a `datasets.Dataset` in their original order; all rows if `count` is None.

    Raises:
        ValueError: if the count is below 1; the message calls it `name`.
    """
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}.")
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count]))
