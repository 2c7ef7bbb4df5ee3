"""DPC-KNN: density-peak clusters of the patches, each merged into one token (https://huggingface.co/papers/2204.08680).

TCFormer's official code is Apache-2.0. Differs from the paper: no convolutions around it; CLS, registers, CLR and recalled
rows are protected; ties between densities are broken by position instead of noise, so that results repeat.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention_clca import at_least_float32
from .reduction_base import Regrouping, TokenState, Weights, nearest_row, one_hot_assignment, pairwise_distance


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


_FEWEST_CLUSTERS = 5  # before the last stage; the original's guard for 5 neighbours, whatever `k_neighbors` is


class DPCKNNReduction(Regrouping):
    """Before the layer, cluster the patches around points of high density that are far from denser ones. The keep rate is
    a share of the patches, cumulative.

    Args:
        k_neighbors: neighbours that a density is estimated from, the token itself among them.
        equal_weight: merge by the mean instead of a learnt weight per token.
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
    def slots(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        clusters = state.budget.of_patches(stage, state.num_patches)
        if state.budget.tokens(stage) is None:
            last = stage == len(config.reduction_layers) - 1
            clusters = max(clusters, 1 if last else _FEWEST_CLUSTERS)
        return min(clusters, num_rows)

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
        """Centres (B, M) in the order of falling score, and the cluster (B, n) of each of `tokens` (B, n, D)."""
        tokens = at_least_float32(tokens)
        batch, num_tokens, width = tokens.shape
        distance = pairwise_distance(tokens).div_(width**0.5)
        nearest = distance.topk(min(self.k_neighbors, num_tokens), dim=-1, largest=False).values
        # Logarithms, whose order is the same: of tokens far from each other all densities would be zero.
        density = -nearest.square().mean(dim=-1)
        centres = (self.separation(distance, density).log() + density).topk(clusters, dim=1).indices
        labels = nearest_row(distance, centres)
        own = torch.arange(clusters, device=tokens.device).expand(batch, -1)
        return centres, labels.scatter(1, centres, own)

    @staticmethod
    def separation(distance: torch.Tensor, density: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        """Distance (B, n) of each token from the nearest denser one, for the densest the largest distance there is. Of
        tokens of the same density the first is the denser."""
        position = torch.arange(density.shape[1], device=density.device)
        farthest = distance.amax(dim=(1, 2))[:, None, None]
        theirs, parts = density.unsqueeze(1), []
        for start in range(0, density.shape[1], chunk):  # squares of booleans would take more than the distances
            part = slice(start, start + chunk)
            mine, first = density[:, part].unsqueeze(2), position[part].unsqueeze(1)
            denser = (theirs > mine) | ((theirs == mine) & (position < first))  # (B, i, j): j than i
            parts.append(torch.where(denser, distance[:, part], farthest).amin(dim=2))
        return torch.cat(parts, dim=1)


def shares_of_clusters(scores: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """What share (B, n) of its cluster each token is: exp(score) / (sum of those of its cluster + 1e-6), of `scores` (B, n) and
    the cluster `labels` (B, n)."""
    with torch.no_grad():  # a positive score could overflow: the largest of the cluster is subtracted from all
        most = scores.new_zeros(scores.shape[0], clusters).scatter_reduce(1, labels, scores, "amax").gather(1, labels)
    weights = (scores - most).exp()
    total = weights.new_zeros(scores.shape[0], clusters).scatter_add(1, labels, weights).gather(1, labels)
    return weights / (total + 1e-6 * (-most).exp())
