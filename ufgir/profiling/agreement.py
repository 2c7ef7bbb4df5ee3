"""Measure how well a trained ViT whose tokens are reduced without training agrees with the dense ViT."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig

from ..utils.text import shortened
from .benchmark_cases import Case, Setting, quarters
from .targets import changed, keep_rate_for


Images = Callable[[int], Iterable[torch.Tensor]]  # side in pixels -> batches (B, C, H, W)


class Agreement(NamedTuple):
    """Agreement of a model with the dense model on some images.

    Attributes:
        top1: share of images with the same predicted class; None without a trained classifier.
        cosine: mean cosine similarity of the logits, or of the features that a classifier would read.
    """

    top1: float | None
    cosine: float


@torch.inference_mode()
def answers(model: nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the logits (N, K) of all images, or pooled features (N, D) of a model without classes, in float32 on the CPU."""
    weight = next(model.parameters())
    return torch.cat([model(batch.to(weight.device, weight.dtype)).logits.float().cpu() for batch in batches])


def agreement(ours: torch.Tensor, dense: torch.Tensor, has_classes: bool) -> Agreement:
    """Compare two outputs of `answers`, each (N, K)."""
    same = (ours.argmax(dim=1) == dense.argmax(dim=1)).double().mean().item() if has_classes else None
    return Agreement(same, torch.cosine_similarity(ours.double(), dense.double(), dim=1).mean().item())


def places(config: CLCAViTConfig) -> list[list[int]]:
    """Return the layers in which methods are compared: three stages, and every layer."""
    depth = config.num_hidden_layers
    return [quarters(depth), list(range(depth))]


def cases_at_cost(
    config: CLCAViTConfig,
    methods: Mapping[str, Mapping[str, Any]],
    layers: Sequence[list[int]],
    target_gmacs: float,
    settings: Sequence[Setting],
) -> tuple[list[Case], list[str]]:
    """Find for each method and list of layers the largest keep rate within a cost.

    Args:
        config: the network.
        methods: name -> options of the method.
        layers: lists of layers that reduce.
        target_gmacs: cost per image, see `keep_rate_for`.
        settings: settings of the cases.

    Returns:
        The cases, and a sentence for each one that is left out.
    """
    cases, notes = [], []
    for size in dict.fromkeys(setting.image_size for setting in settings):
        for method, where in product(methods, layers):
            options = methods[method]
            values = {"reduction": method, "reduction_layers": where, "reduction_kwargs": dict(options) or None}
            try:
                rate = keep_rate_for(changed(config, **values, image_size=size), target_gmacs)
            except ValueError as error:
                notes.append(f"{method} in {len(where)} layers is left out: {shortened(str(error), 300)}")
                continue
            of_size = [setting for setting in settings if setting.image_size == size]
            more = {"layers": tuple(where), "options": tuple(options.items())}
            cases += [Case(setting, method, "base", rate, **more) for setting in of_size]
    return cases, notes
