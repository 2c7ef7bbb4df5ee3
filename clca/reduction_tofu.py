"""ToFu: drop similar tokens in early layers, merge them in late ones (https://huggingface.co/papers/2312.01026).

No official code was found. Of three implementations that were compared, two are CC-BY-NC 4.0 and Apache-2.0, and one
has no known license; none is used here. Differences: means are weighted by size, and attention is proportional to it,
unless `proportional` is off; merged tokens are as long as the longest of their members, as in the paper; registers,
CLR and retrieved tokens may be merged as well.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import AttentionContext, SelectedTokens, TokenMap, at_least_float32
from .reduction_base import MergedTokens, Merging, TokenState, cosine_of_halves, match_halves, one_hot_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class ToFuReduction(Merging):
    """Between attention and MLP, match tokens as ToMe does, with the same counts. In early layers one token of each
    pair is dropped. In late layers their mean replaces both, scaled to the norm of the longest token in it (MLERP).

    Args:
        merge_from: 0-based index of the first layer in which stages merge. By default the second layer of the second
            half.
        proportional: attention is proportional to the sizes of the tokens. The published numbers seem to be without
            it.
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

    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[TokenMap, TokenState]:
        if not self.merges_early:
            return super().merge(context, state, merged)
        key = context.key.mean(dim=1)
        with torch.no_grad():
            kept = match_halves(cosine_of_halves(key), merged).kept
        # Each token counts as one again: the size of dropped tokens is lost.
        return SelectedTokens(kept), state.select(kept).with_assignment(
            lambda: one_hot_assignment(kept, key.shape[1], key.dtype)
        )

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        token_map, state = self.merge_tokens(context, state)
        if token_map is None:
            return hidden_states, state
        means = token_map(hidden_states)
        if not isinstance(token_map, MergedTokens):  # tokens were dropped, not merged
            return means, state
        length, lengths = (at_least_float32(values).norm(dim=-1) for values in (means, hidden_states))
        longest = torch.zeros_like(length).scatter_reduce(1, token_map.target, lengths, "amax")
        scale = longest / length.masked_fill(length == 0, 1)  # a mean of zero stays zero
        return means * scale.unsqueeze(-1).to(means.dtype), state
