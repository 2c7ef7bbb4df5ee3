"""Choices of methods that depend on the last bit or on ties: equal to the original code, or at least deterministic."""

import itertools
import math

import pytest
import torch

from clca.reduction_base import pairwise_distance
from clca.reduction_dpcknn import shares_of_clusters
from clca.reduction_heuristic import inside_by_count, inside_by_step
from tests.helpers import images, tiny_model
from ufgir.checkpoints.original_keys import original_config


PATTERNS = ("l1", "l2", "linf")


# The heuristic's circles.


def original_radius(pattern: str, side: int) -> torch.Tensor:
    """Compute the radius as in the original, for square grids."""
    axis = torch.linspace(math.floor(-side / 2), math.floor(side / 2), side)
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    if pattern == "l1":
        return torch.abs(x) + torch.abs(y)
    return torch.sqrt(x * x + y * y) if pattern == "l2" else torch.maximum(torch.abs(x), torch.abs(y))


def masks_of(pattern: str, side: int) -> int:
    """Compare all masks of a grid, at 50 keep rates and 3 stages and in all steps to 4 minimum radii, and return their
    number."""
    radius, count = original_radius(pattern, side), 0
    radii = radius.unique()
    kept = (radius.flatten() <= radii.unsqueeze(1)).sum(dim=1)
    for percent, stage in itertools.product(range(2, 101, 2), (1, 2, 3)):
        target = int(side * side * (percent / 100) ** stage)
        expected = radius <= radii[(kept - target).abs().argmin()]
        assert inside_by_count(pattern, (side, side), target) == expected.flatten().tolist(), (side, percent, stage)
        count += 1
    for least, steps in itertools.product((-1.0, 1.0, 1.5, 2.0), (4, 6, 9)):
        smallest = least if least > 0 else radius[side // 2, side // 2].item()
        for step, threshold in enumerate(torch.linspace(radius[0, 0].item(), smallest, steps)):
            expected = (radius <= threshold).flatten().tolist()
            assert inside_by_step(pattern, (side, side), least, step, steps) == expected, (side, least, step)
            count += 1
    return count


@pytest.mark.parametrize("pattern", PATTERNS)
def test_circles_at_224_pixels(pattern: str) -> None:
    assert masks_of(pattern, 14) == 226


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_circles_of_all_grids(pattern: str) -> None:
    """Grids have 2 to 40 patches per side."""
    assert sum(masks_of(pattern, side) for side in range(2, 41)) == 39 * 226


# Distances and ties.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_symmetric(dtype: torch.dtype) -> None:
    """They are exactly symmetric, also across the chunks in which they are mirrored."""
    tokens = torch.randn(2, 70, 48, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for chunk in (1, 32, 256):
        distance = pairwise_distance(tokens, chunk)
        assert torch.equal(distance, distance.transpose(1, 2))
        assert not distance.diagonal(dim1=1, dim2=2).any()
        exact = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
        assert torch.allclose(distance, exact, rtol=1e-4)


def test_mutual_neighbours_are_equally_dense() -> None:
    """With two neighbors, one of which is the token itself, two tokens that are nearest to each other have the same
    density. So the first counts as denser, and the second cannot become a center before it."""
    stage = tiny_model(reduction="dpcknn", reduction_kwargs={"k_neighbors": 2}).float().vit.layers[1].reduction
    generator = torch.Generator().manual_seed(0)
    corners = torch.randn(1, 30, 16, generator=generator)
    tokens = (corners + 0.01 * torch.randn(2, 30, 16, generator=generator)).transpose(0, 1).reshape(1, 60, 16)
    centres, labels = stage.label(tokens, 30)
    assert centres.sort().values.tolist() == [list(range(0, 60, 2))]
    assert torch.equal(labels[:, ::2], labels[:, 1::2])


# DPC-KNN's weights and densities.


@pytest.mark.parametrize("bias", [-200.0, -30.0, -3.0, 0.0, 3.0, 80.0])
def test_shares(bias: float) -> None:
    """Shares of float32 scores, whether exp overflows or not, equal the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(2, 20, generator=generator) + bias
    labels = torch.randint(6, (2, 20), generator=generator)
    weights = scores.double().exp()
    total = weights.new_zeros(2, 7).scatter_add(1, labels, weights).gather(1, labels)
    shares = shares_of_clusters(scores, labels, 7)
    assert torch.allclose(shares.double(), weights / (total + 1e-6), rtol=1e-5, atol=1e-12)


def test_gradient_of_shares() -> None:
    """It equals that of the formula: the subtracted maximum has no gradient."""
    labels = torch.tensor([[0, 1, 0, 1, 1]])
    scores = torch.tensor([[0.5, 2.0, 1.0, -3.0, 2.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: shares_of_clusters(s, labels, 2), scores)


def test_a_large_learned_bias() -> None:
    """It affects all tokens equally, so it only changes the term 1e-6."""
    model = tiny_model(reduction="dpcknn", keep_rate=0.5).float()
    biases = [model.vit.layers[layer].reduction.score.bias for layer in (1, 2)]
    logits = []
    for value in (20.0, 89.0, 1e4):
        with torch.no_grad():
            for bias in biases:
                bias.fill_(value)
            logits.append(model(images().float()).logits)
    assert all(torch.allclose(logits[0], other, atol=1e-4) for other in logits[1:])


def test_tokens_far_from_each_other_have_different_densities() -> None:
    """Although exp would underflow for all of them, tokens in groups are denser than isolated ones."""
    stage = tiny_model(reduction="dpcknn", reduction_kwargs={"k_neighbors": 3}).float().vit.layers[1].reduction
    alone = 1e3 * torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    groups = alone[:, -2:].repeat_interleave(3, dim=1) + 100 * torch.randn(
        1, 6, 16, generator=torch.Generator().manual_seed(1)
    )
    centres, _ = stage.label(torch.cat([alone[:, :-2], groups], dim=1), 2)
    assert (centres >= 10).all()


# The start of k-medoids.


def start(distance: torch.Tensor, first: int, count: int, far: str) -> list[int]:
    """Compute the start for one image with plain loops."""
    chosen = [first]
    while len(chosen) < count:
        gaps = [(max if far == "original" else min)(row[c] for c in chosen) for row in distance.tolist()]
        chosen.append(gaps.index(max(gaps)))
    return chosen


@pytest.mark.parametrize("spread", ["nearest", "original"])
def test_equal_weight_start(spread: str) -> None:
    options = {"equal_weight": True, "spread": spread, "cluster_iters": 0}
    stage = tiny_model(reduction="kmedoids", reduction_kwargs=options).vit.layers[1].reduction
    tokens = torch.randn(3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    medoids, _ = stage.label(tokens, 6, None)
    for image, own in zip(tokens, medoids.tolist(), strict=True):
        nearest_to_mean = (image - image.mean(dim=0)).norm(dim=1).argmin().item()
        assert own == start(torch.cdist(image, image), nearest_to_mean, 6, spread)
        assert (len(set(own)) == 6) == (spread == "nearest")


@pytest.mark.parametrize(("equal", "spread"), [(True, "original"), (False, None)])
def test_equal_weight_of_the_original(equal: bool, spread: str | None) -> None:
    options = {"reduction_loc": [3], "keep_rate": [0.5], "equal_weight": equal}
    spec = {"method": "kmedoids_old", "options": options, "dims": {}, "num_labels": 2}
    assert (original_config(spec).reduction_kwargs or {}).get("spread") == spread
