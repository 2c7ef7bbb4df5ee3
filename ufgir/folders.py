"""Folders that appear complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


MARKER = "conversion.json"  # in a converted folder: what it was made of


def is_made_of(output: Path, made_of: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether `output` is there, converted from the same source in the same way, and is to stay.

    Raises:
        ValueError: it is something else; or another conversion, and `overwrite` is not set.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`output` {output} exists and was not made by a conversion: choose another place."
        ) from error
    if found == made_of and not overwrite:
        return True
    if not overwrite:
        raise ValueError(f"`output` {output} was made of another file or with other options: set `overwrite`.")
    return False


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that takes the place of `target` when the block ends, and vanishes if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes a folder that only its owner may read
        if target.is_dir() and any(target.iterdir()):
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
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
