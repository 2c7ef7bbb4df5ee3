"""How raw downloads of leaf photos tell class and split: by file names, or by annotation lists."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..checks import DatasetError
from ..image_files import count_others, entries_of, is_image, shown


SPLITS = ("train", "test")  # of the raw downloads
NAME_PATTERN = re.compile(r"([0-9]+)_([0-9]+)_(train|test)", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """An image as the raw data list it."""

    file: str  # relative to the root of the raw data, with /
    label: int  # from 0
    split: str  # train or test


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the raw data."""

    kind: str  # one of KINDS
    where: str  # a file, a line of a list, or a split
    text: str


@dataclass
class Listing:
    """What the names or lists of the raw data say, before any image is opened."""

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _image_names(folder: Path) -> list[str]:
    """Names of the images right in `folder`."""
    return sorted(file.name for file in entries_of(folder).files if is_image(file))


def _left_out(root: Path, folder: Path, listing: Listing) -> None:
    """Adds to a listing what lies right in `folder` and is no image: a problem if it cannot be used, else a note."""
    entries = entries_of(folder)
    for path, why in entries.problems.items():
        listing.problems.append(Problem("missing", shown(path.relative_to(root)), why))
    if others := sorted(file for file in entries.files if not is_image(file)):
        names = ", ".join(file.name for file in others[:5]) + (", ..." if len(others) > 5 else "")
        listing.notes.append(f"{len(others)} files are no images and left out, {count_others(others)}: {names}")


@dataclass(frozen=True)
class FileNames:
    """One flat folder; the file names tell class and split. Rows are in the order of class and number."""

    folder: str

    def roots(self, source: Path, nearby: Sequence[Path]) -> list[Path]:
        """The folders that can be meant."""
        named = [path for path in nearby if path.name == self.folder and _image_names(path)]
        return named or [path for path in (source,) if _image_names(path)]

    def expected(self) -> str:
        """In words."""
        return f"{self.folder}/ with images <class>_<number>_<train|test>.png"

    def folders(self) -> list[str]:
        """What lies below the root."""
        return [""]

    def read(self, root: Path, classes: int) -> Listing:
        """Every image of the folder."""
        listing, numbered = Listing(), []
        _left_out(root, root, listing)
        for name in _image_names(root):
            match = NAME_PATTERN.fullmatch(Path(name).stem)
            if match is None:
                listing.problems.append(Problem("name", name, "expected <class>_<number>_<train|test>"))
            elif not 1 <= int(match[1]) <= classes:
                listing.problems.append(Problem("name", name, f"class {int(match[1])} is not one of 1 to {classes}"))
            else:
                row = Row(name, int(match[1]) - 1, match[3].lower())
                numbered.append((row.label, int(match[2]), name, row))
        listing.rows = [row for *_, row in sorted(numbered, key=lambda entry: entry[:3])]
        return listing


@dataclass(frozen=True)
class AnnotationLists:
    """`images/` beside `anno/train.txt` and `anno/test.txt`, in each of `parts`. Rows are in the order of the lists."""

    parts: tuple[str, ...] = ("",)  # folders below the root

    def roots(self, source: Path, nearby: Sequence[Path]) -> list[Path]:
        """The folders that can be meant."""
        if source.name in self.parts and len(self.parts) == 1:  # the part itself was named
            nearby = [*nearby, source.parent]
        found = [path for path in nearby if any((path / part / "anno").is_dir() for part in self.parts)]
        # growth stages are laid out as soygene is
        return [path for path in found if "" not in self.parts or path == source or not _is_stage(path)]

    def expected(self) -> str:
        """In words."""
        parts = [part + "/" if part else "" for part in self.parts]
        return " and ".join(f"{part}images/, {part}anno/train.txt, {part}anno/test.txt" for part in parts)

    def folders(self) -> list[str]:
        """What lies below the root."""
        return [f"{part}/{folder}".lstrip("/") for part in self.parts for folder in ("anno", "images")]

    def read(self, root: Path, classes: int) -> Listing:
        """Every line of every list."""
        listing = Listing()
        for split in SPLITS:
            for part in self.parts:
                self._read_list(root, PurePosixPath(part), split, classes, listing)
        listed = {row.file for row in listing.rows}
        for part in self.parts:
            folder = root / part / "images"
            if not folder.is_dir():
                raise DatasetError(f"{folder} is not a folder: expected {self.expected()} in {root}.")
            _left_out(root, folder, listing)
            present = {str(PurePosixPath(part, "images", name)) for name in _image_names(folder)}
            if unlisted := sorted(present - listed):
                shown = ", ".join(unlisted[:5]) + (", ..." if len(unlisted) > 5 else "")
                listing.notes.append(f"{len(unlisted)} images are in no list and left out: {shown}")
        if len(self.parts) > 1:
            listing.notes.append(
                f"rows are in the order {', '.join(self.parts)}: the last images of each class, which the loader takes for "
                f"validation, come from {self.parts[-1]}; `--validation random` mixes them"
            )
        return listing

    @staticmethod
    def _read_list(root: Path, part: PurePosixPath, split: str, classes: int, listing: Listing) -> None:
        name = str(part / "anno" / f"{split}.txt")
        try:
            lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            raise DatasetError(f"{root / name} is missing: it lists the {split} images.") from None
        except UnicodeDecodeError as error:
            raise DatasetError(f"{root / name} is not UTF-8 text: {error}.") from error
        except OSError as error:
            raise DatasetError(f"{root / name} cannot be read: {error.strerror}.") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            file, _, class_id = line.strip().replace("\t", " ").rpartition(" ")
            file, path, trouble = file.strip(), PurePosixPath(file.strip()), None
            if not file or not re.fullmatch(r"[0-9]{1,9}", class_id):
                trouble = f"expected `file class`, got {line.strip()[:80]!r}"
            elif not 1 <= int(class_id) <= classes:
                trouble = f"class {int(class_id)} of {file} is not one of 1 to {classes}"
            elif path.is_absolute() or ".." in path.parts:
                trouble = f"{file} lies outside of images/"
            elif (said := re.search(r"_(train|test)$", path.stem)) and said[1] != split:
                trouble = f"the name of {file} says {said[1]}"
            if trouble:
                listing.problems.append(Problem("list", f"{name} line {number}", trouble))
            else:
                listing.rows.append(Row(str(part / "images" / path), int(class_id) - 1, split))


def _is_stage(path: Path) -> bool:
    return re.fullmatch(r"R\d", path.name) is not None
