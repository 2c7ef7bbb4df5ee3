"""File locks for output files and folders: one process at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


PATIENCE = 10.0  # seconds that the workers of a process that was killed may hold on to its lock


@contextlib.contextmanager
def only_one(target: Path, refusal: str) -> Iterator[None]:
    """Let no other process that asks for the same file or folder into its block.

    The lock is a file `.NAME.lock` beside the target. It is no longer held when its process has ended in whatever way, and is
    deleted at the end of the block.

    Args:
        target: what is written in the block; its parent is made if it is not there.
        refusal: a sentence for the second process.

    Raises:
        ValueError: another process is at work.
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
        with contextlib.suppress(OSError):  # as Windows refuses to delete an open file
            file.unlink()  # while it is held: afterwards it may be another's
        lock.release()
