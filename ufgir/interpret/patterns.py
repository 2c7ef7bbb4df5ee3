"""Which patches a reduction keeps, and which it puts together: per image, over a data set, and between two models.

All of it is read off the assignments that a forward pass gives with `output_assignments=True`, for any method, grid and depth.

- A patch is *kept* by a stage if it still has a token of its own: a token made of it alone. Pruning keeps patches; merging keeps
  those that were merged with none; methods with soft slots (sit, patchmerger, sinkhorn) keep none.
- The *depth* of a patch is the layer at which it loses its own token, or the number of layers if it never does.
- A *cluster map* says for each patch which token after the stage holds the largest part of it, -1 for none.

Shapes: B images, S stages, P patches of the image, N and M tokens before and after a stage.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clca import CLCAViTConfig
from clca.reductions_clca import get_reduction

from ..utils.statistics import RunningMean
from .tracing import trace_patches


MISSING = "comparing merges needs scikit-learn: pip install 'clca-vit[analysis]'"
OWN = 0.999  # the share of a patch in its own token; half precision rounds


def stage_layers(config: CLCAViTConfig, name: str = "the model") -> list[int]:
    """0-based layers that hold a stage, S of them.

    Raises:
        ValueError: a model without a reduction; `name` is what the message calls it.
    """
    if config.reduction is None:
        raise ValueError(
            f"{name} reduces no tokens (`reduction` is None): it has no pattern of kept or merged patches."
        )
    return get_reduction(config.reduction).layers(config)


def check_comparable(first: CLCAViTConfig, second: CLCAViTConfig) -> None:
    """Refuse two models whose patterns cannot be laid over one another.

    Raises:
        ValueError: no reduction, other grids of patches, or other numbers of stages.
    """
    stages = [len(stage_layers(c, f"the {name} model")) for c, name in ((first, "first"), (second, "second"))]
    grids = [" x ".join(map(str, config.image_grid)) for config in (first, second)]
    if grids[0] != grids[1]:
        raise ValueError(
            f"the models see grids of {grids[0]} and {grids[1]} patches: patterns can be compared on equal grids only, so "
            "set `image_size` of one of them."
        )
    if stages[0] != stages[1]:
        raise ValueError(
            f"the models reduce in {stages[0]} and {stages[1]} stages: patterns are compared stage by stage, so set "
            "`reduction_layers` of one of them."
        )


def kept_patches(
    assignments: Sequence[torch.Tensor], config: CLCAViTConfig, num_patches: int | None = None
) -> torch.Tensor:
    """Patches that still have a token of their own after each stage, (B, S, P) booleans; what the cache recalls is no such
    token.

    Args:
        assignments: one (B, M, N) per stage, as the model returns them.
        config: the model's configuration.
        num_patches: of the images, if not those of `config.image_size`.

    Raises:
        ValueError: as `trace_patches`.
    """
    return own_tokens(trace_patches(assignments, config, num_patches, recall=False).stages)


def own_tokens(stages: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same of a trace's stages, (B, M, P) each: (B, S, P) booleans."""
    return torch.stack([stage.amax(dim=1) > OWN for stage in stages], dim=1)


