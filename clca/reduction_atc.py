"""ATC: merge tokens by agglomerative clustering (https://huggingface.co/papers/2409.11923).

Its official code is MIT; the part for models trained without it derives from ToMe's (CC-BY-NC 4.0). None of it is used
here. Differences: that part removes one token less than requested in models with CLS; here registers, CLR and
retrieved tokens may be merged.
"""

import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .attention_clca import at_least_float32, full_precision, gather_rows, is_exporting
from .reduction_base import Merging


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class ATCReduction(Merging):
    """Between attention and MLP, repeatedly merge the two nearest clusters of tokens, by the cosine distance of their
    keys. The keep rate is a share of the patches, cumulative; a stage removes the difference between two targets.

    The new order is: token 0, then clusters by their first tokens.

    Args:
        linkage: distance of two clusters: the `average`, minimum (`single`) or maximum (`complete`) distance of their
            tokens.
    """

    name = "atc"
    max_exported_patches = 256  # each merge adds about 40 operators

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, linkage: Literal["average", "single", "complete"] = "average"
    ) -> None:
        super().__init__(config, stage)
        self.linkage = linkage

    @classmethod
    def max_merged(cls, num_tokens: int) -> int:
        return num_tokens - 2  # token 0 and one cluster remain

    def match(self, metric: torch.Tensor, merged: int) -> torch.Tensor:
        metric = nn.functional.normalize(at_least_float32(metric[:, 1:]), dim=-1)
        if torch.jit.is_tracing() or is_exporting():  # files must run without this package
            first = cluster(cosine_distance(metric), merged, self.linkage)
        elif torch.compiler.is_compiling():
            first = opaque_first_members(metric, merged, self.linkage)
        else:
            first = first_members(metric, merged, self.linkage)
        number = (first == torch.arange(first.shape[1], device=first.device)).cumsum(dim=1)  # clusters counted from 1
        return nn.functional.pad(number.gather(1, first), (1, 0))


def first_members(metric: torch.Tensor, merged: int, linkage: str) -> torch.Tensor:
    """Merge the two nearest clusters of tokens `merged` times.

    Args:
        metric: (B, n, d) of unit length.
        merged: number of merges.
        linkage: `average`, `single` or `complete`.

    Returns:
        Index (B, n) of the first member of the cluster of each token.
    """
    scipy = scipy_functions() if metric.device.type == "cpu" else None
    if scipy is None:
        return cluster(cosine_distance(metric), merged, linkage)
    # In float64 distances are equal only if tokens are.
    return torch.stack([cluster_by_scipy(scipy, image, merged, linkage) for image in metric.double()])


# `first_members` as one operator of a compiled graph, which would otherwise have about 40 operators for each merge. The name is that of this
# module, because a model of the Hub brings a module of its own.
opaque_first_members = torch.library.custom_op(
    re.sub(r"\W", "_", __name__) + "::first_members", first_members, mutates_args=()
)


@opaque_first_members.register_fake
def _(metric: torch.Tensor, merged: int, linkage: str) -> torch.Tensor:
    return metric.new_empty(metric.shape[:2], dtype=torch.long)


def cluster(distance: torch.Tensor, merged: int, linkage: str) -> torch.Tensor:
    """Return the result of `first_members` by operators of torch.

    Args:
        distance: (B, n, n), overwritten. Of equal distances, the pair with the lowest first members is merged.
        merged: number of merges.
        linkage: `average`, `single` or `complete`.
    """
    width = distance.shape[1]
    first = torch.arange(width, device=distance.device).expand(distance.shape[0], -1)
    members = torch.ones_like(distance[:, 0])
    for _ in range(0 if distance.is_meta else merged):  # shapes do not depend on the merges, so skip them
        one = distance.amin(dim=2).argmin(dim=1, keepdim=True)  # (B, 1)
        other = gather_rows(distance, one).argmin(dim=2)  # greater than `one`, because distances are symmetric
        pair = torch.cat([one, other], dim=1)
        index = pair.unsqueeze(2).expand(-1, -1, width)
        rows, counts = distance.gather(1, index), members.gather(1, pair)  # (B, 2, n), (B, 2)
        if linkage == "average":
            joint = (rows * counts.unsqueeze(2)).sum(dim=1) / counts.sum(dim=1, keepdim=True)
        else:
            joint = rows.amin(dim=1) if linkage == "single" else rows.amax(dim=1)
        joint = joint.scatter(1, pair, torch.inf)  # no distance to itself or to the cluster it absorbed
        rows = torch.stack([joint, torch.full_like(joint, torch.inf)], dim=1)
        distance.scatter_(1, index, rows).scatter_(2, index.transpose(1, 2), rows.transpose(1, 2))
        members = members.scatter(1, one, counts.sum(dim=1, keepdim=True))
        first = torch.where(first == other, one, first)
    return first


def cluster_by_scipy(scipy: Any, metric: torch.Tensor, merged: int, linkage: str) -> torch.Tensor:
    """Return the result of `first_members` (n,) for one image, many times faster.

    scipy breaks ties in a different order. So images in which two relevant distances are equal, or are NaN, use
    `cluster`.

    Args:
        scipy: `linkage` and `squareform`, see `scipy_functions`.
        metric: (n, d), float64, of unit length.
        merged: number of merges.
        linkage: `average`, `single` or `complete`.
    """
    merges_of, squareform = scipy
    width = metric.shape[0]
    upper = 1 - squareform((metric @ metric.T).numpy(), checks=False)  # (n (n - 1) / 2,)
    if metric.isfinite().all():
        merges = torch.from_numpy(merges_of(upper, linkage)[:merged])  # (merged, 4), by ascending distance
        relevant = upper[upper <= merges[-1, 2].item()]
        relevant.sort()  # by NumPy, many times faster than by torch on a CPU
        if (relevant[1:] != relevant[:-1]).all():
            parent = torch.arange(width + merged)  # merge i makes cluster n + i from two others
            parent[merges[:, :2].long()] = parent[width:, None].clone()
            for _ in range(merged.bit_length()):
                parent = parent[parent]
            root, row = parent[:width], torch.arange(width)
            return torch.full_like(parent, width).scatter_reduce(0, root, row, "amin")[root]
    return cluster(cosine_distance(metric.unsqueeze(0)), merged, linkage)[0]


def cosine_distance(metric: torch.Tensor) -> torch.Tensor:
    """Return 1 - cosine (B, n, n) of `metric` (B, n, d) of unit length, with infinity on the diagonal."""
    with full_precision(metric):
        distance = (1 - metric @ metric.transpose(1, 2)).triu(1)
    distance = distance + distance.transpose(1, 2)  # a matrix product is not exactly symmetric
    return distance.masked_fill(torch.eye(distance.shape[1], dtype=torch.bool, device=distance.device), torch.inf)


def scipy_functions() -> Any:
    """Return `linkage` and `squareform` of scipy, or None if it is not installed."""
    try:
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform
    except ImportError:
        return None
    return linkage, squareform
