"""Load tables that hold the images themselves: parquet files and folders of `save_to_disk`. For the Hub see `hub`."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from .checks import DatasetError, listed, split_of
from .columns import Splits
from .sources import Opened, Source


logger = logging.getLogger(__name__)


def is_saved(source: Source) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((source.path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(source: Source) -> Opened:
    """The layout of `save_to_disk`, for the table in `ufgir.data.load`."""
    return Opened(datasets.load_from_disk(source.path), source.columns)


def has_parquet(source: Source) -> bool:
    """Whether there are parquet files in the folder. Those that list images belong to `ufgir.data.listings`."""
    return source.is_folder and bool(parquet_files(source.path))


def open_parquet(source: Source) -> Opened:
    """The layout of parquet files that hold images, for the table in `ufgir.data.load`."""
    files = parquet_splits(source.path, parquet_files(source.path))
    return Opened(load_parquet(files, source.cache_dir, source.streaming), source.columns)


def parquet_files(path: Path) -> list[Path]:
    """The parquet files in a folder and below it, sorted."""
    return sorted(path.rglob("*.parquet"))


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
