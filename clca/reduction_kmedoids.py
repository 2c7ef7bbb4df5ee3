"""K-medoids: keep the tokens at the centres of clusters (the baseline of https://huggingface.co/papers/2308.04657).

The official code of that study is MIT. Differences: with equal weights, the first medoid is the token nearest to the
mean instead of a random one, and the next ones are far from all medoids chosen so far instead of from one of them
(unless `spread` is `original`); a stage in layer 0, before any attention, weights all tokens equally.
"""

from typing import TYPE_CHECKING, Literal

import torch

from .attention_clca import AttentionContext, at_least_float32, gather_rows
from .reduction_base import Regrouping, TokenState, Weights, nearest_token, one_hot_assignment, pairwise_distance


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class KMedoidsReduction(Regrouping):
    """Before the layer, cluster all tokens but token 0 and keep the medoid of each cluster. The keep rate is a share
    of the patches, cumulative. The cost of a token is weighted by the attention it received in the layer before.

    Args:
        cluster_iters: number of iterations of assignment and update.
        equal_weight: weight all tokens equally, and start from tokens far from each other.
        spread: how to find the token farthest from those chosen at the start. `nearest`: by its distance to the
            nearest of them. `original`: by its distance to the farthest, as in the original CLCA code; this soon
            chooses the same tokens again. Clusters of a token that is chosen twice are empty and become token 0.
    """

    name = "kmedoids"

    def __init__(
        self,
        config: "CLCAViTConfig",
        stage: int,
        *,
        cluster_iters: int = 3,
        equal_weight: bool = False,
        spread: Literal["nearest", "original"] = "nearest",
    ) -> None:
        super().__init__(config, stage)
        self.cluster_iters = cluster_iters
        self.equal_weight = equal_weight
        self.spreads_as_original = spread == "original"

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "cluster_iters", lambda v: v >= 0, "a number of rounds")

    @classmethod
    def protected(cls, state: TokenState) -> tuple[int, int]:
        return 1, 0

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        return min(super().slots(config, stage, num_tokens, state), num_tokens)

    @classmethod
    def observe(cls, context: AttentionContext, state: TokenState, before_stage: bool) -> TokenState:
        if not before_stage or cls.option(context.attention.config, "equal_weight"):
            return state
        with torch.no_grad():
            return state.with_tracks(received=at_least_float32(context.received_attention()))

    @classmethod
    def retrieved_value(cls, name: str, track: torch.Tensor, training: bool) -> torch.Tensor:
        return track.mean(dim=1, keepdim=True)  # these tokens were not part of that attention

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        if slots == 0:
            return tokens[:, :0], lambda: tokens.new_zeros(tokens.shape[0], 0, tokens.shape[1])
        received = state.tracks.get("received")
        medoids, _ = self.label(tokens, slots, None if received is None else received[:, 1:])
        return gather_rows(tokens, medoids), lambda: one_hot_assignment(medoids, tokens.shape[1], tokens.dtype)

    @torch.no_grad()
    def label(
        self, tokens: torch.Tensor, clusters: int, received: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the medoids (B, M) and the cluster (B, n) of each token.

        Args:
            tokens: (B, n, D).
            clusters: number of clusters M.
            received: attention that each token received, (B, n); None for equal weights.
        """
        tokens = at_least_float32(tokens)
        distance = pairwise_distance(tokens)
        if received is None:
            cost, medoids = distance.sum(dim=2), self.spread(distance, tokens, clusters)
        else:
            cost, medoids = received * distance.sum(dim=2), received.topk(clusters, dim=1).indices
        for _ in range(self.cluster_iters):
            medoids = self.cheapest(cost, nearest_token(distance, medoids), clusters)
        return medoids, nearest_token(distance, medoids)

    @staticmethod
    def cheapest(cost: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
        """Return the member (B, M) of each cluster with the least cost, the first of several; token 0 for an empty
        cluster.

        Args:
            cost: (B, n).
            labels: cluster of each token, (B, n).
            clusters: number of clusters M.
        """
        batch, num_tokens = cost.shape
        least = cost.new_full((batch, clusters), torch.inf).scatter_reduce(1, labels, cost, "amin")
        position = torch.arange(num_tokens, device=cost.device).expand_as(labels)
        position = torch.where(cost == least.gather(1, labels), position, num_tokens)
        first = position.new_full((batch, clusters), num_tokens).scatter_reduce(1, labels, position, "amin")
        return first.where(first < num_tokens, 0)

    def spread(self, distance: torch.Tensor, tokens: torch.Tensor, clusters: int) -> torch.Tensor:
        """Choose tokens (B, M) far from each other: the one nearest to the mean, then repeatedly the farthest from
        those chosen.

        Args:
            distance: (B, n, n).
            tokens: (B, n, D).
            clusters: number M of tokens to choose.
        """
        center = (tokens - tokens.mean(dim=1, keepdim=True)).square().sum(dim=2).argmin(dim=1, keepdim=True)
        chosen = [center]
        combine = torch.maximum if self.spreads_as_original else torch.minimum
        gap = gather_rows(distance, center).squeeze(1)
        for _ in range(clusters - 1):
            farthest = gap.argmax(dim=1, keepdim=True)
            chosen.append(farthest)
            gap = combine(gap, gather_rows(distance, farthest).squeeze(1))
        return torch.cat(chosen, dim=1)
