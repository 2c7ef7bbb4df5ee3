"""Load data sets from files that list images and their classes, one per row: CSV (as in the original research code), JSONL and
parquet.

Files are compared, not their names: an image listed twice, also under two names or through a link, is found.
"""

import csv
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from ..utils.options import argument
from ..utils.text import counted
from .checks import SPLIT_NAMES, DatasetError, Use, distinct_uses, listed, split_of
from .image_files import IMAGE_SUFFIXES, Identity, child_folders, identity_of, is_hidden, is_utf8
from .labels import as_lists, is_plain_integer, without_fraction
from .sources import Opened, Source
from .tables import parquet_files, parquet_splits


logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = (",", ";", "\t")  # of CSV files; the first one that gives the wanted columns is used
PATH_COLUMNS = ("dir", "file_name", "filename", "file", "path", "image", "image_path")  # tried in this order
LABEL_COLUMNS = ("class_id", "label", "labels", "class", "classes", "target", "cultivar")
CLASS_NAMES_CSV = "classid_classname.csv"
METADATA = tuple(f"metadata{suffix}" for suffix in SUFFIXES)  # names of the listings of `imagefolder` in `datasets`
TABLES = (*SUFFIXES, ".txt", ".json", ".xls", ".xlsx", ".ods", ".xml")  # suffixes of files that may list images
# Text files that are never listings, by the start of their names.
_NO_LISTINGS = ("readme", "license", "licence", "copying", "citation", "changelog", "requirements")
_SAMPLED = 20  # listed files that are looked for to find the folder that all are relative to
_WORDS_OF_LABELS = ("label", "class", "cultivar", "variety", "species", "category", "target")


@dataclass(frozen=True)
class _Row:
    number: int  # line or row in the file, from 1
    file: str
    label: Any


