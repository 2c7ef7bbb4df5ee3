"""One function from any layout of leaf photos to a checked `DatasetDict` with `image` and `label`.

Read are: the drawn data set `"synthetic_leaves"`, folders of class folders (with or without split folders), the CSV layout of
the original research code (`class_id,dir`), folders of `save_to_disk` or of parquet files, and ids on the Hugging Face Hub.
What is wrong with the data is said before any training, and by name.
"""

import csv
import difflib
import inspect
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm

from dataset_scripts.synthetic_leaves import synthetic_leaves


logger = logging.getLogger(__name__)

SYNTHETIC_LEAVES = "synthetic_leaves"
SPLIT_NAMES = {  # ours: what folders and files may call it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IMAGE_COLUMNS = ("image", "img", "picture", "photo")  # tried in this order
LABEL_COLUMNS = ("label", "labels", "class_id", "class", "target", "cultivar", "fine_label")
CLASS_NAMES_CSV = "classid_classname.csv"
LISTED = 20  # names that one message lists at most

Rows = list[tuple[Path, int]]  # (file, class id)


class DatasetError(ValueError):
    """The data cannot be used as they are; the message names what is wrong."""


def _listed(names: Iterable[Any]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _split_of(name: str) -> str | None:
    """Our name for the split that others call `name`; None if it is no split."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def _from_rows(splits: dict[str, Rows], class_names: Sequence[str]) -> datasets.DatasetDict:
    label = datasets.ClassLabel(names=list(class_names))
    features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": label})
    columns = {
        split: {"image": [str(file) for file, _ in rows], "label": [class_id for _, class_id in rows]}
        for split, rows in splits.items()
    }
    return datasets.DatasetDict({s: datasets.Dataset.from_dict(c, features=features) for s, c in columns.items()})


def _check_same_classes(classes: dict[str, set[Any]], source: str, may_lack: bool = False) -> None:
    """The classes of each split must be those of the first one (train, if there is one).

    With `may_lack` a split may lack some of them: that is logged, not refused.
    """
    first, reference = next(iter(classes.items()))
    problems = []
    for split, present in classes.items():
        if added := sorted(present - reference, key=str):
            problems.append(f"{split} has {_listed(added)}, which {first} lacks")
        if lacking := sorted(reference - present, key=str):
            if may_lack:
                logger.warning("%s: %s has no image of %d classes: %s", source, split, len(lacking), _listed(lacking))
            else:
                problems.append(f"{split} lacks {_listed(lacking)}, which {first} has")
    if problems:
        raise DatasetError(f"{source}: classes differ between splits: {'; '.join(problems)}.")


# Image folders


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    return sorted(file for file in files if not file.name.startswith("."))


def _split_folders(path: Path) -> dict[str, Path]:
    """Split to folder; `path` itself is train if it holds class folders."""
    children = _folders(path)
    splits = [_split_of(child.name) for child in children]
    if "train" not in splits and (None in splits or not splits):
        return {"train": path}
    found: dict[str, Path] = {}
    for child, split in zip(children, splits, strict=True):
        if split is None:
            allowed = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
            raise DatasetError(f"{path} holds split folders, but {child.name} is not one of {allowed}.")
        if split in found:
            raise DatasetError(f"{path} holds two folders for the {split} split: {found[split].name}, {child.name}.")
        found[split] = child
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _load_image_folder(path: Path) -> datasets.DatasetDict:
    """split/class/image or class/image."""
    roots = _split_folders(path)
    images = {split: {folder.name: _images(folder) for folder in _folders(root)} for split, root in roots.items()}
    if not any(files for classes in images.values() for files in classes.values()):
        raise DatasetError(
            f"{path} holds no images. Expected split/class/image or class/image with one of the suffixes "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, or a CSV, parquet or save_to_disk layout."
        )
    empty = [roots[split] / name for split, classes in images.items() for name, files in classes.items() if not files]
    if empty:
        raise DatasetError(f"{path}: class folders without images: {_listed(f.relative_to(path) for f in empty)}.")
    _check_same_classes({split: set(classes) for split, classes in images.items()}, str(path))
    names = sorted(next(iter(images.values())))
    rows = {
        split: [(file, class_id) for class_id, name in enumerate(names) for file in classes[name]]
        for split, classes in images.items()
    }
    return _from_rows(rows, names)


# CSV files of the original research code


def _read_csv(file: Path, columns: Sequence[str]) -> list[list[str]]:
    """The values of `columns` of every row, as text."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = list(reader.fieldnames or [])
            if lacking := [column for column in columns if column not in header]:
                raise DatasetError(
                    f"{file} lacks the column {', '.join(lacking)}. Available: {', '.join(header) or 'no header'}."
                )
            return [[(row[column] or "").strip() for column in columns] for row in reader]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text: {error}.") from error


def _class_id(text: str, file: Path, row: int) -> int:
    try:
        class_id = int(text)
    except ValueError:
        raise DatasetError(f"{file}: `class_id` in row {row} must be an integer, got {text!r}.") from None
    if class_id < 0:
        raise DatasetError(f"{file}: `class_id` in row {row} must be at least 0, got {class_id}.")
    return class_id


def _csv_files(path: Path, given: dict[str, str | None]) -> dict[str, Path]:
    """Split to CSV file: the files that the caller names, and only those; else those with the usual names."""
    if any(given.values()):
        files = {split: path / name for split, name in given.items() if name}
        for split, file in files.items():
            if not file.is_file():
                present = _listed(sorted(f.name for f in path.glob("*.csv"))) or "none"
                raise DatasetError(f"`csv_{split}`: {file} does not exist. CSV files in {path}: {present}.")
        return files
    files = {}
    for split, names in SPLIT_NAMES.items():
        if file := next((path / f"{name}.csv" for name in names if (path / f"{name}.csv").is_file()), None):
            files[split] = file
    if not {"train", "validation"} <= set(files) and (path / "train_val.csv").is_file():
        files.pop("validation", None)  # both are parts of train_val.csv
        files = {"train": path / "train_val.csv", **{s: f for s, f in files.items() if s != "train"}}
    return files


def _load_csv(
    path: Path, files: dict[str, Path], data_folder: str | os.PathLike | None, class_names: str | None
) -> datasets.DatasetDict:
    """`class_id,dir` rows; `dir` is relative to the data folder."""
    rows: dict[str, list[tuple[int, str]]] = {}
    for split, file in files.items():
        pairs = _read_csv(file, ("class_id", "dir"))
        if not pairs:
            raise DatasetError(f"{file} lists no images.")
        rows[split] = [(_class_id(text, file, row), name) for row, (text, name) in enumerate(pairs, start=2)]

    first = next(iter(rows))
    _check_same_classes({split: {class_id for class_id, _ in pairs} for split, pairs in rows.items()}, str(path))
    ids = {class_id for class_id, _ in rows[first]}
    if lacking := sorted(set(range(max(ids) + 1)) - ids):
        raise DatasetError(
            f"{files[first]}: class ids must run from 0 to {max(ids)} without a gap; no image has {_listed(lacking)}."
        )
    uses = Counter(name for pairs in rows.values() for name in {name for _, name in pairs})
    if shared := sorted(name for name, count in uses.items() if count > 1):
        raise DatasetError(f"{path}: images listed in more than one split: {_listed(shared)}.")

    if data_folder is not None:
        root = path / data_folder
        if not root.is_dir():
            raise DatasetError(f"`csv_data_folder`: {root} is not a folder.")
    else:
        sample = rows[first][0][1]
        root = next((folder for folder in (path, *_folders(path)) if (folder / sample).is_file()), path)
    if missing := [name for pairs in rows.values() for _, name in pairs if not (root / name).is_file()]:
        raise DatasetError(
            f"{path}: {len(missing)} listed images are not in {root} (see `csv_data_folder`): {_listed(missing)}."
        )

    names_file = path / (class_names or CLASS_NAMES_CSV)
    names = [str(class_id) for class_id in sorted(ids)]
    if names_file.is_file():
        pairs = _read_csv(names_file, ("class_id", "class_name"))
        by_id = {_class_id(text, names_file, row): name for row, (text, name) in enumerate(pairs, start=2)}
        if lacking := sorted(ids - set(by_id)):
            raise DatasetError(f"{names_file} has no name for class {_listed(lacking)}.")
        names = [by_id[class_id] for class_id in sorted(ids)]
        if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
            raise DatasetError(f"{names_file} gives several classes the name {_listed(repeated)}.")
    elif class_names:
        raise DatasetError(f"`csv_class_names`: {names_file} does not exist.")
    return _from_rows({s: [(root / name, class_id) for class_id, name in pairs] for s, pairs in rows.items()}, names)


# Tables: parquet, save_to_disk, Hub


def _load_parquet(path: Path, files: Sequence[Path], cache_dir: str | None) -> datasets.DatasetDict:
    """A file belongs to the split that its name or its folder's name contains as a word."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [
            w for part in reversed(file.relative_to(path).with_suffix("").parts) for w in re.split(r"[^A-Za-z]+", part)
        ]
        split = next((found for word in words if (found := _split_of(word))), None)
        splits.setdefault(split or "", []).append(str(file))
    if "" in splits:
        if len(splits) > 1:
            raise DatasetError(f"{path}: parquet files whose names tell no split: {_listed(splits[''])}.")
        splits = {"train": splits[""]}
    return datasets.load_dataset("parquet", data_files=splits, cache_dir=cache_dir)


def _load_hub(name: str, config_name: str | None, revision: str | None, cache_dir: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(name, config_name, revision=revision, cache_dir=cache_dir)
    except (OSError, datasets.exceptions.DatasetsError) as error:  # not found, no access, offline
        raise DatasetError(
            f"`name_or_path` must be {SYNTHETIC_LEAVES!r}, a folder, or a dataset on the Hub, got {name!r}: there is no "
            f"such folder, and loading it from the Hub failed ({type(error).__name__}: {error})."
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
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    candidates = [name for name in usual if name in of_kind] or (of_kind if len(of_kind) == 1 else [])
    candidates = candidates or [name for name in usual if name in features and not of_kind]
    if not candidates:
        raise DatasetError(f"No {role} column found: name it in `{role}_column`. Available: {', '.join(features)}.")
    return candidates[0]


def _unify(
    loaded: datasets.DatasetDict | datasets.Dataset, source: str, image_column: str | None, label_column: str | None
) -> datasets.DatasetDict:
    """Our split names, the two columns `image` and `label`, and one list of class names."""
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    ours: dict[str, datasets.Dataset] = {}
    for name, split in loaded.items():
        known = _split_of(name)
        if known is None:
            logger.warning("%s: split %s is left out: it is not train, validation or test", source, name)
        elif known in ours:
            raise DatasetError(f"{source} has more than one {known} split: {', '.join(loaded)}.")
        elif not len(split):
            raise DatasetError(f"{source}: the {name} split is empty.")
        else:
            ours[known] = split
    if not ours:
        raise DatasetError(f"{source} has no train, validation or test split. Available: {', '.join(loaded)}.")
    ours = {split: ours[split] for split in SPLIT_NAMES if split in ours}

    for name, split in ours.items():
        image = _find_column(split.features, "image", image_column, datasets.Image, IMAGE_COLUMNS, name)
        label = _find_column(split.features, "label", label_column, datasets.ClassLabel, LABEL_COLUMNS, name)
        if image == label:
            raise DatasetError(f"`image_column` and `label_column` are both {image!r}.")
        split = split.select_columns([image, label])
        renamed = {old: new for old, new in ((image, "image"), (label, "label")) if old != new}
        split = split.rename_columns(renamed) if renamed else split
        try:
            ours[name] = split.cast_column("image", datasets.Image(mode="RGB"))
        except (TypeError, ValueError, NotImplementedError) as error:  # what Arrow raises for a cast it does not know
            raise DatasetError(
                f"{source}: column {image!r} of the {name} split does not hold images: {error}."
            ) from error
    return datasets.DatasetDict(_unify_labels(ours, source))


def _unify_labels(splits: dict[str, datasets.Dataset], source: str) -> dict[str, datasets.Dataset]:
    """`label` as a `ClassLabel` with the same names in every split."""
    first = next(iter(splits))
    kinds = {name: split.features["label"] for name, split in splits.items()}
    for name, kind in kinds.items():
        if not isinstance(kind, datasets.ClassLabel | datasets.Value):
            raise DatasetError(
                f"{source}: the label column of {name} must be ClassLabel, text or integers, got {kind}."
            )
        if type(kind) is not type(kinds[first]):
            raise DatasetError(f"{source}: labels are {kinds[first]} in {first}, but {kind} in {name}.")
    labels = {name: set(split.unique("label")) for name, split in splits.items()}
    if isinstance(kinds[first], datasets.ClassLabel):
        names = kinds[first].names
        _check_same_classes({name: set(kind.names) for name, kind in kinds.items()}, source)
        if unordered := [name for name, kind in kinds.items() if kind.names != names]:
            raise DatasetError(f"{source}: {', '.join(unordered)} lists the same classes as {first} in another order.")
        for name, present in labels.items():
            if unknown := sorted(
                {label for label in present if label is None or not 0 <= label < len(names)}, key=str
            ):
                raise DatasetError(f"{source}: {name} has images without a class: label {_listed(unknown)}.")
        _check_same_classes({n: {names[label] for label in present} for n, present in labels.items()}, source, True)
        return splits
    for name, present in labels.items():
        types = {type(label) for label in present}
        if types not in ({int}, {str}):
            found = ", ".join(sorted(kind.__name__ for kind in types))
            raise DatasetError(f"{source}: labels of {name} must be all integers or all text, got {found}.")
    _check_same_classes(labels, source, True)
    values = sorted(labels[first])
    if isinstance(values[0], int) and values != list(range(len(values))):
        raise DatasetError(
            f"{source}: integer labels must run from 0 to {len(values) - 1} without a gap, got {_listed(values)}."
        )
    feature = datasets.ClassLabel(names=[str(value) for value in values])
    return {name: split.cast_column("label", feature) for name, split in splits.items()}


# What is public


def _split_train(train: datasets.Dataset, fraction: float) -> tuple[list[int], list[int]]:
    """Row numbers for train and validation: the last `fraction` of each class, in the order of the rows."""
    members: dict[int, list[int]] = {}
    for row, label in enumerate(train["label"]):
        members.setdefault(label, []).append(row)
    kept = [rows[: max(1, int(len(rows) * (1 - fraction) + 1e-9))] for rows in members.values()]
    keep = {row for rows in kept for row in rows}
    return sorted(keep), [row for row in range(len(train)) if row not in keep]


def _problem(image: dict[str, Any]) -> str | None:
    """Why the undecoded `image` cannot be read; None if it can."""
    try:
        source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        with Image.open(source) as opened:
            opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        return f"{type(error).__name__}: {error}"
    return None


def verify_images(dataset_dict: datasets.DatasetDict, num_threads: int | None = None) -> int:
    """Decodes every image once, with a progress bar.

    Args:
        dataset_dict: splits with a column `image`.
        num_threads: threads that decode at the same time; by default the number of cores, at most 8.

    Returns:
        The number of images.

    Raises:
        DatasetError: some images cannot be read; all of them are named.
    """
    total = sum(len(split) for split in dataset_dict.values())
    broken: list[str] = []
    workers = num_threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, desc="Verifying images", unit="image") as progress:
        for name, split in dataset_dict.items():
            raw = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
            row = 0
            for batch in raw.iter(batch_size=64):
                for image, problem in zip(batch["image"], pool.map(_problem, batch["image"]), strict=True):
                    if problem is not None:
                        broken.append(f"{name} row {row} ({image['path'] or 'no path'}): {problem}")
                    row += 1
                    progress.update()
    if broken:
        raise DatasetError("\n  ".join([f"{len(broken)} of {total} images cannot be read:", *broken]))
    return total


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


def load_ufgir_dataset(
    name_or_path: str | os.PathLike,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
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
) -> datasets.DatasetDict:
    """Any of the layouts below as splits train / validation / test with the columns `image` (RGB) and `label`.

    `name_or_path` is one of:
      - `"synthetic_leaves"`, drawn here, with the arguments of `dataset_scripts.synthetic_leaves.synthetic_leaves`;
      - a folder split/class/image, or class/image, which is all train;
      - a folder with `train.csv`, `val.csv`, `test.csv` with the columns `class_id,dir`. `train_val.csv` stands in where
        `train.csv` or `val.csv` is missing. `classid_classname.csv` (`class_id,class_name`) may name the classes;
      - a folder written by `save_to_disk`, or one of parquet files whose names tell the split;
      - a dataset on the Hub.

    Without a validation split, the LAST `validation_fraction` of each class of train, in the order of its rows, becomes one:
    of n images the first int(n * (1 - validation_fraction)) stay, but at least one, so that a class with a single image
    stays in train. Nothing is shuffled. A missing test split stays missing, and so does a missing train split.

    Args:
        image_column: the column with the images; by default found by its type, then by its name.
        label_column: the column with the classes (`ClassLabel`, text, or integers from 0), found likewise.
        validation_fraction: in [0, 1); 0 makes no validation split.
        seed: of synthetic_leaves; nothing else is random.
        verify: decode every image first. By default only what lies in a local folder.
        csv_train, csv_validation, csv_test: names of CSV files in the folder. If one is given, only the given ones are read:
            `csv_train="train_val.csv", csv_test="test.csv", validation_fraction=0` trains on all there is.
        csv_data_folder: what the CSV's `dir` is relative to, itself relative to `name_or_path`. By default that folder, or the
            first folder in it that has the first image.
        csv_class_names: name of the CSV file with the class names, if not `classid_classname.csv`.
        config_name, revision: of a dataset on the Hub.
        cache_dir: where `datasets` keeps what is drawn, converted from parquet or downloaded; by default its own cache.
        synthetic_kwargs: `num_classes`, `images_per_class`, `image_size`, `difficulty` of synthetic_leaves.

    Raises:
        DatasetError: the folder, its images, classes, columns or class ids cannot be used. A `ValueError`.
        ValueError: an argument is out of range.
    """
    source = os.fspath(name_or_path)
    _refuse_unknown(synthetic_kwargs, source)
    if isinstance(validation_fraction, bool) or not 0 <= validation_fraction < 1:
        raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}.")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    csv_given = {"train": csv_train, "validation": csv_validation, "test": csv_test}
    path = Path(source).expanduser()
    local = source != SYNTHETIC_LEAVES and path.exists()

    if source == SYNTHETIC_LEAVES:
        loaded = synthetic_leaves(seed=seed, cache_dir=cache, **synthetic_kwargs)
    elif not local:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
            raise DatasetError(f"`name_or_path`: the folder {source} does not exist.")
        loaded = _load_hub(source, config_name, revision, cache)
    elif not path.is_dir():
        raise DatasetError(f"`name_or_path` must be a folder, got the file {source}.")
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = datasets.load_from_disk(path)
    elif csv_files := _csv_files(path, csv_given):
        loaded = _load_csv(path, csv_files, csv_data_folder, csv_class_names)
    elif parquet := sorted(path.rglob("*.parquet")):
        loaded = _load_parquet(path, parquet, cache)
    else:
        loaded = _load_image_folder(path)
    splits = _unify(loaded, source, image_column, label_column)

    if "train" in splits and "validation" not in splits and validation_fraction:
        train, validation = _split_train(splits["train"], validation_fraction)
        if validation:
            parts = {"train": splits["train"].select(train), "validation": splits["train"].select(validation)}
            splits = datasets.DatasetDict({**parts, **{s: d for s, d in splits.items() if s != "train"}})
        else:
            logger.warning("%s: no class has an image to spare for validation", source)
    if local if verify is None else verify:
        verify_images(splits)
    sizes = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    logger.info("%s: %d classes, images: %s", source, next(iter(splits.values())).features["label"].num_classes, sizes)
    return splits
