"""Files and folders that a subcommand is to write: tried before it computes, and what it computed is told if they fail."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..utils.files import TEMPORARY


class NotWritten(OSError):
    """Something could not be written after the work was done.

    Attributes:
        done: what to tell of the work first.
    """

    def __init__(self, done: str, why: str) -> None:
        super().__init__(why)
        self.done = done


def check_folder(path: str | os.PathLike, option: str = "--output", whole: bool = False) -> None:
    """Refuse, before a long computation, a folder that files cannot be written into. It is not made yet.

    Args:
        path: the folder, there or not.
        option: that names it.
        whole: it will be made beside `path` and take its place, see `ufgir.utils.files.new_folder`.

    Raises:
        ValueError: it is a file, or lies in one, or nothing can be written there.
    """
    if os.path.isfile(path):
        raise ValueError(f"`{option}` must be a folder, got the file {path}.")
    if (file := _file_above(path)) is not None:
        raise ValueError(f"`{option}` must be a folder, and {path} lies in {file}, which is a file: choose another.")
    if whole and os.path.ismount(path):
        raise ValueError(f"`{option}` {path} is where a disk is mounted, and cannot be replaced: name a folder in it.")
    place = Path(path).absolute()
    _try(place.parent if whole else place, place.name, option, path)


def check_file(path: str | os.PathLike, option: str = "--output") -> None:
    """Refuse, before a long computation, a file that cannot be written. It is not made yet, nor is its folder.

    Args:
        path: the file, there or not.
        option: that names it.

    Raises:
        ValueError: it is a folder, or lies in a file, or nothing can be written there.
    """
    if os.path.isdir(path):
        raise ValueError(f"`{option}` must be a file, got the folder {path}.")
    if (file := _file_above(path)) is not None:
        raise ValueError(f"`{option}` {path} lies in {file}, which is a file: choose another place.")
    place = Path(path).absolute()
    _try(place.parent, place.name, option, path)


def check_document(path: str | os.PathLike, option: str = "--into") -> None:
    """Refuse, before a long computation, a document that cannot be written, or that cannot have `figures` beside it.

    Args:
        path: the document, which is there.
        option: that names it.

    Raises:
        ValueError: see `check_file` and `check_folder`.
    """
    check_file(path, option)
    check_folder(Path(path).parent / "figures", option)


def _file_above(path: str | os.PathLike) -> Path | None:
    """The file that stands where a folder above `path` should be."""
    return next((above for above in Path(path).parents if os.path.isfile(above)), None)


def _try(folder: Path, name: str, option: str, path: str | os.PathLike) -> None:
    """Make a file in `folder`, or where that is not there yet, a folder in its place; and remove it. Only trying tells:
    permissions say nothing of /proc, of a disk that is mounted for reading, or to root."""
    try:
        if os.path.isdir(folder):
            with tempfile.NamedTemporaryFile(dir=folder, prefix=f"_{name}.", suffix=TEMPORARY):
                return
        while not os.path.exists(folder.parent):
            folder = folder.parent
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"_{folder.name}.", suffix=TEMPORARY):
            return
    except OSError as error:
        raise ValueError(f"`{option}` {path} cannot be written: {error.strerror}. Choose another place.") from error


@contextmanager
def told_first(done: Sequence[str]) -> Iterator[None]:
    """Within, files are written: if one fails, what was computed is told before the mistake.

    Args:
        done: paragraphs on what was computed and, appended within, on what was written.

    Raises:
        NotWritten: in place of the error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        place = getattr(error, "filename2", None) or getattr(error, "filename", None)
        why = f"{place}: {error.strerror}" if place else getattr(error, "strerror", None) or str(error)
        raise NotWritten("\n\n".join(done), f"not everything was written: {why}") from error
