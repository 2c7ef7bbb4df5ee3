"""One function from any layout of photos to a checked `DatasetDict` with `image` and `label`.

Read are: the drawn data set `"synthetic_leaves"`, folders of class folders (with or without split folders), CSV (as of the
original research code), JSONL and parquet files that list images, folders of `save_to_disk` or of parquet files, names of the
table in `ufgir.data.catalog`, and ids on the Hugging Face Hub. docs/datasets.md draws them all.
What is wrong with the data is said before any training, and by name.
"""

import difflib
import inspect
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import datasets

from .catalog import FINE_GRAINED, FineGrainedDataset
from .checks import IMAGE_SUFFIXES, LISTED, SPLIT_NAMES, DatasetError, problem_of, verify_images
from .columns import our_columns, our_splits
from .folders import load_image_folder, load_images
from .hub import load_hub, missing_folder
from .labels import check_class_names, to_multi_hot, unify_labels
from .listings import listing_files, lists_files, load_listings
from .splits import add_validation, check_split_arguments, limit_shots
from .streams import to_stream, unify_stream_labels
from .synthetic_leaves import synthetic_leaves
from .tables import load_parquet, parquet_splits


__all__ = [
    "IMAGE_SUFFIXES",
    "LISTED",
    "SPLIT_NAMES",
    "SYNTHETIC_LEAVES",
    "DatasetError",
    "load_images",
    "load_ufgir_dataset",
    "problem_of",
    "to_multi_hot",
    "verify_images",
]

logger = logging.getLogger(__name__)

SYNTHETIC_LEAVES = "synthetic_leaves"


