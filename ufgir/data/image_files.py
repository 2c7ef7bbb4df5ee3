"""Decide which files are images, and list all files in a folder.

A file whose suffix belongs to a format that Pillow decodes is treated as an image without being opened. A file with another
suffix, or none, is opened once and is an image if Pillow recognizes its content.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..transforms.images import HEIF_SUFFIXES


# Formats that Pillow recognizes but cannot decode by itself, or that are not plain images.
_NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_OPENED_AS_JPEG = {"MPO"}  # opened by the JPEG plugin, without an entry of its own
# Formats with a signature in their first bytes; the others are recognized by their suffix only.
_BY_CONTENT = {"AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "QOI", "TIFF", "WEBP"}
# Camera raw formats. Most are TIFF files, of which Pillow would read only the preview.
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
SYSTEM_NAMES = frozenset(  # folders and files created by operating systems; names that begin with . are always hidden
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")
)

Identity = tuple[int, int] | str


def _readable_suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that Pillow can decode here, in lower case, with the dot."""
    Image.init()
    formats = Image.registered_extensions().items()
    readable = (Image.OPEN.keys() | _OPENED_AS_JPEG) - _NO_IMAGES
    return frozenset(suffix for suffix, name in formats if name in readable)


IMAGE_SUFFIXES = _readable_suffixes()
USUAL_SUFFIXES = ".bmp, .gif, .jpg, .png, .tif, .webp and others that Pillow reads"  # for messages


def is_hidden(name: str) -> bool:
    """Return whether a folder or file is hidden or created by an operating system."""
    return name.startswith(".") or name in SYSTEM_NAMES


def is_image(file: str | os.PathLike) -> bool:
    """Return whether Pillow can decode a file, judged by its suffix, or by its first bytes if the suffix is unknown."""
    suffix = Path(file).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return True
    if suffix in _RAW_SUFFIXES:
        return False
    try:
        with Image.open(file, formats=sorted(_BY_CONTENT & Image.OPEN.keys())):
            return True
    except Exception:  # Pillow's decoders raise many types of errors for other files
        return False


def conversion_hint(file: str | os.PathLike) -> str | None:
    """Return how to convert a photo that Pillow cannot decode (HEIC, raw); None for other files."""
    suffix = Path(file).suffix.lower()
    if suffix in HEIF_SUFFIXES - IMAGE_SUFFIXES:
        return "HEIC: install pillow-heif, or save it as JPEG"
    if suffix in _RAW_SUFFIXES:
        return "camera raw file: convert it to TIFF, PNG or JPEG"
    return None


def shown(path: str | os.PathLike) -> str:
    """Return a path for messages, with bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8; file names from another system may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def identity_of(file: str | os.PathLike) -> Identity | None:
    """Return a key that is equal for all paths to the same file; None if there is no such file."""
    try:
        about = os.stat(file)
        if not os.path.isfile(file):
            return None
        return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(file)
    except (OSError, ValueError):  # ValueError for an invalid name
        return None


class Entries(NamedTuple):
    """The contents of a folder, sorted by name, without hidden files.

    Attributes:
        folders: folders, and links to folders.
        files: file -> identity; also for links to files.
        problems: unusable entry -> reason.
    """

    folders: list[Path]
    files: dict[Path, Identity]
    problems: dict[Path, str]


def entries_of(folder: Path) -> Entries:
    """List the contents of a folder."""
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
                found.problems[path] = "the file name is not UTF-8; rename it"
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
    """Return the folders in `path` that are not hidden, sorted."""
    return entries_of(path).folders


@dataclass
class FolderScan:
    """The contents of a folder and its subfolders, without hidden files.

    Attributes:
        images: image -> identity, sorted by path.
        others: files that are not images.
        problems: unusable entry (link without a target, unreadable folder) -> reason.
    """

    images: dict[Path, Identity] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    problems: dict[Path, str] = field(default_factory=dict)


def scan_folder(folder: Path) -> FolderScan:
    """List the contents of a folder and its subfolders; links to folders are followed, except circular ones."""
    found = FolderScan()
    _scan(folder, frozenset(), found)
    found.images = dict(sorted(found.images.items(), key=lambda item: item[0].parts))
    found.others.sort(key=lambda file: file.parts)
    return found


def _scan(folder: Path, above: frozenset[str], found: FolderScan) -> None:
    place = os.path.realpath(folder)
    if place in above:
        found.problems[folder] = "a link to one of its parent folders"
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
    """Count files that are not images by suffix: `2 .HEIC (install pillow-heif, or ...), 1 without a suffix`."""
    counts = Counter(file.suffix for file in files)
    parts = []
    for suffix, count in counts.most_common():
        why = conversion_hint(Path(f"x{suffix}"))
        parts.append(f"{count:,} {suffix or 'without a suffix'}" + (f" ({why})" if why else ""))
    return ", ".join(parts)


def problem_lines(problems: Mapping[Path, str], root: Path) -> list[str]:
    """Return one line per problem, with paths relative to `root`."""
    return [f"{shown(os.path.relpath(path, root))}: {why}" for path, why in problems.items()]
