"""One of the layouts in `ufgir.data.load.LAYOUTS`: image folders, split/class/image or class/image. Also images without classes."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets

from .checks import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    USUAL_SUFFIXES,
    DatasetError,
    check_same_classes,
    find_broken,
    listed,
    split_of,
    verify_images,
)
from .sources import Opened, Source


logger = logging.getLogger(__name__)


def child_folders(path: Path) -> list[Path]:
    """The visible folders in `path`, sorted."""
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _is_class_folder(folder: Path) -> bool:
    """Whether pictures lie directly in `folder` and no folders do: a picture beside folders makes no class of them."""
    return not child_folders(folder) and any(_is_image(file) for file in folder.iterdir())


def _visible_files(folder: Path) -> list[Path]:
    """The files in `folder` and below it, sorted, but hidden ones and those of hidden folders."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(p.startswith(".") for p in file.relative_to(folder).parts))


def images_in(folder: Path) -> list[Path]:
    """The visible images in `folder` and below it, sorted."""
    return [file for file in _visible_files(folder) if _is_image(file)]


def _split_folders(path: Path) -> dict[str, Path]:
    """Split to folder; `path` itself is train if it holds class folders.

    Among class folders, one that is called as a split is a class, too, if it holds pictures and no folders.
    """
    children = child_folders(path)
    splits = {child: split for child in children if (split := split_of(child.name))}
    if others := [child.name for child in children if child not in splits]:
        if all(_is_class_folder(child) for child in splits):
            return {"train": path}
        allowed = ", ".join(name for names in SPLIT_NAMES.values() for name in names)
        raise DatasetError(
            f"{path} holds the split folders {listed(child.name for child in splits)}, but {listed(others)} is not one of "
            f"{allowed}: rename it, or put it elsewhere. (A class that is called as a split must hold pictures and no folders.)"
        )
    if not splits:
        return {"train": path}
    found: dict[str, Path] = {}
    for child, split in splits.items():
        if split in found:
            raise DatasetError(f"{path} holds two folders for the {split} split: {found[split].name}, {child.name}.")
        found[split] = child
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _check_loose_images(path: Path, roots: dict[str, Path], images: dict[str, dict[str, list[Path]]]) -> None:
    """Pictures that lie in no class folder: an error where there are no class folders, else a warning."""
    for folder in dict.fromkeys((path, *roots.values())):
        loose = sorted(file.name for file in folder.iterdir() if _is_image(file))
        if not loose:
            continue
        split = next((split for split, root in roots.items() if root == folder), None)
        if split is not None and not any(images[split].values()):
            raise DatasetError(
                f"{folder} holds {len(loose):,} images but no class folders: put the images of each class into a folder "
                f"named after it ({folder.name}/<class>/{loose[0]}), or list files and classes in {split}.csv or "
                f"{split}.jsonl; to classify images without known classes use `load_images`."
            )
        logger.warning(
            "%s: %d images beside the folders belong to no class and are left out: %s",
            folder,
            len(loose),
            listed(loose),
        )


def load_image_folder(path: Path, known_classes: bool) -> datasets.DatasetDict:
    """split/class/image or class/image.

    Args:
        path: the folder.
        known_classes: the caller knows which classes there are: no split needs to have all of them.

    Raises:
        DatasetError: no images, or no class folders; a class folder without images; classes that train lacks.
    """
    roots = _split_folders(path)
    files = {
        split: {folder.name: _visible_files(folder) for folder in child_folders(root)} for split, root in roots.items()
    }
    images = {s: {name: [f for f in own if _is_image(f)] for name, own in c.items()} for s, c in files.items()}
    _check_loose_images(path, roots, images)
    others = [f for classes in files.values() for own in classes.values() for f in own if not _is_image(f)]
    if others:
        names = listed(file.relative_to(path) for file in others)
        logger.warning("%s: %d files in class folders are no pictures by their suffix: %s", path, len(others), names)
    if not any(files for classes in images.values() for files in classes.values()):
        raise DatasetError(
            f"{path} holds no images. Expected split/class/image or class/image with one of the suffixes "
            f"{USUAL_SUFFIXES}, or a CSV, JSONL, parquet or save_to_disk layout."
        )
    empty = [roots[split] / name for split, classes in images.items() for name, files in classes.items() if not files]
    if empty:
        raise DatasetError(f"{path}: class folders without images: {listed(f.relative_to(path) for f in empty)}.")
    if not known_classes:
        check_same_classes({split: set(classes) for split, classes in images.items()}, str(path))
    names = sorted({name for classes in images.values() for name in classes})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    splits = {}
    for split, classes in images.items():
        rows = [(str(file), label) for label, name in enumerate(names) for file in classes.get(name, ())]
        columns = {"image": [file for file, _ in rows], "label": [label for _, label in rows]}
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


def open_image_folder(source: Source) -> Opened:
    """The layout of folders named after classes, for the table in `ufgir.data.load`."""
    return Opened(load_image_folder(source.path, source.known_classes), source.columns)


def _natural(text: str) -> list[str | int]:
    """A key that sorts img2 before img10."""
    return [int(part) if part.isdecimal() else part.lower() for part in re.split(r"(\d+)", text)]


def load_images(
    folder_or_files: str | os.PathLike | Sequence[str | os.PathLike], *, verify: bool = True, skip_broken: bool = False
) -> datasets.Dataset:
    """Images whose classes are not known, e.g. to predict them: a dataset with the columns `image` and `path`.

    Args:
        folder_or_files: an image, a folder, or a list of both. Of a folder, all images in it and below it, in natural order
            (leaf2.png before leaf10.png); a list keeps its order.
        verify: decode every image first.
        skip_broken: leave images that cannot be read out, with a warning that names them, instead of raising.

    Returns:
        One row an image; `path` is the file as text. Nothing but the paths is in memory.

    Raises:
        DatasetError: a file or folder does not exist, there are no images, or some cannot be read: one a line.
    """
    one = isinstance(folder_or_files, str | os.PathLike)
    sources = [Path(os.path.expanduser(source)) for source in ([folder_or_files] if one else folder_or_files)]
    if missing := [source for source in sources if not source.exists()]:
        raise DatasetError(f"`folder_or_files`: {len(missing):,} of {len(sources):,} do not exist: {listed(missing)}.")
    files: list[str] = []
    for source in sources:
        if source.is_dir():
            found = images_in(source)
            files += map(str, sorted(found, key=lambda file: _natural(str(file.relative_to(source)))))
        else:
            files.append(str(source))
    if not files:
        raise DatasetError(
            f"`folder_or_files`: no image in {listed(sources) or 'an empty list'} (suffixes {USUAL_SUFFIXES})."
        )
    images = _with_paths(files)
    if not verify and not skip_broken:
        return images
    if not skip_broken:
        verify_images(datasets.DatasetDict({"images": images}))
        return images
    broken = find_broken(datasets.DatasetDict({"images": images}))
    if broken:
        problems = listed((problem for _, _, problem in broken), separator="\n  ")
        logger.warning("%d of %d images cannot be read and are left out:\n  %s", len(broken), len(files), problems)
    rows = {row for _, row, _ in broken}
    if len(rows) == len(files):
        raise DatasetError(f"`folder_or_files`: none of {len(files):,} images can be read.")
    return _with_paths(file for row, file in enumerate(files) if row not in rows)


def _with_paths(files: Iterable[str]) -> datasets.Dataset:
    files = list(files)
    features = datasets.Features({"image": datasets.Image(), "path": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": files, "path": files}, features=features)
