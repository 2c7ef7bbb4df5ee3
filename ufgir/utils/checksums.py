"""The list of a checkpoint's files: their sizes and checksums, to be compared before anything is loaded from it.

The checksums are XXH3 of 128 bits: they show every damage of a disk or a copy, but not the work of somebody who wants to deceive.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash


FILE_LIST = "checkpoint_files.json"
WEIGHTS = ("*.safetensors", "*.bin")
_CHUNK = 2**20  # bytes


def checksum(path: Path) -> str:
    """The checksum of a file, with the name of its kind."""
    hashed, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hashed.update(buffer[:size])
    return f"xxh3_128:{hashed.hexdigest()}"


def write_file_list(folder: Path, files: Sequence[Path], about: Mapping[str, Any]) -> Path:
    """Write the list into `folder`.

    Args:
        folder: of the checkpoint.
        files: in it, at any depth.
        about: what else the list says.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    content = {
        **about,
        "files": {name: file.stat().st_size for name, file in zip(names, files, strict=True)},
        "checksums": {name: checksum(file) for name, file in zip(names, files, strict=True)},
    }
    (folder / FILE_LIST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder / FILE_LIST


def unlike_the_list(folder: Path, read: bool, names: Sequence[str] = ("*",)) -> Iterator[str]:
    """What differs from the list of a checkpoint, in a few words each.

    Args:
        folder: of the checkpoint, with a list.
        read: compare checksums, too, where the list has them (those of earlier versions have none): all is read.
        names: patterns of the names of the files to look at.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: the list cannot be read.
    """
    content = json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))
    checksums = content.get("checksums", {})
    for name, size in content["files"].items():
        if not any(fnmatch(Path(name).name, pattern) for pattern in names):
            continue
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            yield f"{name} is missing"
        elif found != size:
            yield f"{name} has {found} of {size} bytes"
        elif read and name in checksums and checksum(file) != checksums[name]:
            yield f"{name} is damaged, its checksum is not the one it was saved with"


def check_weights(checkpoint: str | os.PathLike) -> None:
    """Compare the weights in a folder with its list, if it has one.

    Raises:
        ValueError: they are not those that were saved.
    """
    folder = Path(checkpoint)
    if not (folder / FILE_LIST).is_file():
        return
    try:
        problem = next(unlike_the_list(folder, True, WEIGHTS), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problem = f"{FILE_LIST} in it cannot be read"
    if problem is not None:
        raise ValueError(f"{folder} is not as it was saved: {problem}. Use another checkpoint")
