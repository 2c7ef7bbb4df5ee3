"""File lists of checkpoints and models: sizes and checksums, compared before loading.

The list of a checkpoint has all its files, that of a model only its weights, since people edit configurations and model cards.
The checksums are 128-bit XXH3. They detect accidental damage, but do not protect against deliberate manipulation.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import xxhash


FILE_LIST = "checkpoint_files.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
_CHUNK = 2**20  # bytes


def checksum(path: Path) -> str:
    """Return the checksum of a file, prefixed with the name of the algorithm."""
    hashed, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            hashed.update(buffer[:size])
    return f"xxh3_128:{hashed.hexdigest()}"


def write_file_list(folder: Path, files: Sequence[Path], about: Mapping[str, Any]) -> Path:
    """Write the file list of a checkpoint.

    Args:
        folder: folder of the checkpoint.
        files: files in the folder, at any depth.
        about: additional content of the list.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    content = {
        **about,
        "files": {name: file.stat().st_size for name, file in zip(names, files, strict=True)},
        "checksums": {name: checksum(file) for name, file in zip(names, files, strict=True)},
    }
    (folder / FILE_LIST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder / FILE_LIST


def list_weights(folder: Path) -> None:
    """Write the file list of a model folder, with its weights."""
    write_file_list(folder, sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)}), {})


def find_differences(folder: Path, read: bool, names: Sequence[str] = ("*",)) -> Iterator[str]:
    """Yield a short description of each difference between a checkpoint and its file list.

    Args:
        folder: folder of a checkpoint with a file list.
        read: also compare checksums, which reads all files. Lists of earlier versions have none.
        names: patterns of the names of the files to compare.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: if the list cannot be read.
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
            yield f"{name} is damaged (its checksum differs from the saved one)"


def check_weights(checkpoint: str | os.PathLike) -> None:
    """Compare the weights in a folder with its file list, if there is one.

    Raises:
        ValueError: if they differ.
    """
    folder = Path(checkpoint)
    if not (folder / FILE_LIST).is_file():
        return
    try:
        problem = next(find_differences(folder, True, WEIGHTS), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problem = f"{FILE_LIST} cannot be read"
    if problem is not None:
        raise ValueError(
            f"{folder} differs from the saved checkpoint: {problem}. Use another checkpoint, or delete {FILE_LIST} in it if the "
            "weights were replaced on purpose"
        )
