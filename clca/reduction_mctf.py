"""MCTF: fuse tokens that are alike, draw little attention and are small (https://huggingface.co/papers/2403.10030).

Its official code is MIT; the matching in it is derived from ToMe's, which is CC-BY-NC 4.0. None of it is used here.
Differences: tokens are fused between attention and MLP instead of before the attention, by the same attention weights,
so values are those of the tokens before the fusion; a stage may leave fewer than 10 tokens; registers, CLR and
retrieved tokens may be fused as well. The training procedure is not implemented.
"""

from typing import TYPE_CHECKING, Literal

import torch

from .attention_clca import AttentionContext, TokenMap, at_least_float32
from .reduction_base import Matching, Merging, TokenState, cosine_of_halves, descending_order, match_halves


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class MCTFReduction(Merging):
    """Between attention and MLP, fuse pairs of tokens. The keep rate is a share of the current tokens; rates below 0.5
    fuse half of them.

    Tokens at even positions are matched with tokens at odd positions. Half of the removed tokens are even ones that
    are fused into odd ones; the others are odd ones that are fused into even ones.

    Args:
        tau_sim: temperature of the similarity of the tokens that enter the layer. 0 disables this factor, a large
            value flattens it.
        tau_info: temperature of the factor for tokens that receive little attention.
        tau_size: temperature of the factor for small tokens.
        bidirectional: if False, only even tokens are fused into odd ones.
        pooling: weights of a mean: `attention`, received attention times size, or `size`.
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
    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[TokenMap, TokenState]:
        size = self.size(context, state)
        received = at_least_float32(context.received_attention())
        received = received.clamp(min=torch.finfo(received.dtype).tiny)  # avoids a mean of weights that are all zero
        target = self.match_by(self.scores(context.layer_input, received, size), merged)
        weights = received * size if self.pooling == "attention" else None
        return self.pool(target, size.shape[1] - merged, size, state, weights)

    def scores(self, tokens: torch.Tensor, received: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Return how well tokens at even and at odd positions fit together, (B, a, b).

        Args:
            tokens: (B, N, D).
            received: attention that each token received, (B, N).
            size: (B, N).
        """
        scores = cosine_of_halves(tokens)
        # A cosine may be less than -1 because of rounding, and its root would be NaN.
        scores = ((scores + 1) / 2).clamp(min=0) ** (1 / self.tau_sim) if self.tau_sim else torch.ones_like(scores)
        for values, tau in ((received, self.tau_info), (size, self.tau_size)):
            if tau:
                little = (values.amin(dim=1, keepdim=True) / values) ** (1 / tau)
                scores = scores * little[:, ::2].unsqueeze(2) * little[:, 1::2].unsqueeze(1)
        return scores

    def match_by(self, scores: torch.Tensor, merged: int) -> torch.Tensor:
        """Return the index (B, N) of the new token of each token.

        The new order is: even tokens that stay, ascending; odd tokens that stay, by descending score, or ascending if
        all of them stay.

        Args:
            scores: (B, a, b), overwritten.
            merged: number of tokens to remove.
        """
        if not self.bidirectional:
            return match_halves(scores, merged).target
        forward = merged // 2
        target = match_halves(scores, forward).target
        stay, even = scores.shape[1] - forward, target[:, ::2]
        # Odd tokens take the tokens already fused into them along, so the second step maps the result of the first.
        best, partner = scores.masked_fill((even >= stay).unsqueeze(2), -torch.inf).max(dim=1)  # (B, b)
        order = descending_order(best)
        removed, odd = order[:, : merged - forward], order[:, merged - forward :]
        kept = torch.cat([torch.arange(stay, device=odd.device).expand(odd.shape[0], -1), stay + odd], dim=1)
        backward = Matching(kept, stay + removed, even.gather(1, partner.gather(1, removed)))
        return backward.target.gather(1, target)
