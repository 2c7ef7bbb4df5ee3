"""How similar the features of two layers or two models are, and how far apart the tokens of a layer lie.

Two ways to one pass over any number of images:

- `FeatureMoments` adds up what the CLS features of all images have in common, (D, D') for each pair of layers. Linear CKA,
  CCA, PWCCA and the Procrustes distance of all images are made of it, exactly.
- `BatchedCKA` adds up HSIC over batches, which needs images only, not features of equal number or width: it compares all
  tokens of layers of different lengths (https://huggingface.co/papers/2010.15327).

The functions on two matrices, such as `linear_cka`, take what fits into memory.

Shapes: B images of a batch, n images in all, N tokens, D and D' widths.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..utils.statistics import RunningMean


NOISE = 1e-6  # what varies by less than this share of its size is constant but for rounding


class Moments(NamedTuple):
    """What two sets of features of the same images add up to.

    Attributes:
        xx: (D, D), products of the channels of x, summed over images.
        xy: (D, D').
        yy: (D', D').
        rank: the most linearly independent channels that so many images can show.
    """

    xx: torch.Tensor
    xy: torch.Tensor
    yy: torch.Tensor
    rank: int

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> "Moments":
        """Of features x (n, D) and y (n, D').

        Args:
            normalise: subtract each channel's mean over the images, and scale all of x, and of y, to a Frobenius norm of one,
                as all measures expect. Without it the features are taken as they are.

        Raises:
            ValueError: not two matrices with a row for each of the same images.
        """
        if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) == 0:
            raise ValueError(
                "`x` and `y` must be matrices with a row for each of the same images, got the shapes "
                f"{tuple(x.shape)} and {tuple(y.shape)}."
            )
        x, y = _double(x), _double(y)
        if not normalise:
            return cls(x.T @ x, x.T @ y, y.T @ y, len(x))
        x, y = _centred(x), _centred(y)
        return cls(x.T @ x, x.T @ y, y.T @ y, len(x) - 1).scaled()

    def scaled(self) -> "Moments":
        """Those of features whose Frobenius norm is one; features that do not vary become NaN."""
        x, y = self.xx.trace().sqrt(), self.yy.trace().sqrt()
        return self._replace(xx=self.xx / x**2, xy=self.xy / (x * y), yy=self.yy / y**2)

    # Each measure, of the moments. What they mean is said at the functions on matrices below.

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
        """Canonical correlations, and the weight in x of every canonical variable of x, those without a partner included."""
        check_canonical(max(len(self.xx), len(self.yy)), self.rank)
        if not self._finite():
            nan = torch.full((1,), math.nan, dtype=self.xx.dtype)
            return nan, nan
        (whiten_x, unwhiten_x, x_rank), (whiten_y, _, y_rank) = _whitening(self.xx), _whitening(self.yy)
        # numpy's decomposition: torch's completes U by other vectors, on which `pwcca(original=True)` depends
        left, correlations, _ = np.linalg.svd((whiten_x @ self.xy @ whiten_y).cpu().numpy())
        weights = (torch.from_numpy(left.T.copy()) @ unwhiten_x.cpu()).abs().sum(dim=1)
        return torch.from_numpy(correlations[: min(x_rank, y_rank)]).clamp(max=1), weights


def check_canonical(widest: int, rank: int) -> None:
    """Refuse features whose canonical correlations say nothing.

    Args:
        widest: channels of the wider features.
        rank: the most linearly independent channels that the images can show, one less than there are images.

    Raises:
        ValueError: there are as many channels.
    """
    if rank <= widest:
        raise ValueError(
            f"canonical correlations of {widest} channels need more than {widest + 1} images, or they are 1 whatever "
            f"the features; got features of rank {rank} at most: give more images, or use linear CKA."
        )


def _double(features: torch.Tensor) -> torch.Tensor:
    """In float64, which Apple's GPUs do not have."""
    return (features.cpu() if features.device.type == "mps" else features).double()


def _centred(x: torch.Tensor) -> torch.Tensor:
    """Less the mean over the images; zero where all images have the same."""
    centred = x - x.mean(dim=0)
    return centred if centred.norm() > NOISE * x.norm() else torch.zeros_like(x)


def _whitening(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Square root (D, D) of the inverse of such products, that of the products themselves, and their rank."""
    values, vectors = torch.linalg.eigh(products)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = torch.where(real, values, 0).sqrt()
    inverse = torch.where(real, 1 / roots, 0)
    return vectors * inverse @ vectors.T, vectors * roots @ vectors.T, int(real.sum())


def linear_cka(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """Linear centred kernel alignment (https://huggingface.co/papers/1905.00414) of features (n, D) and (n, D'): in [0, 1],
    one where y is x, rotated and scaled. One less this is the distance of the original code. `normalise` as of `Moments.of`;
    NaN if all images have the same features."""
    return Moments.of(x, y, normalise).linear_cka()


def linear_cka_prime_distance(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """1 - 2 |YX'|² / (|X|⁴ + |Y|⁴) of features (n, D) and (n, D'), in Frobenius norms: as the original code for more images
    than channels. It is zero for equal features only if these have a single direction; `gram_distance` is a distance."""
    xx, xy, yy, _ = Moments.of(x, y, normalise)
    return float(1 - 2 * xy.square().sum() / (xx.trace() ** 2 + yy.trace() ** 2))


def gram_distance(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """|XX' - YY'|² / (|X|⁴ + |Y|⁴), X and Y having a row for each image: what the original code gives as the same measure as
    `linear_cka_prime_distance`, for more channels than images."""
    xx, xy, yy, _ = Moments.of(x, y, normalise)
    difference = xx.square().sum() + yy.square().sum() - 2 * xy.square().sum()
    return float(difference / (xx.trace() ** 2 + yy.trace() ** 2))


def procrustes_distance(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """Squared distance of features (n, D) and (n, D') after the best rotation: |X|² + |Y|² - 2 |X'Y|_nuclear. Normalised it is
    in [0, 2], and zero where y is x, rotated and scaled (https://huggingface.co/papers/2108.01661)."""
    return Moments.of(x, y, normalise).procrustes()


def cca(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> torch.Tensor:
    """Canonical correlations of features (n, D) and (n, D'), falling: as many as the smaller rank.

    Raises:
        ValueError: not more images than channels, where the correlations would be 1 whatever the features.
    """
    return Moments.of(x, y, normalise).correlations()


def mean_cca(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """Mean of the canonical correlations, in [0, 1]; raises as `cca`."""
    return Moments.of(x, y, normalise).mean_cca()


def mean_squared_cca(x: torch.Tensor, y: torch.Tensor, normalise: bool = True) -> float:
    """Mean of the squared canonical correlations, in [0, 1]; raises as `cca`."""
    return Moments.of(x, y, normalise).mean_squared_cca()


def pwcca_distance(x: torch.Tensor, y: torch.Tensor, normalise: bool = True, original: bool = False) -> float:
    """Projection-weighted CCA (https://huggingface.co/papers/1806.05759), as a distance in [0, 1]: one less the canonical
    correlations, weighted by how much of x each canonical variable of x explains. Not symmetric, and
    not indifferent to rotations of x; raises as `cca`.

    Args:
        normalise: as of `Moments.of`.
        original: where x has more directions than y, those without a partner have a weight, too, as in the original code.
            There is no unique set of them, so that the number depends on how the decomposition chose them.
    """
    return Moments.of(x, y, normalise).pwcca(original)


# name -> measure of the moments, and whether equal features have 1 (a similarity) or 0 (a distance)
MEASURES: dict[str, tuple[Callable[[Moments], float], bool]] = {
    "cka-plain": (Moments.linear_cka, True),
    "pwcca": (Moments.pwcca, False),
    "cca": (Moments.mean_cca, True),
    "cca-squared": (Moments.mean_squared_cca, True),
    "procrustes": (Moments.procrustes, False),
}
CANONICAL = {"pwcca", "cca", "cca-squared"}  # those that need more images than channels
FEWEST_UNBIASED = 4  # images of a batch for unbiased HSIC


class FeatureMoments:
    """Adds up, batch by batch, the moments of the features of several layers, of one model or of two.

    Holds (D, D) float64 numbers for each layer and each pair of layers: 24 x 5 MB for 4 layers of two ViT-B, 168 x 5 MB for 12.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: list[list[torch.Tensor]] = []  # of x and y: the first batch's means, near those of all
        self._sums: list[list[torch.Tensor]] = []
        self._own: list[list[torch.Tensor]] = []
        self._cross: list[list[torch.Tensor]] = []

    def update(self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor] | None = None) -> None:
        """Add a batch: features (B, D) of each layer, of the same images; without `ys` the layers of `xs` among themselves."""
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
        """Of layer i of `xs` and layer j of `ys`, centred and scaled."""
        x, y = self._sums[0][i], self._sums[-1][j]
        xx = self._own[0][i] - torch.outer(x, x) / self.count
        yy = self._own[-1][j] - torch.outer(y, y) / self.count
        xy = self._cross[i][j] - torch.outer(x, y) / self.count
        xx, yy = self._or_zero(xx, 0, i), self._or_zero(yy, -1, j)
        return Moments(xx, xy, yy, self.count - 1).scaled()

    def _or_zero(self, products: torch.Tensor, side: int, layer: int) -> torch.Tensor:
        """Zero where all images have the same features."""
        mean = self._shift[side][layer] + self._sums[side][layer] / self.count
        size = products.trace() + self.count * mean.square().sum()
        return products if products.trace() > NOISE**2 * size else torch.zeros_like(products)

    def matrix(self, measure: str) -> np.ndarray:
        """One of `MEASURES` for every pair of layers, (layers of x, layers of y).

        Raises:
            ValueError: an unknown measure, no images, or fewer of them than the measure needs.
        """
        if measure not in MEASURES:
            raise ValueError(f"`measure` must be one of {', '.join(MEASURES)}, got {measure!r}.")
        if self.count == 0:
            raise ValueError("no images were given: there is nothing to compare.")
        function = MEASURES[measure][0]
        rows, columns = len(self._cross), len(self._cross[0])
        return np.array([[function(self.pair(i, j)) for j in range(columns)] for i in range(rows)])


def _grams(features: Iterable[torch.Tensor]) -> torch.Tensor:
    """(layers, B, B) products of the images' features (B, ...), centred on the batch."""
    flat = (_centred(_double(x.flatten(1))) for x in features)
    return torch.stack([x @ x.T for x in flat])


def hsic(k: torch.Tensor, ell: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Hilbert-Schmidt independence criterion of each pair of Gram matrices (R, n, n) and (C, n, n): (R, C).

    Args:
        k, ell: products of the features of n images.
        unbiased: the estimator of Song et al. (https://jmlr.org/papers/v13/song12a.html), of which batches may be averaged;
            else tr(KHLH) / (n - 1)², which is larger for small batches.

    Raises:
        ValueError: fewer than 4 images for the unbiased estimator, 2 for the other.
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
    """Linear CKA of every pair of layers, of which only (layers, layers) numbers are held: HSIC is averaged over batches
    (https://huggingface.co/papers/2010.15327). Unbiased, it does not depend on the batch size but for chance."""

    def __init__(self, unbiased: bool = True) -> None:
        self.unbiased = unbiased
        self.least = FEWEST_UNBIASED if unbiased else 2  # images of a batch
        self.batches = 0
        self._sums: tuple[torch.Tensor, ...] | None = None

    def update(self, xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor] | None = None) -> bool:
        """Add a batch: features (B, ...) of each layer, of the same images, and of any shape; without `ys` the layers of `xs`
        among themselves. False, and nothing is added, if it has too few images."""
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
        """(layers of x, layers of y); NaN where the features of a layer do not vary.

        Raises:
            ValueError: no batch with enough images was given.
        """
        if self._sums is None:
            raise ValueError(
                f"CKA needs a batch of at least {self.least} images, and there was none: give more images, or a larger batch size."
            )
        xy, xx, yy = self._sums
        return (xy / torch.outer(xx, yy).sqrt()).cpu().numpy()  # the root of a negative estimate is NaN


class TokenSpread:
    """Norms of the tokens of a layer, and their distances from each other, averaged over images.

    Attributes:
        norm: Euclidean norm of a token, over all tokens.
        distance: mean Euclidean distance of two tokens of an image, over images.
        scaled_distance: the same with the distances of each image scaled to [0, 1], from the smallest to the largest of those
            that are not zero: how even they are, whatever the norms.
    """

    def __init__(self) -> None:
        self.norm, self.distance, self.scaled_distance = RunningMean(), RunningMean(), RunningMean()

    def update(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> None:
        """Add a batch of tokens (B, N, D), of which only `visible` (B, N) ones count."""
        tokens = _double(tokens)
        if visible is None:
            visible = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        visible = visible.to(tokens.device)
        self.norm.update(tokens.norm(dim=-1)[visible].cpu().numpy())
        first, second = torch.triu_indices(tokens.shape[1], tokens.shape[1], offset=1, device=tokens.device)
        distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")[:, first, second]
        pairs = visible[:, first] & visible[:, second]
        nan = distances.new_tensor(math.nan)
        self.distance.update(torch.where(pairs, distances, nan).nanmean(dim=1).cpu().numpy())
        apart = pairs & (distances > 0)
        low = torch.where(apart, distances, math.inf).amin(dim=1, keepdim=True) if pairs.shape[1] else nan
        high = torch.where(apart, distances, -math.inf).amax(dim=1, keepdim=True) if pairs.shape[1] else nan
        scaled = (distances - low) / (high - low)
        self.scaled_distance.update(torch.where(apart, scaled, nan).nanmean(dim=1).cpu().numpy())

    def row(self) -> Mapping[str, Any]:
        """Means and deviations."""
        return {
            f"{name}_{kind}": getattr(getattr(self, name), kind)
            for name in ("norm", "distance", "scaled_distance")
            for kind in ("mean", "std")
        }
