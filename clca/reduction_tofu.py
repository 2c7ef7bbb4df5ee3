"""ToFu: drop similar tokens in early layers, merge them in late ones (https://huggingface.co/papers/2312.01026).

No official code was found; the licences of the implementations compared with are CC-BY-NC 4.0 and Apache-2.0, of a third it
is unknown. None is used here. Differs from those: means are weighted by size, and attention is proportional to it, unless
`proportional` is off; merged tokens are as long as the longest of their members, as the paper has it; registers, CLR and
recalled rows may be merged as well.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import AttentionContext, RowMap, TakenRows, at_least_float32
from .reduction_base import MergedRows, Merging, TokenState, cosine_of_halves, match_halves, one_hot_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class ToFuReduction(Merging):
    """Between attention and MLP, match rows as ToMe does, with the same counts. In early layers one row of a pair is dropped;
    in late ones the mean takes the place of both, as long as the longest row in it (MLERP).

    Args:
        merge_from: 0-based index of the layer from which on stages merge. By default the second after half of the layers.
        proportional: attention is proportional to the tokens' sizes. The published numbers seem to be made without.
    """

    name = "tofu"

    def __init__(
        self, config: "CLCAViTConfig", stage: int, *, merge_from: int | None = None, proportional: bool = True
    ) -> None:
        super().__init__(config, stage)
        first = config.num_hidden_layers // 2 + 1 if merge_from is None else merge_from
        self.merges_early = config.reduction_layers[stage] < first  # dropping is linear, MLERP is not
        self.size_track = "size" if proportional else "silent_size"

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "merge_from", lambda v: v is None or v >= 0, "the index of a layer")

    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[RowMap, TokenState]:
        if not self.merges_early:
            return super().merge(context, state, merged)
        key = context.key.mean(dim=1)
        with torch.no_grad():
            kept = match_halves(cosine_of_halves(key), merged).kept
        # A row stands for itself: the size of what is dropped is lost.
        return TakenRows(kept), state.select(kept).with_assignment(
            lambda: one_hot_assignment(kept, key.shape[1], key.dtype)
        )

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        rows, state = self.merge_rows(context, state)
        if rows is None:
            return hidden_states, state
        means = rows(hidden_states)
        if not isinstance(rows, MergedRows):  # some as they are
            return means, state
        length, lengths = (at_least_float32(values).norm(dim=-1) for values in (means, hidden_states))
        longest = torch.zeros_like(length).scatter_reduce(1, rows.target, lengths, "amax")
        scale = longest / length.masked_fill(length == 0, 1)  # a mean of zero stays zero
        return means * scale.unsqueeze(-1).to(means.dtype), state
