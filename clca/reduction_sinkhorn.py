"""Sinkhorn: tokens are transported to learned prototypes (the baseline of https://huggingface.co/papers/2308.04657).

The official code of that study is MIT. As there, the new tokens are sums of tokens of unit length, and each prototype
is normalized in place, which its gradient ignores.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from .attention_clca import at_least_float32
from .reduction_base import LearnedSlots, TokenState, Weights


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class SinkhornReduction(LearnedSlots):
    """Before the layer, replace all tokens but token 0 by sums over an entropic optimal transport plan. The keep rate
    is a share of the patches at `config.image_size`, cumulative: the prototypes are parameters.

    Args:
        sinkhorn_eps: strength of the entropy.
        cluster_iters: number of iterations of Sinkhorn's algorithm.
    """

    name = "sinkhorn"

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, sinkhorn_eps: float = 1.0, cluster_iters: int = 3
    ) -> None:
        super().__init__(config, stage)
        self.sinkhorn_eps = sinkhorn_eps
        self.cluster_iters = cluster_iters
        slots = self.num_slots(config, stage)
        self.prototypes = nn.Parameter(torch.zeros(slots, config.hidden_size))

    def init_weights(self) -> None:
        init.normal_(self.prototypes)

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "sinkhorn_eps", lambda v: v > 0, "positive")
        cls.check_option(config, "cluster_iters", lambda v: v >= 1, "at least 1")

    @classmethod
    def protected(cls, state: TokenState) -> tuple[int, int]:
        return 1, 0

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        if self.training:
            with torch.no_grad():
                self.prototypes.copy_(nn.functional.normalize(self.prototypes, dim=-1))
        unit = nn.functional.normalize(self.prototypes, dim=-1)
        prototypes = self.prototypes + (unit - self.prototypes).detach()  # the gradient ignores the normalization
        tokens = nn.functional.normalize(tokens, dim=-1)
        plan = self.transport(tokens @ prototypes.T)  # (B, n, M); the weights of each token sum to one
        weights = plan.transpose(1, 2)
        return weights.to(tokens.dtype) @ tokens, lambda: weights / weights.sum(dim=-1, keepdim=True)

    def transport(self, similarity: torch.Tensor) -> torch.Tensor:
        """Return the transport plan (B, n, M) for similarities (B, n, M), computed in the log domain: slots first,
        then tokens.

        All slots, and all tokens, have the same mass, so masses cancel."""
        plan = at_least_float32(similarity) / self.sinkhorn_eps
        for _ in range(self.cluster_iters):
            for dim in (1, 2):
                plan = plan.log_softmax(dim=dim)
        return plan.exp()