def compose_clusters(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Clusters of clusters: each of `first` (..., P) is looked up in `second` (..., C), the clusters that those were put into.
    What `second` does not list stays as it is: -1, for what was dropped, and numbers above C - 1."""
    listed = (first >= 0) & (first < second.shape[-1])
    return torch.where(listed, second.gather(-1, first.clamp(0, second.shape[-1] - 1)), first)


def cluster_maps(
    assignments: Sequence[torch.Tensor], config: CLCAViTConfig, num_patches: int | None = None
) -> torch.Tensor:
    """The row of the sequence after each stage that holds the largest part of a patch, or of the token it was in before:
    (B, S, P) integers, -1 where no row holds any.

    Raises:
        ValueError: another number of assignments than the model has stages.
    """
    stages = stage_layers(config)
    if len(assignments) != len(stages):
        raise ValueError(
            f"`assignments` must hold one matrix per stage, {len(stages)} for `reduction`={config.reduction!r}, got "
            f"{len(assignments)}."
        )
    num_patches = config.num_patches if num_patches is None else num_patches
    clusters = torch.arange(num_patches, device=assignments[0].device) + config.num_prefix_tokens
    clusters = clusters.expand(len(assignments[0]), -1)  # rows that the cache appends do not move those before
    maps = []
    for assignment in assignments:
        share, row = assignment.max(dim=1)  # (B, N)
        clusters = compose_clusters(clusters, torch.where(share > 0, row, -1))
        maps.append(clusters)
    return torch.stack(maps, dim=1)


def patch_depths(kept: np.ndarray, layers: Sequence[int], num_layers: int) -> np.ndarray:
    """Layers in which each patch had a token of its own, counted to where it lost it: (B, P), from `kept` (B, S, P).

    Args:
        layers: of the S stages.
        num_layers: of the model, the depth of patches that are never lost.
    """
    depths = np.full((kept.shape[0], kept.shape[2]), num_layers)
    for stage in reversed(range(len(layers))):
        depths[~kept[:, stage]] = layers[stage]
    return depths


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of kept sets (..., P): patches that both keep over patches that either keeps, (...); NaN where neither keeps any."""
    either = (first | second).sum(axis=-1)
    return np.where(either > 0, (first & second).sum(axis=-1) / np.maximum(either, 1), math.nan)


def cluster_agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """How well two cluster maps (P,) of an image agree, whatever their clusters are called.

    Returns:
        Homogeneity (each cluster of `second` lies in one of `first`), completeness (the other way round) and their harmonic
        mean, the normalised mutual information (NMI), each in [0, 1] (https://aclanthology.org/D07-1043). Dropped patches, -1,
        are a cluster.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import homogeneity_completeness_v_measure
    except ImportError as error:
        raise ImportError(MISSING) from error
    return homogeneity_completeness_v_measure(first, second)


class PatternStatistics:
    """What a reduction does to the patches of many images, in one pass.

    Args:
        config: of a model with a reduction.

    Raises:
        ValueError: a model without one.
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        self.layers = stage_layers(config)
        self.num_layers = config.num_hidden_layers
        self.grid = config.image_grid
        patches = config.num_patches
        self.depth = RunningMean((patches,))
        self.kept = RunningMean((len(self.layers), patches))  # how often
        self.share = RunningMean((len(self.layers),))  # of the patches of an image

    def update(self, kept: np.ndarray) -> None:
        """Add what `kept_patches` (B, S, P) says of a batch."""
        self.depth.update(patch_depths(kept, self.layers, self.num_layers))
        self.kept.update(kept)
        self.share.update(kept.mean(axis=2))

    def maps(self) -> dict[str, np.ndarray]:
        """(rows, columns) each: mean and deviation of the depth, and how often each stage keeps the patch (`kept_stage_0`, ...)."""
        values = {"depth_mean": self.depth.mean, "depth_std": self.depth.std}
        values |= {f"kept_stage_{stage}": kept for stage, kept in enumerate(self.kept.mean)}
        return {name: value.reshape(self.grid) for name, value in values.items()}

    def stages(self) -> list[dict[str, Any]]:
        """A row per stage: its layer, mean and deviation over images of the share of patches that it keeps."""
        rows = zip(self.layers, self.share.mean.tolist(), self.share.std.tolist(), strict=True)
        return [{"stage": i, "layer": a, "kept_mean": b, "kept_std": c} for i, (a, b, c) in enumerate(rows)]


class PatternAgreement:
    """How alike the patterns of two models are, stage by stage, over many images in one pass.

    Args:
        first, second: their configurations.

    Raises:
        ValueError: models that `check_comparable` refuses.
    """

    MEASURES = ("iou", "homogeneity", "completeness", "nmi")

    def __init__(self, first: CLCAViTConfig, second: CLCAViTConfig) -> None:
        check_comparable(first, second)
        self.layers = [stage_layers(first), stage_layers(second)]
        self._means = {name: RunningMean((len(self.layers[0]),)) for name in self.MEASURES}

    def update(
        self, kept: tuple[np.ndarray, np.ndarray], clusters: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Add a batch, what `kept_patches` and `cluster_maps` (B, S, P) say of the same images for each model; the measures of
        these images, (B, S) each."""
        agreement = [
            [cluster_agreement(first, second) for first, second in zip(*stages, strict=True)]
            for stages in zip(*clusters, strict=True)
        ]
        agreement = np.array(agreement).reshape(*kept[0].shape[:2], 3)
        values = {"iou": intersection_over_union(*kept)}
        values |= {name: agreement[..., i] for i, name in enumerate(self.MEASURES[1:])}
        for name, value in values.items():
            self._means[name].update(value)
        return values

    def stages(self) -> list[dict[str, Any]]:
        """A row per stage: its layers, mean and deviation over images of each measure, and the number of images in the mean of
        the IoU, which is not defined where no model keeps a patch."""
        rows = []
        for stage, layers in enumerate(zip(*self.layers, strict=True)):
            row: dict[str, Any] = {"stage": stage, "layer_a": layers[0], "layer_b": layers[1]}
            for name, mean in self._means.items():
                row |= {f"{name}_mean": float(mean.mean[stage]), f"{name}_std": float(mean.std[stage])}
            rows.append(row | {"iou_images": int(self._means["iou"].count[stage])})
        return rows


def gap_correlation(similarities: Sequence[float], gaps: Sequence[float]) -> dict[str, float]:
    """Rank correlations of a similarity of pairs of models with the gaps between their accuracies.

    Args:
        similarities: one number a pair.
        gaps: |accuracy of one - accuracy of the other|, in the same order.

    Returns:
        `spearman` and `kendall` (tau-b) in [-1, 1], `spearman_p` and `kendall_p` of the hypothesis that there is no relation,
        and the number of `pairs`, those with a NaN left out. NaN where all similarities, or all gaps, are equal.

    Raises:
        ValueError: another number of gaps, or fewer than three pairs.
        ImportError: SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("rank correlations need SciPy: pip install 'clca-vit[analysis]'") from error
    if len(similarities) != len(gaps):
        raise ValueError(f"`gaps` must hold a number for each of the {len(similarities)} pairs, got {len(gaps)}.")
    values = np.array([similarities, gaps], dtype=np.float64)
    values = values[:, ~np.isnan(values).any(axis=0)]
    if values.shape[1] < 3:
        raise ValueError(f"a rank correlation needs at least three pairs of models, got {values.shape[1]}.")
    if (np.ptp(values, axis=1) == 0).any():
        result = dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"), math.nan)
    else:
        spearman, kendall = stats.spearmanr(*values), stats.kendalltau(*values)
        result = {"spearman": float(spearman.statistic), "spearman_p": float(spearman.pvalue)}
        result |= {"kendall": float(kendall.statistic), "kendall_p": float(kendall.pvalue)}
    return result | {"pairs": values.shape[1]}
