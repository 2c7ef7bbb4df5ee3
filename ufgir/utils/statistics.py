"""Means and deviations in one pass, without keeping the values."""

import math
from typing import Any

import numpy as np


class RunningMean:
    """Mean and deviation of numbers, or of arrays element by element, that come in batches; NaN are left out.

    Batches are merged by the formula of Chan et al. (https://doi.org/10.1080/00031305.1983.10483115), which does not suffer
    where the mean is much larger than the deviation.

    Args:
        shape: of one value.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._count = np.zeros(shape)
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)  # of the distances from the mean, summed

    def update(self, values: np.ndarray) -> None:
        """Add values (n, *shape)."""
        values = np.asarray(values, dtype=np.float64)
        known = ~np.isnan(values)
        count = known.sum(axis=0)
        values = np.where(known, values, 0.0)
        mean = values.sum(axis=0) / np.maximum(count, 1)
        squares = np.where(known, values - mean, 0.0) ** 2
        total = self._count + count
        difference = mean - self._mean
        self._squares = (
            self._squares + squares.sum(axis=0) + difference**2 * self._count * count / np.maximum(total, 1)
        )
        self._mean = self._mean + difference * count / np.maximum(total, 1)
        self._count = total

    @property
    def count(self) -> Any:
        """Values that were not NaN."""
        return self._plain(self._count)

    @property
    def mean(self) -> Any:
        """NaN where there were no values."""
        return self._plain(np.where(self._count > 0, self._mean, math.nan))

    @property
    def std(self) -> Any:
        """Population deviation; NaN where there were no values."""
        variance = self._squares / np.maximum(self._count, 1)
        return self._plain(np.where(self._count > 0, np.sqrt(variance), math.nan))

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from a `state`."""
        self._count, self._mean, self._squares = (np.array(state[name]) for name in ("count", "mean", "squares"))

    @staticmethod
    def _plain(values: np.ndarray) -> Any:
        return float(values) if np.ndim(values) == 0 else values
