"""Similarity of features: values of the original, invariances, and batches compared with the whole data."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ufgir.interpret.similarity import (
    MEASURES,
    BatchedCKA,
    FeatureMoments,
    Moments,
    TokenSpread,
    cca,
    gram_distance,
    hsic,
    linear_cka,
    linear_cka_prime_distance,
    mean_cca,
    mean_squared_cca,
    procrustes_distance,
    pwcca_distance,
)
from ufgir.utils.statistics import RunningMean


GOLDENS = load_file(Path(__file__).parents[1] / "goldens_misc" / "feature_sim.safetensors")
MORE_IMAGES = ["same", "diff", "wide"]  # than channels


def golden(case, name):
    return GOLDENS[f"{case}.{name}"]


def golden_pair(case):
    """Transpose the goldens, which contain channels x images."""
    return golden(case, "A").T, golden(case, "B").T


def features(count=40, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width, seed=3):
    return torch.linalg.qr(features(width, width, seed))[0]


# The original's numbers


@pytest.mark.parametrize("case", [*MORE_IMAGES, "tall"])
def test_cka_and_procrustes_equal_the_original(case):
    x, y = golden_pair(case)
    assert 1 - linear_cka(x, y, normalize=False) == pytest.approx(float(golden(case, "lin_cka_dist")), abs=1e-6)
    assert procrustes_distance(x, y, normalize=False) == pytest.approx(float(golden(case, "procrustes")), abs=1e-6)
    prime = gram_distance if case == "tall" else linear_cka_prime_distance
    assert prime(x, y, normalize=False) == pytest.approx(float(golden(case, "lin_cka_prime_dist")), abs=1e-6)


@pytest.mark.parametrize("case", MORE_IMAGES)
def test_canonical_correlations_equal_the_original(case):
    x, y = golden_pair(case)
    torch.testing.assert_close(cca(x, y, normalize=False), golden(case, "rho"), atol=1e-6, rtol=0)
    for function, name in ((mean_cca, "mean_cca"), (mean_squared_cca, "mean_sq_cca")):
        assert function(x, y, normalize=False) == pytest.approx(float(golden(case, name)), abs=1e-6), name
    expected = pytest.approx(float(golden(case, "pwcca_dist")), abs=1e-6)
    assert pwcca_distance(x, y, normalize=False, original=True) == expected
    if case != "diff":  # x has more channels than y
        assert pwcca_distance(x, y, normalize=False) == expected


# Properties


@pytest.mark.parametrize("measure", MEASURES)
def test_rotating_scaling_and_shifting_features_changes_nothing(measure):
    x = features()
    y = 3 * x @ rotation(6) + 7
    function, is_similarity = MEASURES[measure]
    assert function(Moments.of(x, y)) == pytest.approx(1.0 if is_similarity else 0.0, abs=1e-9)
    other = features(seed=5)
    assert function(Moments.of(other, y)) == pytest.approx(function(Moments.of(other, x)), abs=1e-9)
    if measure != "pwcca":  # whose weights are those of the channels of x
        assert function(Moments.of(y, other)) == pytest.approx(function(Moments.of(x, other)), abs=1e-9)
    assert abs(function(Moments.of(x, other)) - (1.0 if is_similarity else 0.0)) > 0.1


def test_only_cca_is_indifferent_to_any_linear_map():
    x = features()
    skewed = x @ torch.diag(torch.tensor([1, 10, 0.1, 3, 1, 1], dtype=torch.float64))
    assert mean_cca(x, skewed) == pytest.approx(1.0)
    assert linear_cka(x, skewed) < 0.9


def test_channels_that_do_not_vary_or_repeat_others_count_for_nothing_in_cca():
    x, y = features(), features(seed=5)
    more = torch.cat([x, x[:, :2], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(cca(more, y), cca(x, y))


def test_correlations_of_fewer_images_than_channels_are_refused():
    with pytest.raises(ValueError, match="30 channels need more than 31 images"):
        cca(*golden_pair("tall"))
    with pytest.raises(ValueError, match="more than 7 images"):
        pwcca_distance(features(7), features(7, seed=5))  # centered, seven images span six directions
    pwcca_distance(features(8), features(8, seed=5))


def test_features_that_are_the_same_in_all_images_have_no_similarity():
    same = torch.ones(40, 6) + 1e-8 * features(seed=3)  # but for rounding
    moments, batched = FeatureMoments(), BatchedCKA()
    moments.update([same], [features()])
    batched.update([same], [features()])
    for one in (Moments.of(same, features()), moments.pair(0, 0)):
        assert all(math.isnan(function(one)) for function, _ in MEASURES.values())
    assert np.isnan(batched.matrix()).all()


def test_features_of_different_images_are_refused():
    with pytest.raises(ValueError, match=r"\(40, 6\) and \(39, 6\)"):
        linear_cka(features(40), features(39))


# In one pass


@pytest.mark.parametrize("measure", MEASURES)
def test_moments_of_batches_are_those_of_all_images(measure):
    xs = [features(seed=i) + 1000 for i in range(3)]  # a mean much larger than the std
    ys = [xs[0] @ rotation(6) + 0.5 * features(seed=9), features(40, 4, seed=8)]
    moments = FeatureMoments()
    for start in range(0, 40, 7):
        moments.update([x[start : start + 7] for x in xs], [y[start : start + 7] for y in ys])
    expected = [[MEASURES[measure][0](Moments.of(x, y)) for y in ys] for x in xs]
    np.testing.assert_allclose(moments.matrix(measure), expected, atol=1e-8)


def test_moments_within_a_model():
    xs = [features(seed=i) for i in range(2)]
    moments = FeatureMoments()
    moments.update(xs)
    matrix = moments.matrix("cka-plain")
    np.testing.assert_allclose(np.diag(matrix), 1)
    assert matrix[0, 1] == pytest.approx(linear_cka(*xs)) == pytest.approx(matrix[1, 0])


def test_moments_refuse_unknown_measures_and_no_images():
    with pytest.raises(ValueError, match=r"cka-plain, pwcca, .*'svcca'"):
        FeatureMoments().matrix("svcca")
    with pytest.raises(ValueError, match="no images"):
        FeatureMoments().matrix("cca")


def test_biased_cka_of_one_batch_is_linear_cka():
    x, y = features(), features(40, 9, seed=5) + 3
    batched = BatchedCKA(unbiased=False)
    assert batched.update([x, y])
    np.testing.assert_allclose(batched.matrix()[0, 1], linear_cka(x, y))
    np.testing.assert_allclose(np.diag(batched.matrix()), 1)


def test_unbiased_hsic_is_its_definition():
    """Song et al., equation 4, as a sum over all quadruples of different images."""
    k, ell = (g @ g.T for g in (features(6, 3), features(6, 2, seed=5)))
    pairs, triples, quadruples = [], [], []
    for i in range(6):
        for j in set(range(6)) - {i}:
            pairs.append(k[i, j] * ell[i, j])
            for q in set(range(6)) - {i, j}:
                triples.append(k[i, j] * ell[i, q])
                quadruples += [k[i, j] * ell[q, r] for r in set(range(6)) - {i, j, q}]
    expected = sum(np.mean(terms) * factor for terms, factor in ((pairs, 1), (quadruples, 1), (triples, -2)))
    assert float(hsic(k[None], ell[None])[0, 0]) == pytest.approx(float(expected))


def test_unbiased_cka_does_not_grow_as_batches_shrink():
    """For independent features it is about zero in batches of any size, while the biased one is far above zero."""
    x, y = features(2000, 30), features(2000, 30, seed=5)
    found = {}
    for unbiased in (True, False):
        batched = BatchedCKA(unbiased)
        for i in range(0, 2000, 10):
            batched.update([x[i : i + 10]], [y[i : i + 10]])
        found[unbiased] = batched.matrix()[0, 0]
    assert abs(found[True]) < 0.02
    assert found[False] > 0.5


def test_batched_cka_takes_layers_of_different_lengths_and_leaves_small_batches_out():
    batched = BatchedCKA()
    tokens = [torch.randn(5, count, 4) for count in (17, 9, 3)]
    assert batched.update(tokens)
    assert not batched.update([t[:3] for t in tokens])
    assert (batched.matrix().shape, batched.batches) == ((3, 3), 1)
    with pytest.raises(ValueError, match="at least 4 images"):
        BatchedCKA().matrix()


def test_norms_and_distances_of_tokens():
    spread = TokenSpread()
    triangle = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])  # distances 3, 4, 5
    spread.update(triangle)
    row = spread.row()
    assert row["norm_mean"] == pytest.approx(7 / 3)
    assert row["distance_mean"] == pytest.approx(4)
    assert row["scaled_distance_mean"] == pytest.approx(0.5)
    hidden = TokenSpread()
    padded = torch.cat([triangle, torch.full((1, 2, 2), 99.0)], dim=1)
    hidden.update(padded, torch.tensor([[True, True, True, False, False]]))
    assert hidden.row() == pytest.approx(row)


def test_equal_tokens_have_no_scaled_distance_and_one_token_none():
    spread = TokenSpread()
    spread.update(torch.ones(2, 3, 4))
    assert (spread.row()["distance_mean"], spread.scaled_distance.count) == (0, 0)
    alone = TokenSpread()
    alone.update(torch.ones(2, 1, 4))
    assert (alone.norm.count, alone.distance.count) == (2, 0)


def test_running_mean_is_that_of_all_values():
    values = np.random.default_rng(0).normal(1e6, 1, size=(100, 3))
    values[::7, 1] = np.nan
    running, other = RunningMean((3,)), RunningMean((3,))
    running.update(values[:33])
    other.restore(running.state())
    other.update(values[33:])
    np.testing.assert_allclose(other.mean, np.nanmean(values, axis=0))
    np.testing.assert_allclose(other.std, np.nanstd(values, axis=0), rtol=1e-6)
    assert math.isnan(RunningMean().mean)
