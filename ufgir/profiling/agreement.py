"""How much of what a trained ViT says is left when its tokens are reduced without any training."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig

from ..utils.text import shortened
from .benchmark_cases import Case, Setting, quarters
from .targets import changed, keep_rate_for


Pictures = Callable[[int], Iterable[torch.Tensor]]  # side in pixels -> batches (B, C, H, W)


class Agreement(NamedTuple):
    """What a model says of some images, beside what the dense one says of them.

    Attributes:
        top1: share of images with the same first class; None where there is no trained classifier.
        cosine: mean cosine between the logits or, without a classifier, the features that it would read.
    """

    top1: float | None
    cosine: float


@torch.inference_mode()
def answers(model: nn.Module, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Logits (N, K) of all images, or pooled features (N, D) of a model without classes, in float32 on the CPU."""
    weight = next(model.parameters())
    return torch.cat([model(batch.to(weight.device, weight.dtype)).logits.float().cpu() for batch in batches])


def agreement(ours: torch.Tensor, dense: torch.Tensor, has_classes: bool) -> Agreement:
    """Compare `answers` (N, K)."""
    same = (ours.argmax(dim=1) == dense.argmax(dim=1)).double().mean().item() if has_classes else None
    return Agreement(same, torch.cosine_similarity(ours.double(), dense.double(), dim=1).mean().item())


def places(config: CLCAViTConfig) -> list[list[int]]:
    """Where methods are compared: at three stages, and in every layer."""
    depth = config.num_hidden_layers
    return [quarters(depth), list(range(depth))]


def cases_at_cost(
    config: CLCAViTConfig,
    methods: Mapping[str, Mapping[str, Any]],
    layers: Sequence[list[int]],
    target_gmacs: float,
    settings: Sequence[Setting],
) -> tuple[list[Case], list[str]]:
    """Cases of as nearly the same cost as can be, each with the largest keep rate that costs no more; and why others are left
    out.

    Args:
        config: the network.
        methods: name -> its options.
        layers: lists of layers to reduce in.
        target_gmacs: what an image may cost, see `keep_rate_for`.
        settings: of the cases.
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
