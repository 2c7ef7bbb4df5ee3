"""Tables that hold the images themselves: parquet files, `save_to_disk`, data sets of the Hub."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets

from .checks import DatasetError, listed, split_of
from .columns import Splits


logger = logging.getLogger(__name__)


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
