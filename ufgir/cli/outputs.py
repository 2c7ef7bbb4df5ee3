"""Checks of output files and folders before a computation, and reporting of results when writing fails."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..utils.files import temporary_path


class NotWritten(OSError):
    """Raised if a file could not be written after the computation.

    Attributes:
        done: text about the finished work, to print first.
    """

    def __init__(self, done: str, why: str) -> None:
        super().__init__(why)
        self.done = done


def check_folder(
    path: str | os.PathLike, option: str = "--output", whole: bool = False, files: Sequence[str] = ()
) -> None:
    """Check, before a long computation, that files can be written into a folder. The folder is not created.

    Args:
        path: the folder; it need not exist.
        option: name of the option, for the message.
        whole: the folder will be created next to `path` and replace it, see `ufgir.utils.files.new_folder`.
        files: names of the files that will be written into it.

    Raises:
        ValueError: if it is a file, is below a file, or cannot be written, or if one of the files is a folder there.
    """
    if os.path.isfile(path):
        raise ValueError(f"`{option}` must be a folder, got the file {path}.")
    if (file := _file_above(path)) is not None:
        raise ValueError(
            f"`{option}` must be a folder, but {path} is below {file}, which is a file: choose another path."
        )
    if whole and os.path.ismount(path):
        raise ValueError(f"`{option}` {path} is a mount point and cannot be replaced: choose a folder in it.")
    folder = next((name for name in files if os.path.isdir(Path(path, name))), None)
    if folder is not None:
        raise ValueError(
            f"`{option}` {path} must not hold a folder {folder}: a file of this name is written. Move it."
        )
    place = Path(path).absolute()
    _try(place.parent if whole else place, place.name, option, path)


def check_file(path: str | os.PathLike, option: str = "--output") -> None:
    """Check, before a long computation, that a file can be written. Neither the file nor its folder is created.

    Args:
        path: the file; it need not exist.
        option: name of the option, for the message.

    Raises:
        ValueError: if it is a folder, is below a file, or cannot be written.
    """
    if os.path.isdir(path):
        raise ValueError(f"`{option}` must be a file, got the folder {path}.")
    if (file := _file_above(path)) is not None:
        raise ValueError(f"`{option}` {path} is below {file}, which is a file: choose another path.")
    place = Path(path).absolute()
    _try(place.parent, place.name, option, path)


def check_document(path: str | os.PathLike, option: str = "--into") -> None:
    """Check, before a long computation, that a document and a folder `figures` next to it can be written.

    Args:
        path: the document, which exists.
        option: name of the option, for the message.

    Raises:
        ValueError: see `check_file` and `check_folder`.
    """
    check_file(path, option)
    check_folder(Path(path).parent / "figures", option)


def _file_above(path: str | os.PathLike) -> Path | None:
    """Return the file at the path of a parent folder of `path`; None if there is none."""
    return next((above for above in Path(path).parents if os.path.isfile(above)), None)


def _try(folder: Path, name: str, option: str, path: str | os.PathLike) -> None:
    """Check that `folder` is writable: create and remove a temporary file in it, or a folder in its place if it does not exist.
    Permissions alone are not enough: they do not cover /proc, read-only mounts, or root."""
    try:
        if os.path.isdir(folder):
            with temporary_path(folder / name):
                return
        while not os.path.exists(folder.parent):
            folder = folder.parent
        with temporary_path(folder, folder=True):
            return
    except OSError as error:
        raise ValueError(
            f"`{option}` {path} cannot be written: {error.strerror or error}. Choose another path."
        ) from error


@contextmanager
def print_before_error(done: Sequence[str]) -> Iterator[None]:
    """Context in which files are written: if writing fails, the results are printed before the error.

    Args:
        done: paragraphs about the results; paragraphs about written files are appended within the context.

    Raises:
        NotWritten: instead of the original error.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        place = getattr(error, "filename2", None) or getattr(error, "filename", None)
        why = f"{place}: {error.strerror}" if place else getattr(error, "strerror", None) or str(error)
        raise NotWritten("\n\n".join(done), f"could not write all files: {why}") from error
