"""ToMe: merge the most similar pairs of tokens (https://huggingface.co/papers/2210.09461).

Its official code is CC-BY-NC 4.0 and none of it is used here. Differs from the paper: layers and counts come from keep
rates; registers, CLR and recalled rows may be merged as well; attention is always proportional to the tokens' sizes.
"""

from .reduction_base import Merging


class ToMeReduction(Merging):
    """Between attention and MLP, merge pairs of rows with similar keys. The keep rate is a share of the patches,
    cumulative; a stage removes what lies between two targets, but at most half of its rows, and never catches up.

    Rows at even positions are matched with rows at odd ones. The new order is: unmerged even rows, all odd rows.
    """

    name = "tome"
