"""Similarity metrics for heat maps over the patches of an image (https://huggingface.co/papers/1604.03605), on any grid.

Maps are (rows, columns), non-negative. Metrics of distributions scale each map to sum to one. Logarithms are to base 2, so
divergences are in bits and the Jensen-Shannon divergence is at most one.
"""

import math
from collections.abc import Callable

import numpy as np

from ..utils.extras import install_command


MISSING = "comparing heat maps needs SciPy and POT"


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"`a` and `b` must be maps (rows, columns) over the same grid, got the shapes {a.shape} and {b.shape}."
        )
    for name, values in (("a", a), ("b", b)):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
            raise ValueError(
                f"`{name}` must be a map of finite, non-negative numbers that are not all zero, got values from "
                f"{values.min():g} to {values.max():g}."
            )
    return a, b


def _distributions(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _checked(a, b)
    return a / a.sum(), b / b.sum()


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    if ((p > 0) & (q == 0)).any():
        return math.inf
    held = p > 0
    return float((p[held] * np.log2(p[held] / q[held])).sum())


def kl_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Kullback-Leibler divergence KL(a ‖ b) = sum a log2(a / b), at least 0; infinite if b is zero where a is not.

    The `KL` of the original code for (map1, map2) is `kl_divergence(map2, map1)`.

    Raises:
        ValueError: as in all functions of this module: if the grids differ, or a map has negative values or only zeros.
    """
    return _kl(*_distributions(a, b))


def js_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the Jensen-Shannon divergence, (KL(a ‖ m) + KL(b ‖ m)) / 2 with m the mean of both, in [0, 1]."""
    p, q = _distributions(a, b)
    mean = (p + q) / 2
    return (_kl(p, mean) + _kl(q, mean)) / 2


def js_reverse(a: np.ndarray, b: np.ndarray) -> float:
    """Compute (KL(m ‖ a) + KL(m ‖ b)) / 2 with m the mean of both, called JS in the original code. Unlike the Jensen-Shannon
    divergence, it is unbounded, and infinite if one map is zero where the other is not."""
    p, q = _distributions(a, b)
    mean = (p + q) / 2
    return (_kl(mean, p) + _kl(mean, q)) / 2


def pearson_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the linear correlation of the cells (PCC), in [-1, 1]; NaN for a constant map."""
    a, b = _checked(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def spearman_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the rank correlation of the cells (SCC), in [-1, 1]; NaN for a constant map."""
    try:
        from scipy.stats import rankdata
    except ImportError as error:
        raise ImportError(f"{MISSING}: {install_command('analysis')}") from error
    a, b = _checked(a, b)
    return pearson_correlation(rankdata(a).reshape(a.shape), rankdata(b).reshape(b.shape))


def map_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the histogram intersection (SIM), in [0, 1]: subtract the minimum of each map, scale it to sum to one, and sum the smaller
    of the two values of each cell. NaN for a constant map."""
    a, b = _checked(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.min(), b - b.min()
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


def ground_distances(rows: int, columns: int) -> np.ndarray:
    """Return the Euclidean distances, in cells, between the cells of a grid in row-major order: (rows * columns, rows * columns)."""
    cells = np.indices((rows, columns)).reshape(2, -1).T.astype(np.float64)
    return np.linalg.norm(cells[:, None] - cells, axis=-1)


def earth_movers_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the earth mover's distance (EMD): the minimal sum of moved share times distance in cells, by POT's exact solver.

    The original code enumerates distances column by column but maps row by row. On square grids the result is the same; on other
    grids its EMD differs from this one.
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(f"{MISSING}: {install_command('analysis')}") from error
    p, q = _distributions(a, b)
    p, q = p.ravel(), q.ravel()
    return float(ot.emd2(p / p.sum(), q / q.sum(), ground_distances(*np.shape(a)), numItermax=10_000_000))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "kl_a_b": kl_divergence,
    "kl_b_a": lambda a, b: kl_divergence(b, a),
    "js": js_divergence,
    "js_reverse": js_reverse,
    "pcc": pearson_correlation,
    "scc": spearman_correlation,
    "sim": map_similarity,
    "emd": earth_movers_distance,
}


def compare_maps(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Compute all `METRICS` of two maps.

    Raises:
        ValueError: if the grids differ, or a map has negative values or only zeros.
        ImportError: if SciPy or POT is not installed.
    """
    return {name: metric(a, b) for name, metric in METRICS.items()}