def listing_files(path: Path, given: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Return split -> listing: only the files given by the caller, else CSV or JSONL files with the usual names."""
    if any(given.values()):
        files = {split: path / name for split, name in given.items() if name}
        for split, file in files.items():
            if not file.is_file():
                what = "is a folder" if file.is_dir() else "does not exist"
                present = listed(sorted(f.name for f in path.iterdir() if f.suffix in SUFFIXES)) or "none"
                raise DatasetError(f"{argument(f'csv_{split}')}: {file} {what}. Listings in {path}: {present}.")
            if file.suffix not in SUFFIXES:
                raise DatasetError(f"{argument(f'csv_{split}')} must end in {', '.join(SUFFIXES)}, got {file.name}.")
        return {split: [file] for split, file in files.items()}
    for suffix in SUFFIXES[:3]:
        files = {}
        usual = [f"{name}{suffix}" for name in ("train_val", *(n for names in SPLIT_NAMES.values() for n in names))]
        if folders := [name for name in usual if (path / name).is_dir()]:
            raise DatasetError(f"{path / folders[0]} is a folder with the name of a listing file. Rename it.")
        for split, names in SPLIT_NAMES.items():
            candidates = (path / f"{name}{suffix}" for name in names)
            if file := next((candidate for candidate in candidates if candidate.is_file()), None):
                files[split] = file
        both = path / f"train_val{suffix}"
        if not {"train", "validation"} <= set(files) and both.is_file():
            files.pop("validation", None)  # train_val contains both
            files = {"train": both, **{s: f for s, f in files.items() if s != "train"}}
        if files:
            return {split: [file] for split, file in files.items()}
    return {}


def metadata_files(path: Path, columns: Mapping[str, str | None]) -> dict[str, list[Path]]:
    """Return split -> `metadata` files in the format of `datasets`, next to the split folders or in them.

    Files without a class column (e.g. with captions) are ignored.
    """
    found: dict[str, list[Path]] = {}
    for folder, split in [(path, None), *((child, split_of(child.name)) for child in child_folders(path))]:
        for file in (folder / name for name in METADATA if folder == path or split):
            if file.is_file() and _has_labels(file, columns):
                found.setdefault(split or "", []).append(file)
                break
    return {"": found[""]} if "" in found else found


def _has_labels(file: Path, columns: Mapping[str, str | None]) -> bool:
    header = _header(file)
    return "file_name" in header and any(
        name in header for name in ([columns["label_column"]] if columns["label_column"] else LABEL_COLUMNS)
    )


def _header(file: Path) -> list[str]:
    """Return the column names of a listing; raise DatasetError if it cannot be read."""
    if file.suffix == ".parquet":
        return _parquet_schema(file).names
    if file.suffix != ".jsonl":
        return read_csv(file, rows=1)[0]
    try:
        with open(file, encoding="utf-8-sig") as stream:
            first = json.loads(next((line for line in stream if line.strip()), "{}"))
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{file} is not a JSON Lines file in UTF-8: {error}.") from error
    return list(first) if isinstance(first, dict) else []


def check_unused_tables(path: Path, files: Iterable[Path], used: Collection[Path] = ()) -> None:
    """Log a warning that names unused tables and text files.

    Args:
        path: the data folder.
        files: files in it or in its split folders.
        used: those of `files` that are used.

    Raises:
        DatasetError: if an unused table has columns of files and classes; the message says how to use it.
    """
    tables = [
        file
        for file in files
        if file.suffix.lower() in TABLES
        and file not in set(used)
        and not is_hidden(file.name)
        and not file.stem.lower().startswith(_NO_LISTINGS)
        and file.name not in (CLASS_NAMES_CSV, "prepare.json", "dataset_infos.json")
    ]
    for file in tables:
        if not used and (columns := _looks_like_listing(path, file)):
            name = os.path.relpath(file, path)
            raise DatasetError(
                f"{file} seems to list images ({columns[0]}) and their classes ({columns[1]}), but only files named train, "
                f"val, test or metadata are read automatically. Pass {argument('csv_train')} {name} (and "
                f"{argument('csv_validation')}, {argument('csv_test')}, {argument('image_column')}, "
                f"{argument('label_column')} if needed), or move it out of the folder to use the folder names as classes."
            )
    if tables:
        names = listed(os.path.relpath(file, path) for file in tables)
        logger.warning(
            "%s: not used: %s: %s", path, counted(len(tables), "table or text file", "tables or text files"), names
        )


def _looks_like_listing(path: Path, file: Path) -> tuple[str, str] | None:
    """Return the names of the file and class columns of a table, or None if it does not seem to have both."""
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        if file.suffix.lower() in (".jsonl", ".parquet"):
            header = _header(file)
        elif file.suffix.lower() in (".csv", ".tsv", ".txt"):
            header, rows = read_csv(file, rows=1)
        else:
            return None
    except DatasetError:
        return None
    row = rows[0][1] if rows else {}
    if file.suffix.lower() in (".csv", ".tsv", ".txt"):
        if len(header) == 1 and header[0].split()[1:]:  # columns separated by spaces
            header = header[0].split()
        first = [cell for cell in header if Path(cell).suffix.lower() in IMAGE_SUFFIXES]
        if first and len(header) > 1 and any((folder / first[0]).is_file() for folder in (path, *child_folders(path))):
            return f"{first[0]} in its first line, which should name the columns", header[header.index(first[0]) - 1]
    images = [name for name in header if Path(row.get(name, "")).suffix.lower() in IMAGE_SUFFIXES]
    images += [name for usual in PATH_COLUMNS for name in header if name.lower() == usual]
    labels = [
        name
        for name in header
        if name.lower() in LABEL_COLUMNS or any(word in name.lower() for word in _WORDS_OF_LABELS)
    ]
    labels = [name for name in labels if name not in images]
    return (f"`{images[0]}`", f"`{labels[0]}`") if images and labels else None


def lists_files(file: Path, image_column: str | None) -> bool:
    """Return whether a parquet file contains names of image files instead of images."""
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
    """Return whether files in the folder list images: CSV, JSONL, or parquet files without images."""
    return source.is_folder and bool(_listings_of(source))


def open_listings(source: Source) -> Opened:
    """Open images listed in files (an entry of `ufgir.data.load.LAYOUTS`)."""
    files = _listings_of(source)
    data, id_names = load_listings(
        source.path,
        files,
        **source.columns,
        label_separator=source.label_separator,
        data_folder=source.csv_data_folder,
        class_names_file=source.csv_class_names,
    )
    used = [file for parts in files.values() for file in parts]
    used += [source.path / f"{name}{used[0].suffix}" for name in ("train_val", "train", "val")]
    if source.csv_class_names:
        used.append(source.path / source.csv_class_names)
    if not any(source.listings.values()):  # no warning if the caller chose the listings
        check_unused_tables(source.path, sorted(file for file in source.path.iterdir() if file.is_file()), used)
    return Opened(data, {"image_column": None, "label_column": None}, id_names, labels_split=True)


def _listings_of(source: Source) -> dict[str, list[Path]]:
    """Return split -> files that list its images, "" for a file that lists several splits; empty if there are none."""
    if files := listing_files(source.path, source.listings):
        return files
    if files := metadata_files(source.path, source.columns):
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
    """Return the given column, or the first one with a usual name; raise DatasetError if there is none."""
    found = given if given in header else None
    if given is None:
        found = next((name for name in usual if name in header), None)
    if found is None:
        wanted = given or f"{strict} (or {', '.join(name for name in usual if name != strict)})"
        hint = "" if given else f"; pass another name as {argument(f'{role}_column')}"
        raise DatasetError(f"{file} lacks the column {wanted}{hint}. Available: {', '.join(header) or 'no header'}.")
    if list(header).count(found) > 1:
        raise DatasetError(f"{file} has more than one column {found}: {', '.join(header)}. Rename one of them.")
    return found


def _columns(header: Sequence[str], file: Path, columns: Mapping[str, str | None]) -> tuple[str, str]:
    usual = ("file_name", *PATH_COLUMNS) if file.name in METADATA else PATH_COLUMNS
    image = _choose(header, columns["image"], usual, "image", file, "dir")
    label = _choose(header, columns["label"], LABEL_COLUMNS, "label", file, "class_id")
    if image == label:
        raise DatasetError(f"`image_column` and `label_column` are both {image!r}.")
    return image, label


def _delimiter(first: str, wanted: Sequence[Sequence[str]]) -> str:
    """Return the first delimiter for which the header has one name of each group; else the first one in the header."""

    def cells(delimiter: str) -> set[str]:
        return {cell.strip().strip('"') for cell in first.strip().split(delimiter)}

    complete = (d for d in DELIMITERS if wanted and all(any(n in cells(d) for n in group) for group in wanted))
    several = (d for d in DELIMITERS if d in first)
    return next(complete, None) or next(several, ",")


def read_csv(
    file: Path, wanted: Sequence[Sequence[str]] = (), rows: int | None = None
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the header and the rows as (line number, column -> text).

    Args:
        file: columns are separated by commas, semicolons or tabs, detected from the header.
        wanted: groups of names; the header should have one name of each group.
        rows: maximum number of rows to read; None for all.

    Raises:
        DatasetError: if the file is not UTF-8 or not CSV, or a row has more cells than columns.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            delimiter = _delimiter(stream.readline(), wanted)
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter, skipinitialspace=True)
            header = [name.strip() for name in next((row for row in reader if row), [])]
            found: list[tuple[int, dict[str, str]]] = []
            for cells in reader:
                if rows is not None and len(found) == rows:
                    break
                if not cells:
                    continue
                if any(cell.strip() for cell in cells[len(header) :]):
                    raise DatasetError(
                        f"{file}: row {reader.line_num} has {len(cells)} cells, but there are {len(header)} columns. Put text that "
                        f"contains {delimiter!r} in double quotes."
                    )
                cells = [cell.strip() for cell in cells] + [""] * (len(header) - len(cells))
                found.append((reader.line_num, dict(zip(header, cells[: len(header)], strict=True))))
            return header, found
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{file} is not a CSV file in UTF-8: {error}.") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from error


def _read(file: Path, columns: Mapping[str, str | None]) -> tuple[list[_Row], str]:
    """Return the rows of a listing and the name of its label column."""
    if file.suffix in (".csv", ".tsv"):
        wanted = [[columns["image"]] if columns["image"] else PATH_COLUMNS]
        wanted += [[columns["label"]] if columns["label"] else LABEL_COLUMNS]
        header, numbered = read_csv(file, wanted)
        image, label = _columns(header, file, columns)
    elif file.suffix == ".jsonl":
        numbered = _read_jsonl(file)
        image, label = _columns(list(numbered[0][1]) if numbered else [], file, columns)
        for number, row in numbered:
            if lacking := [name for name in (image, label) if name not in row]:
                raise DatasetError(f"{file}: line {number} lacks {', '.join(lacking)}.")
    else:
        image, label = _columns(_parquet_schema(file).names, file, columns)
        try:
            table = pyarrow.parquet.read_table(file, columns=[image, label])
        except (pyarrow.ArrowException, OSError) as error:
            raise DatasetError(f"{file} cannot be read: {error}.") from error
        numbered = list(enumerate(table.to_pylist(), start=1))
    if not numbered:
        raise DatasetError(f"{file} lists no images.")
    for number, row in numbered:
        if not isinstance(row[image], str) or not row[image]:
            raise DatasetError(f"{file}: `{image}` in row {number} must name a file, got {row[image]!r}.")
        if not is_utf8(row[image]):
            raise DatasetError(f"{file}: `{image}` in row {number} is not UTF-8 text: {row[image]!a}.")
        if "\0" in row[image]:
            raise DatasetError(f"{file}: `{image}` in row {number} contains a null character: {row[image]!a}.")
    return [_Row(number, row[image], _whole_numbers(row[label])) for number, row in numbered], label


def _whole_numbers(label: Any) -> Any:
    """Convert whole floats to integers; tables with empty cells store 0 as 0.0."""
    if isinstance(label, list):
        return [_whole_numbers(part) for part in label]
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _read_jsonl(file: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    number = 0
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                rows.append((number, json.loads(line)))
                if not isinstance(rows[-1][1], dict):
                    raise DatasetError(f"{file}: line {number} must be a JSON object, got {line.strip()[:80]}.")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file} is not UTF-8 text: {error}.") from error
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror}.") from error
    except DatasetError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also for numbers with thousands of digits
        raise DatasetError(f"{file}: line {number} is not JSON: {error}.") from error
    return rows


def _class_id(text: str, file: Path, row: int) -> int:
    whole = without_fraction(text)
    if not is_plain_integer(whole):
        raise DatasetError(f"{file}: `class_id` in row {row} must be an integer, got {text[:80]!r}.")
    if int(whole) < 0:
        raise DatasetError(f"{file}: `class_id` in row {row} must be at least 0, got {whole}.")
    return int(whole)


def _from_csv(rows: dict[str, list[tuple[Path, _Row]]], column: str) -> dict[str, list[Any]]:
    """Convert all cells of a CSV label column to integers, to JSON lists, or leave them as text.

    They become integers if all are plain integers, or all are written as `7.0`; `007` is a name.
    """
    cells = [row.label for pairs in rows.values() for _, row in pairs]
    zeros = [cell for cell in cells if re.fullmatch(r"0[0-9]+", cell)]
    padded = bool(zeros) and all(re.fullmatch(r"[0-9]+", cell) for cell in cells)
    if column == "class_id" and not padded and not any(cell.startswith("[") for cell in cells):
        return {
            split: [_class_id(row.label, file, row.number) for file, row in pairs] for split, pairs in rows.items()
        }
    fractions = [without_fraction(cell) for cell in cells]
    if all(new != old for new, old in zip(fractions, cells, strict=True)) or all(map(is_plain_integer, cells)):
        return {split: [int(without_fraction(row.label)) for _, row in pairs] for split, pairs in rows.items()}
    if padded and len({len(cell) for cell in cells}) > 1:
        logger.warning(
            "`%s`: labels such as %s are names, sorted as text; earlier versions read them as numbers, sorted by value",
            *(column, zeros[0]),
        )
    if all(cell.startswith("[") and cell.endswith("]") for cell in cells):
        parsed: dict[str, list[Any]] = {split: [] for split in rows}
        for split, pairs in rows.items():
            for file, row in pairs:
                try:
                    parsed[split].append(json.loads(row.label))
                except (ValueError, RecursionError) as error:
                    raise DatasetError(
                        f"{file}: `{column}` in row {row.number} is not a JSON list: {error}."
                    ) from error
        return parsed
    return {split: [row.label for _, row in pairs] for split, pairs in rows.items()}


def _check_types(
    labels: Mapping[str, list[Any]], rows: Mapping[str, list[tuple[Path, _Row]]], column: str, separated: bool
) -> None:
    """Raise DatasetError unless all labels are integers, all are text, or all are lists of one of these.

    Empty text is allowed only with a separator (`separated`).
    """
    in_lists, kind = None, None
    for split, values in labels.items():
        for value, (file, row) in zip(values, rows[split], strict=True):
            where = f"{file}: `{column}` in row {row.number}"
            parts = value if isinstance(value, list) else [value]
            kinds = {type(part) for part in parts}
            if any(isinstance(part, int) and abs(part) >= 2**63 for part in parts):
                raise DatasetError(f"{where} must be an integer of at most 64 bits, or a text, got {str(value)[:80]}.")
            if any(isinstance(part, str) and not is_utf8(part) for part in parts):
                raise DatasetError(f"{where} is not UTF-8 text: {value!a}.")
            if value == "" and not separated:
                raise DatasetError(f"{where} is empty: every image needs a class.")
            if kinds - {int, str} or len(kinds) > 1:
                raise DatasetError(f"{where} must be an integer, a text, or a list of these, got {value!r}.")
            in_lists = isinstance(value, list) if in_lists is None else in_lists
            kind = kind or next(iter(kinds), None)
            if isinstance(value, list) != in_lists or kinds - {kind}:
                raise DatasetError(f"{where} is {value!r}: integers, texts and lists must not be mixed in a column.")


def _spellings(name: str) -> Iterator[str]:
    """Yield the listed file name and its variants: / instead of a backslash, and both Unicode forms (NFC, NFD)."""
    slashes = name.replace("\\", "/")
    for text in dict.fromkeys((name, slashes)):
        yield text
        yield unicodedata.normalize("NFC", text)
        yield unicodedata.normalize("NFD", text)


def _find(root: Path, name: str) -> tuple[str, Identity] | None:
    """Return the path of a listed file and its identity; None if there is no such file."""
    for text in dict.fromkeys(_spellings(name)):
        path = os.path.join(root, text)
        if (identity := identity_of(path)) is not None:
            return path, identity
    return None


def _root(path: Path, data_folder: str | None, names: Sequence[str]) -> Path:
    """Return the folder that listed files are relative to.

    Without `data_folder`, it is the first of `path` and its subfolders that has the most of some listed files: single ones may be
    missing, or be given by absolute paths, which are found from every folder.
    """
    if data_folder is None:
        sample = names[:: -(-len(names) // _SAMPLED)]
        best, most = path, 0
        for folder in (path, *child_folders(path)):
            count = sum(_find(folder, name) is not None for name in sample)
            if count > most:
                best, most = folder, count
            if most == len(sample):
                break
        return best
    if not (path / data_folder).is_dir():
        raise DatasetError(f"{argument('csv_data_folder')}: {path / data_folder} is not a folder.")
    return path / data_folder


def _id_names(path: Path, given: str | None, ids: set[int]) -> dict[int, str] | None:
    """Return class id -> name from a CSV file with `class_id,class_name`; None if there is no such file."""
    found = _class_names(path, given)
    if found is None:
        return None
    file, rows = found
    names = {_class_id(class_id, file, number): name for number, class_id, name in rows}
    if lacking := sorted(ids - set(names)):
        raise DatasetError(f"{file} has no name for class {listed(lacking)}.")
    counts = Counter(names[class_id] for class_id in ids)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise DatasetError(f"{file} gives several classes the name {listed(repeated)}.")
    return names


def _class_names(path: Path, given: str | None) -> tuple[Path, list[tuple[int, str, str]]] | None:
    """Return the class-name file and its rows (line number, class id as text, name); None if there is no such file."""
    file = path / (given or CLASS_NAMES_CSV)
    if not file.is_file():
        if given or file.is_dir():
            what = "is a folder" if file.is_dir() else "does not exist"
            raise DatasetError(f"{argument('csv_class_names')}: {file} {what}.")
        return None
    header, rows = read_csv(file, [["class_id"], ["class_name"]])
    if lacking := [name for name in ("class_id", "class_name") if name not in header]:
        raise DatasetError(
            f"{file} lacks the column {', '.join(lacking)}. Available: {', '.join(header) or 'no header'}."
        )
    seen: dict[str, str] = {}
    for number, row in rows:
        if seen.setdefault(row["class_id"], row["class_name"]) != row["class_name"]:
            raise DatasetError(
                f"{file}: row {number} gives class {row['class_id']} a second name, {row['class_name']}."
            )
        if not row["class_name"]:
            raise DatasetError(f"{file}: row {number} gives class {row['class_id']} no name.")
    return file, [(number, row["class_id"], row["class_name"]) for number, row in rows]


def _by_folder(rows: dict[str, list[tuple[Path, _Row]]], path: Path) -> dict[str, list[tuple[Path, _Row]]]:
    """Return the rows of metadata files with file names relative to `path`.

    Rows of a file next to the split folders are assigned to splits by the folder of their image.
    """
    moved: dict[str, list[tuple[Path, _Row]]] = {}
    for split, pairs in rows.items():
        for file, row in pairs:
            name = os.path.normpath(os.path.join(os.path.relpath(file.parent, path), row.file.replace("\\", "/")))
            moved.setdefault(split, []).append((file, _Row(row.number, name, row.label)))
    if "" not in moved:
        return moved
    parts = [(split_of(row.file.split("/")[0]) if "/" in row.file else None) for _, row in moved[""]]
    if not any(parts):
        return {"train": moved[""]}
    if outside := [row.file for part, (_, row) in zip(parts, rows[""], strict=True) if part is None]:
        raise DatasetError(
            f"{moved[''][0][0]}: some files lie in split folders, but others do not: {listed(outside)}."
        )
    return {
        split: [pair for part, pair in zip(parts, moved[""], strict=True) if part == split]
        for split in SPLIT_NAMES
        if split in parts
    }


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
    """Load the listed images with their labels as integers, text or lists, and the names of integer labels.

    Raises:
        DatasetError: if a file cannot be read or lacks a column, or if a listed image is missing, is in two splits or has two
            labels.
    """
    rows: dict[str, list[tuple[Path, _Row]]] = {}
    columns = {"image": image_column, "label": label_column}
    for split, parts in files.items():
        rows[split] = []
        for file in parts:
            found, column = _read(file, columns)
            rows[split] += [(file, row) for row in found]
    if any(file.name in METADATA for parts in files.values() for file in parts):
        rows = _by_folder(rows, path)
    labels: dict[str, list[Any]] = {split: [row.label for _, row in pairs] for split, pairs in rows.items()}
    if label_separator is None and all(f.suffix in (".csv", ".tsv") for parts in files.values() for f in parts):
        labels = _from_csv(rows, column)
    _check_types(labels, rows, column, label_separator is not None)
    if label_separator is not None:
        every = [label for values in labels.values() for label in values]
        if not isinstance(every[0], str):
            raise DatasetError(
                f"`label_separator` requires text, but `{column}` of {path} has {every[0]!r}. Leave it out."
            )
        parts = iter(as_lists(every, label_separator))
        labels = {split: [next(parts) for _ in values] for split, values in labels.items()}

    names = [row.file for pairs in rows.values() for _, row in pairs]
    root = _root(path, data_folder, names)
    places = {name: _find(root, name) for name in dict.fromkeys(names)}
    if missing := [name for name, place in places.items() if place is None]:
        raise DatasetError(
            f"{path}: {len(missing)} listed images are not in {root} (see {argument('csv_data_folder')}): {listed(missing)}."
        )
    labels, paths = _distinct(rows, labels, {name: place for name, place in places.items() if place}, path)

    flat = [part for v in labels.values() for label in v for part in (label if isinstance(label, list) else [label])]
    integers = bool(flat) and all(isinstance(label, int) for label in flat)
    if class_names_file and not integers:
        raise DatasetError("`csv_class_names` requires integer classes, but the classes are text. Leave it out.")
    if integers:
        id_names = _id_names(path, class_names_file, set(flat))
    else:
        id_names = None
        labels = _named_as_written(path, labels)
    value: Any = datasets.Value("int64" if integers else "string")
    lists = any(isinstance(label, list) for values in labels.values() for label in values)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(value) if lists else value})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"image": paths[split], "label": labels[split]}, features=features)
            for split in rows
        }
    ), id_names


def _distinct(
    rows: Mapping[str, list[tuple[Path, _Row]]],
    labels: Mapping[str, list[Any]],
    places: Mapping[str, tuple[str, Identity]],
    path: Path,
) -> tuple[dict[str, list[Any]], dict[str, list[str]]]:
    """Return the labels and paths of each split, with each file once."""
    uses = [
        Use(split, row.file, places[row.file][1], tuple(label) if isinstance(label, list) else label)
        for split, pairs in rows.items()
        for (_, row), label in zip(pairs, labels[split], strict=True)
    ]
    kept = [uses[number] for number in distinct_uses(uses, str(path))]
    own = {split: [use for use in kept if use.split == split] for split in rows}
    return (
        {s: [list(u.label) if isinstance(u.label, tuple) else u.label for u in found] for s, found in own.items()},
        {split: [places[use.file][0] for use in found] for split, found in own.items()},
    )


def _named_as_written(path: Path, labels: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Replace labels such as `007` by the names in the usual class-name file; return other labels unchanged."""
    texts = {label for values in labels.values() for label in values if isinstance(label, str)}
    if not texts or not all(re.fullmatch(r"[0-9]+", text) for text in texts):
        return labels
    found = _class_names(path, None)
    if found is None:
        return labels
    file, rows = found
    names = {class_id: name for _, class_id, name in rows}
    if lacking := sorted(texts - set(names)):
        raise DatasetError(
            f"{file} has no name for class {listed(lacking)}. Class ids must be written as in the listings, including zeros."
        )
    if repeated := sorted(name for name, n in Counter(names[text] for text in texts).items() if n > 1):
        raise DatasetError(f"{file} gives several classes the name {listed(repeated)}.")
    return {split: [names[label] for label in values] for split, values in labels.items()}
