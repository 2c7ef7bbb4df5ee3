"""EDAR: keep the tokens that CLS attends to through two layers, or fuse the others into one (an option).

Attention rollout (https://huggingface.co/papers/2005.00928) as the criterion of EViT, from the later CLCA code; there
is no paper about it. The license of the official code was not checked, and none of it is used here. Differences from
the original: if the layer before did not have the same tokens, where the original fails, only the stage's layer is
used; registers, CLR and retrieved tokens are candidates as well. In a model without CLS the first patch takes its
place.
"""

from typing import TYPE_CHECKING

from .reduction_base import RolloutPruning


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class EDARReduction(RolloutPruning):
    """Keep the tokens that CLS attends to through two layers. The keep rate is a share of the current tokens.

    Args:
        fuse_rest: fuse the other tokens into one, weighted by that attention, so the weights sum to less than one.
        normalize_weights: rescale these weights first, so that those of all tokens range from 0 to 1.
    """

    name = "edar"

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, fuse_rest: bool = False, normalize_weights: bool = False
    ) -> None:
        super().__init__(config, stage)
        self.fuse_rest = fuse_rest
        self.normalize_weights = normalize_weights
