"""Find the image and label columns of a table, and rename its splits to train, validation and test."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from .checks import SPLIT_NAMES, DatasetError, split_of
from .labels import class_feature


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture", "photo")  # tried in this order
LABEL_COLUMNS = ("label", "labels", "class_id", "class", "target", "cultivar", "fine_label")
Splits = datasets.DatasetDict | datasets.IterableDatasetDict


def _find_column(
    features: datasets.Features, role: str, given: str | None, kind: type, usual: Sequence[str], split: str
) -> str:
    """Return the given column, else the one of the right type, else the first with a common name."""
    if given is not None:
        if given not in features:
            raise DatasetError(
                f"`{role}_column` must be a column of the {split} split, got {given!r}. Available: {', '.join(features)}."
            )
        return given
    kinds = {name: class_feature(feature) or feature for name, feature in features.items()}
    of_kind = [name for name, feature in kinds.items() if isinstance(feature, kind)]
    candidates = [name for name in usual if name in of_kind] or (of_kind if len(of_kind) == 1 else [])
    candidates = candidates or [name for name in usual if name in features and not of_kind]
    if not candidates:
        raise DatasetError(
            f"No {role} column found. Pass its name as `{role}_column`. Available: {', '.join(features)}."
        )
    return candidates[0]


def our_splits(loaded: Any, source: str, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the splits as a dict in the order train, validation, test; other splits are left out with a warning.

    Args:
        loaded: a data set, or a dict of split name -> data set.
        source: name of the data in messages.
        rename: original split name -> our name, for misleading names; only these splits are used.

    Raises:
        DatasetError: if there is no such split, a split is empty, or two have the same name.
    """
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        loaded = {"train": loaded}
    ours: dict[str, Any] = {}
    for name, split in loaded.items():
        known = rename.get(name) if rename else split_of(name)
        if known is None:
            logger.warning("%s: split %s is left out, because it is not train, validation or test", source, name)
        elif known in ours:
            raise DatasetError(f"{source} has more than one {known} split: {', '.join(loaded)}.")
        elif isinstance(split, datasets.Dataset) and not len(split):
            raise DatasetError(f"{source}: the {name} split is empty.")
        else:
            ours[known] = split
    if not ours:
        raise DatasetError(f"{source} has no train, validation or test split. Available: {', '.join(loaded)}.")
    return {split: ours[split] for split in SPLIT_NAMES if split in ours}


def our_columns(
    splits: Mapping[str, Any], source: str, image_column: str | None, label_column: str | None
) -> dict[str, Any]:
    """Keep the two columns and rename them to `image` (decoded, not converted) and `label`, for map-style or streamed data.

    Raises:
        DatasetError: if a column is missing, both are the same, or the image column does not contain images.
    """
    ours: dict[str, Any] = {}
    for name, split in splits.items():
        if split.features is None:
            raise DatasetError(
                f"{source}: the columns of {name} are unknown before it is read. Set `streaming=False`."
            )
        image = _find_column(split.features, "image", image_column, datasets.Image, IMAGE_COLUMNS, name)
        label = _find_column(split.features, "label", label_column, datasets.ClassLabel, LABEL_COLUMNS, name)
        if image == label:
            raise DatasetError(f"`image_column` and `label_column` are both {image!r}.")
        split = split.select_columns([image, label])
        renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        split = split.rename_columns(renamed) if renamed else split
        try:
            ours[name] = split.cast_column("image", datasets.Image())
        except (TypeError, ValueError, NotImplementedError) as error:  # raised by Arrow for an unsupported cast
            raise DatasetError(
                f"{source}: column {image!r} of the {name} split does not contain images: {error}."
            ) from error
    return ours
