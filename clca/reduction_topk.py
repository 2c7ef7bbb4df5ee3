"""Top-k: keep the tokens that CLS attends to most.

The pruning half of EViT (https://huggingface.co/papers/2202.07800; its official code is Apache-2.0), as the baseline of
https://huggingface.co/papers/2308.04657. Differs from the paper: registers, CLR and recalled rows are candidates as well.
"""

from .reduction_base import AttentionPruning


class TopKReduction(AttentionPruning):
    """Keep what draws attention, drop the rest. The keep rate is a share of the current tokens."""

    name = "topk"
