"""PatchMerger: learned queries gather the tokens (https://huggingface.co/papers/2202.12015).

Its official code (scenic) is Apache-2.0. Differences from the paper: it may act in several layers; CLR and retrieved
tokens are merged with the patches. As in the paper, the new tokens are sums of normalized tokens, so their scale
differs from that of the residual stream.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from .reduction_base import LearnedSlots, TokenState, Weights


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class PatchMergerReduction(LearnedSlots):
    """Before the layer, replace all tokens but CLS and registers by attention outputs of learned queries. The keep
    rate is a share of the patches at `config.image_size`, cumulative: the queries are parameters."""

    name = "patchmerger"

    def __init__(self, config: "CLCAViTConfig", stage: int) -> None:
        super().__init__(config, stage)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.queries = nn.Parameter(torch.zeros(self.num_slots(config, stage), config.hidden_size))

    def init_weights(self) -> None:
        init.normal_(self.queries)

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        tokens = self.norm(tokens)
        weights = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1)  # (B, M, n)
        return weights @ tokens, lambda: weights
