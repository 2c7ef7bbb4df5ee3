"""Measure how well a trained ViT whose tokens are reduced without training agrees with the dense ViT.

Shapes: B images, D features, K classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from clca import CLCAViTConfig

from ..utils.text import shortened
from .benchmark_cases import Case, Setting, quarters
from .targets import changed, keep_rate_for


Images = Callable[[int], Iterable[torch.Tensor]]  # side in pixels -> batches (B, C, H, W)
FEWEST_NEIGHBORS = 3  # images; of two, each is the nearest of the other


class Answers(NamedTuple):
    """Outputs of a model for all images, in float32 on the CPU.

    Attributes:
        features: (B, D), what the classifier reads.
        logits: (B, K); the features again if the model has no classes.
    """

    features: torch.Tensor
    logits: torch.Tensor


class Agreement(NamedTuple):
    """Agreement of a model with the dense model on some images.

    Attributes:
        cosine: mean cosine similarity of the features that the classifier reads.
        neighbor: share of images whose nearest other image, by the cosine of features, is the same. None for fewer than three images.
        top1: share of images with the same predicted class; None without a trained classifier.
    """

    cosine: float
    neighbor: float | None
    top1: float | None


@torch.inference_mode()
def answers(model: nn.Module, batches: Iterable[torch.Tensor]) -> Answers:
    """Compute features and logits of all images.

    Args:
        model: an image classifier of this package or of transformers, whose head is `classifier`.
        batches: images (B, C, H, W).
    """
    weight = next(model.parameters())
    features, logits = [], []

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        features.append(inputs[0].flatten(1).float().cpu())

    handle = model.classifier.register_forward_pre_hook(take)
    try:
        for batch in batches:
            logits.append(model(batch.to(weight.device, weight.dtype)).logits.float().cpu())
    finally:
        handle.remove()
    return Answers(torch.cat(features), torch.cat(logits))


def agreement(ours: Answers, dense: Answers, has_classes: bool) -> Agreement:
    """Compare the answers of two models to the same images.

    Args:
        ours: the answers of a model.
        dense: those of the dense model.
        has_classes: whether the classifier is trained, so that predicted classes can be compared.
    """
    cosine = torch.cosine_similarity(ours.features.double(), dense.features.double(), dim=1).mean().item()
    neighbor = top1 = None
    if len(ours.features) >= FEWEST_NEIGHBORS:
        neighbor = share(nearest(ours.features) == nearest(dense.features))
    if has_classes:
        top1 = share(ours.logits.argmax(dim=1) == dense.logits.argmax(dim=1))
    return Agreement(cosine, neighbor, top1)


def share(hits: torch.Tensor) -> float:
    """Return the share of True in a boolean tensor."""
    return hits.double().mean().item()


def nearest(features: torch.Tensor) -> torch.Tensor:
    """Return for each image the index (B,) of the other image with the most similar features (B, D), by cosine."""
    unit = normalize(features.double(), dim=1)
    similarity = unit @ unit.T
    return similarity.fill_diagonal_(-torch.inf).argmax(dim=1)


def places(config: CLCAViTConfig) -> list[list[int]]:
    """Return the layers in which methods are compared: three stages, and every layer."""
    depth = config.num_hidden_layers
    return [quarters(depth), list(range(depth))]


def cases_at_cost(
    config: CLCAViTConfig,
    methods: Mapping[str, Mapping[str, Any]],
    layers: Sequence[list[int]],
    targets: Sequence[float],
    settings: Sequence[Setting],
) -> tuple[list[Case], list[str]]:
    """Find for each method, list of layers and cost the largest keep rate within the cost.

    Args:
        config: the network.
        methods: name -> options of the method.
        layers: lists of layers that reduce.
        targets: costs per image in GMACs, see `keep_rate_for`.
        settings: settings of the cases.

    Returns:
        The cases, and a sentence for each method and list of layers of which a cost is left out.
    """
    cases, notes = [], []
    for size in dict.fromkeys(setting.image_size for setting in settings):
        of_size = [setting for setting in settings if setting.image_size == size]
        for method, where in product(methods, layers):
            options = methods[method]
            values = {"reduction": method, "reduction_layers": where, "reduction_kwargs": dict(options) or None}
            network = changed(config, **values, image_size=size)
            refused: dict[float, ValueError] = {}
            for target in targets:
                try:
                    rate = keep_rate_for(network, target)
                except ValueError as error:
                    refused[target] = error
                    continue
                more = {"layers": tuple(where), "options": tuple(options.items()), "target_gmacs": target}
                cases += [Case(setting, method, "base", rate, **more) for setting in of_size]
            if refused:
                costs = ", ".join(f"{target:g}" for target in refused)
                why = shortened(str(next(iter(refused.values()))), 300)
                notes.append(f"{method} in {len(where)} layers is left out at {costs} GMACs: {why}")
    return cases, notes
