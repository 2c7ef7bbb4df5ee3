"""Inputs of the analysis: batches of images, and the features of intermediate layers.

Shapes: B images per batch, N tokens, D width.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm
from transformers import default_data_collator

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..evaluation.prediction import GuardedImages, name_of, separate_broken


logger = logging.getLogger(__name__)


# Images


def no_file(index: int) -> str | None:
    """Return None: the image has no file name."""
    return None


class Batch(NamedTuple):
    """A batch of images."""

    indices: list[int]  # in the data set
    columns: Mapping[str, torch.Tensor]  # None if no image could be read
    size: int  # including images that could not be read
    broken: list[str]  # names of the images that could not be read


def batches(
    dataset: Any,
    batch_size: int,
    *,
    start: int = 0,
    num_workers: int = 0,
    files: Callable[[int], str | None] = no_file,
    skip_broken: bool = False,
    progress: str | None = None,
) -> Iterator[Batch]:
    """Yield the images of a data set in order, starting at `start`.

    Args:
        dataset: a `TransformedImages`, `StreamedImages` or similar data set.
        batch_size: images per batch; the last batch may be smaller.
        start: number of images to skip.
        num_workers: number of processes that load images.
        files: returns the file name of an image by index, for messages.
        skip_broken: log and skip images that cannot be read instead of raising. Not for streams.
        progress: label of the progress bar; None for no bar.

    Raises:
        ValueError: if the data set is empty, or an image cannot be read.
    """
    streamed, total = isinstance(dataset, IterableDataset), None
    if streamed:
        dataset.skip(start)
    else:
        total = len(dataset)
        if total == 0:
            raise ValueError("`dataset` is empty.")
        dataset = GuardedImages(Subset(dataset, range(start, total)))
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=functools.partial(separate_broken, collate=default_data_collator),
    )
    first = start
    with tqdm(total=total, initial=start, desc=progress, unit="image", disable=progress is None) as bar:
        for columns, size, problems in loader:
            broken = []
            for position, why in problems.items():
                name = name_of(first + position, files(first + position))
                if not skip_broken:
                    raise ValueError(
                        f"{name} cannot be read: {why}. Use `--skip-broken` to skip such images."
                    ) from None
                logger.warning("Skipping %s, which cannot be read: %s", name, why)
                broken.append(name)
            indices = [first + position for position in range(size) if position not in problems]
            yield Batch(indices, columns, size, broken)
            first += size
            bar.update(size)
    if first == 0:
        raise ValueError("`dataset` is empty.")


# Features


class LayerOutputs:
    """Context manager that records the output tokens of chosen layers, before tokens are retrieved from the cache.

    with LayerOutputs(model, [3, 6]) as outputs:
        model(pixels)
        outputs.tokens[3]

    Attributes:
        tokens: layer -> (B, N, D), of the last forward pass.
        masks: layer -> (B, N), False for padding; None if there is no padding.
    """

    def __init__(self, model: CLCAViTForImageClassification, layers: Sequence[int]) -> None:
        self.model, self.layers = model, layers
        self.tokens: dict[int, torch.Tensor] = {}
        self.masks: dict[int, torch.Tensor | None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerOutputs":
        for layer in dict.fromkeys(self.layers):
            hook = functools.partial(self._take, layer)
            self._handles.append(self.model.vit.layers[layer].register_forward_hook(hook))
        return self

    def _take(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        hidden_states, state = output
        self.tokens[layer], self.masks[layer] = hidden_states, self.model.vit.method.key_mask(state)

    def cls(self) -> list[torch.Tensor]:
        """Return CLS (B, D) after each layer."""
        return [self.tokens[layer][:, 0] for layer in self.layers]

    def all_tokens(self) -> list[torch.Tensor]:
        """Return the tokens (B, N, D) after each layer; padding is zero."""
        pairs = ((self.tokens[layer], self.masks[layer]) for layer in self.layers)
        return [tokens if mask is None else tokens * mask.unsqueeze(-1) for tokens, mask in pairs]

    def __exit__(self, *exception: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.tokens, self.masks = {}, {}


def check_cls(config: CLCAViTConfig, name: str, what: str) -> None:
    """Check that a model has a CLS token; `name` and `what` are part of the error message.

    Raises:
        ValueError: if `use_class_token` is False.
    """
    if not config.use_class_token:
        raise ValueError(f"{name} has no CLS token (`use_class_token` is False), but {what} needs one.")


# Records


def as_json(record: Mapping[str, Any]) -> str:
    """Serialize a record. Numbers that JSON does not support, such as NaN, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value

    return json.dumps(plain(record), indent=2, ensure_ascii=False, default=str) + "\n"
