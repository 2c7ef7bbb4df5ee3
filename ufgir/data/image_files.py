"""Which files are images, and what lies in a folder: nothing in it is passed over without being listed.

Pillow is asked: a file whose suffix belongs to a format that Pillow decodes is taken for an image without opening it; a file with
another suffix, or with none, is opened once and is an image if Pillow knows its content.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..transforms.images import HEIF_SUFFIXES


# Formats that Pillow knows but does not decode by itself, or that hold more than an image.
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_OPENED_AS_JPEG = {"MPO"}  # the plugin of JPEG opens it, so that it has no entry of its own
# Formats that begin with bytes of their own: the others are known by their suffix only.
_BY_CONTENT = {"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "QOI", "TIFF", "WEBP"}
# Of cameras. Most are TIFF files, of which Pillow would read the preview.
_RAW_SUFFIXES = frozenset(
    [
        ".3fr",
        ".arw",
        ".cr2",
        ".cr3",
        ".crw",
        ".dcr",
        ".dng",
        ".erf",
        ".fff",
        ".iiq",
        ".kdc",
        ".mef",
        ".mos",
        ".mrw",
        ".nef",
        ".nrw",
        ".orf",
        ".pef",
        ".raf",
        ".raw",
        ".rw2",
        ".rwl",
        ".sr2",
        ".srf",
        ".srw",
        ".x3f",
    ]
)
SYSTEM_NAMES = (
    frozenset(  # of folders and files that operating systems leave behind; what begins with . is hidden anyway
        ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")
    )
)

Identity = tuple[int, int] | str


def _readable_suffixes() -> frozenset[str]:
    """Of all formats that Pillow decodes here, lower case, with the dot."""
    Image.init()
    formats = Image.registered_extensions().items()
    readable = (Image.OPEN.keys() | _OPENED_AS_JPEG) - _NO_IMAGES
    return frozenset(suffix for suffix, name in formats if name in readable)


IMAGE_SUFFIXES = _readable_suffixes()
USUAL_SUFFIXES = ".bmp, .gif, .jpg, .png, .tif, .webp and others that Pillow reads"  # for messages


def is_hidden(name: str) -> bool:
    """Whether a folder or file is hidden, or left behind by an operating system."""
    return name.startswith(".") or name in SYSTEM_NAMES


def is_image(file: str | os.PathLike) -> bool:
    """Whether Pillow decodes a file, told by its suffix, or by its first bytes where Pillow does not know the suffix."""
    suffix = Path(file).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in _RAW_SUFFIXES:
        return False
    try:
        with Image.open(file, formats=sorted(_BY_CONTENT & Image.OPEN.keys())):
            return True
    except Exception:  # Pillow's decoders raise nearly everything for what is no image
        return False


def why_no_image(file: str | os.PathLike) -> str | None:
    """What to do about a file that is not an image for Pillow but a photo for people; None if it is none."""
    suffix = Path(file).suffix.lower()
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return "HEIC: install pillow-heif, or save it as JPEG"
    if suffix in _RAW_SUFFIXES:
        return "raw data of a camera: develop it to TIFF, PNG or JPEG"
    return None


def shown(path: str | os.PathLike) -> str:
    """A path for messages: bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_utf8(text: str) -> bool:
    """Whether a name or text can be written as UTF-8: names of files from another system may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def identity_of(file: str | os.PathLike) -> Identity | None:
    """What tells a file from others, whatever path leads to it; None if there is no such file."""
    try:
        about = os.stat(file)
        if not os.path.isfile(file):
            return None
        return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(file)
    except (OSError, ValueError):  # the latter for a name that cannot be one
        return None


class Entries(NamedTuple):
    """What lies directly in a folder, by name; hidden things are left out.

    Attributes:
        folders: also those that links lead to.
        files: file to its identity; also those that links lead to.
        problems: what lies there and cannot be used, and why.
    """

    folders: list[Path]
    files: dict[Path, Identity]
    problems: dict[Path, str]


def entries_of(folder: Path) -> Entries:
    """Look into a folder."""
    found = Entries([], {}, {})
    try:
        device = os.stat(folder).st_dev
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        found.problems[folder] = f"the folder cannot be read ({error.strerror})"
        return found
    for entry in visible:
        path = folder / entry.name
        try:
            if not is_utf8(entry.name):
                found.problems[path] = "the name is not UTF-8: rename it"
            elif entry.is_dir():
                found.folders.append(path)
            elif entry.is_file():
                linked = entry.is_symlink() or not entry.inode()
                identity = identity_of(path) if linked else None
                found.files[path] = identity or (device, entry.inode())
            elif entry.is_symlink():
                found.problems[path] = f"a link to {shown(os.readlink(path))}, which does not exist"
            else:
                found.problems[path] = "neither a file nor a folder"
        except OSError as error:
            found.problems[path] = error.strerror or str(error)
    return found


def child_folders(path: Path) -> list[Path]:
    """The visible folders in `path`, sorted."""
    return entries_of(path).folders


@dataclass
class FolderScan:
    """What lies in a folder and below it, hidden things left out.

    Attributes:
        images: image to its identity, sorted by path.
        others: files that are no images.
        problems: what cannot be used, and why: links without a target, folders that cannot be read.
    """

    images: dict[Path, Identity] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)


def scan_folder(folder: Path) -> FolderScan:
    """Everything in a folder and below it; links to folders are followed, but not in a circle."""
    found = FolderScan()
    _scan(folder, frozenset(), found)
    found.images = dict(sorted(found.images.items(), key=lambda item: item[0].parts))
    found.others.sort(key=lambda file: file.parts)
    return found


def _scan(folder: Path, above: frozenset[str], found: FolderScan) -> None:
    place = os.path.realpath(folder)
    if place in above:
        found.problems[folder] = "a link to a folder that holds it"
        return
    entries = entries_of(folder)
    found.problems |= entries.problems
    for file, identity in entries.files.items():
        if is_image(file):
            found.images[file] = identity
        else:
            found.others.append(file)
    for child in entries.folders:
        _scan(child, above | {place}, found)


def count_others(files: Iterable[Path]) -> str:
    """Files that are no images, by their suffixes: `2 .HEIC (install pillow-heif, or ...), 1 without a suffix`."""
    counts = Counter(file.suffix for file in files)
    parts = []
    for suffix, count in counts.most_common():
        why = why_no_image(Path(f"x{suffix}"))
        parts.append(f"{count:,} {suffix or 'without a suffix'}" + (f" ({why})" if why else ""))
    return ", ".join(parts)


def problem_lines(problems: Mapping[Path, str], root: Path) -> list[str]:
    """A line for each problem, with paths relative to `root`."""
    return [f"{shown(os.path.relpath(path, root))}: {why}" for path, why in problems.items()]
