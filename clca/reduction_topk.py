"""Top-k: keep the tokens that CLS attends to most.

The pruning half of EViT (https://huggingface.co/papers/2202.07800; its official code is Apache-2.0), as in the
baseline of https://huggingface.co/papers/2308.04657. Differences from the paper: registers, CLR and retrieved tokens
are candidates as well.
"""

from .reduction_base import AttentionPruning


class TopKReduction(AttentionPruning):
    """Keep the tokens with the most attention and drop the others. The keep rate is a share of the current tokens."""

    name = "topk"
