"""Checks shared by all layouts: names of splits, lists of problems, and whether images can be decoded."""

import io
import logging
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import datasets
from tqdm.auto import tqdm

from ..transforms.images import open_image


logger = logging.getLogger(__name__)

SPLIT_NAMES = {  # our name: accepted names of folders and files
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
LISTED = 20  # maximum number of names in a message


class DatasetError(ValueError):
    """Data that cannot be used; the message names the problem."""

    has_list = True  # the message may have one item per line

    def __init__(self, message: str) -> None:
        """Store the message. If torch re-raises the error of a DataLoader worker with its traceback, store only the message."""
        own = message.rpartition(f"{type(self).__name__}: ")[2] if "Original Traceback" in message else message
        super().__init__(own.rstrip("\n"))


def listed(names: Iterable[Any], separator: str = ", ") -> str:
    """Join the first `LISTED` names, followed by the number of the others."""
    names = [str(name) for name in names]
    rest = f"and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    between = (separator if "\n" in separator else " ") if rest else ""
    return separator.join(names[:LISTED]) + between + rest


def split_of(name: str) -> str | None:
    """Return train, validation or test for a common name of a split; None for any other name."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def check_same_classes(classes: dict[str, set[str]], source: str) -> None:
    """Raise DatasetError if a split has classes that the first split (train, if present) lacks.

    A split that lacks some classes of the first one is named in a warning.
    """
    first, reference = next(iter(classes.items()))
    problems = []
    for split, present in classes.items():
        if added := sorted(present - reference):
            problems.append(f"{split} has {listed(added)}, which {first} lacks")
        if lacking := sorted(reference - present):
            logger.warning("%s: %s has no images of %d classes: %s", source, split, len(lacking), listed(lacking))
    if problems:
        raise DatasetError(
            f"{source}: classes differ between splits: {'; '.join(problems)}. Remove their images, or add images of them to {first}."
        )


def file_of(image: Any) -> str | None:
    """Return the file of an undecoded image, or None if it is unknown."""
    return image.get("path") if isinstance(image, dict) else None


def problem_of(image: Any) -> str | None:
    """Return the reason why an undecoded image cannot be read, or None if it can."""
    if not isinstance(image, dict):
        return "the image is missing (null)"
    if image["bytes"] is None and not image["path"]:
        return "the image is missing (neither bytes nor a file)"
    if image["bytes"] is None and not os.path.exists(image["path"]):
        return "the file does not exist"
    try:
        source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
        open_image(source)
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        return f"{type(error).__name__}: {error}"
    return None


def find_broken(
    dataset_dict: datasets.DatasetDict, num_threads: int | None = None
) -> list[tuple[str, int, str | None, str]]:
    """Decode every image once, with a progress bar, and return (split, row, file, problem) of those that cannot be read."""
    total = sum(len(split) for split in dataset_dict.values())
    broken: list[tuple[str, int, str | None, str]] = []
    workers = num_threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, tqdm(total=total, desc="Verifying images", unit="image") as progress:
        for name, split in dataset_dict.items():
            raw = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
            row = 0
            for batch in raw.iter(batch_size=64):
                for image, problem in zip(batch["image"], pool.map(problem_of, batch["image"]), strict=True):
                    if problem is not None:
                        broken.append((name, row, file_of(image), problem))
                    row += 1
                    progress.update()
    return broken


def verify_images(
    dataset_dict: datasets.DatasetDict,
    num_threads: int | None = None,
    where: Callable[[str, int], str] | None = None,
) -> int:
    """Decode every image once, with a progress bar.

    Args:
        dataset_dict: splits with a column `image`.
        num_threads: number of decoding threads; by default the number of cores, at most 8.
        where: function of a split and a row number that returns a name for an image stored in a table; by default "split row n".

    Returns:
        The number of images.

    Raises:
        DatasetError: if images cannot be read; one per line, the first `LISTED` and the number of the others.
    """

    def label(split: str, row: int, file: str | None) -> str:
        if file and os.path.isabs(file):
            return file
        place = where(split, row) if where else f"{split} row {row}"
        return f"{file} ({place})" if file else place

    total = sum(len(split) for split in dataset_dict.values())
    if broken := find_broken(dataset_dict, num_threads):
        lines = listed((f"{label(*place)}: {problem}" for *place, problem in broken), separator="\n  ")
        raise DatasetError(f"{len(broken):,} of {total:,} images cannot be read. Delete or replace them:\n  {lines}")
    return total


class Use(NamedTuple):
    """One occurrence of a file in a data set.

    Attributes:
        split: the split that contains it.
        file: the file name in the data set.
        identity: key that is equal for all paths to the same file.
        label: its class, or a tuple of classes.
    """

    split: str
    file: str
    identity: Hashable
    label: Any


def distinct_uses(uses: Sequence[Use], source: str) -> list[int]:
    """Return the indices of the uses to keep: of several uses of a file in a split with the same label, the first.

    Files are compared, not their names: `12.png`, `./12.png`, a link to it and a hard link are one file.

    Raises:
        DatasetError: if a file is in two splits or has two labels.
    """
    first: dict[Hashable, int] = {}
    kept: list[int] = []
    repeated: list[str] = []
    shared: list[str] = []
    differing: list[str] = []
    for number, use in enumerate(uses):
        other = uses[first.setdefault(use.identity, number)]
        if other is use:
            kept.append(number)
            continue
        same = use.file if use.file == other.file else f"{other.file} = {use.file}"
        if use.split != other.split:
            shared.append(f"{same} ({other.split} and {use.split})")
        elif use.label != other.label:
            differing.append(f"{same} ({_classes(other.label)} and {_classes(use.label)})")
        else:
            repeated.append(same)
    if shared:
        raise DatasetError(f"{source}: images listed in more than one split: {listed(shared)}.")
    if differing:
        raise DatasetError(
            f"{source}: images listed with more than one class: {listed(differing)}. (For multi-label data, put all classes of an "
            "image in one row, as a list or with `label_separator`.)"
        )
    if repeated:
        logger.warning(
            "%s: %d images are listed more than once with the same class and are used once: %s",
            *(source, len(repeated), listed(repeated)),
        )
    return kept


def _classes(label: Any) -> str:
    return listed(label) if isinstance(label, tuple) else str(label)
