"""Load a data set from any supported layout as a checked `DatasetDict` with the columns `image` and `label`.

Supported layouts: the drawn data set `"synthetic_leaves"`; class folders, with or without split folders; CSV (the format
of the original research code), JSONL and parquet files that list images; folders written by `save_to_disk`; folders of
parquet files; names of the table in `ufgir.data.catalog`; and ids on the Hugging Face Hub. docs/datasets.md shows them all.
Errors in the data are reported before training and name the file, row or class.
"""

import difflib
import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets

from ..utils.options import Requirement, argument, check_options
from .catalog import FineGrainedDataset
from .checks import LISTED, SPLIT_NAMES, DatasetError, problem_of, verify_images
from .columns import our_columns, our_splits
from .folders import load_images, open_image_folder
from .hub import is_known_set, open_hub, open_known_set
from .image_files import IMAGE_SUFFIXES
from .labels import check_class_names, to_multi_hot, unify_labels
from .listings import has_listings, open_listings
from .sources import Opened, Source
from .splits import add_validation, check_split_arguments, limit_shots
from .streams import to_stream, unify_stream_labels
from .synthetic_leaves import synthetic_leaves
from .tables import has_parquet, is_saved, open_parquet, open_saved


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


class Layout(NamedTuple):
    """A supported layout of a data set.

    Attributes:
        title: description for messages.
        recognizes: returns whether a source has this layout; called in the order of `LAYOUTS`.
        opens: reads the source.
        options: arguments of `load_ufgir_dataset` that have no effect on other layouts.
    """

    title: str
    recognizes: Callable[[Source], bool]
    opens: Callable[[Source], Opened]
    options: tuple[str, ...] = ()


def _is_drawn(source: Source) -> bool:
    return source.name == SYNTHETIC_LEAVES


def _open_drawn(source: Source) -> Opened:
    return Opened(synthetic_leaves(seed=source.seed, cache_dir=source.cache_dir, **source.drawing), source.columns)


def _is_on_hub(source: Source) -> bool:
    return not source.is_folder


_OF_LISTINGS = ("csv_train", "csv_validation", "csv_test", "csv_data_folder", "csv_class_names")
_OF_HUB = ("config_name", "revision")
_OF_DRAWING = tuple(p for p in inspect.signature(synthetic_leaves).parameters if p not in ("seed", "cache_dir"))

# The first layout that recognizes a source opens it. To add a layout, add a record here and a module with its two functions.
LAYOUTS = (
    Layout(f"`{SYNTHETIC_LEAVES}`", _is_drawn, _open_drawn, _OF_DRAWING),
    Layout("a folder written by `save_to_disk`", is_saved, open_saved),
    Layout("a folder with files that list images", has_listings, open_listings, _OF_LISTINGS),
    Layout("a folder of parquet files that contain images", has_parquet, open_parquet),
    Layout("a folder of class folders", lambda source: source.is_folder, open_image_folder),
    Layout("a data set of the Hub", is_known_set, open_known_set, _OF_HUB),
    Layout("a data set of the Hub", _is_on_hub, open_hub, _OF_HUB),
)
_PARTS_TRAIN = Requirement(("validation_split",), "data without a validation split", lambda s: "validation" not in s)
_REQUIREMENTS = tuple(
    Requirement(layout.options, layout.title, lambda used, options=layout.options: used.options == options)
    for layout in LAYOUTS
    if layout.options
)


