"""MCTF: fuse tokens that are alike, draw little attention and are small (https://huggingface.co/papers/2403.10030).

Its official code is MIT; the matching in it is derived from ToMe's, which is CC-BY-NC 4.0. None of it is used here. Differs
from it: tokens are fused between attention and MLP instead of before the attention, by the same attention weights, so that
values are those of the tokens before the fusion; a stage may leave fewer than 10 tokens; registers, CLR and recalled rows may
be fused as well. Of the training procedure nothing is here.
"""

from typing import TYPE_CHECKING, Literal

import torch

from .attention_clca import AttentionContext, RowMap, at_least_float32
from .reduction_base import Matching, Merging, TokenState, cosine_of_halves, falling_order, match_halves


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class MCTFReduction(Merging):
    """Between attention and MLP, fuse pairs of rows. The keep rate is a share of the current tokens; rates below 0.5 fuse half
    of them.

    Rows at even positions are matched with rows at odd ones. Half of the rows that disappear are even ones that go to odd
    ones, the others are odd ones that go to even ones.

    Args:
        tau_sim: temperature of the similarity of the tokens that enter the layer; 0 leaves it out, a large one flattens it.
        tau_info: the same of how little attention they receive.
        tau_size: the same of how small they are.
        bidirectional: False: even rows go to odd ones only.
        pooling: weights of a mean: `attention` received times size, or `size`.
    """

    name = "mctf"
    from_patches = False

    def __init__(
        self,
        config: "CLCAViTConfig",
        stage: int,
        *,
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        bidirectional: bool = True,
        pooling: Literal["attention", "size"] = "attention",
    ) -> None:
        super().__init__(config, stage)
        self.tau_sim, self.tau_info, self.tau_size = tau_sim, tau_info, tau_size
        self.bidirectional = bidirectional
        self.pooling = pooling

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        for name in ("tau_sim", "tau_info", "tau_size"):
            cls.check_option(config, name, lambda v: v >= 0, "0 or more")

    @torch.no_grad()
    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[RowMap, TokenState]:
        size = self.size(context, state)
        received = at_least_float32(context.received_attention())
        received = received.clamp(min=torch.finfo(received.dtype).tiny)  # tokens that receive nothing have a mean, too
        target = self.match_by(self.scores(context.layer_input, received, size), merged)
        weights = received * size if self.pooling == "attention" else None
        return self.pool(target, size.shape[1] - merged, size, state, weights)

    def scores(self, tokens: torch.Tensor, received: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """How well rows at even and at odd positions go together, (B, a, b), of `tokens` (B, N, D), the attention that they
        `received` (B, N) and their `size` (B, N)."""
        scores = cosine_of_halves(tokens)
        # Rounding can make a cosine less than -1, whose root would be NaN.
        scores = ((scores + 1) / 2).clamp(min=0) ** (1 / self.tau_sim) if self.tau_sim else torch.ones_like(scores)
        for values, tau in ((received, self.tau_info), (size, self.tau_size)):
            if tau:
                little = (values.amin(dim=1, keepdim=True) / values) ** (1 / tau)
                scores = scores * little[:, ::2].unsqueeze(2) * little[:, 1::2].unsqueeze(1)
        return scores

    def match_by(self, scores: torch.Tensor, merged: int) -> torch.Tensor:
        """New row (B, N) of each row by `scores` (B, a, b), which are overwritten. The new order: even rows that stay,
        ascending; odd rows that stay, by falling score, or ascending if none of them goes."""
        if not self.bidirectional:
            return match_halves(scores, merged).target
        forward = merged // 2
        target = match_halves(scores, forward).target
        stay, even = scores.shape[1] - forward, target[:, ::2]
        # Odd rows take along what has gone to them, so the second step maps the rows that the first has left.
        best, partner = scores.masked_fill((even >= stay).unsqueeze(2), -torch.inf).max(dim=1)  # (B, b)
        order = falling_order(best)
        gone, odd = order[:, : merged - forward], order[:, merged - forward :]
        kept = torch.cat([torch.arange(stay, device=odd.device).expand(odd.shape[0], -1), stay + odd], dim=1)
        backward = Matching(kept, stay + gone, even.gather(1, partner.gather(1, gone)))
        return backward.target.gather(1, target)
