"""ToMe: merge the most similar pairs of tokens (https://huggingface.co/papers/2210.09461).

Its official code is CC-BY-NC 4.0 and none of it is used here. Differences from the paper: layers and counts come from
keep rates; registers, CLR and retrieved tokens may be merged as well; attention is always proportional to the sizes of
the tokens.
"""

from .reduction_base import Merging


class ToMeReduction(Merging):
    """Between attention and MLP, merge pairs of tokens with similar keys. The keep rate is a share of the patches,
    cumulative; a stage removes the difference between two targets, but at most half of its tokens, and does not catch
    up later.

    Tokens at even positions are matched with tokens at odd ones. The new order is: unmerged even tokens, all odd
    tokens."""

    name = "tome"
