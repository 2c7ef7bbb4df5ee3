"""Patterns of kept and merged patches for every method, agreement of two models, and depth over a data set."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from clca import REDUCTIONS
from tests.helpers import images, tiny_config, tiny_model
from ufgir.interpret.patterns import (
    PatternAgreement,
    PatternStatistics,
    check_comparable,
    cluster_agreement,
    cluster_maps,
    compose_clusters,
    gap_correlation,
    intersection_over_union,
    kept_patches,
    patch_depths,
)


GOLDEN = json.loads((Path(__file__).parents[1] / "goldens_misc" / "analysis_utils.json").read_text(encoding="utf-8"))
PRUNING = ("topk", "evit", "heuristic")
SOFT = ("sit", "patchmerger", "sinkhorn")


def patterns(**changes):
    model = tiny_model(**changes)
    with torch.no_grad():
        output = model(images(4), output_assignments=True)
    return model.config, output


# What a pattern is


@pytest.mark.parametrize(
    ("first", "then", "expected"), [("first", "second_in", "second"), ("first", "third_in", "third")]
)
def test_clusters_are_composed_as_in_the_original(first, then, expected):
    for clusters, of_clusters, composed in zip(GOLDEN[first], GOLDEN[then], GOLDEN[expected], strict=True):
        found = compose_clusters(torch.tensor(clusters), torch.tensor(of_clusters))
        assert found.tolist() == composed


def test_dropped_patches_stay_dropped():
    assert compose_clusters(torch.tensor([-1, 1, 0]), torch.tensor([3, -1])).tolist() == [-1, -1, 3]


@pytest.mark.parametrize("method", sorted(REDUCTIONS))
@pytest.mark.parametrize("cache", [{}, {"cross_layer_cache": True, "num_clr_tokens": 1}])
def test_patterns_of_every_method(method, cache):
    config, output = patterns(reduction=method, keep_rate=0.5, **cache)
    kept, clusters = kept_patches(output.assignments, config), cluster_maps(output.assignments, config)
    assert kept.shape == clusters.shape == (4, 2, 16)
    assert not (kept[:, 1] & ~kept[:, 0]).any()  # nobody comes back
    for stage, assignment in enumerate(output.assignments):
        assert clusters[:, stage].max() < assignment.shape[1]
        for image in range(4):
            own = clusters[image, stage][kept[image, stage]]
            assert (own >= 0).all()
            assert len(own.unique()) == len(own)  # a token of their own
    if method in SOFT:
        assert not kept.any()
    else:
        assert kept[:, 0].any()


@pytest.mark.parametrize("method", PRUNING)
def test_pruning_keeps_the_scheduled_number(method):
    options = {"reduction_kwargs": None}
    config, output = patterns(reduction=method, keep_rate=0.5, **options)
    kept = kept_patches(output.assignments, config).sum(dim=-1)
    patches = torch.tensor([[a.shape[1] - 1 - (method == "evit") for a in output.assignments]]).expand(4, -1)
    if method == "heuristic":  # masks patches, and the rows stay
        assert (kept < 16).all()
    else:
        assert (patches - kept <= 1).all()  # the fused row of the first stage may be among those of the second
        assert kept[:, 0].tolist() == [8] * 4


def test_kept_patches_are_the_rows_of_the_assignment():
    config, output = patterns(reduction="topk", keep_rate=0.5)
    kept = kept_patches(output.assignments, config)
    expected = output.assignments[0][:, 1:, 1:].sum(dim=1) > 0
    torch.testing.assert_close(kept[:, 0], expected)


def test_clusters_of_tome_are_its_merges():
    config, output = patterns(reduction="tome", keep_rate=0.75)
    clusters = cluster_maps(output.assignments, config)[:, 0]
    for image in range(4):
        for patch, row in enumerate(clusters[image].tolist()):
            assert output.assignments[0][image, row, 1 + patch] > 0
    kept = kept_patches(output.assignments, config)[:, 0]
    alone = (clusters.unsqueeze(1) == clusters.unsqueeze(2)).sum(dim=1) == 1
    torch.testing.assert_close(kept, alone)


def test_depth_is_the_layer_at_which_a_patch_loses_its_token():
    kept = np.array([[[True, True, False, False], [True, False, False, False]]])
    assert patch_depths(kept, [3, 6], 12).tolist() == [[12, 6, 3, 3]]


# Agreement


def test_intersection_over_union():
    first = np.array([[True, True, False, False], [False] * 4])
    second = np.array([[False, True, True, False], [False] * 4])
    found = intersection_over_union(first, second)
    assert found[0] == pytest.approx(1 / 3)
    assert math.isnan(found[1])  # neither keeps any: nothing to agree on


def test_cluster_agreement_ignores_indices_and_is_directed():
    coarse, fine = np.array([0, 0, 0, 1, 1, 1]), np.array([7, 7, 2, -1, -1, -1])
    assert cluster_agreement(coarse, 5 - coarse) == pytest.approx((1, 1, 1))
    homogeneity, completeness, nmi = cluster_agreement(coarse, fine)
    assert homogeneity == pytest.approx(1)
    assert completeness < 1
    assert nmi == pytest.approx(2 * completeness / (1 + completeness))


def agreement(first, second):
    """Return the agreement of the stages of two models on four images in two batches."""
    found = PatternAgreement(first[0], second[0])
    kept = [kept_patches(o.assignments, c).numpy() for c, o in (first, second)]
    clusters = [cluster_maps(o.assignments, c).numpy() for c, o in (first, second)]
    for part in (slice(0, 3), slice(3, 4)):
        found.update(tuple(k[part] for k in kept), tuple(c[part] for c in clusters))
    return found.stages()


def test_a_model_agrees_with_itself_and_less_with_another_rate_or_method():
    evit = patterns(reduction="evit", keep_rate=0.5)
    for row in agreement(evit, evit):
        assert [row[f"{name}_mean"] for name in PatternAgreement.MEASURES] == pytest.approx([1] * 4)
    for changes in ({"reduction": "evit", "keep_rate": 0.75}, {"reduction": "tome", "keep_rate": 0.5}):
        for row in agreement(evit, patterns(**changes)):
            assert all(0 <= row[f"{name}_mean"] < 1 + 1e-9 for name in PatternAgreement.MEASURES)
            assert max(row["iou_mean"], row["nmi_mean"]) < 0.999
    stages = agreement(evit, patterns(reduction="evit", keep_rate=0.75, reduction_layers=[2, 3]))
    assert [(row["layer_a"], row["layer_b"]) for row in stages] == [(1, 2), (2, 3)]
    finer = agreement(evit, patterns(reduction="evit", keep_rate=0.75))[0]  # of the same ranking
    assert (finer["iou_mean"], finer["homogeneity_mean"]) == pytest.approx((8 / 12, 1))
    assert finer["completeness_mean"] < 1


def test_methods_without_kept_patches_have_no_iou_but_an_agreement_of_clusters():
    sit = patterns(reduction="sit", keep_rate=0.5)
    row = agreement(sit, patterns(reduction="patchmerger", keep_rate=0.5))[0]
    assert (row["iou_images"], math.isnan(row["iou_mean"])) == (0, True)
    assert 0 <= row["nmi_mean"] <= 1


# Over a data set


@pytest.mark.parametrize("size", [{"image_size": 32}, {"image_size": (32, 48), "num_hidden_layers": 7}])
def test_statistics_of_any_grid_and_depth(size):
    config = tiny_config(reduction="topk", keep_rate=0.5, **size)
    model = tiny_model(reduction="topk", keep_rate=0.5, **size)
    height, width = config.image_grid
    with torch.no_grad():
        output = model(images(5, height * 8, width * 8), output_assignments=True)
    kept = kept_patches(output.assignments, config).numpy()
    statistics = PatternStatistics(config)
    for part in (kept[:2], kept[2:]):
        statistics.update(part)
    maps = statistics.maps()
    depths = patch_depths(kept, [1, 2], config.num_hidden_layers)
    np.testing.assert_allclose(maps["depth_mean"], depths.mean(axis=0).reshape(height, width))
    np.testing.assert_allclose(maps["depth_std"], depths.std(axis=0).reshape(height, width))
    np.testing.assert_allclose(maps["kept_stage_1"], kept[:, 1].mean(axis=0).reshape(height, width))
    assert [row["kept_mean"] for row in statistics.stages()] == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"reduction": None}, "the second model reduces no tokens"),
        ({}, {"image_size": 64}, "grids of 4 x 4 and 8 x 8 patches"),
        ({}, {"image_size": (16, 64)}, "grids of 4 x 4 and 2 x 8 patches"),
        ({}, {"reduction_layers": [2]}, "2 and 1 stages"),
    ],
)
def test_incomparable_models_raise(first, second, words):
    with pytest.raises(ValueError, match=words):
        check_comparable(*(tiny_config(**{"reduction": "evit", "keep_rate": 0.5} | c) for c in (first, second)))


def test_a_model_without_reduction_has_no_pattern():
    with pytest.raises(ValueError, match="reduces no tokens"):
        PatternStatistics(tiny_config())
    with pytest.raises(ValueError, match="one matrix per stage, 2"):
        cluster_maps([torch.eye(17).expand(1, -1, -1)], tiny_config(reduction="evit", keep_rate=0.5))


# Similarity and accuracy


def test_rank_correlations_with_accuracy_gaps():
    found = gap_correlation([0.9, 0.8, 0.5, math.nan, 0.2], [0.01, 0.02, 0.03, 0.5, 0.2])
    assert (found["spearman"], found["kendall"], found["pairs"]) == pytest.approx((-1, -1, 4))
    found = gap_correlation([1, 2, 3, 4], [1, 2, 4, 3])
    assert (found["spearman"], found["kendall"]) == pytest.approx((0.8, 4 / 6))
    assert 0 < found["spearman_p"] < 1
    assert math.isnan(gap_correlation([1, 1, 1], [1, 2, 3])["kendall"])
    with pytest.raises(ValueError, match="at least three pairs of models, got 2"):
        gap_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="each of the 3 pairs, got 2"):
        gap_correlation([1, 2, 3], [1, 2])
