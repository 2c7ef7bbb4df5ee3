"""DMAWS ("dual MAWS"): keep the tokens that CLS and they attend to mutually in two layers.

From the later CLCA code, without its own paper; mutual attention is that of FFVT
(https://huggingface.co/papers/2107.02341). The license of the official code was not checked, and none of it is used
here. Differences from the original: if the layer before did not have the same tokens, where the original fails, only
the stage's layer is used; tokens are compared by logarithms, because the product of four softmaxes often underflows in
float32; registers, CLR and retrieved tokens are candidates as well. In a model without CLS the first patch takes its
place.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import AttentionContext
from .reduction_base import TwoLayerPruning


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class DMAWSReduction(TwoLayerPruning):
    """Keep the tokens with the largest product of mutual attention (see MAWS) in the stage's layer and in the one
    before. The keep rate is a share of the current tokens.

    Args:
        fuse_rest: fuse the other tokens into one, weighted by these products. Their sum is far below one.
        normalize_weights: rescale these weights first, so that those of all tokens range from 0 to 1.
    """

    name = "dmaws"

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, fuse_rest: bool = False, normalize_weights: bool = False
    ) -> None:
        super().__init__(config, stage)
        self.fuse_rest = fuse_rest
        self.normalize_weights = normalize_weights

    @classmethod
    def note(cls, context: AttentionContext) -> torch.Tensor:
        return context.mutual_attention()  # (B, N)

    def score(self, context: AttentionContext) -> torch.Tensor:
        own, before = context.mutual_attention(), self.noted(context)
        return own if before is None else own + before

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.exp()  # scores are logarithms
