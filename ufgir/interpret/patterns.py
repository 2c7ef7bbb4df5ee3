"""Patterns of kept and merged patches: per image, over a data set, and compared between two models.

They are computed from the assignments of a forward pass with `output_assignments=True`, for any method, grid and depth.

- A patch is *kept* by a stage if it still has its own token: a token that holds only this patch. Pruning keeps patches; merging
  keeps the patches it does not merge; methods with soft slots (sit, patchmerger, sinkhorn) keep none.
- The *depth* of a patch is the index of the layer in which it loses its own token, or the number of layers if it never does.
- A *cluster map* holds, for each patch, the index of the token that holds the largest part of it after the stage; -1 for none.

Shapes: B images, S stages, P patches per image, N and M tokens before and after a stage.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clca import CLCAViTConfig
from clca.reductions_clca import get_reduction

from ..utils.extras import install_command
from ..utils.statistics import RunningMean
from .tracing import trace_patches


MISSING = "comparing merges needs scikit-learn"
OWN = 0.999  # minimal share of a patch in its own token; below one because half precision rounds


def stage_layers(config: CLCAViTConfig, name: str = "the model") -> list[int]:
    """Return the 0-based indices of the S layers with a stage.

    Raises:
        ValueError: if the model has no reduction; the message calls the model `name`.
    """
    if config.reduction is None:
        raise ValueError(
            f"{name} reduces no tokens (`reduction` is None), so it has no pattern of kept or merged patches."
        )
    return get_reduction(config.reduction).layers(config)


def check_comparable(first: CLCAViTConfig, second: CLCAViTConfig) -> None:
    """Check that the patterns of two models can be compared.

    Raises:
        ValueError: if a model has no reduction, or the models differ in the grid of patches or the number of stages.
    """
    stages = [len(stage_layers(c, f"the {name} model")) for c, name in ((first, "first"), (second, "second"))]
    grids = [" x ".join(map(str, config.image_grid)) for config in (first, second)]
    if grids[0] != grids[1]:
        raise ValueError(
            f"the models have grids of {grids[0]} and {grids[1]} patches; patterns can only be compared on equal grids. Change "
            "`image_size` of one of them."
        )
    if stages[0] != stages[1]:
        raise ValueError(
            f"the models have {stages[0]} and {stages[1]} stages; patterns are compared stage by stage. Change "
            "`reduction_layers` of one of them."
        )


def kept_patches(
    assignments: Sequence[torch.Tensor], config: CLCAViTConfig, num_patches: int | None = None
) -> torch.Tensor:
    """Return which patches still have their own token after each stage, (B, S, P) booleans. Tokens retrieved from the cache are ignored.

    Args:
        assignments: one (B, M, N) per stage, as returned by the model.
        config: the model's configuration.
        num_patches: patches per image; None for those of `config.image_size`.

    Raises:
        ValueError: see `trace_patches`.
    """
    return own_tokens(trace_patches(assignments, config, num_patches, retrieve=False).stages)


def own_tokens(stages: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `kept_patches`, (B, S, P) booleans, from the stages of a trace, (B, M, P) each."""
    return torch.stack([stage.amax(dim=1) > OWN for stage in stages], dim=1)


