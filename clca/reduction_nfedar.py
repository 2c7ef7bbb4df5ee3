"""NFEDAR: keep the tokens that CLS attends to through two layers, drop the others.

Attention rollout (https://huggingface.co/papers/2005.00928) as the criterion of EViT, from the later CLCA code; there
is no paper about it. The license of the official code was not checked, and none of it is used here. Differences from
the original are those of EDAR.
"""

from .reduction_base import RolloutPruning


class NFEDARReduction(RolloutPruning):
    """Keep the tokens that CLS attends to through two layers. The keep rate is a share of the current tokens."""

    name = "nfedar"
    differentiable_tracks = False  # scores have no gradient without a fused token
