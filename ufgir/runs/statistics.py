"""Statistics of accuracies: bootstrap over seeds and test images, McNemar's exact test, Holm's correction.

Shapes: S seeds, N test images, R resamples.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 2**24  # random numbers in memory


def resampled_means(outcomes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resample seeds and test images with replacement and return the mean of each resample.

    All seeds of a resample see the same images, since they were tested on the same images: an image that is hard for one
    seed is usually hard for the others. This is the pigeonhole bootstrap of Owen
    (https://doi.org/10.1214/07-AOAS122). With one seed only images are resampled.

    Args:
        outcomes: (S, N), for each seed and image whether it is right (1 or 0), or the difference of two of these.
        resamples: R.
        seed: of the random numbers. The same seed gives opposite means for opposite outcomes.

    Returns:
        (R,) means.

    Raises:
        ValueError: if there are no outcomes or no resamples.
    """
    outcomes = np.asarray(outcomes, dtype=np.float64) + 0.0  # no negative zeros
    if outcomes.ndim != 2 or outcomes.size == 0:
        raise ValueError(f"`outcomes` must have the shape (seeds, images), neither of them 0, got {outcomes.shape}")
    if resamples < 1:
        raise ValueError(f"`resamples` must be at least 1, got {resamples}")
    count, images = outcomes.shape
    rng = np.random.default_rng(seed)
    # Images with the same outcomes under all seeds are interchangeable, so that counting each kind of image is enough.
    _, first, counts = np.unique(outcomes, axis=1, return_index=True, return_counts=True)
    order = np.argsort(first)  # of first occurrence, which does not depend on signs
    kinds, shares = outcomes[:, first[order]], counts[order] / images
    means = []
    for size in _chunks(resamples, len(shares)):
        by_seed = rng.multinomial(images, shares, size=size) @ kinds.T / images  # (R, S)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size) / count
        means.append((by_seed * weights).sum(axis=1))
    return np.concatenate(means)


def _chunks(resamples: int, kinds: int) -> Iterator[int]:
    step = max(1, _CELLS // kinds)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


class Interval(NamedTuple):
    """A confidence interval, and the two-sided p-value of the mean being 0."""

    low: float
    high: float
    p: float


def bootstrap_interval(
    outcomes: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Return the percentile interval of the mean of `outcomes`, see `resampled_means`.

    The p-value is twice the share of resamples on the rarer side of 0, and at least 2 / (R + 1).
    """
    means = resampled_means(outcomes, resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    tiny = 1e-12  # sums of fractions that are 0 but for rounding
    rarer = min(int((means <= tiny).sum()), int((means >= -tiny).sum()))
    return Interval(float(low), float(high), min(1.0, 2 * (rarer + 1) / (resamples + 1)))


class McNemar(NamedTuple):
    """Images that only one of two models classifies correctly, and the two-sided p-value of their difference."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> McNemar:
    """Compare two models on the same images with McNemar's exact test (https://doi.org/10.1007/BF02295996).

    If the models are equally good, each image on which only one of them is right is as likely to be the first's as the
    second's: a binomial distribution with probability 1/2.

    Args:
        first: (N,) whether the first model is right.
        second: (N,) whether the second model is right on the same images.

    Raises:
        ValueError: if the numbers of images differ.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` must be of the same images, got {first.size} and {second.size} outcomes"
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail, ways = 0, 1  # in whole numbers: exact for any number of images
    for k in range(fewer + 1):
        tail += ways
        ways = ways * (total - k) // (k + 1)
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**total))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number with Holm's method (https://www.jstor.org/stable/4615733).

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on; none gets smaller than one before it.
    """
    corrected, least = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected
