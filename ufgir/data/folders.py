"""Load images from class folders, split/class/image or class/image (a layout of `ufgir.data.load`), and images without classes."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets

from ..utils.text import counted
from .checks import (
    SPLIT_NAMES,
    DatasetError,
    Use,
    check_same_classes,
    distinct_uses,
    find_broken,
    listed,
    split_of,
    verify_images,
)
from .image_files import (
    USUAL_SUFFIXES,
    Entries,
    FolderScan,
    child_folders,
    conversion_hint,
    count_others,
    entries_of,
    identity_of,
    is_image,
    is_utf8,
    problem_lines,
    scan_folder,
    shown,
)
from .labels import one_spelling, warn_of_look_alikes
from .listings import check_unused_tables
from .sources import Opened, Source


logger = logging.getLogger(__name__)


def _is_class_folder(folder: Path) -> bool:
    """Return whether `folder` directly contains images and no folders."""
    entries = entries_of(folder)
    return not entries.folders and any(map(is_image, entries.files))


def _split_folders(path: Path) -> dict[str, Path]:
    """Return split -> folder; `path` itself is train if it contains class folders.

    A folder named like a split is a class if other class folders are next to it and it contains images and no folders.
    """
    children = child_folders(path)
    splits = {child: split for child in children if (split := split_of(child.name))}
    if others := [child.name for child in children if child not in splits]:
        if all(_is_class_folder(child) for child in splits):
            return {"train": path}
        allowed = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise DatasetError(
            f"{path} contains the split folders {listed(child.name for child in splits)}, but {listed(others)} is not one of "
            f"{allowed}. Rename or move it. (A class folder with the name of a split must contain images and no folders.)"
        )
    if not splits:
        return {"train": path}
    found: dict[str, Path] = {}
    for child, split in splits.items():
        if split in found:
            raise DatasetError(
                f"{path} contains two folders for the {split} split: {found[split].name}, {child.name}."
            )
        found[split] = child
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _check_loose_images(
    entries: dict[Path, Entries], roots: dict[str, Path], scans: dict[str, dict[Path, FolderScan]]
) -> None:
    """Warn about images outside class folders; raise DatasetError if there are no class folders."""
    for folder, found in entries.items():
        loose = [file.name for file in found.files if is_image(file)]
        if not loose:
            continue
        split = next((split for split, root in roots.items() if root == folder), None)
        if split is not None and not any(scan.images for scan in scans[split].values()):
            raise DatasetError(
                f"{folder} contains {len(loose):,} images but no class folders. Put the images of each class into a folder "
                f"named after it ({folder.name}/<class>/{loose[0]}), or list files and classes in {split}.csv or "
                f"{split}.jsonl. To classify images whose classes are unknown, use `ufgir predict MODEL FOLDER`."
            )
        logger.warning(
            "%s: %d images outside the class folders are left out: %s",
            folder,
            len(loose),
            listed(loose),
        )


def load_image_folder(path: Path, known_classes: bool) -> datasets.DatasetDict:
    """Load split/class/image or class/image.

    Args:
        path: the folder.
        known_classes: whether the caller gives the class names; splits may then lack some of the classes.

    Raises:
        DatasetError: if there are no images or no class folders, a class folder has no images, a split has classes that train
            lacks, a link has no target, a folder cannot be read, a file is in two splits or two classes, or a table in the
            folder lists files and classes.
    """
    roots = _split_folders(path)
    entries = {folder: entries_of(folder) for folder in dict.fromkeys((path, *roots.values()))}
    check_unused_tables(path, [file for found in entries.values() for file in found.files])
    scans = {split: {folder: scan_folder(folder) for folder in entries[root].folders} for split, root in roots.items()}
    every = [scan for found in scans.values() for scan in found.values()]
    problems = {file: why for found in (*entries.values(), *every) for file, why in found.problems.items()}
    if problems:
        lines = listed(problem_lines(problems, path), separator="\n  ")
        raise DatasetError(f"{path}: {len(problems):,} files or folders cannot be used:\n  {lines}")
    _check_loose_images(entries, roots, scans)
    if others := [file for scan in every for file in scan.others]:
        logger.warning(
            "%s: left out because not an image: %s in class folders (%s): %s",
            *(
                path,
                counted(len(others), "file"),
                count_others(others),
                listed(file.relative_to(path) for file in others),
            ),
        )
    if not any(scan.images for scan in every):
        raise DatasetError(
            f"{path} contains no images. Expected split/class/image or class/image with one of the suffixes "
            f"{USUAL_SUFFIXES}, or a CSV, JSONL, parquet or save_to_disk layout."
        )
    if empty := [folder for found in scans.values() for folder, scan in found.items() if not scan.images]:
        raise DatasetError(f"{path}: class folders without images: {listed(f.relative_to(path) for f in empty)}.")
    called = one_spelling({split: [folder.name for folder in found] for split, found in scans.items()}, str(path))
    classes = {split: {called[folder.name] for folder in found} for split, found in scans.items()}
    if not known_classes:
        check_same_classes(classes, str(path))
        warn_of_look_alikes(set().union(*classes.values()), str(path))
    names = sorted(set().union(*classes.values()))
    images = [
        Use(split, str(file), identity, called[folder.name])
        for split, found in scans.items()
        for folder, scan in sorted(found.items(), key=lambda item: (called[item[0].name], item[0].name))
        for file, identity in scan.images.items()
    ]
    kept = [images[number] for number in distinct_uses(images, str(path))]
    label_of = {name: label for label, name in enumerate(names)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split in scans:
        rows = [(use.file, label_of[use.label]) for use in kept if use.split == split]
        columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


def open_image_folder(source: Source) -> Opened:
    """Open class folders (an entry of `ufgir.data.load.LAYOUTS`)."""
    return Opened(load_image_folder(source.path, source.known_classes), source.columns)


def _natural(text: str) -> list[str | int]:
    """Return a sort key that puts img2 before img10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", text)]


class FoundImages(NamedTuple):
    """Result of `find_images`.

    Attributes:
        files: the images, in order.
        others: other file -> how to make it readable, or "" if it is not a photo.
        problems: unusable link or folder -> reason.
    """

    files: list[str]
    others: dict[str, str]
    problems: dict[str, str]

    def describe(self) -> list[str]:
        """List the files that are left out, one per line; empty if there are none."""
        lines = []
        if self.problems:
            lines.append(f"{len(self.problems):,} cannot be used and are left out:")
            lines += [f"  {file}: {why}" for file, why in self.problems.items()]
        if self.others:
            what = count_others(map(Path, self.others))
            lines.append(
                f"left out because not an image: {counted(len(self.others), 'file')} ({what}): {listed(self.others)}"
            )
        return lines


def find_images(folder_or_files: str | os.PathLike | Sequence[str | os.PathLike]) -> FoundImages:
    """Find the images that `load_images` loads, and all other files next to them, without decoding them.

    Args:
        folder_or_files: an image, a folder, or a list of images and folders.

    Raises:
        DatasetError: if a file or folder does not exist, or there are no images.
    """
    one = isinstance(folder_or_files, str | os.PathLike)
    sources = [Path(os.path.expanduser(source)) for source in ([folder_or_files] if one else folder_or_files)]
    if missing := [shown(source) for source in sources if not source.is_dir() and identity_of(source) is None]:
        raise DatasetError(f"`folder_or_files`: {len(missing):,} of {len(sources):,} do not exist: {listed(missing)}.")
    found = FoundImages([], {}, {})
    for source in sources:
        if not source.is_dir():
            if is_utf8(str(source)):
                found.files.append(str(source))
            else:
                found.problems[shown(source)] = "the file name is not UTF-8; rename it"
            continue
        scan = scan_folder(source)
        ordered = sorted(scan.images, key=lambda file: _natural(str(file.relative_to(source))))
        found.files.extend(map(str, ordered))
        found.others.update({shown(file): conversion_hint(file) or "" for file in scan.others})
        found.problems.update({shown(file): why for file, why in scan.problems.items()})
    if not found.files:
        left_out = "; ".join(line.strip() for line in found.describe())
        raise DatasetError(
            f"`folder_or_files`: no image in {listed(sources) or 'an empty list'} (suffixes {USUAL_SUFFIXES})"
            + (f": {left_out}." if left_out else ".")
        )
    return found


def load_images(
    folder_or_files: str | os.PathLike | Sequence[str | os.PathLike], *, verify: bool = True, skip_broken: bool = False
) -> datasets.Dataset:
    """Load images without classes, e.g. to classify them, as a data set with the columns `image` and `path`.

    Args:
        folder_or_files: an image, a folder, or a list of images and folders. A folder stands for all images in it and its
            subfolders, in natural order (leaf2.png before leaf10.png); a list keeps its order. Files that are not images are
            left out, with a warning that counts and names them.
        verify: decode every image first.
        skip_broken: leave out images, links and folders that cannot be read, with a warning that names them, instead of
            raising.

    Returns:
        One row per image; `path` is the file name as text. Only the paths are kept in memory.

    Raises:
        DatasetError: if a file or folder does not exist, there are no images, or some cannot be read (one per line).
    """
    found = find_images(folder_or_files)
    if found.problems and not skip_broken:
        lines = listed((f"{file}: {why}" for file, why in found.problems.items()), separator="\n  ")
        raise DatasetError(f"`folder_or_files`: {len(found.problems):,} cannot be used:\n  {lines}")
    if left_out := found.describe():
        logger.warning("\n".join(left_out))
    return load_found_images(found, verify=verify, skip_broken=skip_broken)


def load_found_images(found: FoundImages, *, verify: bool = True, skip_broken: bool = False) -> datasets.Dataset:
    """Return the data set of `load_images` for the images that `find_images` found."""
    files = found.files
    images = _with_paths(files)
    if not verify and not skip_broken:
        return images
    if not skip_broken:
        verify_images(datasets.DatasetDict({"images": images}))
        return images
    broken = find_broken(datasets.DatasetDict({"images": images}))
    if broken:
        problems = listed((f"{file}: {problem}" for _, _, file, problem in broken), separator="\n  ")
        logger.warning("%d of %d images cannot be read and are left out:\n  %s", len(broken), len(files), problems)
    rows = {row for _, row, *_ in broken}
    if len(rows) == len(files):
        raise DatasetError(f"`folder_or_files`: none of {len(files):,} images can be read.")
    return _with_paths(file for row, file in enumerate(files) if row not in rows)


def _with_paths(files: Iterable[str]) -> datasets.Dataset:
    files = list(files)
    features = datasets.Features({"image": datasets.Image(), "path": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": files, "path": files}, features=features)
