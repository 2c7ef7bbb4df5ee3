"""DPC-KNN: density-peak clusters of the patches, each merged into one token (https://huggingface.co/papers/2204.08680).

TCFormer's official code is Apache-2.0. Differences from the paper: there are no convolutions around it; CLS,
registers, CLR and retrieved tokens are protected; ties between densities are broken by position instead of noise, so
that results are reproducible.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention_clca import at_least_float32
from .reduction_base import Regrouping, TokenState, Weights, nearest_token, one_hot_assignment, pairwise_distance


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


_MIN_CLUSTERS = 5  # before the last stage. The original requires this for 5 neighbors, whatever `k_neighbors` is.


class DPCKNNReduction(Regrouping):
    """Before the layer, cluster the patches around points of high density that are far from denser points. The keep
    rate is a share of the patches, cumulative.

    Args:
        k_neighbors: number of neighbors to estimate the density from, including the token itself.
        equal_weight: merge tokens by their mean instead of a learned weight per token.
    """

    name = "dpcknn"

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, k_neighbors: int = 5, equal_weight: bool = False
    ) -> None:
        super().__init__(config, stage)
        self.k_neighbors = k_neighbors
        self.score = None if equal_weight else nn.Linear(config.hidden_size, 1)

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "k_neighbors", lambda v: v >= 1, "at least 1")

    @classmethod
    def protected(cls, state: TokenState) -> tuple[int, int]:
        return state.prefix, state.suffix

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        clusters = state.budget.of_patches(stage, state.num_patches)
        if state.budget.tokens(stage) is None:
            last = stage == len(config.reduction_layers) - 1
            clusters = max(clusters, 1 if last else _MIN_CLUSTERS)
        return min(clusters, num_tokens)

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        _, labels = self.label(tokens, slots)
        scores = tokens.new_zeros(labels.shape) if self.score is None else self.score(tokens).squeeze(-1)
        share = shares_of_clusters(at_least_float32(scores), labels, slots)
        index = labels.unsqueeze(-1).expand_as(tokens)
        weighted = tokens * share.unsqueeze(-1).to(tokens.dtype)
        merged = tokens.new_zeros(tokens.shape[0], slots, tokens.shape[2]).scatter_add(1, index, weighted)
        return merged, lambda: one_hot_assignment(labels, slots, share.dtype).transpose(1, 2) * share.unsqueeze(1)

    @torch.no_grad()
    def label(self, tokens: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the centers (B, M) by descending score, and the cluster (B, n) of each of `tokens` (B, n, D)."""
        tokens = at_least_float32(tokens)
        batch, num_tokens, width = tokens.shape
        distance = pairwise_distance(tokens).div_(width**0.5)
        nearest = distance.topk(min(self.k_neighbors, num_tokens), dim=-1, largest=False).values
        # Use logarithms, which keep the order: densities of tokens far from each other would underflow to zero.
        density = -nearest.square().mean(dim=-1)
        centers = (self.separation(distance, density).log() + density).topk(clusters, dim=1).indices
        labels = nearest_token(distance, centers)
        own = torch.arange(clusters, device=tokens.device).expand(batch, -1)
        return centers, labels.scatter(1, centers, own)

    @staticmethod
    def separation(distance: torch.Tensor, density: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        """Return the distance (B, n) of each token from the nearest denser one; for the densest token, the largest of
        all distances.

        Of tokens with the same density, the one with the lower index counts as denser.

        Args:
            distance: (B, n, n).
            density: (B, n).
            chunk: number of tokens to process at once.
        """
        position = torch.arange(density.shape[1], device=density.device)
        farthest = distance.amax(dim=(1, 2))[:, None, None]
        theirs, parts = density.unsqueeze(1), []
        for start in range(
            0, density.shape[1], chunk
        ):  # full boolean matrices would need more memory than the distances
            part = slice(start, start + chunk)
            mine, first = density[:, part].unsqueeze(2), position[part].unsqueeze(1)
            denser = (theirs > mine) | ((theirs == mine) & (position < first))  # (B, i, j): j is denser than i
            parts.append(torch.where(denser, distance[:, part], farthest).amin(dim=2))
        return torch.cat(parts, dim=1)


def shares_of_clusters(scores: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Return the share (B, n) of each token in its cluster: exp(score) / (sum over the cluster + 1e-6).

    Args:
        scores: (B, n).
        labels: cluster of each token, (B, n).
        clusters: number of clusters M.
    """
    with torch.no_grad():  # subtract the largest score of each cluster, so that exp does not overflow
        most = scores.new_zeros(scores.shape[0], clusters).scatter_reduce(1, labels, scores, "amax").gather(1, labels)
    weights = (scores - most).exp()
    total = weights.new_zeros(scores.shape[0], clusters).scatter_add(1, labels, weights).gather(1, labels)
    return weights / (total + 1e-6 * (-most).exp())
