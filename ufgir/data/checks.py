"""What all layouts of data share: the names of splits, how problems are listed, and whether images can be read."""

import io
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
from PIL import Image
from tqdm.auto import tqdm

from ..transforms.images import open_picture


logger = logging.getLogger(__name__)

SPLIT_NAMES = {  # ours: what folders and files may call it
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
# Formats that Pillow knows but does not decode by itself, or that hold more than a picture.
_NO_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def _readable_suffixes() -> frozenset[str]:
    """Of all formats that Pillow decodes here, lower case, with the dot."""
    Image.init()
    formats = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in formats if name in Image.OPEN and name not in _NO_PICTURES)


IMAGE_SUFFIXES = _readable_suffixes()
USUAL_SUFFIXES = ".bmp, .gif, .jpg, .png, .tif, .webp and others that Pillow reads"  # for messages
LISTED = 20  # names that one message lists at most


class DatasetError(ValueError):
    """The data cannot be used as they are; the message names what is wrong."""

    has_list = True  # it may name one thing a line


def listed(names: Iterable[Any], separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    rest = f"and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    between = (separator if "\n" in separator else " ") if rest else ""
    return separator.join(names[:LISTED]) + between + rest


def split_of(name: str) -> str | None:
    """Our name for the split that others call `name`; None if it is no split."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def check_same_classes(classes: dict[str, set[str]], source: str) -> None:
    """No split may have classes that the first one (train, if there is one) lacks; one that lacks some of them is named in the
    log."""
    first, reference = next(iter(classes.items()))
    problems = []
    for split, present in classes.items():
        if added := sorted(present - reference):
            problems.append(f"{split} has {listed(added)}, which {first} lacks")
        if lacking := sorted(reference - present):
            logger.warning("%s: %s has no image of %d classes: %s", source, split, len(lacking), listed(lacking))
    if problems:
        raise DatasetError(
            f"{source}: classes differ between splits: {'; '.join(problems)}. Take their images out, or add some to {first}."
        )


def problem_of(image: dict[str, Any]) -> str | None:
    """Why the undecoded `image` cannot be read; None if it can."""
    try:
        source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        open_picture(source)
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        return f"{type(error).__name__}: {error}"
    return None


def find_broken(dataset_dict: datasets.DatasetDict, num_threads: int | None = None) -> list[tuple[str, int, str]]:
    """Decodes every image once, with a progress bar: (split, row, file and problem) of those that cannot be read."""
    total = sum(len(split) for split in dataset_dict.values())
    broken: list[tuple[str, int, str]] = []
    workers = num_threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, desc="Verifying images", unit="image") as progress:
        for name, split in dataset_dict.items():
            raw = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
            row = 0
            for batch in raw.iter(batch_size=64):
                for image, problem in zip(batch["image"], pool.map(problem_of, batch["image"]), strict=True):
                    if problem is not None:
                        broken.append((name, row, f"{image['path'] or 'no path'}: {problem}"))
                    row += 1
                    progress.update()
    return broken


def verify_images(dataset_dict: datasets.DatasetDict, num_threads: int | None = None) -> int:
    """Decodes every image once, with a progress bar.

    Args:
        dataset_dict: splits with a column `image`.
        num_threads: threads that decode at the same time; by default the number of cores, at most 8.

    Returns:
        The number of images.

    Raises:
        DatasetError: some images cannot be read; one a line, the first `LISTED` and the number of the others.
    """
    total = sum(len(split) for split in dataset_dict.values())
    if broken := find_broken(dataset_dict, num_threads):
        lines = listed((f"{split} row {row}: {problem}" for split, row, problem in broken), separator="\n  ")
        raise DatasetError(f"{len(broken):,} of {total:,} images cannot be read:\n  {lines}")
    return total