def compose_clusters(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Look up the clusters `first` (..., P) in `second` (..., C), which maps clusters to larger clusters. Values outside 0 .. C - 1, such
    as -1 for dropped patches, are unchanged."""
    listed = (first >= 0) & (first < second.shape[-1])
    return torch.where(listed, second.gather(-1, first.clamp(0, second.shape[-1] - 1)), first)


def cluster_maps(
    assignments: Sequence[torch.Tensor], config: CLCAViTConfig, num_patches: int | None = None
) -> torch.Tensor:
    """Return the index of the token that holds the largest part of each patch (or of the token that held the patch before) after each
    stage: (B, S, P) integers, -1 for none.

    Raises:
        ValueError: if the number of assignments differs from that of stages.
    """
    stages = stage_layers(config)
    if len(assignments) != len(stages):
        raise ValueError(
            f"`assignments` must hold one matrix per stage, {len(stages)} for `reduction`={config.reduction!r}, got "
            f"{len(assignments)}."
        )
    num_patches = config.num_patches if num_patches is None else num_patches
    clusters = torch.arange(num_patches, device=assignments[0].device) + config.num_prefix_tokens
    clusters = clusters.expand(
        len(assignments[0]), -1
    )  # tokens appended from the cache do not change the indices of earlier tokens
    maps = []
    for assignment in assignments:
        share, row = assignment.max(dim=1)  # (B, N)
        clusters = compose_clusters(clusters, torch.where(share > 0, row, -1))
        maps.append(clusters)
    return torch.stack(maps, dim=1)


def patch_depths(kept: np.ndarray, layers: Sequence[int], num_layers: int) -> np.ndarray:
    """Return the depth of each patch, (B, P), from `kept` (B, S, P).

    Args:
        kept: booleans, see `kept_patches`.
        layers: layer index of each of the S stages.
        num_layers: number of layers; the depth of patches that are always kept.
    """
    depths = np.full((kept.shape[0], kept.shape[2]), num_layers)
    for stage in reversed(range(len(layers))):
        depths[~kept[:, stage]] = layers[stage]
    return depths


def intersection_over_union(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Compute the IoU (...) of sets of kept patches (..., P); NaN if both sets are empty."""
    either = (first | second).sum(axis=-1)
    return np.where(either > 0, (first & second).sum(axis=-1) / np.maximum(either, 1), math.nan)


def cluster_agreement(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Compute the agreement of two cluster maps (P,) of an image, independent of the cluster indices.

    Returns:
        Homogeneity (each cluster of `second` lies in one of `first`), completeness (the reverse) and their harmonic mean, the
        normalized mutual information (NMI), each in [0, 1] (https://aclanthology.org/D07-1043). Dropped patches (-1) form a cluster.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import homogeneity_completeness_v_measure
    except ImportError as error:
        raise ImportError(f"{MISSING}: {install_command('analysis')}") from error
    return homogeneity_completeness_v_measure(first, second)


class PatternStatistics:
    """Statistics of the patterns of kept patches over many images, in one pass.

    Args:
        config: configuration of a model with a reduction.

    Raises:
        ValueError: if the model has no reduction.
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        self.layers = stage_layers(config)
        self.num_layers = config.num_hidden_layers
        self.grid = config.image_grid
        patches = config.num_patches
        self.depth = RunningMean((patches,))
        self.kept = RunningMean((len(self.layers), patches))  # frequency
        self.share = RunningMean((len(self.layers),))  # of kept patches per image

    def update(self, kept: np.ndarray) -> None:
        """Add a batch of `kept_patches`, (B, S, P)."""
        self.depth.update(patch_depths(kept, self.layers, self.num_layers))
        self.kept.update(kept)
        self.share.update(kept.mean(axis=2))

    def maps(self) -> dict[str, np.ndarray]:
        """Return maps (rows, columns): mean and std of the depth, and the frequency with which each stage keeps a patch (`kept_stage_0`, ...)."""
        values = {"depth_mean": self.depth.mean, "depth_std": self.depth.std}
        values |= {f"kept_stage_{stage}": kept for stage, kept in enumerate(self.kept.mean)}
        return {name: value.reshape(self.grid) for name, value in values.items()}

    def stages(self) -> list[dict[str, Any]]:
        """Return a row per stage: its layer, and mean and std over images of the share of kept patches."""
        rows = zip(self.layers, self.share.mean.tolist(), self.share.std.tolist(), strict=True)
        return [{"stage": i, "layer": a, "kept_mean": b, "kept_std": c} for i, (a, b, c) in enumerate(rows)]


class PatternAgreement:
    """Agreement of the patterns of two models, stage by stage, over many images in one pass.

    Args:
        first, second: configurations of the models.

    Raises:
        ValueError: see `check_comparable`.
    """

    MEASURES = ("iou", "homogeneity", "completeness", "nmi")

    def __init__(self, first: CLCAViTConfig, second: CLCAViTConfig) -> None:
        check_comparable(first, second)
        self.layers = [stage_layers(first), stage_layers(second)]
        self._means = {name: RunningMean((len(self.layers[0]),)) for name in self.MEASURES}

    def update(
        self, kept: tuple[np.ndarray, np.ndarray], clusters: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Add a batch: `kept_patches` and `cluster_maps`, (B, S, P), of each model for the same images. Returns the measures of these
        images, (B, S) each."""
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
        """Return a row per stage: its layers, mean and std over images of each measure, and the number of images with an IoU, which is
        undefined if neither model keeps a patch."""
        rows = []
        for stage, layers in enumerate(zip(*self.layers, strict=True)):
            row: dict[str, Any] = {"stage": stage, "layer_a": layers[0], "layer_b": layers[1]}
            for name, mean in self._means.items():
                row |= {f"{name}_mean": float(mean.mean[stage]), f"{name}_std": float(mean.std[stage])}
            rows.append(row | {"iou_images": int(self._means["iou"].count[stage])})
        return rows


def gap_correlation(similarities: Sequence[float], gaps: Sequence[float]) -> dict[str, float]:
    """Compute rank correlations between a similarity of pairs of models and the gaps between their accuracies.

    Args:
        similarities: one number per pair.
        gaps: absolute difference of the accuracies, in the same order.

    Returns:
        `spearman` and `kendall` (tau-b) in [-1, 1]; `spearman_p` and `kendall_p`, the p-values for no correlation; and the number
        of `pairs` without NaN. NaN if all similarities, or all gaps, are equal.

    Raises:
        ValueError: if the numbers of similarities and gaps differ, or there are fewer than three pairs.
        ImportError: if SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError(f"rank correlations need SciPy: {install_command('analysis')}") from error
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
