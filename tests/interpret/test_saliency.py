"""Metrics between heat maps: values of the original, definitions on small maps, and rejected input."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ufgir.interpret.saliency import (
    METRICS,
    compare_maps,
    earth_movers_distance,
    ground_distances,
    js_divergence,
    js_reverse,
    kl_divergence,
    map_similarity,
)


GOLDENS = load_file(Path(__file__).parents[1] / "goldens_misc" / "heatmap_metrics.safetensors")
# The original's name -> ours. Its KL is that of the second map from the first.
ORIGINAL = {"KL": "kl_b_a", "JS": "js_reverse", "PCC": "pcc", "SCC": "scc", "SIM": "sim", "EMD": "emd"}


def golden_maps(case):
    return GOLDENS[f"{case}.map1"], GOLDENS[f"{case}.map2"]


@pytest.mark.parametrize("case", [0, 1, 2])
def test_metrics_equal_the_original(case):
    found = compare_maps(*golden_maps(case))
    for original, name in ORIGINAL.items():
        if (case, original) != (1, "EMD"):
            assert found[name] == pytest.approx(float(GOLDENS[f"{case}.{original}"]), abs=1e-6), name


def test_emd_on_a_grid_that_is_not_square_is_right_where_the_original_is_wrong():
    """Case 1, 4 x 6, records an error of the original: its distances are in column-major order, its maps in row-major order."""
    ot = pytest.importorskip("ot")
    a, b = golden_maps(1)
    cells = np.indices(a.shape[::-1]).reshape(2, -1).T  # as for 6 x 4
    mistaken = np.linalg.norm((cells[:, None] - cells).astype(float), axis=-1)
    original = float(GOLDENS["1.EMD"])
    assert ot.emd2(a.ravel() / a.sum(), b.ravel() / b.sum(), mistaken) == pytest.approx(original, abs=1e-6)
    assert abs(earth_movers_distance(a, b) - original) > 0.05
    assert earth_movers_distance(a, b) == pytest.approx(earth_movers_distance(a.T, b.T))  # turned, it is the same work


def test_ground_distances_are_row_by_row():
    distances = ground_distances(2, 3)
    assert distances[0, 1] == 1  # the next column
    assert distances[0, 3] == 1  # the next row
    assert distances[2, 3] == pytest.approx(math.sqrt(5))
    np.testing.assert_array_equal(
        GOLDENS["dist_3x2"], ground_distances(2, 3)
    )  # the original's name has them the other way


def test_moving_all_across_a_row_or_down_a_column():
    def at(row, column):
        return np.eye(1, 12, row * 4 + column).reshape(3, 4)

    assert earth_movers_distance(at(0, 0), at(0, 3)) == pytest.approx(3)
    assert earth_movers_distance(at(0, 0), at(2, 0)) == pytest.approx(2)


@pytest.mark.parametrize("name", METRICS)
def test_equal_maps(name):
    a = golden_maps(0)[0]
    assert METRICS[name](a, 3 * a) == pytest.approx(1 if name in ("pcc", "scc", "sim") else 0, abs=1e-9)


def test_divergences_have_their_directions_and_bounds():
    a, b = np.array([[1.0, 1.0]]), np.array([[3.0, 1.0]])
    assert kl_divergence(a, b) == pytest.approx(0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    assert kl_divergence(b, a) == pytest.approx(0.75 * math.log2(0.75 / 0.5) + 0.25 * math.log2(0.25 / 0.5))
    left, right = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    assert js_divergence(left, right) == 1  # bits
    assert math.isinf(js_reverse(left, right))
    assert math.isinf(kl_divergence(left, right))
    assert kl_divergence(left, a) == 1  # 0 log 0 is 0
    assert map_similarity(left, right) == 0


def test_constant_maps_have_no_correlation():
    found = compare_maps(np.ones((2, 3)), golden_maps(1)[0][:2, :3])
    assert all(math.isnan(found[name]) for name in ("pcc", "scc", "sim"))
    assert math.isfinite(found["emd"])


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.ones((2, 3)), np.ones((3, 2)), r"same grid.*\(2, 3\) and \(3, 2\)"),
        (np.ones(4), np.ones(4), "rows, columns"),
        (np.ones((2, 2)), -np.ones((2, 2)), "`b` must be .* -1 to -1"),
        (np.zeros((2, 2)), np.ones((2, 2)), "`a` must be .* not all zero"),
        (np.full((2, 2), np.nan), np.ones((2, 2)), "`a` must be .* finite"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(a, b, words):
    for metric in METRICS.values():
        with pytest.raises(ValueError, match=words if metric is not METRICS["kl_b_a"] else None):
            metric(a, b)
