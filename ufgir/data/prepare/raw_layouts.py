"""Read the classes and splits of raw downloads of leaf photos, from file names or annotation lists."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ...utils.text import counted
from ..checks import DatasetError
from ..image_files import count_others, entries_of, is_image, shown


SPLITS = ("train", "test")  # of the raw downloads
NAME_PATTERN = re.compile(r"([0-9]+)_([0-9]+)_(train|test)", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """An image as listed in the raw data."""

    file: str  # relative to the root of the raw data, with /
    label: int  # from 0
    split: str  # train or test


@dataclass(frozen=True)
class Problem:
    """A problem in the raw data."""

    kind: str  # one of KINDS
    where: str  # a file, a line of a list, or a split
    text: str


@dataclass
class Listing:
    """Contents of the names or lists of the raw data, before any image is opened."""

    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _image_names(folder: Path) -> list[str]:
    """Return the names of the images directly in `folder`."""
    return sorted(file.name for file in entries_of(folder).files if is_image(file))


def _left_out(root: Path, folder: Path, listing: Listing) -> None:
    """Add the other files directly in `folder` to the listing: as a problem if unusable, else as a note."""
    entries = entries_of(folder)
    for path, why in entries.problems.items():
        listing.problems.append(Problem("missing", shown(path.relative_to(root)), why))
    if others := sorted(file for file in entries.files if not is_image(file)):
        names = ", ".join(file.name for file in others[:5]) + (", ..." if len(others) > 5 else "")
        listing.notes.append(
            f"left out because not an image: {counted(len(others), 'file')} ({count_others(others)}): {names}"
        )


@dataclass(frozen=True)
class FileNames:
    """One flat folder whose file names contain class and split. Rows are sorted by class and number."""

    folder: str

    def roots(self, source: Path, nearby: Sequence[Path]) -> list[Path]:
        """Return the folders that may be the root."""
        named = [path for path in nearby if path.name == self.folder and _image_names(path)]
        return named or [path for path in (source,) if _image_names(path)]

    def expected(self) -> str:
        """Describe the layout in words."""
        return f"{self.folder}/ with images <class>_<number>_<train|test>.png"

    def folders(self) -> list[str]:
        """Return the data folders, relative to the root."""
        return [""]

    def read(self, root: Path, classes: int) -> Listing:
        """Read every image name of the folder."""
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
    """`images/` next to `anno/train.txt` and `anno/test.txt`, in each of `parts`. Rows are in the order of the lists."""

    parts: tuple[str, ...] = ("",)  # folders below the root

    def roots(self, source: Path, nearby: Sequence[Path]) -> list[Path]:
        """Return the folders that may be the root."""
        if source.name in self.parts and len(self.parts) == 1:  # `source` is the part itself
            nearby = [*nearby, source.parent]
        found = [path for path in nearby if any((path / part / "anno").is_dir() for part in self.parts)]
        # growth stages have the same layout as soygene
        return [path for path in found if "" not in self.parts or path == source or not _is_stage(path)]

    def expected(self) -> str:
        """Describe the layout in words."""
        parts = [part + "/" if part else "" for part in self.parts]
        return " and ".join(f"{part}images/, {part}anno/train.txt, {part}anno/test.txt" for part in parts)

    def folders(self) -> list[str]:
        """Return the data folders, relative to the root."""
        return [f"{part}/{folder}".lstrip("/") for part in self.parts for folder in ("anno", "images")]

    def read(self, root: Path, classes: int) -> Listing:
        """Read every line of every list."""
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
                listing.notes.append(f"{len(unlisted)} images are not in any list and are left out: {shown}")
        if len(self.parts) > 1:
            listing.notes.append(
                f"rows are in the order {', '.join(self.parts)}: the last images of each class, which the loader uses for "
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
            file, path, problem = file.strip(), PurePosixPath(file.strip()), None
            if not file or not re.fullmatch(r"[0-9]{1,9}", class_id):
                problem = f"expected `file class`, got {line.strip()[:80]!r}"
            elif not 1 <= int(class_id) <= classes:
                problem = f"class {int(class_id)} of {file} is not one of 1 to {classes}"
            elif path.is_absolute() or ".." in path.parts:
                problem = f"{file} is outside of images/"
            elif (named := re.search(r"_(train|test)$", path.stem)) and named[1] != split:
                problem = f"the name of {file} contains {named[1]}"
            if problem:
                listing.problems.append(Problem("list", f"{name} line {number}", problem))
            else:
                listing.rows.append(Row(str(part / "images" / path), int(class_id) - 1, split))


def _is_stage(path: Path) -> bool:
    return re.fullmatch(r"R\d", path.name) is not None
