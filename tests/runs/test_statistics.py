"""Bootstrap intervals, McNemar's exact test and Holm's correction."""

import math

import numpy as np
import pytest

from ufgir.runs.statistics import bootstrap_interval, holm, mcnemar, resampled_means


def outcomes(only_first: int, only_second: int, both: int = 20, neither: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of two models on images of four kinds, in random order."""
    first = np.repeat([True, False, True, False], [only_first, only_second, both, neither])
    second = np.repeat([False, True, True, False], [only_first, only_second, both, neither])
    order = np.random.default_rng(0).permutation(len(first))
    return first[order], second[order]


def test_one_seed_gives_the_binomial_interval():
    right = np.arange(200) < 140
    means = resampled_means(right[None], 20_000)
    assert means.mean() == pytest.approx(0.7, abs=0.001) and means.std() == pytest.approx(
        math.sqrt(0.21 / 200), rel=0.02
    )
    interval = bootstrap_interval(right[None], 20_000)
    assert (interval.low, interval.high) == pytest.approx((0.635, 0.7625), abs=0.0051)  # of Binomial(200, 0.7)
    assert interval.p == 2 / 20_001


def test_seeds_and_images_both_add_to_the_variance():
    """Two ends: seeds that differ on the same image outcomes, and seeds that agree on all images."""
    alike = np.tile(np.arange(100) < 50, (5, 1))
    assert resampled_means(alike, 20_000).std() == pytest.approx(0.05, rel=0.03)  # 5 seeds tell no more than one
    levels = np.repeat([[0.2], [0.4], [0.6]], 100, axis=1)  # the same for all images
    assert resampled_means(levels, 20_000).std() == pytest.approx(np.std([0.2, 0.4, 0.6]) / math.sqrt(3), rel=0.03)


def test_the_interval_covers_the_true_accuracy():
    """Of 200 simulated studies: images of different difficulty, seeds of different quality."""
    rng = np.random.default_rng(0)
    hits = 0
    for study in range(200):
        chance = 1 / (1 + np.exp(-rng.normal(0, 1.5, 120) - rng.normal(0, 0.2, (5, 1))))
        interval = bootstrap_interval(rng.random((5, 120)) < chance, 400, seed=study)
        hits += interval.low <= 0.5 <= interval.high  # by symmetry
    assert 0.90 <= hits / 200 <= 0.995


def test_exchanging_the_models_mirrors_the_interval():
    rng = np.random.default_rng(1)
    difference = rng.integers(0, 2, (3, 80)) - rng.integers(0, 2, (3, 80))
    here, there = bootstrap_interval(difference, 999), bootstrap_interval(-difference, 999)
    assert here == pytest.approx((-there.high, -there.low, there.p))
    assert bootstrap_interval(difference, 999) == here != bootstrap_interval(difference, 999, seed=2)


def test_no_difference_at_all():
    assert bootstrap_interval(np.zeros((3, 10)), 100) == (0.0, 0.0, 1.0)
    assert bootstrap_interval(np.ones((1, 10)), 100)[:2] == (1.0, 1.0)


@pytest.mark.parametrize(
    "shape, resamples, words", [((0, 3), 9, "outcomes"), ((3,), 9, "outcomes"), ((1, 3), 0, "resamples")]
)
def test_wrong_inputs_of_the_bootstrap(shape, resamples, words):
    with pytest.raises(ValueError, match=f"`{words}` must"):
        resampled_means(np.zeros(shape), resamples)


@pytest.mark.parametrize(
    "only_first, only_second, p",
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (3, 1, 2 * (1 + 4) / 16),
        (2, 8, 2 * (1 + 10 + 45) / 1024),
        (50, 15, 1.6e-5),  # the first look of the study
    ],
)
def test_mcnemar_against_values_by_hand(only_first, only_second, p):
    first, second = outcomes(only_first, only_second)
    test, mirrored = mcnemar(first, second), mcnemar(second, first)
    assert test == (only_first, only_second, pytest.approx(p, rel=0.05 if p < 1e-3 else 1e-12))
    assert mirrored == (only_second, only_first, test.p)


def test_mcnemar_of_many_images_and_of_different_images():
    first, second = outcomes(5100, 4900)
    normal = math.erfc((200 - 1) / math.sqrt(10_000) / math.sqrt(2))  # the approximation for large numbers
    assert mcnemar(first, second).p == pytest.approx(normal, rel=1e-3)
    with pytest.raises(ValueError, match="`first` and `second`"):
        mcnemar(first, second[1:])


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []
