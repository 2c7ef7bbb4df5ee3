"""MAWS: keep the tokens that CLS and they attend to mutually (https://huggingface.co/papers/2107.02341).

From FFVT; the license of its official code was not checked, and none of it is used here. Differences from the paper,
as in the later CLCA code: heads are averaged before the softmax over queries, not after; tokens are dropped in a few
layers instead of being selected in each layer for an additional last layer; registers, CLR and retrieved tokens are
candidates as well. In a model without CLS the first patch takes its place.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import AttentionContext
from .reduction_base import ScoredByAttention


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class MAWSReduction(ScoredByAttention):
    """Keep the tokens with the largest product of two factors: the attention from CLS to the token, and the attention
    from the token to CLS, compared with all other tokens. The keep rate is a share of the current tokens.

    Args:
        fuse_rest: fuse the other tokens into one, weighted by these products. Their sum is far below one.
    """

    name = "maws"

    def __init__(self, config: "CLCAViTConfig", stage: int, *, fuse_rest: bool = False) -> None:
        super().__init__(config, stage)
        self.fuse_rest = fuse_rest

    def score(self, context: AttentionContext) -> torch.Tensor:
        return context.mutual_attention()

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.exp()  # scores are logarithms
