"""Atomic writing of files and folders: they appear complete or not at all.

Data is first written next to its target as `_NAME.<eight characters>.tmp`. Uploads to the Hub ignore names that begin with `_`. The
writing process holds a lock on this file or folder, which the system releases when the process ends in any way. The next process that
writes the same target removes those that are not locked, the leftovers of killed processes; `remove_leftovers` removes all of a folder.
"""

import csv
import errno
import glob
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY, REPLACED = ".tmp", ".old"
# Names of temporary files and folders, and of those about to be replaced; in earlier versions they began with a dot.
_LEFTOVER = re.compile(r"[._](?P<target>.+)\.(?:[a-z0-9_]{8}|\d+)\.(?:tmp|old)")
_FILES = "files"  # target in the name of the folder of `whole_files`
_STALE = 3600.0  # seconds after which a temporary file is considered abandoned where files cannot be locked
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """A file could not be written completely because there is no space. The message is a full sentence."""


@contextmanager
def raise_disk_full(path: Path, needed: int | None = None) -> Iterator[None]:
    """Context manager that raises DiskFull, with the file and the required space, if there is no space to write `path`.

    torch and safetensors raise their own error types for a full disk, some with a C++ stack trace in the message.

    Args:
        path: a file, or a folder, whose most recently written file is named in the message.
        needed: required bytes; None if unknown.

    Raises:
        DiskFull: if the disk is full, or a quota or the file size limit is reached.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not _is_full(error):
            raise
        raise DiskFull(_full_disk_message(path, needed, error)) from None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    of_torch = isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text)
    return of_torch or any(f"(os error {number})" in text for number in _FULL)


def _full_disk_message(path: Path, needed: int | None, error: Exception) -> str:
    place = next(folder for folder in (path, *path.parents) if folder.is_dir())
    free = _megabytes(shutil.disk_usage(place).free)
    size = "" if needed is None else f"{_megabytes(needed)} are needed, "
    file = path
    if path.is_dir():
        written = [inner for inner in path.rglob("*") if inner.is_file()]
        file = max(written, key=lambda inner: inner.stat().st_mtime_ns, default=path)
        if not isinstance(error, OSError) and "inline_container" not in str(error):  # safetensors has removed its file
            return f"the weights could not be written into {_final(path)}, the disk is full: {size}{free} are free"
    told = f"{_final(file)} could not be written, the disk is full: {size}{free} are free"
    limited = getattr(error, "errno", None) == errno.EFBIG or f"(os error {errno.EFBIG})" in str(error)
    return f"{told}; files may not be that large here (`ulimit -f`)" if limited else told


def _final(file: Path) -> Path:
    """Return the path that a temporary file or folder will have when it is complete."""
    found = ((part, _LEFTOVER.fullmatch(part)) for part in file.parts)
    return Path(*(match["target"] if match else part for part, match in found if not part.startswith(f"_{_FILES}.")))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _for_everyone(path: Path) -> None:
    """Set the permissions given by the umask; mkstemp, mkdtemp and safetensors restrict them to the owner."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def share(folder: Path) -> None:
    """Set the permissions given by the umask for a folder and its content."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _for_everyone(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Return whether a name is that of a temporary file or folder of this module."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove the temporary files and folders of killed processes from `folder`.

    A folder that was about to be replaced is restored if its replacement is missing. Call this only if no other process writes to
    `folder`.
    """
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if found := _LEFTOVER.fullmatch(path.name):
            _clear(path, folder / found["target"])


def _remove_stale(target: Path) -> None:
    """Remove the temporary files and folders of this target that were left by killed processes."""
    for name in glob.glob(f"[._]{glob.escape(target.name)}.*.*", root_dir=target.parent, include_hidden=True):
        found = _LEFTOVER.fullmatch(name)
        if found is None or found["target"] != target.name:
            continue
        path = target.parent / name
        with suppress(OSError), _locked(path) as locked:  # it raises if its process is alive, or it was renamed
            if locked or time.time() - path.stat().st_mtime > _STALE:
                _clear(path, target)


