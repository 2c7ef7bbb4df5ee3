"""Similarity of the features of two layers or two models, and distances between the tokens of a layer.

Two classes process any number of images in one pass:

- `FeatureMoments` accumulates the moments of the CLS features, (D, D') per pair of layers. Linear CKA, CCA, PWCCA and the
  Procrustes distance over all images are computed from them exactly.
- `BatchedCKA` accumulates HSIC over batches. Layers may differ in number and width of features, so it can compare all tokens of
  layers of different lengths (https://huggingface.co/papers/2010.15327).

The functions on two matrices, such as `linear_cka`, are for features that fit into memory.

Shapes: B images per batch, n images in total, N tokens, D and D' widths.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.statistics import RunningMean


NOISE = 1e-6  # features whose variation is a smaller share of their norm count as constant, up to rounding


class Moments(NamedTuple):
    """Moments of two sets of features of the same images.

    Attributes:
        xx: (D, D), products of the channels of x, summed over images.
        xy: (D, D'), products of the channels of x and y.
        yy: (D', D'), products of the channels of y.
        rank: upper bound on the rank of the features, given the number of images.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor
    rank: int

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> "Moments":
        """Compute the moments of features x (n, D) and y (n, D').

        Args:
            x: (n, D).
            y: (n, D').
            normalize: subtract the mean of each channel, and scale x and y to a Frobenius norm of one, as all measures expect. If
                False, the features are used unchanged.

        Raises:
            ValueError: if the features are not two matrices with the same number of rows.
        """
        if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) == 0:
            raise ValueError(
                "`x` and `y` must be matrices with one row per image, got the shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}."
            )
        x, y = _double(x), _double(y)
        if not normalize:
            return cls(x.T @ x, x.T @ y, y.T @ y, len(x))
        x, y = _centered(x), _centered(y)
        return cls(x.T @ x, x.T @ y, y.T @ y, len(x) - 1).scaled()

    def scaled(self) -> "Moments":
        """Return the moments of features scaled to a Frobenius norm of one; constant features become NaN."""
        x, y = self.xx.trace().sqrt(), self.yy.trace().sqrt()
        return self._replace(xx=self.xx / x**2, xy=self.xy / (x * y), yy=self.yy / y**2)

    # The measures are documented at the functions on matrices below.

    def linear_cka(self) -> float:
        """See `linear_cka`."""
        return float(self.xy.square().sum() / (self.xx.norm() * self.yy.norm()))

    def procrustes(self) -> float:
        """See `procrustes_distance`."""
        if not self._finite():
            return math.nan
        rotated = torch.linalg.matrix_norm(self.xy, "nuc")
        return max(float(self.xx.trace() + self.yy.trace() - 2 * rotated), 0.0)

    def correlations(self) -> torch.Tensor:
        """See `cca`."""
        return self._cca()[0]

    def mean_cca(self) -> float:
        """See `mean_cca`."""
        return float(self.correlations().mean())

    def mean_squared_cca(self) -> float:
        """See `mean_squared_cca`."""
        return float(self.correlations().square().mean())

    def pwcca(self, original: bool = False) -> float:
        """See `pwcca_distance`."""
        correlations, weights = self._cca()
        with_partner = weights[: len(correlations)]
        return float(1 - with_partner @ correlations / (weights if original else with_partner).sum())

    def _finite(self) -> bool:
        return bool(self.xx.isfinite().all() and self.yy.isfinite().all())

    def _cca(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return canonical correlations, and the weight in x of every canonical variable of x, including those without a partner."""
        check_canonical(max(len(self.xx), len(self.yy)), self.rank)
        if not self._finite():
            nan = torch.full((1,), math.nan, dtype=self.xx.dtype)
            return nan, nan
        (whiten_x, unwhiten_x, x_rank), (whiten_y, _, y_rank) = _whitening(self.xx), _whitening(self.yy)
        # numpy's decomposition: torch's completes U with other vectors, on which `pwcca(original=True)` depends
        left, correlations, _ = np.linalg.svd((whiten_x @ self.xy @ whiten_y).cpu().numpy())
        weights = (torch.from_numpy(left.T.copy()) @ unwhiten_x.cpu()).abs().sum(dim=1)
        return torch.from_numpy(correlations[: min(x_rank, y_rank)]).clamp(max=1), weights


def check_canonical(widest: int, rank: int) -> None:
    """Check that there are enough images for canonical correlations.

    Args:
        widest: number of channels of the wider features.
        rank: upper bound on the rank of the features: the number of images minus one.

    Raises:
        ValueError: if `rank` is at most `widest`.
    """
    if rank <= widest:
        raise ValueError(
            f"canonical correlations of {widest} channels need more than {widest + 1} images (with fewer, they are always 1), "
            f"got features of rank {rank} at most. Pass more images or use linear CKA."
        )


def _double(features: torch.Tensor) -> torch.Tensor:
    """Convert features to float64, on the CPU if the device is an Apple GPU, which does not support it."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def _centered(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over the images; return zeros if all images have the same features."""
    centered = x - x.mean(dim=0)
    return centered if centered.norm() > NOISE * x.norm() else torch.zeros_like(x)


def _whitening(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the square roots (D, D) of the inverse of `products` and of `products`, and the rank."""
    values, vectors = torch.linalg.eigh(products)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(real, values, 0).sqrt()
    inverse = torch.where(real, 1 / roots, 0)
    return vectors * inverse @ vectors.T, vectors * roots @ vectors.T, int(real.sum())


def linear_cka(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute linear centered kernel alignment (https://huggingface.co/papers/1905.00414) of features (n, D) and (n, D'), in [0, 1]; one if
    y is x, rotated and scaled. The distance of the original code is 1 - CKA. For `normalize`, see `Moments.of`. NaN if all images have
    the same features."""
    return Moments.of(x, y, normalize).linear_cka()


def linear_cka_prime_distance(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute 1 - 2 |YX'|² / (|X|⁴ + |Y|⁴) of features (n, D) and (n, D'), in Frobenius norms, as the original code does for more images than
    channels. It is zero for equal features only if they have rank one; `gram_distance` is a distance."""
    xx, xy, yy, _ = Moments.of(x, y, normalize)
    return float(1 - 2 * xy.square().sum() / (xx.trace() ** 2 + yy.trace() ** 2))


def gram_distance(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute |XX' - YY'|² / (|X|⁴ + |Y|⁴), where X and Y have a row per image. The original code uses it in place of
    `linear_cka_prime_distance` for more channels than images."""
    xx, xy, yy, _ = Moments.of(x, y, normalize)
    difference = xx.square().sum() + yy.square().sum() - 2 * xy.square().sum()
    return float(difference / (xx.trace() ** 2 + yy.trace() ** 2))


def procrustes_distance(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute the squared distance of features (n, D) and (n, D') after the best rotation: |X|² + |Y|² - 2 |X'Y|_nuclear. With
    `normalize` it is in [0, 2], and zero if y is x, rotated and scaled (https://huggingface.co/papers/2108.01661)."""
    return Moments.of(x, y, normalize).procrustes()


def cca(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """Compute the canonical correlations of features (n, D) and (n, D'), in descending order; as many as the smaller rank.

    Raises:
        ValueError: if there are not more images than channels; all correlations would be 1.
    """
    return Moments.of(x, y, normalize).correlations()


def mean_cca(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute the mean canonical correlation, in [0, 1]; raises as `cca`."""
    return Moments.of(x, y, normalize).mean_cca()


def mean_squared_cca(x: torch.Tensor, y: torch.Tensor, normalize: bool = True) -> float:
    """Compute the mean squared canonical correlation, in [0, 1]; raises as `cca`."""
    return Moments.of(x, y, normalize).mean_squared_cca()


def pwcca_distance(x: torch.Tensor, y: torch.Tensor, normalize: bool = True, original: bool = False) -> float:
    """Compute the projection-weighted CCA distance (https://huggingface.co/papers/1806.05759), in [0, 1]: one minus the mean of the canonical
    correlations, weighted by how much of x each canonical variable of x explains. Not symmetric, and not invariant to rotations of x;
    raises as `cca`.

    Args:
        x: (n, D).
        y: (n, D').
        normalize: see `Moments.of`.
        original: if x has a higher rank than y, also weight the directions of x without a partner, as in the original code. These
            directions are not unique, so the result depends on the decomposition.
    """
    return Moments.of(x, y, normalize).pwcca(original)


# name -> measure of the moments, and whether it is a similarity (1 for equal features) or a distance (0)
MEASURES: dict[str, tuple[Callable[[Moments], float], bool]] = {
    "cka-plain": (Moments.linear_cka, True),
    "pwcca": (Moments.pwcca, False),
    "cca": (Moments.mean_cca, True),
    "cca-squared": (Moments.mean_squared_cca, True),
    "procrustes": (Moments.procrustes, False),
}
CANONICAL = {"pwcca", "cca", "cca-squared"}  # measures that need more images than channels
FEWEST_UNBIASED = 4  # minimal batch size for unbiased HSIC


class FeatureMoments:
    """Accumulates the moments of features of several layers, of one model or of two, batch by batch.

    Holds (D, D) float64 numbers for each layer and each pair of layers: 24 x 5 MB for 4 layers of two ViT-B, 168 x 5 MB for 12.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: list[
            list[torch.Tensor]
        ] = []  # means of x and y over the first batch, close to those of all images
        self._sums: list[list[torch.Tensor]] = []
        self._own: list[list[torch.Tensor]] = []
        self._cross: list[list[torch.Tensor]] = []

    def update(self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor] | None = None) -> None:
        """Add a batch: features (B, D) of each layer, for the same images; without `ys`, the layers of `xs` are compared with each other."""
        sides = [[_double(x) for x in side] for side in (xs, *([] if ys is None else [ys]))]
        if self.count == 0:
            self._shift = [[x.mean(dim=0) for x in side] for side in sides]
        sides = [
            [x - m for x, m in zip(side, means, strict=True)] for side, means in zip(sides, self._shift, strict=True)
        ]
        sums = [[x.sum(dim=0) for x in side] for side in sides]
        own = [[x.T @ x for x in side] for side in sides]
        cross = [[x.T @ y for y in sides[-1]] for x in sides[0]]
        if self.count == 0:
            self._sums, self._own, self._cross = sums, own, cross
        else:
            for old, new in ((self._sums, sums), (self._own, own), (self._cross, cross)):
                for row, added in zip(old, new, strict=True):
                    for total, value in zip(row, added, strict=True):
                        total += value
        self.count += len(sides[0][0])

    def pair(self, i: int, j: int) -> Moments:
        """Return the moments of layer i of `xs` and layer j of `ys`, centered and scaled."""
        x, y = self._sums[0][i], self._sums[-1][j]
        xx = self._own[0][i] - torch.outer(x, x) / self.count
        yy = self._own[-1][j] - torch.outer(y, y) / self.count
        xy = self._cross[i][j] - torch.outer(x, y) / self.count
        xx, yy = self._or_zero(xx, 0, i), self._or_zero(yy, -1, j)
        return Moments(xx, xy, yy, self.count - 1).scaled()

    def _or_zero(self, products: torch.Tensor, side: int, layer: int) -> torch.Tensor:
        """Return zeros if all images have the same features."""
        mean = self._shift[side][layer] + self._sums[side][layer] / self.count
        size = products.trace() + self.count * mean.square().sum()
        return products if products.trace() > NOISE**2 * size else torch.zeros_like(products)

    def matrix(self, measure: str) -> np.ndarray:
        """Compute one of `MEASURES` for every pair of layers, (layers of x, layers of y).

        Raises:
            ValueError: if the measure is unknown, or there are no images or fewer than the measure needs.
        """
        if measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {', '.join(MEASURES)}, got {measure!r}.")
        if self.count == 0:
            raise ValueError("no images to compare: call `update` with at least one batch of images.")
        function = MEASURES[measure][0]
        rows, columns = len(self._cross), len(self._cross[0])
        return np.array([[function(self.pair(i, j)) for j in range(columns)] for i in range(rows)])


def _grams(features: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the Gram matrices (layers, B, B) of features (B, ...), centered on the batch."""
    flat = (_centered(_double(x.flatten(1))) for x in features)
    return torch.stack([x @ x.T for x in flat])


def hsic(k: torch.Tensor, ell: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Compute the Hilbert-Schmidt independence criterion of each pair of Gram matrices (R, n, n) and (C, n, n): (R, C).

    Args:
        k: (R, n, n).
        ell: (C, n, n), of the same images.
        unbiased: use the estimator of Song et al. (https://jmlr.org/papers/v13/song12a.html), which can be averaged over batches;
            otherwise tr(KHLH) / (n - 1)², which is larger for small batches.

    Raises:
        ValueError: if there are fewer than 4 images for the unbiased estimator, or 2 for the other.
    """
    n = k.shape[-1]
    least = FEWEST_UNBIASED if unbiased else 2
    if n < least:
        raise ValueError(f"`k` must have at least {least} images, got {n}.")
    if not unbiased:
        k = k - k.mean(dim=1, keepdim=True)
        k = k - k.mean(dim=2, keepdim=True)
        return torch.einsum("rij,cij->rc", k, ell) / (n - 1) ** 2
    others = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, ell = k * others, ell * others
    k_rows, ell_rows = k.sum(dim=2), ell.sum(dim=2)  # (R, n), (C, n)
    sums = torch.outer(k_rows.sum(dim=1), ell_rows.sum(dim=1))
    products = torch.einsum("rij,cij->rc", k, ell)
    return (products + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * k_rows @ ell_rows.T) / (n * (n - 3))


class BatchedCKA:
    """Linear CKA of every pair of layers, with HSIC averaged over batches (https://huggingface.co/papers/2010.15327). Holds only (layers,
    layers) numbers. The expected value of the unbiased estimator does not depend on the batch size."""

    def __init__(self, unbiased: bool = True) -> None:
        self.unbiased = unbiased
        self.least = FEWEST_UNBIASED if unbiased else 2  # minimal batch size
        self.batches = 0
        self._sums: tuple[torch.Tensor, ...] | None = None

    def update(self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor] | None = None) -> bool:
        """Add a batch: features (B, ...) of each layer, for the same images; without `ys`, the layers of `xs` are compared with each other.
        Returns False, and adds nothing, if the batch has too few images."""
        if len(xs[0]) < self.least:
            return False
        k = _grams(xs)
        ell = k if ys is None else _grams(ys).to(k.device)
        own = [
            torch.cat([hsic(g[i : i + 1], g[i : i + 1], self.unbiased)[0] for i in range(len(g))]) for g in (k, ell)
        ]
        new = (hsic(k, ell, self.unbiased), *own)
        self._sums = new if self._sums is None else tuple(a + b for a, b in zip(self._sums, new, strict=True))
        self.batches += 1
        return True

    def matrix(self) -> np.ndarray:
        """Return the CKA (layers of x, layers of y); NaN for layers with constant features.

        Raises:
            ValueError: if there was no batch with enough images.
        """
        if self._sums is None:
            raise ValueError(
                f"CKA needs a batch of at least {self.least} images, got none. Pass more images or increase the batch size."
            )
        xy, xx, yy = self._sums
        return (xy / torch.outer(xx, yy).sqrt()).cpu().numpy()  # the root of a negative estimate is NaN


class TokenSpread:
    """Norms of the tokens of a layer, and distances between them, averaged over images.

    Attributes:
        norm: Euclidean norm of a token, over all tokens.
        distance: mean Euclidean distance between two tokens of an image, over images.
        scaled_distance: mean distance after scaling the non-zero distances of each image to [0, 1]; measures how even the distances
            are, independent of the norms.
    """

    def __init__(self) -> None:
        self.norm, self.distance, self.scaled_distance = RunningMean(), RunningMean(), RunningMean()

    def update(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add a batch of tokens (B, N, D). `mask` (B, N) selects the tokens to include; None for all."""
        tokens = _double(tokens)
        if mask is None:
            mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        mask = mask.to(tokens.device)
        self.norm.update(tokens.norm(dim=-1)[mask].cpu().numpy())
        first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], offset=1, device=tokens.device)
        distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")[:, first, second]
        pairs = mask[:, first] & mask[:, second]
        nan = distances.new_tensor(math.nan)
        self.distance.update(torch.where(pairs, distances, nan).nanmean(dim=1).cpu().numpy())
        apart = pairs & (distances > 0)
        low = torch.where(apart, distances, math.inf).amin(dim=1, keepdim=True) if pairs.shape[1] else nan
        high = torch.where(apart, distances, -math.inf).amax(dim=1, keepdim=True) if pairs.shape[1] else nan
        scaled = (distances - low) / (high - low)
        self.scaled_distance.update(torch.where(apart, scaled, nan).nanmean(dim=1).cpu().numpy())

    def row(self) -> Mapping[str, Any]:
        """Return means and stds."""
        return {
            f"{name}_{kind}": getattr(getattr(self, name), kind)
            for name in ("norm", "distance", "scaled_distance")
            for kind in ("mean", "std")
        }
