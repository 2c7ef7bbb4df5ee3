"""Tables that hold the images themselves: parquet files, `save_to_disk`, data sets of the Hub."""

import difflib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .data_checks import SPLIT_NAMES, DatasetError, listed, split_of
from .data_labels import class_feature


logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture", "photo")  # tried in this order
LABEL_COLUMNS = ("label", "labels", "class_id", "class", "target", "cultivar", "fine_label")
PATIENCE = 10.0  # seconds to wait for the Hub's first answer

Splits = datasets.DatasetDict | datasets.IterableDatasetDict


def parquet_splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Split to files: a file belongs to the split that its name or its folder's name contains as a word."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [
            w for part in reversed(file.relative_to(path).with_suffix("").parts) for w in re.split(r"[^A-Za-z]+", part)
        ]
        split = next((found for word in words if (found := split_of(word))), None)
        splits.setdefault(split or "", []).append(file)
    if "" in splits:
        if len(splits) > 1:
            raise DatasetError(f"{path}: parquet files whose names tell no split: {listed(splits[''])}.")
        splits = {"train": splits[""]}
    return splits


def load_parquet(splits: Mapping[str, Sequence[Path]], cache_dir: str | None, streaming: bool) -> Splits:
    """Parquet files that hold images."""
    files = {split: [str(file) for file in files] for split, files in splits.items()}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, streaming=streaming)


def missing_folder(source: str) -> str | None:
    """The sentence for a `source` that is no folder and cannot be meant as an id on the Hub; None if it can.

    Meant as a path is what starts with ., / or ~, has more than two parts, or starts with a folder that is there.
    """
    parts = source.replace("\\", "/").split("/")
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) and not source.endswith("/")
    if is_id and not (len(parts) == 2 and Path(parts[0]).is_dir()):
        return None
    parent = Path(os.path.expanduser(source)).parent
    hint = _near(source) if parent.is_dir() else f" Nor does {parent}."
    return f"`name_or_path`: the folder {source} does not exist.{hint}"


def _near(source: str) -> str:
    """A folder with a similar name, as a question; else nothing."""
    parent = Path(os.path.expanduser(source)).parent
    folders = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(source).name, folders, n=1)
    return f" Did you mean {parent / close[0]}?" if close else ""


@contextmanager
def _offline() -> Iterator[None]:
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _hub_answers(name: str, revision: str | None) -> str | None:
    """None if the data set is on the Hub, else why nothing can be heard of it.

    `datasets` asks six times in 23 seconds before it gives up: one question comes first.

    Raises:
        DatasetError: the Hub answers that there is no such data set, or that it may not be read.
    """
    if datasets.config.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        HfApi(endpoint=datasets.config.HF_ENDPOINT).dataset_info(name, revision=revision, timeout=PATIENCE)
    except OfflineModeIsEnabled:
        return "offline mode is on (HF_HUB_OFFLINE)"
    except GatedRepoError as error:
        raise DatasetError(
            f"`name_or_path`: the data set {name} on the Hub is gated: accept its terms on "
            f"{datasets.config.HF_ENDPOINT}/datasets/{name} and log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise DatasetError(f"`revision`: the data set {name} on the Hub has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise DatasetError(_no_such(name, "the Hub has none of this name, or none that you may read")) from error
    except HTTPError as error:
        return f"the Hub does not answer ({type(error).__name__}: {error})"
    return None


def _no_such(name: str, reason: str) -> str:
    return (
        f"`name_or_path` must be 'synthetic_leaves', a folder, a name of `ufgir datasets`, or a data set on the Hub, got "
        f"{name!r}: there is no such folder in {os.getcwd()}, and {reason}.{_near(name)}"
    )


def load_hub(
    name: str, config_name: str | None, revision: str | None, cache_dir: str | None, streaming: bool
) -> Splits:
    """A data set of the Hub, or what is left of it in the cache where the Hub cannot be reached.

    Raises:
        DatasetError: not found, no access, not cached; within seconds.
    """
    silence = _hub_answers(name, revision)
    arguments = {"revision": revision, "cache_dir": cache_dir, "streaming": streaming}
    try:
        if silence is None:
            return datasets.load_dataset(name, config_name, **arguments)
        with _offline():
            return datasets.load_dataset(name, config_name, **arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if silence is not None:
            raise DatasetError(_no_such(name, f"{silence} and it is not in the cache")) from error
        raise DatasetError(
            f"`name_or_path`: loading {name!r} from the Hub failed ({type(error).__name__}: {error})."
        ) from error


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