def _clear(leftover: Path, target: Path) -> None:
    """Remove a leftover; restore it if it was about to be replaced and `target` is missing."""
    if leftover.suffix == REPLACED and not target.exists():
        os.replace(leftover, target)
    else:
        remove(leftover)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Context manager that locks a file or folder, so that other processes can tell that this one is alive.

    Yields:
        False if files cannot be locked here: on Windows, some network disks, and those of other users.

    Raises:
        BlockingIOError: if another process has locked it.
        FileNotFoundError: if another process has removed it.
    """
    with ExitStack() as stack:
        locked = False
        if fcntl is not None:
            try:
                handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except (BlockingIOError, FileNotFoundError):
                raise
            except OSError:
                pass
            if locked and not os.path.samestat(os.fstat(handle), path.stat()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        yield locked


@contextmanager
def temporary_path(target: Path, folder: bool = False) -> Iterator[Path]:
    """Context manager that yields a new temporary file or folder next to `target`. It is deleted at the end of the block, unless it was
    renamed. The leftovers of killed processes that wrote the same target are deleted first.

    Args:
        target: file or folder to write; its parent folder is created if missing.
        folder: yield a folder.

    Raises:
        DiskFull: if there is no space.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    names = {"dir": target.parent, "prefix": f"_{target.name}.", "suffix": TEMPORARY}
    with ExitStack() as stack:
        while True:
            with raise_disk_full(target):
                if folder:
                    path = Path(tempfile.mkdtemp(**names))
                else:
                    handle, name = tempfile.mkstemp(**names)
                    os.close(handle)
                    path = Path(name)
            with suppress(BlockingIOError, FileNotFoundError):  # until then, another process may remove it
                stack.enter_context(_locked(path))
                break
        stack.callback(remove, path)
        yield path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder, which replaces `target` at the end of the block and is deleted if the block fails.

    Raises:
        DiskFull: if there is no space.
    """
    with temporary_path(target, folder=True) as temporary:
        with raise_disk_full(temporary):
            yield temporary
        share(temporary)
        if not target.is_dir() or not any(target.iterdir()):
            os.replace(temporary, target)
            return
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(_locked(target))  # so that it is no leftover while it has another name
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"_{target.name}.", suffix=REPLACED))
            os.replace(target, old)
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder, whose files are moved to `folder` one by one at the end of the block, and deleted if
    the block fails. Other files in `folder` are kept.

    Raises:
        DiskFull: if there is no space.
    """
    with temporary_path(folder / _FILES, folder=True) as temporary:
        with raise_disk_full(temporary):
            yield temporary
        for file in sorted(
            (file for file in temporary.rglob("*") if file.is_file()), reverse=True
        ):  # shards before their index
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            _for_everyone(file)
            to_disk(file)
            os.replace(file, target)


@contextmanager
def whole_file(path: str | os.PathLike, needed: int | None = None) -> Iterator[Path]:
    """Context manager that yields a temporary file, which replaces `path` at the end of the block and is deleted if the block fails.
    Missing folders are created.

    Args:
        path: the file to write.
        needed: required bytes, for the error message; None if unknown.

    Raises:
        DiskFull: if there is no space.
    """
    path = Path(path)
    with temporary_path(path) as temporary, raise_disk_full(path, needed):
        yield temporary
        _for_everyone(temporary)
        to_disk(temporary)
        os.replace(temporary, path)


def write_text_atomically(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 atomically: `path` holds either the old content or all of the new.

    Raises:
        DiskFull: if there is no space.
    """
    content = text.encode()
    with whole_file(path, len(content)) as temporary:
        temporary.write_bytes(content)
    return Path(path)


Row = dict[str, Any]


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as CSV atomically, with numbers to seven digits."""

    def cell(value: Any) -> Any:
        return f"{value:.7g}" if isinstance(value, float) else "" if value is None else value

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([cell(value) for value in row.values()] for row in rows)
    return write_text_atomically(path, buffer.getvalue())
