"""Load tables that contain the images: parquet files and folders of `save_to_disk`. For the Hub see `hub`."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from .checks import DatasetError, listed, split_of
from .columns import Splits
from .image_files import is_hidden
from .sources import Opened, Source


logger = logging.getLogger(__name__)

MAX_UNNAMED_CLASSES = 100_000  # maximum number of classes of a table without class names


# Errors that `datasets` and Arrow raise for truncated, changed or foreign files.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, pyarrow.ArrowException, DatasetsError)


def is_saved(source: Source) -> bool:
    """Return whether the folder was written by `save_to_disk`."""
    return any((source.path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(source: Source) -> Opened:
    """Open a folder of `save_to_disk` (an entry of `ufgir.data.load.LAYOUTS`).

    Raises:
        DatasetError: if a file is missing or cannot be read.
    """
    for file in sorted(source.path.glob("**/*.json")):
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise DatasetError(f"{file} is not a valid file of `save_to_disk`: {error}.") from error
        if file.name in ("dataset_dict.json", "dataset_info.json", "state.json") and not isinstance(about, dict):
            raise DatasetError(f"{file} is not a valid file of `save_to_disk`: not a JSON object.")
        if file.name == "dataset_info.json":
            _check_class_numbers(about.get("features"), file)
    try:
        return Opened(datasets.load_from_disk(source.path), source.columns)
    except _UNREADABLE as error:
        for file in sorted(source.path.glob("**/*.arrow")):
            try:
                pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
            except (pyarrow.ArrowException, OSError) as cause:
                raise DatasetError(f"{file} cannot be read: {cause}.") from error
        raise DatasetError(
            f"{source.path} is not a complete folder of `save_to_disk` ({type(error).__name__}: {error})."
        ) from error


def has_parquet(source: Source) -> bool:
    """Return whether the folder has parquet files. Those that list image files are opened by `ufgir.data.listings`."""
    return source.is_folder and bool(parquet_files(source.path))


def open_parquet(source: Source) -> Opened:
    """Open parquet files that contain images (an entry of `ufgir.data.load.LAYOUTS`)."""
    files = parquet_splits(source.path, parquet_files(source.path))
    counts = {split: [(file, _rows_of(file)) for file in parts] for split, parts in files.items()}

    def where(split: str, row: int) -> str:
        for file, count in counts.get(split, ()):
            if row < count:
                return f"{file}, row {row + 1}"
            row -= count
        return f"{split} row {row}"

    return Opened(load_parquet(files, source.cache_dir, source.streaming), source.columns, where=where)


def _rows_of(file: Path) -> int:
    """Return the number of rows of a parquet file; raise DatasetError if it is invalid or has too many unnamed classes."""
    try:
        about = pyarrow.parquet.read_metadata(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{file} is not a parquet file: {error}.") from error
    try:
        features = json.loads((about.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        features = None  # written by another program; optional for `datasets`
    _check_class_numbers(features, file)
    return about.num_rows


def _check_class_numbers(features: Any, file: Path) -> None:
    """Raise DatasetError for a label with too many classes without names.

    `datasets` would create a name for each class.
    """
    if isinstance(features, dict):
        if features.get("_type") == "ClassLabel" and features.get("names") is None:
            number = features.get("num_classes")
            if not isinstance(number, int) or not 0 < number <= MAX_UNNAMED_CLASSES:
                raise DatasetError(
                    f"{file}: `num_classes` of a label without class names must be 1 to {MAX_UNNAMED_CLASSES:,}, got {number}."
                )
        for value in features.values():
            _check_class_numbers(value, file)
    elif isinstance(features, list):
        for value in features:
            _check_class_numbers(value, file)


def parquet_files(path: Path) -> list[Path]:
    """Return the parquet files in a folder and its subfolders, sorted, without hidden ones."""
    found = (file for file in path.rglob("*.parquet") if not any(map(is_hidden, file.relative_to(path).parts)))
    return sorted(file for file in found if not file.is_dir())


def parquet_splits(path: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return split -> files: a file belongs to the split whose name is a word in the name of the file or its folders."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = [
            w for part in reversed(file.relative_to(path).with_suffix("").parts) for w in re.split(r"[^A-Za-z]+", part)
        ]
        split = next((found for word in words if (found := split_of(word))), None)
        splits.setdefault(split or "", []).append(file)
    if "" in splits:
        if len(splits) > 1:
            raise DatasetError(f"{path}: parquet files without a split in their names: {listed(splits[''])}.")
        splits = {"train": splits[""]}
    return splits


def load_parquet(splits: Mapping[str, Sequence[Path]], cache_dir: str | None, streaming: bool) -> Splits:
    """Load parquet files that contain images.

    Raises:
        DatasetError: if a file cannot be read, or the files have different columns.
    """
    files = {split: [str(file) for file in files] for split, files in splits.items()}
    try:
        return datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir, streaming=streaming)
    except _UNREADABLE as error:
        for file in (file for parts in splits.values() for file in parts):
            try:
                for _ in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=64):
                    pass
            except (pyarrow.ArrowException, OSError, MemoryError) as cause:
                raise DatasetError(f"{file} cannot be read: {cause}.") from error
        names = listed(file for parts in files.values() for file in parts)
        cause = error.__cause__ or error
        raise DatasetError(f"The parquet files {names} cannot be read together: {cause}.") from error