def _refuse_unknown(arguments: Iterable[str], source: str) -> None:
    allowed = [name for name in inspect.signature(synthetic_leaves).parameters if name not in ("seed", "cache_dir")]
    for name in arguments:
        if name not in allowed:
            own = [p for p in inspect.signature(load_ufgir_dataset).parameters if p != "synthetic_kwargs"]
            close = difflib.get_close_matches(name, [*allowed, *own], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise DatasetError(
                f"Unknown argument `{name}`.{hint} Available: {', '.join(own)}, and for {SYNTHETIC_LEAVES}: "
                f"{', '.join(allowed)}."
            )
        if source != SYNTHETIC_LEAVES:
            raise DatasetError(f"`{name}` applies to {SYNTHETIC_LEAVES!r} only, not to {source!r}.")


def _refuse_misplaced(arguments: Mapping[str, Any], source: str, needed: str) -> None:
    """An argument that the source has no use for is a mistake, not something to pass over."""
    if given := [f"`{name}`" for name, value in arguments.items() if value is not None]:
        raise DatasetError(f"{', '.join(given)} applies to {needed} only, not to {source!r}.")


def _known_set(source: str) -> FineGrainedDataset | None:
    """The row of the table that `source` names; DatasetError if it cannot be loaded by its name."""
    from .catalog import SETS  # which imports this module

    if source in SETS:
        raise DatasetError(
            f"`name_or_path`: {source} is a set of Ultra-FGVC, which is not on the Hub: download it, run `ufgir prepare "
            f"{source} --source RAW --output OUT`, and give the folder OUT."
        )
    entry = FINE_GRAINED.get(source)
    if entry is not None and entry.hub_id is None:
        raise DatasetError(f"`name_or_path`: {entry.how_to_get()}")
    return entry


def _check_counts(splits: datasets.DatasetDict, entry: FineGrainedDataset) -> None:
    """A warning where a data set of the Hub is not what the table says."""
    train = sum(len(splits[name]) for name in ("train", "validation") if name in splits)
    found = (_num_classes(splits), train, len(splits["test"]) if "test" in splits else 0)
    expected = (entry.num_classes, entry.train, entry.test)
    if found != expected:
        logger.warning(
            "%s: %s on the Hub has (classes, train + validation, test) = %s, but the original's lists have %s",
            *(entry.name, entry.hub_id, found, expected),
        )


def _num_classes(splits: Mapping[str, Any]) -> int:
    label = next(iter(splits.values())).features["label"]
    return (label.feature if isinstance(label, datasets.List) else label).num_classes


def _refuse_for_stream(what: str, source: str) -> NoReturn:
    raise DatasetError(
        f"`streaming`: {what} needs the labels of all images of {source} before the first is read: leave it out, or do not "
        "stream."
    )


@dataclass
class _Opened:
    """Data as they come, and what is known about them."""

    data: Any  # a data set, or a dict of them
    columns: dict[str, str | None]
    id_names: dict[int, str] | None = None  # of integer labels
    entry: FineGrainedDataset | None = None
    listed: bool = False  # by files beside the images


def _open_hub(source: str, columns: dict[str, str | None], **arguments: Any) -> _Opened:
    """A data set of the Hub, by its id or by a name of the table."""
    entry = _known_set(source)
    if entry is None:
        if problem := missing_folder(source):
            raise DatasetError(problem)
        return _Opened(load_hub(source, **arguments), columns)
    columns = {name: value or getattr(entry, name) for name, value in columns.items()}
    return _Opened(load_hub(entry.hub_id, **arguments), columns, entry=entry)


def _open_folder(
    path: Path,
    columns: dict[str, str | None],
    listings: Mapping[str, str | None],
    *,
    known_classes: bool,
    cache_dir: str | None,
    streaming: bool,
    **of_listings: Any,
) -> _Opened:
    """Whatever layout the folder has."""
    if not path.is_dir():
        raise DatasetError(
            f"`name_or_path` must be a folder, got the file {path}: give the folder it is in, and name the file in "
            "`csv_train` if it lists images."
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _Opened(datasets.load_from_disk(path), columns)
    files = listing_files(path, listings)
    if not files and (parquet := sorted(path.rglob("*.parquet"))):
        files = parquet_splits(path, parquet)
        if not lists_files(parquet[0], columns["image_column"]):
            return _Opened(load_parquet(files, cache_dir, streaming), columns)
    if files:
        data, id_names = load_listings(path, files, **columns, **of_listings)
        return _Opened(data, dict.fromkeys(columns), id_names, listed=True)
    return _Opened(load_image_folder(path, known_classes), columns)


class IdleArgument(DatasetError):
    """An argument would do nothing for these data."""


def load_ufgir_dataset(
    name_or_path: str | os.PathLike,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    label_separator: str | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.2,
    validation_split: str | None = None,
    shots: int | None = None,
    seed: int = 0,
    split_seed: int | None = None,
    streaming: bool = False,
    verify: bool | None = None,
    csv_train: str | None = None,
    csv_validation: str | None = None,
    csv_test: str | None = None,
    csv_data_folder: str | os.PathLike | None = None,
    csv_class_names: str | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **synthetic_kwargs: Any,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Any of the layouts below as splits train / validation / test with the columns `image` and `label`.

    Images are decoded as they are; `ufgir.transforms.images.to_rgb` makes RGB of any of them, and all transforms begin with it.

    `name_or_path` is one of:
      - `"synthetic_leaves"`, drawn here, with the arguments of `ufgir.data.synthetic_leaves.synthetic_leaves`;
      - a folder split/class/image, or class/image, which is all train;
      - a folder with `train.csv`, `val.csv`, `test.csv` with the columns `class_id,dir`, or the same as JSONL or parquet.
        `train_val.csv` stands in where `train.csv` or `val.csv` is missing. `classid_classname.csv` (`class_id,class_name`)
        may name classes that are integers;
      - a folder written by `save_to_disk`, or one of parquet files whose names tell the split;
      - a name of the table in `ufgir.data.catalog` that has an id on the Hub, e.g. `"cub"`;
      - a data set on the Hub.

    `label` is a `ClassLabel`, or `List(ClassLabel)` where images have several classes: where the column holds lists, or with
    a `label_separator`. `to_multi_hot` makes a target of these.

    Without a validation split, a part of train becomes one: of the n images of a class the first
    int(n * (1 - validation_fraction)) stay, but at least one, so that a class with a single image stays in train. First
    means in the order of the rows (`validation_split="last"`, as the original), or in a random one (`"random"`). A missing
    test split stays missing, and so does a missing train split.

    Args:
        image_column: the column with the images, or with their files; by default found by its type, then by its name.
        label_column: the column with the classes (`ClassLabel`, text, integers from 0, or lists of these), found likewise.
        label_separator: what stands between the classes of one image in a text, e.g. ";" for "cat;dog".
        class_names: the classes by index, e.g. those of a trained model, `list(model.config.id2label.values())`. The data's
            classes are mapped onto them by name and may be fewer. By default those of the data.
        validation_fraction: in [0, 1); 0 makes no validation split.
        validation_split: "last" or "random", by default "last"; only for data without a validation split.
        shots: at most that many images of each class in train, chosen at random; validation is split off before.
        seed: of synthetic_leaves, and of what `split_seed` is for.
        split_seed: of a random validation split and of `shots`; by default `seed`.
        streaming: return an `IterableDatasetDict` that reads while it is iterated. Tables of the Hub and of parquet are then
            not read beforehand, so that `shots` and a validation split, for which the labels of all images must be known, are
            refused, and classes must be known from a `ClassLabel` or `class_names`. Files in a folder are listed, not read.
        verify: decode every image first. By default only what lies in a local folder, and no stream.
        csv_train, csv_validation, csv_test: names of CSV, JSONL or parquet files in the folder that list images. If one is
            given, only the given ones are read:
            `csv_train="train_val.csv", csv_test="test.csv", validation_fraction=0` trains on all there is.
        csv_data_folder: what listed files are relative to, itself relative to `name_or_path`. By default that folder, or the
            first folder in it that has the first image.
        csv_class_names: name of the CSV file with the names of classes, if not `classid_classname.csv`.
        config_name, revision: of a data set on the Hub.
        cache_dir: where `datasets` keeps what is drawn, converted from parquet or downloaded; by default its own cache.
        synthetic_kwargs: `num_classes`, `images_per_class`, `image_size`, `difficulty` of synthetic_leaves.

    Raises:
        DatasetError: the folder, its images, classes, columns or class ids cannot be used. A `ValueError`.
        IdleArgument: there is a validation split, and `validation_split`. A `DatasetError`.
        ValueError: an argument is out of range.
    """
    source = os.fspath(name_or_path)
    _refuse_unknown(synthetic_kwargs, source)
    check_split_arguments(validation_fraction, validation_split or "last", shots)
    check_class_names(class_names)
    if label_separator == "":
        raise ValueError("`label_separator` must be at least one character, got ''.")
    if streaming and verify:
        raise ValueError("`verify` reads every image before the first is used: leave it out with `streaming`.")
    split_seed = seed if split_seed is None else split_seed
    cache = None if cache_dir is None else os.fspath(cache_dir)
    local = source != SYNTHETIC_LEAVES and Path(os.path.expanduser(source)).exists()
    columns = {"image_column": image_column, "label_column": label_column}
    hub = {"config_name": config_name, "revision": revision}
    listings = {"train": csv_train, "validation": csv_validation, "test": csv_test}
    csv_arguments = {f"csv_{split}": name for split, name in listings.items()}
    csv_arguments |= {"csv_data_folder": csv_data_folder, "csv_class_names": csv_class_names}

    of_csv = "folders of images that files list"
    if not local:
        _refuse_misplaced(csv_arguments, source, of_csv)
    if local or source == SYNTHETIC_LEAVES:
        _refuse_misplaced(hub, source, "data sets of the Hub")

    if source == SYNTHETIC_LEAVES:
        opened = _Opened(synthetic_leaves(seed=seed, cache_dir=cache, **synthetic_kwargs), columns)
    elif local:
        opened = _open_folder(
            Path(os.path.expanduser(source)),
            columns,
            listings,
            known_classes=class_names is not None,
            label_separator=label_separator,
            data_folder=None if csv_data_folder is None else os.fspath(csv_data_folder),
            class_names_file=csv_class_names,
            cache_dir=cache,
            streaming=streaming,
        )
    else:
        opened = _open_hub(source, columns, **hub, cache_dir=cache, streaming=streaming)
    if local and not opened.listed:
        _refuse_misplaced(csv_arguments, source, of_csv)

    rename = dict(opened.entry.splits) if opened.entry else None
    splits = our_columns(our_splits(opened.data, source, rename), source, **opened.columns)
    if validation_split is not None and "validation" in splits:
        raise IdleArgument(f"`validation_split` parts train, but {source} has a validation split: leave it out.")
    separator = None if opened.listed else label_separator  # labels of listings are lists by now
    if isinstance(next(iter(splits.values())), datasets.IterableDataset):
        if shots is not None:
            _refuse_for_stream("`shots`", source)
        if validation_fraction and "train" in splits and "validation" not in splits:
            _refuse_for_stream("`validation_fraction` (there is no validation split: set it to 0)", source)
        return unify_stream_labels(splits, source, class_names, separator)

    options = {"class_names": class_names, "id_names": opened.id_names, "separator": separator}
    splits = datasets.DatasetDict(unify_labels(splits, source, **options))
    if opened.entry is not None:
        _check_counts(splits, opened.entry)
    splits = add_validation(splits, source, validation_fraction, validation_split or "last", split_seed)
    if shots is not None:
        splits = limit_shots(splits, source, shots, split_seed)
    if verify if verify is not None else local and not streaming:
        verify_images(splits)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    logger.info("%s: %d classes, images: %s", source, _num_classes(splits), sizes)
    return to_stream(splits) if streaming else splits
