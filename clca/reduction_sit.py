"""SiT: a learned soft assignment of the tokens to slots (Self-slimmed ViT, https://huggingface.co/papers/2111.12624).

Its official code has no license file. Differences from the paper: only its token slimming module is implemented,
without the distillation; CLR and retrieved tokens are merged with the patches.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init

from .reduction_base import LearnedSlots, TokenState, Weights


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class SiTReduction(LearnedSlots):
    """Before the layer, replace all tokens but CLS and registers by weighted sums. The keep rate is a share of the
    patches at `config.image_size`, cumulative: the slots are parameters."""

    name = "sit"

    def __init__(self, config: "CLCAViTConfig", stage: int) -> None:
        super().__init__(config, stage)
        width = config.hidden_size
        slots = self.num_slots(config, stage)
        self.slot_logits = nn.Sequential(
            nn.LayerNorm(width, eps=1e-5), nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, slots)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))

    def init_weights(self) -> None:
        init.ones_(self.scale)

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        weights = (self.slot_logits(tokens) * self.scale).softmax(dim=1).transpose(1, 2)  # (B, M, n)
        return weights @ tokens, lambda: weights
