"""One function from any layout of photos to a checked `DatasetDict` with `image` and `label`.

Read are: the drawn data set `"synthetic_leaves"`, folders of class folders (with or without split folders), CSV (as of the
original research code), JSONL and parquet files that list images, folders of `save_to_disk` or of parquet files, names of the
table in `ufgir.data.catalog`, and ids on the Hugging Face Hub. docs/datasets.md draws them all.
What is wrong with the data is said before any training, and by name.
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
    """A way in which data may lie somewhere.

    Attributes:
        title: what it is, for messages.
        recognizes: whether a source is of this layout; asked in the order of `LAYOUTS`.
        opens: reads it.
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

# The first that recognizes a source opens it. One more layout: a record here, and a module with its two functions.
LAYOUTS = (
    Layout(f"`{SYNTHETIC_LEAVES}`", _is_drawn, _open_drawn, _OF_DRAWING),
    Layout("a folder written by `save_to_disk`", is_saved, open_saved),
    Layout("a folder of images that files list", has_listings, open_listings, _OF_LISTINGS),
    Layout("a folder of parquet files that hold images", has_parquet, open_parquet),
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
    """DatasetError for an argument that no layout has."""
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
    """The layout of a source; DatasetError for a file."""
    if source.path.is_file() and source.name != SYNTHETIC_LEAVES:
        raise DatasetError(
            f"{argument('name_or_path')} must be a folder, got the file {source.path}: give the folder it is in, and name the "
            f"file in {argument('csv_train')} if it lists images."
        )
    return next(layout for layout in LAYOUTS if layout.recognizes(source))


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


def _where(splits: datasets.DatasetDict, where: Callable[[str, int], str] | None, split: str, row: int) -> str:
    """What to call an image of a table: its file and its row there, also where the split is a part of another."""
    chosen = splits[split]._indices  # of `select`, which divides train
    row = row if chosen is None else chosen.column(0)[row].as_py()
    source = "train" if split == "validation" and chosen is not None else split
    return where(source, row) if where else f"{source} row {row}"


def _refuse_for_stream(what: str, source: str) -> NoReturn:
    raise DatasetError(
        f"`streaming`: {what} needs the labels of all images of {source} before the first is read: leave it out, or do not "
        "stream."
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

    An argument that has no effect on the layout of the data is named in a warning.

    Raises:
        DatasetError: the folder, its images, classes, columns or class ids cannot be used. A `ValueError`.
        ValueError: an argument is out of range.
    """
    source = os.fspath(name_or_path)
    _check_names(synthetic_kwargs)
    check_split_arguments(validation_fraction, validation_split or "last", shots)
    check_class_names(class_names)
    if label_separator == "":
        raise ValueError("`label_separator` must be at least one character, got ''.")
    if streaming and verify:
        raise ValueError("`verify` reads every image before the first is used: leave it out with `streaming`.")
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
    if verify if verify is not None else given.is_folder and not streaming:
        verify_images(splits, where=functools.partial(_where, splits, opened.where))
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    logger.info("%s: %d classes, images: %s", source, _num_classes(splits), sizes)
    return to_stream(splits) if streaming else splits
