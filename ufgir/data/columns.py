"""Find the image and label columns of a table, and bring its splits to our names."""

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
    """The column that the caller names, else the one of the right kind, else the first with a usual name."""
    if given is not None:
        if given not in features:
            raise DatasetError(
                f"`{role}_column` is {given!r}, which the {split} split lacks. Available: {', '.join(features)}."
            )
        return given
    kinds = {name: class_feature(feature) or feature for name, feature in features.items()}
    of_kind = [name for name, feature in kinds.items() if isinstance(feature, kind)]
    candidates = [name for name in usual if name in of_kind] or (of_kind if len(of_kind) == 1 else [])
    candidates = candidates or [name for name in usual if name in features and not of_kind]
    if not candidates:
        raise DatasetError(f"No {role} column found: name it in `{role}_column`. Available: {', '.join(features)}.")
    return candidates[0]


def our_splits(loaded: Any, source: str, rename: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Split name to data, under our names and in our order; what is none of them is left out with a warning.

    Args:
        loaded: one data set, or several by the names of their splits.
        source: what messages call it.
        rename: their name to ours, where names mislead; only these splits are taken.
    """
    if isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        loaded = {"train": loaded}
    ours: dict[str, Any] = {}
    for name, split in loaded.items():
        known = rename.get(name) if rename else split_of(name)
        if known is None:
            logger.warning("%s: split %s is left out: it is not train, validation or test", source, name)
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
    """The two columns `image`, decoded as it is, and `label`, of map-style or streamed data."""
    ours: dict[str, Any] = {}
    for name, split in splits.items():
        if split.features is None:
            raise DatasetError(f"{source}: the columns of {name} are not known before it is read: do not stream it.")
        image = _find_column(split.features, "image", image_column, datasets.Image, IMAGE_COLUMNS, name)
        label = _find_column(split.features, "label", label_column, datasets.ClassLabel, LABEL_COLUMNS, name)
        if image == label:
            raise DatasetError(f"`image_column` and `label_column` are both {image!r}.")
        split = split.select_columns([image, label])
        renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        split = split.rename_columns(renamed) if renamed else split
        try:
            ours[name] = split.cast_column("image", datasets.Image())
        except (TypeError, ValueError, NotImplementedError) as error:  # what Arrow raises for a cast it does not know
            raise DatasetError(
                f"{source}: column {image!r} of the {name} split does not hold images: {error}."
            ) from error
    return ours
