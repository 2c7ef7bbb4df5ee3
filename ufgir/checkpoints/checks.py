"""Checks of a source before a model is built, and conversion of file errors to one sentence.

Numbers in a file must not determine the size of an allocation: `check_contents` limits the numbers of a config.json, and
`check_header` compares them with names and shapes in the header of the weights. Neither builds a model.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clca.configuration_clca import LARGEST

from ..utils.text import one_sentence, shortened


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # index of weights in several files

# Largest numbers accepted in a config.json: ours and transformers' names, and timm's.
MOST = {
    **LARGEST,
    "depth": LARGEST["num_hidden_layers"],
    "embed_dim": LARGEST["hidden_size"],
    "mlp_ratio": 256,
    "num_heads": LARGEST["num_attention_heads"],
    "img_size": LARGEST["image_size"],
    "in_chans": LARGEST["num_channels"],
    "reg_tokens": LARGEST["num_register_tokens"],
}
LARGEST_RESIZE = 4  # largest ratio of the image side before the crop to that of the model's input
ALWAYS_RESIZED = 1024  # side in pixels that is always accepted
_FRACTIONS = ("mlp_ratio",)
_PARTS = ("vision_config", "model_args")  # nested objects of config.json with such numbers
_WITHOUT_FLOATS = r".*(num_batches_tracked|position_ids)"  # names of integer tensors


class Stored(NamedTuple):
    """Shape and dtype of a tensor in the header of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str  # name in safetensors: F32, I8, ...


@contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Convert errors of file readers to a ValueError; keep ValueError and OSError, which are readable already.

    Args:
        what: object that is read, for the message, such as "the weights of X".

    Raises:
        ValueError: if reading fails; the message begins with `what`.
    """
    try:
        yield
    except (IsADirectoryError, PermissionError) as error:
        raise ValueError(f"{what} cannot be read: {one_sentence(error)}") from error
    except (ValueError, OSError):
        raise
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{what} cannot be read: {type(error).__name__}.") from error
    except Exception as error:  # file readers raise many kinds of errors
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {shortened(one_sentence(error))}") from error


def check_contents(contents: Mapping[str, Any], where: str) -> None:
    """Check the types and ranges of values in a config.json.

    Args:
        contents: contents of the file.
        where: description of the file, for the message.

    Raises:
        ValueError: for the first invalid value.
    """
    for values in (contents, *(part for name in _PARTS if isinstance(part := contents.get(name), Mapping))):
        for name, most in MOST.items():
            if (value := values.get(name)) is not None:
                _check_number(name, value, most, where)
        for name in ("id2label", "label2id"):
            labels = values.get(name)
            if labels is not None and not isinstance(labels, Mapping):
                raise ValueError(f"`{name}` in {where} must be an object, got a {type(labels).__name__}.")
            if labels is not None and len(labels) > MOST["num_labels"]:
                raise ValueError(
                    f"`{name}` in {where} must have at most {MOST['num_labels']} classes, got {len(labels)}."
                )
        ids = values.get("id2label") or {}
        if not all(str(index).isdecimal() for index in ids):
            raise ValueError(
                f"`id2label` in {where} must have class indices as keys, got {shortened(str(list(ids)[:5]))}."
            )
        for name in ("dtype", "torch_dtype"):
            dtype = values.get(name)
            if dtype is not None and not isinstance(
                getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype
            ):
                raise ValueError(f"`{name}` in {where} must be a torch dtype, such as float32, got {dtype!r}.")


def _check_number(name: str, value: Any, most: int, where: str) -> None:
    numbers = value if isinstance(value, list | tuple) and name.endswith(("size", "ratio")) else [value]
    kind = int | float if name in _FRACTIONS else int
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, kind):
            raise ValueError(
                f"`{name}` in {where} must be {'an integer' if kind is int else 'a number'}, got {value!r}."
            )
        if not number <= most:
            raise ValueError(f"`{name}` in {where} must be at most {most}, got {number}.")


def read_header(folder: str | Path) -> dict[str, Stored] | None:
    """Read the names, shapes and dtypes of a folder's weights from the headers of its safetensors files; None if it has none.

    Raises:
        ValueError: if a header cannot be read.
    """
    folder = Path(folder)
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).is_file():
            return None
        with in_one_sentence(f"{INDEX} of {folder}"):
            try:
                files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise ValueError(f"{INDEX} of {folder} cannot be read: {one_sentence(error)}") from error
    return {name: stored for file in files for name, stored in _header_of(folder / Path(file).name).items()}


def _header_of(file: Path) -> dict[str, Stored]:
    if file.is_dir():
        raise ValueError(f"the weights of {file.parent} cannot be read: {file.name} is a folder.")
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size
            entries = json.loads(opened.read(length)) if 8 + length <= size else {}
        entries = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if needed > size:
            raise ValueError(f"truncated, {size:,} of {needed:,} bytes")
        return {name: Stored(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"the weights of {file.parent} cannot be read: {file.name}: {one_sentence(error)}") from error


def check_header(contents: Mapping[str, Any], header: Mapping[str, Stored], where: str) -> None:
    """Check that the sizes in config.json match the weights, and that weights are floating-point numbers.

    Args:
        contents: contents of config.json, for a ViT of ours or of transformers.
        header: result of `read_header`.
        where: source, for the message.

    Raises:
        ValueError: if a size or dtype does not match.
    """
    if "quantization_config" not in contents:
        for name, (_, dtype) in header.items():
            if not dtype.startswith(("F", "BF")) and not re.fullmatch(_WITHOUT_FLOATS, name):
                raise ValueError(f"the weights of {where} must be floating-point numbers, but {name} is {dtype}.")
    values = contents.get("vision_config") if isinstance(contents.get("vision_config"), Mapping) else contents
    stored = {name: entry.shape for name, entry in header.items() if not name.startswith(("text_model.", "decoder."))}
    for name, configured, stored_size in _sizes(values, contents, stored):
        if configured is not None and stored_size is not None and configured != stored_size:
            raise ValueError(
                f"`{name}` in the config.json of {where} is {configured}, but its weights have {stored_size}."
            )
    _check_patches(values, stored, where)


def _sizes(
    values: Mapping[str, Any], contents: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name of a size, value in the configuration, value in the weights); None if unknown."""

    def shape(pattern: str, rank: int) -> tuple[int, ...] | tuple[None, ...]:
        found = (shape for name, shape in stored.items() if re.search(pattern, name) and len(shape) == rank)
        return next(found, (None,) * rank)

    layers = [int(match[1]) for name in stored if (match := re.search(r"\blayers?\.(\d+)\.", name))]
    yield "num_hidden_layers", values.get("num_hidden_layers"), 1 + max(layers) if layers else None
    projection = shape(r"patch_embedding(s\.projection)?\.weight$", 4)
    yield "hidden_size", values.get("hidden_size"), projection[0]
    yield "num_channels", values.get("num_channels"), projection[1]
    inner = shape(r"layers?\.0\.(mlp\.fc1|intermediate\.dense)\.weight$", 2)[0]
    yield "intermediate_size", values.get("intermediate_size"), inner
    if contents.get("head", "linear") == "linear":
        labels = contents.get("num_labels", len(contents["id2label"]) if contents.get("id2label") else None)
        yield "num_labels", labels, shape(r"^(cls_)?classifier\.weight$", 2)[0]


def _check_patches(values: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that an `image_size` does not have more patches than there are position embeddings."""
    tables = [shape for name, shape in stored.items() if re.search(r"(?<!clr_)position_embeddings?(\.weight)?$", name)]
    size, patch = values.get("image_size"), values.get("patch_size")
    if not tables or len(tables[0]) < 2 or size is None or patch is None:
        return
    sizes, patches = (list(n) if isinstance(n, list | tuple) else [n, n] for n in (size, patch))
    if min(*sizes, *patches) < 1:
        return  # reported by the configuration
    count = math.prod(side // patch for side, patch in zip(sizes, patches, strict=False))
    if count > tables[0][-2]:
        raise ValueError(
            f"`image_size` {size} in the config.json of {where} gives {count} patches, but its weights have position embeddings "
            f"for {tables[0][-2]}."
        )