def _check_names(arguments: Iterable[str]) -> None:
    """Raise DatasetError for an argument that no layout has."""
    for name in arguments:
        if name not in _OF_DRAWING:
            own = [p for p in inspect.signature(load_ufgir_dataset).parameters if p != "synthetic_kwargs"]
            close = difflib.get_close_matches(name, [*_OF_DRAWING, *own], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise DatasetError(
                f"Unknown argument `{name}`.{hint} Available: {', '.join(own)}, and for {SYNTHETIC_LEAVES}: "
                f"{', '.join(_OF_DRAWING)}."
            )


def _layout_of(source: Source) -> Layout:
    """Return the layout of a source; raise DatasetError if the source is a file."""
    if source.path.is_file() and source.name != SYNTHETIC_LEAVES:
        raise DatasetError(
            f"{argument('name_or_path')} must be a folder, got the file {source.path}. Pass its folder; if the file lists "
            f"images, pass its name as {argument('csv_train')}."
        )
    return next(layout for layout in LAYOUTS if layout.recognizes(source))


def _check_counts(splits: datasets.DatasetDict, entry: FineGrainedDataset) -> None:
    """Log a warning if a data set of the Hub has other counts than the catalog."""
    train = sum(len(splits[name]) for name in ("train", "validation") if name in splits)
    found = (_num_classes(splits), train, len(splits["test"]) if "test" in splits else 0)
    expected = (entry.num_classes, entry.train, entry.test)
    if found != expected:
        logger.warning(
            "%s: %s on the Hub has (classes, train + validation, test) = %s, but the lists of the original have %s",
            *(entry.name, entry.hub_id, found, expected),
        )


def _num_classes(splits: Mapping[str, Any]) -> int:
    label = next(iter(splits.values())).features["label"]
    return (label.feature if isinstance(label, datasets.List) else label).num_classes


def _image_place(splits: datasets.DatasetDict, where: Callable[[str, int], str] | None, split: str, row: int) -> str:
    """Return a name for an image of a table: its file and row there, also if the split is a part of another split."""
    chosen = splits[split]._indices  # of `select`, which divides train
    row = row if chosen is None else chosen.column(0)[row].as_py()
    source = "train" if split == "validation" and chosen is not None else split
    return where(source, row) if where else f"{source} row {row}"


def _raise_for_stream(what: str, source: str) -> NoReturn:
    raise DatasetError(
        f"`streaming`: {what} needs the labels of all images of {source} in advance. Leave it out, or set "
        "`streaming=False`."
    )


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
    """Load a data set as splits train / validation / test with the columns `image` and `label`.

    Images are decoded without conversion; `ufgir.transforms.images.to_rgb`, the first step of every transform, converts
    them to RGB.

    `name_or_path` is one of:
      - `"synthetic_leaves"`: leaves drawn with the arguments of `ufgir.data.synthetic_leaves.synthetic_leaves`;
      - a folder split/class/image, or class/image, which is loaded as train;
      - a folder with `train.csv`, `val.csv`, `test.csv` with the columns `class_id,dir`, or the same as JSONL or parquet.
        `train_val.csv` is used if `train.csv` or `val.csv` is missing. `classid_classname.csv` (`class_id,class_name`) may
        give names to integer class ids;
      - a folder written by `save_to_disk`, or a folder of parquet files whose names contain the split;
      - a name of the table in `ufgir.data.catalog` that has an id on the Hub, e.g. `"cub"`;
      - a data set on the Hub.

    `label` is a `ClassLabel`, or `List(ClassLabel)` for multi-label data: if the column contains lists, or with a
    `label_separator`. `to_multi_hot` converts such a list to a target.

    Without a validation split, a part of train becomes one: of the n images of a class, the first
    max(1, int(n * (1 - validation_fraction))) stay in train. "First" refers to the order of the rows
    (`validation_split="last"`, as in the original) or to a random order (`"random"`). A missing test or train split stays
    missing.

    Args:
        image_column: column with the images or their file names; by default found by its type, then by its name.
        label_column: column with the classes (`ClassLabel`, text, integers from 0, or lists of these); found the same way.
        label_separator: separator between the classes of one image in a text, e.g. ";" for "cat;dog".
        class_names: class names by index, e.g. those of a trained model, `list(model.config.id2label.values())`. The classes
            of the data are mapped onto them by name and may be a subset. By default the classes of the data.
        validation_fraction: share of train that becomes validation, in [0, 1); 0 makes no validation split.
        validation_split: "last" (default) or "random"; only for data without a validation split.
        shots: maximum number of images per class in train, chosen at random after validation is split off.
        seed: seed of synthetic_leaves, and the default of `split_seed`.
        split_seed: seed of a random validation split and of `shots`; `seed` by default.
        streaming: return an `IterableDatasetDict` that reads the data during iteration. Tables of the Hub and parquet files
            are then not read in advance: `shots` and a validation split, which need the labels of all images, raise an error,
            and the classes must come from a `ClassLabel` or from `class_names`. Files in a folder are listed, but not read.
        verify: decode every image before returning. By default only for local folders that are not streamed.
        csv_train, csv_validation, csv_test: names of CSV, JSONL or parquet files in the folder that list images. If one is
            given, only the given ones are read:
            `csv_train="train_val.csv", csv_test="test.csv", validation_fraction=0` trains on all images of train_val.
        csv_data_folder: folder that the listed files are relative to, itself relative to `name_or_path`. By default
            `name_or_path`, or the subfolder that has more of the listed images.
        csv_class_names: name of the CSV file with class names, `classid_classname.csv` by default.
        config_name, revision: configuration and revision of a data set on the Hub.
        cache_dir: folder for data that are drawn, converted from parquet or downloaded; by default the cache of `datasets`.
        synthetic_kwargs: `num_classes`, `images_per_class`, `image_size`, `difficulty` of synthetic_leaves.

    An argument that has no effect on the layout of the data is named in a warning.

    Raises:
        DatasetError: if the folder, its images, classes, columns or class ids cannot be used. A subclass of `ValueError`.
        ValueError: if an argument is out of range.
    """
    source = os.fspath(name_or_path)
    _check_names(synthetic_kwargs)
    check_split_arguments(validation_fraction, validation_split or "last", shots)
    check_class_names(class_names)
    if label_separator == "":
        raise ValueError("`label_separator` must be at least one character, got ''.")
    if streaming and verify:
        raise ValueError("`verify=True` cannot be combined with `streaming`: it reads every image in advance.")
    split_seed = seed if split_seed is None else split_seed
    given = Source(
        source,
        Path(os.path.expanduser(source)),
        {"image_column": image_column, "label_column": label_column},
        label_separator=label_separator,
        known_classes=class_names is not None,
        listings={"train": csv_train, "validation": csv_validation, "test": csv_test},
        csv_data_folder=None if csv_data_folder is None else os.fspath(csv_data_folder),
        csv_class_names=csv_class_names,
        config_name=config_name,
        revision=revision,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        streaming=streaming,
        seed=seed,
        drawing=synthetic_kwargs,
    )
    values = {"csv_train": csv_train, "csv_validation": csv_validation, "csv_test": csv_test}
    values |= {"csv_data_folder": csv_data_folder, "csv_class_names": csv_class_names}
    values |= {"config_name": config_name, "revision": revision, **synthetic_kwargs}
    layout = _layout_of(given)
    check_options(layout, [name for name, value in values.items() if value is not None], _REQUIREMENTS)
    opened = layout.opens(given)

    rename = dict(opened.entry.splits) if opened.entry else None
    splits = our_columns(our_splits(opened.data, source, rename), source, **opened.columns)
    check_options(splits, () if validation_split is None else ("validation_split",), [_PARTS_TRAIN])
    separator = None if opened.labels_split else label_separator
    if isinstance(next(iter(splits.values())), datasets.IterableDataset):
        if shots is not None:
            _raise_for_stream("`shots`", source)
        if validation_fraction and "train" in splits and "validation" not in splits:
            _raise_for_stream("`validation_fraction` (without a validation split; set it to 0)", source)
        return unify_stream_labels(splits, source, class_names, separator)

    options = {"class_names": class_names, "id_names": opened.id_names, "separator": separator}
    splits = datasets.DatasetDict(unify_labels(splits, source, **options))
    if opened.entry is not None:
        _check_counts(splits, opened.entry)
    splits = add_validation(splits, source, validation_fraction, validation_split or "last", split_seed)
    if shots is not None:
        splits = limit_shots(splits, source, shots, split_seed)
    if verify if verify is not None else given.is_folder and not streaming:
        verify_images(splits, where=functools.partial(_image_place, splits, opened.where))
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    logger.info("%s: %d classes, images: %s", source, _num_classes(splits), sizes)
    return to_stream(splits) if streaming else splits
