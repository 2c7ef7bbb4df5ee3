"""Write files and folders whole: they appear complete or not at all.

What is being written lies beside its target as `_NAME.<eight characters>.tmp`: uploads to the Hub leave out names that begin with
`_`, and `remove_leftovers` removes what a killed process has left.
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
from contextlib import contextmanager
from pathlib import Path
from typing import Any


TEMPORARY, REPLACED = ".tmp", ".old"
# Names of what is being written, and of what it is about to replace; earlier versions began them with a dot.
_LEFTOVER = re.compile(r"[._](?P<target>.+)\.(?:[a-z0-9_]{8}|\d+)\.(?:tmp|old)")
_FILES = "_files."  # how the folder of `whole_files` begins
_STALE = 3600.0  # seconds after which a temporary file belongs to no process that still writes it
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(OSError):
    """A file could not be written whole, as there is no space for it; its text is a sentence for people."""


@contextmanager
def telling_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Within, `path` is written: where the space ends, raise DiskFull with the file and the space that it needs.

    torch and safetensors raise errors of their own kinds, some with a trace of C++ in their text.

    Args:
        path: a file; or a folder, of which the file written last is named.
        needed: bytes; None if it is not known.

    Raises:
        DiskFull: the disk, a quota or the limit of a file's size is reached.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFull) or not _is_full(error):
            raise
        raise DiskFull(_what_is_full(path, needed, error)) from None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    text = str(error)
    of_torch = isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text)
    return of_torch or any(f"(os error {number})" in text for number in _FULL)


def _what_is_full(path: Path, needed: int | None, error: Exception) -> str:
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
    """A path as it will be when what is being written has its name."""
    found = ((part, _LEFTOVER.fullmatch(part)) for part in file.parts)
    return Path(*(match["target"] if match else part for part, match in found if not part.startswith(_FILES)))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _for_everyone(path: Path) -> None:
    """Give a file or folder the permissions that the umask leaves; mkstemp, mkdtemp and safetensors give them to the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def share(folder: Path) -> None:
    """Give all that is in a folder, and the folder, the permissions that the umask leaves."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            _for_everyone(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether a name is one of those that this module gives to what is being written."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove what killed processes have left of files and folders that they were writing into `folder`.

    A folder that was about to be replaced gets its name back if its replacement did not come. Only for a process that alone
    writes into `folder`.
    """
    folder = Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = _LEFTOVER.fullmatch(path.name)
        if found and path.suffix == REPLACED and not (folder / found["target"]).exists():
            os.replace(path, folder / found["target"])
        elif found:
            remove(path)


def _remove_stale(target: Path) -> None:
    """Remove what a process that was killed long ago has left of this target."""
    for name in glob.glob(f"[._]{glob.escape(target.name)}.*{TEMPORARY}", root_dir=target.parent, include_hidden=True):
        path = target.parent / name
        try:
            if time.time() - path.stat().st_mtime > _STALE and _LEFTOVER.fullmatch(name):
                remove(path)
        except OSError:  # it has just got its name
            continue


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the place of `target` when the block ends, and vanishes if it fails.

    Raises:
        DiskFull: there is no space for what is written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"_{target.name}.", suffix=TEMPORARY))
    try:
        with telling_full_disk(temporary):
            yield temporary
        share(temporary)
        if target.is_dir() and any(target.iterdir()):
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"_{target.name}.", suffix=REPLACED))
            os.replace(target, old)
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(old, target)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder whose files take their places in `folder` when the block ends, one after the other, and vanish if it fails.

    What else is in `folder` stays.

    Raises:
        DiskFull: there is no space for what is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=_FILES, suffix=TEMPORARY))
    try:
        with telling_full_disk(temporary):
            yield temporary
        for file in sorted(
            (file for file in temporary.rglob("*") if file.is_file()), reverse=True
        ):  # parts before a whole
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            _for_everyone(file)
            to_disk(file)
            os.replace(file, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(path: str | os.PathLike, needed: int | None = None) -> Iterator[Path]:
    """A file that takes the place of `path` when the block ends, and vanishes if it fails; folders are made.

    Args:
        path: the file to write.
        needed: bytes, for the message if there is no space.

    Raises:
        DiskFull: there is no space for it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    with telling_full_disk(path, needed):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"_{path.name}.", suffix=TEMPORARY)
    os.close(handle)
    temporary = Path(name)
    try:
        with telling_full_disk(path, needed):
            yield temporary
            _for_everyone(temporary)
            to_disk(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 so that `path` holds the old content or all of the new one, never a part of it.

    Raises:
        DiskFull: there is no space for it.
    """
    content = text.encode()
    with whole_file(path, len(content)) as temporary:
        temporary.write_bytes(content)
    return Path(path)


Row = dict[str, Any]


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """The rows as CSV, atomically; numbers to seven digits."""

    def cell(value: Any) -> Any:
        return f"{value:.7g}" if isinstance(value, float) else "" if value is None else value

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([cell(value) for value in row.values()] for row in rows)
    return write_text_atomically(path, buffer.getvalue())
