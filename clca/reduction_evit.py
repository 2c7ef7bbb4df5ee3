"""EViT: keep the tokens CLS attends to most and fuse the others into one (https://huggingface.co/papers/2202.07800).

Its official code is Apache-2.0. Differences from the paper: registers, CLR and retrieved tokens are candidates as
well; the fused token is weighted by the attention without normalization, so the weights sum to less than one, as in
the official code.
"""

from .reduction_base import AttentionPruning


class EViTReduction(AttentionPruning):
    """Keep the tokens with the most attention and one weighted sum of the others. The keep rate is a share of the
    current tokens."""

    name = "evit"
    fuse_rest = True
