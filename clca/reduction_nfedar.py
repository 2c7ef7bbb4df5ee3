"""NFEDAR: keep the tokens that CLS attends to through two layers, drop the others.

Attention rollout (https://huggingface.co/papers/2005.00928) as EViT's criterion, of the later CLCA code; no paper has it.
The licence of the official code was not checked, and none of it is used here. Differs from the original as EDAR does.
"""

from .reduction_base import RolloutPruning


class NFEDARReduction(RolloutPruning):
    """Keep the tokens that CLS attends to through two layers. The keep rate is a share of the current tokens."""

    name = "nfedar"
    differentiable_tracks = False  # without a fused token scores have no gradient
