"""Files that list images and their classes, one a row: CSV (as of the original research code), JSONL and parquet."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from .checks import SPLIT_NAMES, DatasetError, listed
from .folders import child_folders
from .labels import as_lists
from .sources import Opened, Source
from .tables import parquet_files, parquet_splits


SUFFIXES = (".csv", ".jsonl", ".parquet")
PATH_COLUMNS = ("dir", "file_name", "filename", "file", "path", "image", "image_path")  # tried in this order
LABEL_COLUMNS = ("class_id", "label", "labels", "class", "classes", "target", "cultivar")
CLASS_NAMES_CSV = "classid_classname.csv"


@dataclass(frozen=True)
class _Row:
    number: int  # in the file, as an editor counts
    file: str
    label: Any


def listing_files(path: Path, given: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Split to listing: the files that the caller names, and only those; else the CSV or JSONL files with usual names."""
    if any(given.values()):
        files = {split: path / name for split, name in given.items() if name}
        for split, file in files.items():
            if not file.is_file():
                present = listed(sorted(f.name for f in path.iterdir() if f.suffix in SUFFIXES)) or "none"
                raise DatasetError(f"`csv_{split}`: {file} does not exist. Listings in {path}: {present}.")
            if file.suffix not in SUFFIXES:
                raise DatasetError(f"`csv_{split}` must end in {', '.join(SUFFIXES)}, got {file.name}.")
        return {split: [file] for split, file in files.items()}
    for suffix in SUFFIXES[:2]:
        files = {}
        for split, names in SPLIT_NAMES.items():
            candidates = (path / f"{name}{suffix}" for name in names)
            if file := next((candidate for candidate in candidates if candidate.is_file()), None):
                files[split] = file
        both = path / f"train_val{suffix}"
        if not {"train", "validation"} <= set(files) and both.is_file():
            files.pop("validation", None)  # both are parts of train_val
            files = {"train": both, **{s: f for s, f in files.items() if s != "train"}}
        if files:
            return {split: [file] for split, file in files.items()}
    return {}


def lists_files(file: Path, image_column: str | None) -> bool:
    """Whether a parquet file holds names of image files, not images."""
    schema = _parquet_schema(file)
    name = image_column or next((column for column in PATH_COLUMNS if column in schema.names), None)
    if name not in schema.names:
        return False
    kind = schema.field(name).type
    images = [field for field in schema if pyarrow.types.is_struct(field.type) or pyarrow.types.is_binary(field.type)]
    return (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)) and (
        image_column is not None or not images
    )


def has_listings(source: Source) -> bool:
    """Whether files in the folder list images: CSV, JSONL, or parquet files that hold no images themselves."""
    return source.is_folder and bool(_listings_of(source))


def open_listings(source: Source) -> Opened:
    """The layout of images that files list, for the table in `ufgir.data.load`."""
    data, id_names = load_listings(
        source.path,
        _listings_of(source),
        **source.columns,
        label_separator=source.label_separator,
        data_folder=source.csv_data_folder,
        class_names_file=source.csv_class_names,
    )
    return Opened(data, {"image_column": None, "label_column": None}, id_names, labels_split=True)


def _listings_of(source: Source) -> dict[str, list[Path]]:
    """Split to the files that list its images; empty if there are none."""
    if files := listing_files(source.path, source.listings):
        return files
    parquet = parquet_files(source.path)
    if parquet and lists_files(parquet[0], source.columns["image_column"]):
        return parquet_splits(source.path, parquet)
    return {}


