"""Running mean and std, without storing the values."""

import math
from typing import Any

import numpy as np


class RunningMean:
    """Running mean and std of numbers, or of arrays element by element, that are added in batches. NaN values are ignored.

    Batches are merged by the formula of Chan et al. (https://doi.org/10.1080/00031305.1983.10483115), which is accurate even if the mean
    is much larger than the std.

    Args:
        shape: shape of one value.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self._count = np.zeros(shape)
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)  # sum of squared distances from the mean

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
        """Number of values that are not NaN."""
        return self._plain(self._count)

    @property
    def mean(self) -> Any:
        """Mean; NaN if there are no values."""
        return self._plain(np.where(self._count > 0, self._mean, math.nan))

    @property
    def std(self) -> Any:
        """Population std; NaN if there are no values."""
        variance = self._squares / np.maximum(self._count, 1)
        return self._plain(np.where(self._count > 0, np.sqrt(variance), math.nan))

    def state(self) -> dict[str, np.ndarray]:
        """Return the state for `restore`."""
        return {"count": self._count, "mean": self._mean, "squares": self._squares}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Restore a `state`."""
        self._count, self._mean, self._squares = (np.array(state[name]) for name in ("count", "mean", "squares"))

    @staticmethod
    def _plain(values: np.ndarray) -> Any:
        return float(values) if np.ndim(values) == 0 else values
