"""What the analysis works on: images in batches, and the features that a model has on the way.

Shapes: B images of a batch, N tokens, D width.
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
    """The file name of an image that has none."""
    return None


class Batch(NamedTuple):
    """Images that could be read."""

    indices: list[int]  # in the data set
    columns: Mapping[str, torch.Tensor]  # None if there are no such images
    size: int  # with those that could not be read
    broken: list[str]  # what these are called


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
    """The images of a data set from `start` on, in order, with a progress bar.

    Args:
        dataset: `TransformedImages`, `StreamedImages`, or the like.
        batch_size: images a batch, the last one excepted.
        start: images to pass over.
        num_workers: processes that load images.
        files: their names, for messages.
        skip_broken: leave images that cannot be read out, with a warning, instead of raising. Not for streams.
        progress: what the bar is called; None for no bar.

    Raises:
        ValueError: an empty data set, or an image that cannot be read.
    """
    streamed, total = isinstance(dataset, IterableDataset), None
    if streamed:
        dataset.skip(start)
    else:
        total = len(dataset)
        if total == 0:
            raise ValueError("`dataset` is empty: there is nothing to analyse.")
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
                        f"{name} cannot be read: {why}. `--skip-broken` leaves such images out."
                    ) from None
                logger.warning("%s cannot be read and is left out: %s", name, why)
                broken.append(name)
            indices = [first + position for position in range(size) if position not in problems]
            yield Batch(indices, columns, size, broken)
            first += size
            bar.update(size)
    if first == 0:
        raise ValueError("`dataset` is empty: there is nothing to analyse.")


# Features


class LayerOutputs:
    """In this context, the tokens that leave chosen layers of a model, before the cache is recalled.

    with LayerOutputs(model, [3, 6]) as outputs:
        model(pixels)
        outputs.tokens[3]

    Attributes:
        tokens: layer -> (B, N, D), of the last forward pass.
        visible: layer -> (B, N), which of the rows are no padding; None for all.
    """

    def __init__(self, model: CLCAViTForImageClassification, layers: Sequence[int]) -> None:
        self.model, self.layers = model, layers
        self.tokens: dict[int, torch.Tensor] = {}
        self.visible: dict[int, torch.Tensor | None] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerOutputs":
        for layer in dict.fromkeys(self.layers):
            hook = functools.partial(self._take, layer)
            self._handles.append(self.model.vit.layers[layer].register_forward_hook(hook))
        return self

    def _take(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        hidden_states, state = output
        self.tokens[layer], self.visible[layer] = hidden_states, self.model.vit.method.visible(state)

    def cls(self) -> list[torch.Tensor]:
        """CLS (B, D) after each layer."""
        return [self.tokens[layer][:, 0] for layer in self.layers]

    def all_tokens(self) -> list[torch.Tensor]:
        """(B, N, D) of each layer; padding is zero."""
        rows = ((self.tokens[layer], self.visible[layer]) for layer in self.layers)
        return [tokens if seen is None else tokens * seen.unsqueeze(-1) for tokens, seen in rows]

    def __exit__(self, *exception: Any) -> None:
        while self._handles:
            self._handles.pop().remove()
        self.tokens, self.visible = {}, {}


def check_cls(config: CLCAViTConfig, name: str, what: str) -> None:
    """Refuse a model without a CLS token, saying for `what` it is needed.

    Raises:
        ValueError: `use_class_token` is False.
    """
    if not config.use_class_token:
        raise ValueError(f"{name} has no CLS token (`use_class_token` is False), and {what} needs one.")


# Records


def as_json(record: Mapping[str, Any]) -> str:
    """A record as text; numbers that JSON does not have, such as NaN, become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if hasattr(value, "tolist"):
            return plain(value.tolist())
        return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value

    return json.dumps(plain(record), indent=2, ensure_ascii=False, default=str) + "\n"