def _parquet_schema(file: Path) -> pyarrow.Schema:
    try:
        return pyarrow.parquet.read_schema(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{file} is not a parquet file: {error}.") from error


def _choose(
    header: Sequence[str], given: str | None, usual: Sequence[str], role: str, file: Path, strict: str | None = None
) -> str:
    """The column that the caller names, or the first with a usual name."""
    found = given if given in header else None
    if given is None:
        found = next((name for name in usual if name in header), None)
    if found is None:
        wanted = given or f"{strict} (or {', '.join(name for name in usual if name != strict)})"
        hint = "" if given else f": name another in `{role}_column`"
        raise DatasetError(f"{file} lacks the column {wanted}{hint}. Available: {', '.join(header) or 'no header'}.")
    return found


def _columns(header: Sequence[str], file: Path, columns: Mapping[str, str | None]) -> tuple[str, str]:
    image = _choose(header, columns["image"], PATH_COLUMNS, "image", file, "dir")
    label = _choose(header, columns["label"], LABEL_COLUMNS, "label", file, "class_id")
    if image == label:
        raise DatasetError(f"`image_column` and `label_column` are both {image!r}.")
    return image, label


def read_csv(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header, and the rows as text."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = list(reader.fieldnames or [])
            return header, [{k: (row[k] or "").strip() for k in header} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} is not a CSV file in UTF-8: {error}.") from error


def _read(file: Path, columns: Mapping[str, str | None]) -> tuple[list[_Row], str]:
    """The rows of one listing, and the name of its label column."""
    if file.suffix == ".csv":
        header, found = read_csv(file)
        image, label = _columns(header, file, columns)
        numbered = list(enumerate(found, start=2))
    elif file.suffix == ".jsonl":
        numbered = _read_jsonl(file)
        image, label = _columns(list(numbered[0][1]) if numbered else [], file, columns)
        for number, row in numbered:
            if lacking := [name for name in (image, label) if name not in row]:
                raise DatasetError(f"{file}: line {number} lacks {', '.join(lacking)}.")
    else:
        image, label = _columns(_parquet_schema(file).names, file, columns)
        numbered = list(enumerate(pyarrow.parquet.read_table(file, columns=[image, label]).to_pylist(), start=1))
    if not numbered:
        raise DatasetError(f"{file} lists no images.")
    for number, row in numbered:
        if not isinstance(row[image], str) or not row[image]:
            raise DatasetError(f"{file}: `{image}` in row {number} must name a file, got {row[image]!r}.")
    return [_Row(number, row[image], row[label]) for number, row in numbered], label


def _read_jsonl(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append((number, json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise DatasetError(f"{file}: line {number} must be a JSON object, got {line.strip()[:80]}.")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text: {error}.") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}: line {number} is not JSON: {error}.") from error
    return rows


def _class_id(text: str, file: Path, row: int) -> int:
    try:
        class_id = int(text)
    except ValueError:
        raise DatasetError(f"{file}: `class_id` in row {row} must be an integer, got {text!r}.") from None
    if class_id < 0:
        raise DatasetError(f"{file}: `class_id` in row {row} must be at least 0, got {class_id}.")
    return class_id


def _from_csv(rows: dict[str, list[tuple[Path, _Row]]], column: str) -> dict[str, list[Any]]:
    """The cells of a CSV's label column as integers, JSON lists or text, whichever all of them are."""
    cells = [row.label for pairs in rows.values() for _, row in pairs]
    if column == "class_id" and not any(cell.startswith("[") for cell in cells):
        return {
            split: [_class_id(row.label, file, row.number) for file, row in pairs] for split, pairs in rows.items()
        }
    if all(re.fullmatch(r"-?\d+", cell) for cell in cells):
        return {split: [int(row.label) for _, row in pairs] for split, pairs in rows.items()}
    if all(cell.startswith("[") and cell.endswith("]") for cell in cells):
        parsed: dict[str, list[Any]] = {split: [] for split in rows}
        for split, pairs in rows.items():
            for file, row in pairs:
                try:
                    parsed[split].append(json.loads(row.label))
                except json.JSONDecodeError as error:
                    raise DatasetError(f"{file}: `{column}` in row {row.number} is no JSON list: {error}.") from error
        return parsed
    return {split: [row.label for _, row in pairs] for split, pairs in rows.items()}


def _check_types(labels: Mapping[str, list[Any]], rows: Mapping[str, list[tuple[Path, _Row]]], column: str) -> None:
    """All labels are integers, all are text, or all are lists of either."""
    in_lists, kind = None, None
    for split, values in labels.items():
        for value, (file, row) in zip(values, rows[split], strict=True):
            where = f"{file}: `{column}` in row {row.number}"
            kinds = {type(part) for part in value} if isinstance(value, list) else {type(value)}
            if kinds - {int, str} or len(kinds) > 1:
                raise DatasetError(f"{where} must be an integer, a text, or a list of these, got {value!r}.")
            in_lists = isinstance(value, list) if in_lists is None else in_lists
            kind = kind or next(iter(kinds), None)
            if isinstance(value, list) != in_lists or kinds - {kind}:
                raise DatasetError(f"{where} is {value!r}: integers, texts and lists must not be mixed in a column.")


def _root(path: Path, data_folder: str | None, sample: str) -> Path:
    """The folder that listed files are relative to."""
    if data_folder is None:
        return next((folder for folder in (path, *child_folders(path)) if (folder / sample).is_file()), path)
    if not (path / data_folder).is_dir():
        raise DatasetError(f"`csv_data_folder`: {path / data_folder} is not a folder.")
    return path / data_folder


def _id_names(path: Path, given: str | None, ids: set[int]) -> dict[int, str] | None:
    """Class id to name, from a CSV file with `class_id,class_name`; None if there is no such file."""
    file = path / (given or CLASS_NAMES_CSV)
    if not file.is_file():
        if given:
            raise DatasetError(f"`csv_class_names`: {file} does not exist.")
        return None
    header, rows = read_csv(file)
    if lacking := [name for name in ("class_id", "class_name") if name not in header]:
        raise DatasetError(
            f"{file} lacks the column {', '.join(lacking)}. Available: {', '.join(header) or 'no header'}."
        )
    names = {_class_id(row["class_id"], file, number): row["class_name"] for number, row in enumerate(rows, start=2)}
    if lacking := sorted(ids - set(names)):
        raise DatasetError(f"{file} has no name for class {listed(lacking)}.")
    counts = Counter(names[class_id] for class_id in ids)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise DatasetError(f"{file} gives several classes the name {listed(repeated)}.")
    return names


def load_listings(
    path: Path,
    files: Mapping[str, Sequence[Path]],
    *,
    image_column: str | None,
    label_column: str | None,
    label_separator: str | None,
    data_folder: str | None,
    class_names_file: str | None,
) -> tuple[datasets.DatasetDict, dict[int, str] | None]:
    """The listed images and their labels as they are: integers, text, or lists of these; and names of integers.

    Raises:
        DatasetError: a file cannot be read, lacks a column, or lists images that are not there or in two splits.
    """
    rows: dict[str, list[tuple[Path, _Row]]] = {}
    columns = {"image": image_column, "label": label_column}
    for split, parts in files.items():
        rows[split] = []
        for file in parts:
            found, column = _read(file, columns)
            rows[split] += [(file, row) for row in found]
    labels: dict[str, list[Any]] = {split: [row.label for _, row in pairs] for split, pairs in rows.items()}
    if label_separator is None and all(file.suffix == ".csv" for parts in files.values() for file in parts):
        labels = _from_csv(rows, column)
    _check_types(labels, rows, column)
    if label_separator is not None:
        every = [label for values in labels.values() for label in values]
        if not isinstance(every[0], str):
            raise DatasetError(
                f"`label_separator` splits text, but `{column}` of {path} has {every[0]!r}: leave it out."
            )
        parts = iter(as_lists(every, label_separator))
        labels = {split: [next(parts) for _ in values] for split, values in labels.items()}

    uses = Counter(name for pairs in rows.values() for name in {row.file for _, row in pairs})
    if shared := sorted(name for name, count in uses.items() if count > 1):
        raise DatasetError(f"{path}: images listed in more than one split: {listed(shared)}.")
    names = [row.file for pairs in rows.values() for _, row in pairs]
    root = _root(path, data_folder, names[0])
    if missing := [name for name in names if not (root / name).is_file()]:
        raise DatasetError(
            f"{path}: {len(missing)} listed images are not in {root} (see `csv_data_folder`): {listed(missing)}."
        )

    flat = [part for v in labels.values() for label in v for part in (label if isinstance(label, list) else [label])]
    integers = bool(flat) and all(isinstance(label, int) for label in flat)
    if class_names_file and not integers:
        raise DatasetError("`csv_class_names` names classes given as integers, but here classes are given as text.")
    id_names = _id_names(path, class_names_file, set(flat)) if integers else None
    value: Any = datasets.Value("int64" if integers else "string")
    lists = any(isinstance(label, list) for values in labels.values() for label in values)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(value) if lists else value})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [str(root / row.file) for _, row in pairs], "label": labels[split]}, features=features
            )
            for split, pairs in rows.items()
        }
    ), id_names
