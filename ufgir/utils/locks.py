"""File locks for output files and folders: one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


PATIENCE = 10.0  # seconds for which the workers of a killed process may still hold its lock


@contextlib.contextmanager
def exclusive_lock(target: Path, refusal: str) -> Iterator[None]:
    """Context manager that locks a file or folder: only one process at a time runs a block with the same target.

    The lock is a file `.NAME.lock` next to the target. It is released when the process ends in any way, and deleted at the end of
    the block.

    Args:
        target: the file or folder to write; its parent folder is created if missing.
        refusal: error message for another process that requests the lock.

    Raises:
        ValueError: if another process holds the lock.
    """
    target = target.resolve()
    file = target.with_name(f".{target.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=PATIENCE)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise ValueError(refusal) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows cannot delete an open file
            file.unlink()  # while it is held: afterwards another process may own it
        lock.release()
