"""Compare two models, or the layers of one model, on the same images in one pass (`ufgir compare`).

Shapes: R and C layers of the first and the second model.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..interpret.attention_maps import checked_layers, evaluation_mode
from ..interpret.patterns import PatternAgreement, PatternStatistics, cluster_maps, kept_patches
from ..interpret.saliency import compare_maps
from ..interpret.similarity import (
    CANONICAL,
    FEWEST_UNBIASED,
    MEASURES,
    BatchedCKA,
    FeatureMoments,
    TokenSpread,
    check_canonical,
)
from .inputs import Batch, LayerOutputs, check_cls


logger = logging.getLogger(__name__)

WHAT = ("cka", *MEASURES, "norms", "patterns")
FEATURES = ("cls", "tokens")
NAMES = ("the first model", "the second model")


class Comparison(NamedTuple):
    """The result of `compare_models`.

    Attributes:
        images: number of compared images.
        layers: layer indices of both models, R and C; the same twice if there is only one model.
        matrices: measure -> (R, C).
        norms: a row per model and layer: means and stds of `TokenSpread`.
        stages: a row per stage: means and stds of `PatternAgreement`, and the share of patches that each model keeps.
        maps: for each model, name -> (rows, columns), see `PatternStatistics.maps`.
        map_metrics: `saliency.METRICS` of the mean depths of both models.
    """

    images: int
    layers: tuple[list[int], list[int]]
    matrices: dict[str, np.ndarray]
    norms: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    maps: list[dict[str, np.ndarray]]
    map_metrics: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """Return one number per measure, for comparisons across pairs of models. Matrices give the value of each layer index that both
        models have, and the mean of these values; patterns give the mean of each stage, and the mean over stages."""
        values = {}
        for measure, matrix in self.matrices.items():
            rows, columns = self.layers
            both = {
                layer: float(matrix[rows.index(layer), columns.index(layer)]) for layer in rows if layer in columns
            }
            values |= {f"{measure}_layer_{layer}": value for layer, value in both.items()}
            if both:
                values[f"{measure}_mean"] = float(np.mean(list(both.values())))
        for name in PatternAgreement.MEASURES if self.stages else ():
            stages = [row[f"{name}_mean"] for row in self.stages]
            values |= {f"{name}_stage_{i}": value for i, value in enumerate(stages)}
            values[f"{name}_mean"] = float(np.mean(stages))
        return values | {f"depth_{name}": value for name, value in self.map_metrics.items()}


def check_comparison(
    configs: Sequence[CLCAViTConfig], what: Sequence[str], features: str, names: Sequence[str] = NAMES
) -> None:
    """Check the arguments of a comparison before any image is read.

    Raises:
        ValueError: if a measure or feature is unknown, if a measure of CLS is combined with other features or a model without CLS, or
            if patterns are compared for a single model, a model without a reduction, or different grids.
    """
    if unknown := [name for name in what if name not in WHAT] or ([] if what else ["nothing"]):
        raise ValueError(f"`what` must be some of {', '.join(WHAT)}, got {unknown[0]}.")
    if features not in FEATURES:
        raise ValueError(f"`features` must be {' or '.join(FEATURES)}, got {features!r}.")
    of_cls = [name for name in what if name in MEASURES]
    if features == "tokens" and of_cls:
        raise ValueError(
            f"`what` {of_cls[0]} compares CLS features only, since layers may differ in the number of tokens. Use `what` cka or "
            "`features` cls."
        )
    if of_cls or ("cka" in what and features == "cls"):
        for config, name in zip(configs, names, strict=False):
            check_cls(config, name, f"`what` {of_cls[0] if of_cls else 'cka'} of CLS features")
    if "patterns" in what:
        if len(configs) != 2:
            raise ValueError("`what` patterns needs two models, got one. Pass a second model, or use `ufgir analyze`.")
        PatternAgreement(*configs)


def check_images(configs: Sequence[CLCAViTConfig], what: Sequence[str], count: int) -> None:
    """Check that there are enough images for the measures before any image is read.

    Args:
        configs: configurations of the models.
        what: any of `WHAT`.
        count: number of images.

    Raises:
        ValueError: if there are too few images.
    """
    if "cka" in what and count < FEWEST_UNBIASED:
        raise ValueError(f"`what` cka needs at least {FEWEST_UNBIASED} images, got {count}.")
    if CANONICAL & set(what):
        check_canonical(max(config.hidden_size for config in configs), count - 1)


def compare_models(
    models: Sequence[CLCAViTForImageClassification],
    batches: Iterable[Batch],
    what: Sequence[str] = ("cka",),
    *,
    layers: Sequence[Sequence[int] | None] = (None, None),
    features: str = "cls",
    names: Sequence[str] = NAMES,
) -> Comparison:
    """Compare two models, or the layers of one model, in one pass. The memory in use does not depend on the number of images.

    Args:
        models: one or two models; they may differ in everything except what is compared.
        batches: batches of images, see `ufgir.analysis.inputs.batches`, with `pixel_values` and, if the second model has a different
            preprocessing, `pixel_values_2`.
        what: any of `WHAT`. `cka`: unbiased linear CKA in batches. `cka-plain`: linear CKA of all images at once. `pwcca`, `cca`,
            `cca-squared`, `procrustes`: see `ufgir.interpret.similarity`. `norms`: norms of tokens, and distances between them.
            `patterns`: kept and merged patches.
        layers: 0-based layer indices of each model; None for all layers.
        features: `cls`, or `tokens` to use all tokens of a layer for `cka`. Tokens are compared by index, whichever patches they
            hold.
        names: names of the models, for messages.

    Raises:
        ValueError: as `check_comparison`, if there is no such layer, or if there are no images or too few for a measure.
    """
    configs = [model.config for model in models]
    check_comparison(configs, what, features, names)
    chosen = [checked_layers(some, config) for some, config in zip(layers, configs, strict=False)]
    cka = BatchedCKA() if "cka" in what else None
    measures = [name for name in what if name in MEASURES]
    moments = FeatureMoments() if measures else None
    spreads = [[TokenSpread() for _ in some] for some in chosen] if "norms" in what else []
    agreement = PatternAgreement(*configs) if "patterns" in what else None
    statistics = [PatternStatistics(config) for config in configs] if agreement else []
    images, left_out = 0, 0
    for batch in batches:
        if not batch.indices:
            continue
        images += len(batch.indices)
        found = [_run(model, batch, i, chosen[i], agreement is not None) for i, model in enumerate(models)]
        if cka is not None:
            taken = cka.update(*(side.cls if features == "cls" else side.tokens for side in found))
            left_out += 0 if taken else len(batch.indices)
        if moments is not None:
            moments.update(*(side.cls for side in found))
        for side, of_layers in zip(found, spreads, strict=False):
            for spread, (tokens, mask) in zip(of_layers, side.tokens_and_masks, strict=True):
                spread.update(tokens, mask)
        if agreement is not None:
            agreement.update(tuple(side.kept for side in found), tuple(side.clusters for side in found))
            for one, side in zip(statistics, found, strict=True):
                one.update(side.kept)
    if images == 0:
        raise ValueError("no images to compare: `batches` is empty.")
    if left_out:
        logger.warning(
            "%d of %d images were in batches too small for unbiased CKA and are not included in it", left_out, images
        )
    matrices = {name: moments.matrix(name) for name in measures}
    matrices |= {"cka": cka.matrix()} if cka is not None else {}
    norms = [
        {"model": "ab"[i], "layer": layer, **spread.row()}
        for i, of_layers in enumerate(spreads)
        for layer, spread in zip(chosen[i], of_layers, strict=True)
    ]
    stages = agreement.stages() if agreement else []
    for i, one in enumerate(statistics):
        for row, stage in zip(stages, one.stages(), strict=True):
            row |= {f"kept_{'ab'[i]}_mean": stage["kept_mean"], f"kept_{'ab'[i]}_std": stage["kept_std"]}
    maps = [one.maps() for one in statistics]
    depths = [one["depth_mean"] for one in maps]
    both = (chosen[0], chosen[-1])
    comparable = len(depths) == 2 and all(
        depth.max() > 0 for depth in depths
    )  # a stage in layer 0 may take all patches
    return Comparison(
        images,
        both,
        {m: matrices[m] for m in what if m in matrices},
        norms,
        stages,
        maps,
        compare_maps(*depths) if comparable else {},
    )


class _Side(NamedTuple):
    """The output of one model for a batch."""

    tokens_and_masks: list[tuple[torch.Tensor, torch.Tensor | None]]
    cls: list[torch.Tensor]  # token 0, which is CLS in a model that has one
    tokens: list[torch.Tensor]
    kept: np.ndarray | None
    clusters: np.ndarray | None


def _run(model: CLCAViTForImageClassification, batch: Batch, side: int, layers: list[int], patterns: bool) -> _Side:
    pixels = batch.columns["pixel_values"]
    if side == 1:
        pixels = batch.columns.get("pixel_values_2", pixels)
    with evaluation_mode(model), LayerOutputs(model, layers) as outputs:
        output = model.vit(pixels.to(model.device), output_assignments=patterns)
        tokens_and_masks = [(outputs.tokens[layer], outputs.masks[layer]) for layer in layers]
        cls, tokens = outputs.cls(), outputs.all_tokens()
    kept = clusters = None
    if patterns:
        kept = kept_patches(output.assignments, model.config).cpu().numpy()
        clusters = cluster_maps(output.assignments, model.config).cpu().numpy()
    return _Side(tokens_and_masks, cls, tokens, kept, clusters)
