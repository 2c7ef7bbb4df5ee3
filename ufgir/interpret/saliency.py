"""How similar two heat maps over the patches of an image are: the metrics of saliency research
(https://huggingface.co/papers/1604.03605), on maps of any grid.

Maps are (rows, columns), not negative. Where a metric takes them as distributions they are scaled to sum to one. Logarithms are
to base 2, so divergences are in bits and Jensen-Shannon's is at most one.
"""

import math
from collections.abc import Callable

import numpy as np


MISSING = "comparing heat maps needs SciPy and POT: pip install 'clca-vit[analysis]'"


def _checked(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"`a` and `b` must be maps (rows, columns) over the same grid, got the shapes {a.shape} and {b.shape}."
        )
    for name, values in (("a", a), ("b", b)):
        if not np.isfinite(values).all() or values.min() < 0 or values.max() == 0:
            raise ValueError(
                f"`{name}` must be a map of finite numbers that are not negative, and not all zero, got values from "
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
    """Kullback-Leibler divergence KL(a ‖ b) = sum a log2(a / b), from 0; infinite where b is zero and a is not.

    The `KL` of the original code is that of its second map from the first, `kl_divergence(map2, map1)`.

    Raises:
        ValueError: as all functions here: maps over different grids, of negative numbers, or of zeros only.
    """
    return _kl(*_distributions(a, b))


def js_divergence(a: np.ndarray, b: np.ndarray) -> float:
    """Jensen-Shannon divergence, (KL(a ‖ m) + KL(b ‖ m)) / 2 with m the mean of both, in [0, 1]."""
    p, q = _distributions(a, b)
    mean = (p + q) / 2
    return (_kl(p, mean) + _kl(q, mean)) / 2


def js_reverse(a: np.ndarray, b: np.ndarray) -> float:
    """(KL(m ‖ a) + KL(m ‖ b)) / 2 with m the mean of both: what the original code calls JS. Unlike Jensen-Shannon's it has no
    bound, and is infinite where one map is zero and the other is not."""
    p, q = _distributions(a, b)
    mean = (p + q) / 2
    return (_kl(mean, p) + _kl(mean, q)) / 2


def pearson_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation of the cells (PCC), in [-1, 1]; NaN for a constant map."""
    a, b = _checked(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def spearman_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the cells' ranks (SCC), in [-1, 1]; NaN for a constant map."""
    try:
        from scipy.stats import rankdata
    except ImportError as error:
        raise ImportError(MISSING) from error
    a, b = _checked(a, b)
    return pearson_correlation(rankdata(a).reshape(a.shape), rankdata(b).reshape(b.shape))


def map_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Histogram intersection (SIM): both maps scaled from their smallest cell to their largest and then to sum to one, the sum
    of the smaller values, in [0, 1]; NaN for a constant map."""
    a, b = _checked(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    a, b = a - a.min(), b - b.min()
    return float(np.minimum(a / a.sum(), b / b.sum()).sum())


def ground_distances(rows: int, columns: int) -> np.ndarray:
    """Euclidean distances between the cells of a grid, counted row by row: (rows * columns, rows * columns), in cells."""
    cells = np.indices((rows, columns)).reshape(2, -1).T.astype(np.float64)
    return np.linalg.norm(cells[:, None] - cells, axis=-1)


def earth_movers_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The least work that turns one map into the other (EMD): share moved times distance in cells, by POT's exact solver.

    (The original counts the cells of its distances column by column and those of its maps row by row. On square grids that
    gives the same number; on others its EMD is another.)
    """
    try:
        import ot
    except ImportError as error:
        raise ImportError(MISSING) from error
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
    """All metrics of two maps, by the names of `METRICS`.

    Raises:
        ValueError: maps over different grids, of negative numbers, or of zeros only.
        ImportError: SciPy or POT is not installed.
    """
    return {name: metric(a, b) for name, metric in METRICS.items()}
