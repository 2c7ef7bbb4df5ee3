"""ATS: sample tokens from the distribution of the CLS token's attention (https://huggingface.co/papers/2111.15667).

Its official code has no license file. Differences from the paper: registers, CLR and retrieved tokens may be sampled
as well. As in the original CLCA code, a stage of K tokens uses K - 1 fixed quantiles (K for some K because of
rounding), so the number of different tokens depends on the image and is at most that.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention_clca import FIRST_TOKEN, AttentionContext, at_least_float32, is_exporting
from .budget_clca import Budget
from .reduction_base import TokenReduction, TokenState, one_hot_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class ATSReduction(TokenReduction):
    """Inside attention, keep CLS and the tokens at fixed quantiles of its attention, in the order of the sequence. The
    keep rate is an upper bound as a share of the patches, cumulative; with `keep_tokens` it is K, the number of
    samples including CLS, so at most K - 1 other tokens are kept.

    The attention is weighted by the norms of the values. Images of a batch keep different numbers of tokens. Shorter
    sequences are padded; padding is never attended to, averaged or sampled. Queries are computed for sampled tokens
    only.

    Args:
        pad_to_bound: pad to the upper bound instead of the longest image of the batch, for static shapes.
    """

    name = "ats"
    static_shapes = False

    def __init__(self, config: "CLCAViTConfig", stage: int, *, pad_to_bound: bool = False) -> None:
        super().__init__(config, stage)
        self.pad_to_bound = pad_to_bound
        self.make_constants()

    @classmethod
    def is_static(cls, config: "CLCAViTConfig") -> bool:
        return cls.option(config, "pad_to_bound")

    def constants(self, budget: Budget, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return `quantile_bits`: the float32 quantiles of the stage viewed as integers, so that no dtype conversion
        rounds them."""
        samples = self.samples(budget, self.stage, math.prod(grid))
        return {"quantile_bits": quantiles(samples).view(torch.int32)}

    @classmethod
    def samples(cls, budget: Budget, stage: int, num_patches: int) -> int:
        """Return K: one more than the share of patches, or the value of `keep_tokens`."""
        return budget.of_patches(stage, num_patches) + (budget.tokens(stage) is None)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        """Return an upper bound of the number of tokens that leave the stage."""
        return min(1 + num_quantiles(cls.samples(state.budget, stage, state.num_patches)), num_tokens)

    @classmethod
    def key_mask(cls, state: TokenState) -> torch.Tensor | None:
        return state.tracks.get("valid")

    def choose_tokens(self, context: AttentionContext, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        num_tokens = context.key.shape[2]
        chosen = self.sample(context, state)  # (B, n), ascending, with duplicates
        new = nn.functional.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)[:, : chosen.shape[1]]
        # Duplicates become 0, the index of CLS, and move to the end.
        ids = torch.where(new, chosen, num_tokens).sort(dim=1).values
        ids = torch.where(ids == num_tokens, 0, ids)
        width = self.count(self.config, self.stage, num_tokens, state) - 1
        if not self.pad_to_bound:
            width = int(new.sum(dim=1).max()) if chosen.numel() else 0
        indices = nn.functional.pad(ids[:, :width], (1, 0))
        valid = nn.functional.pad(ids[:, :width] > 0, (1, 0), value=True)
        state = state.select(indices).with_tracks(valid=valid)
        return indices, state.with_assignment(
            lambda: one_hot_assignment(indices.masked_fill(~valid, -1), num_tokens, context.hidden_states.dtype)
        )

    @torch.no_grad()
    def sample(self, context: AttentionContext, state: TokenState) -> torch.Tensor:
        """Return the tokens (B, n) nearest to the n quantiles of the significance of the tokens 1 .. N - 1."""
        attention = context.attention_rows(FIRST_TOKEN).squeeze(2)[..., 1:]  # (B, H, N - 1)
        norms = context.value[:, :, 1:].norm(dim=-1)
        significance = at_least_float32((attention * norms).sum(dim=1))
        significance = significance / (significance.sum(dim=1, keepdim=True) + 1e-6)
        cumulative = running_sum(significance)
        valid = self.key_mask(state)
        if valid is not None:
            cumulative = cumulative.masked_fill(~valid[:, 1:], 2.0)  # farther from any quantile than every real token
        if is_exporting():  # ONNX cannot view integers as floats
            steps = quantiles(self.samples(state.budget, self.stage, state.num_patches)).to(cumulative)
        else:
            steps = self.constant("quantile_bits", state).view(torch.float32).to(cumulative.dtype)
        if cumulative.shape[1] == 0:
            return cumulative.new_zeros((cumulative.shape[0], 0), dtype=torch.long)
        return (cumulative.unsqueeze(1) - steps[:, None]).abs().argmin(dim=2) + 1


def running_sum(shares: torch.Tensor) -> torch.Tensor:
    """Return the cumulative sum along dimension 1 of shares (B, N) in [0, 1] whose total is at most 1.

    CUDA has no deterministic kernel for floating-point numbers. With deterministic algorithms, integers are summed,
    for which the order does not matter."""
    if not torch.are_deterministic_algorithms_enabled():
        return shares.cumsum(dim=1)
    scale = 2.0**52
    return (shares * scale).long().cumsum(dim=1).to(shares.dtype) / scale


def num_quantiles(samples: int) -> int:
    """Return the length of `quantiles`: K - 1, or K if floating-point arithmetic rounds up (3, 7, 12, 14, 19, ...)."""
    first, last, step = 1 / (2 * samples), (2 * samples - 1) / (2 * samples), 1 / samples
    return math.ceil((last - first) / step)


def quantiles(samples: int) -> torch.Tensor:
    """Return the quantiles 1 / 2K, 3 / 2K, ... in float32, as in the training of published models."""
    first, last, step = 1 / (2 * samples), (2 * samples - 1) / (2 * samples), 1 / samples
    return torch.arange(first, last, step, dtype=torch.float32, device="cpu")
