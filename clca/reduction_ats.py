"""ATS: sample tokens from the distribution of the CLS token's attention (https://huggingface.co/papers/2111.15667).

Its official code has no licence file. Differs from the paper: registers, CLR and recalled rows may be sampled as well. As in
the original CLCA code a stage of K tokens takes K - 1 (rounding makes it K for some K) fixed quantiles, so the number of
different tokens depends on the image and is at most that.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention_clca import FIRST_ROW, AttentionContext, at_least_float32
from .budget_clca import Budget
from .reduction_base import TokenReduction, TokenState, one_hot_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class ATSReduction(TokenReduction):
    """Inside attention, keep CLS and the rows at fixed quantiles of its attention, weighed by the size of their values, in
    the order of the sequence. The keep rate is an upper bound as a share of the patches, cumulative; `keep_tokens` is K,
    the number of samples with CLS among them, so up to one less than K others stay.

    Images of a batch keep different numbers of rows; shorter ones are padded, and pads are never attended to, averaged or
    sampled. Queries are computed for sampled rows only.

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
        """`quantile_bits`: the stage's quantiles, their float32 taken for integers, which no change of dtype rounds."""
        samples = self.samples(budget, self.stage, math.prod(grid))
        return {"quantile_bits": quantiles(samples).view(torch.int32)}

    @classmethod
    def samples(cls, budget: Budget, stage: int, num_patches: int) -> int:
        """K: one more than the share of patches, or what `keep_tokens` says."""
        return budget.of_patches(stage, num_patches) + (budget.tokens(stage) is None)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """An upper bound."""
        return min(1 + num_quantiles(cls.samples(state.budget, stage, state.num_patches)), num_rows)

    @classmethod
    def visible(cls, state: TokenState) -> torch.Tensor | None:
        return state.tracks.get("valid")

    def choose_rows(self, context: AttentionContext, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        num_rows = context.key.shape[2]
        chosen = self.sample(context, state)  # (B, n), ascending, with repetitions
        new = nn.functional.pad(chosen[:, 1:] != chosen[:, :-1], (1, 0), value=True)[:, : chosen.shape[1]]
        # Repetitions become 0, the row of CLS, and go to the end.
        ids = torch.where(new, chosen, num_rows).sort(dim=1).values
        ids = torch.where(ids == num_rows, 0, ids)
        width = self.count(self.config, self.stage, num_rows, state) - 1
        if not self.pad_to_bound:
            width = int(new.sum(dim=1).max()) if chosen.numel() else 0
        rows = nn.functional.pad(ids[:, :width], (1, 0))
        valid = nn.functional.pad(ids[:, :width] > 0, (1, 0), value=True)
        state = state.select(rows).with_tracks(valid=valid)
        return rows, state.with_assignment(
            lambda: one_hot_assignment(rows.masked_fill(~valid, -1), num_rows, context.hidden_states.dtype)
        )

    @torch.no_grad()
    def sample(self, context: AttentionContext, state: TokenState) -> torch.Tensor:
        """Rows (B, n) nearest to the n quantiles of the significance of rows 1 .. N - 1."""
        attention = context.attention_rows(FIRST_ROW).squeeze(2)[..., 1:]  # (B, H, N - 1)
        norms = context.value[:, :, 1:].norm(dim=-1)
        significance = at_least_float32((attention * norms).sum(dim=1))
        significance = significance / (significance.sum(dim=1, keepdim=True) + 1e-6)
        cumulative = running_sum(significance)
        valid = self.visible(state)
        if valid is not None:
            cumulative = cumulative.masked_fill(~valid[:, 1:], 2.0)  # further from any quantile than a real row
        if torch.compiler.is_exporting():  # ONNX cannot take integers for floats
            steps = quantiles(self.samples(state.budget, self.stage, state.num_patches)).to(cumulative)
        else:
            steps = self.constant("quantile_bits", state).view(torch.float32).to(cumulative.dtype)
        if cumulative.shape[1] == 0:
            return cumulative.new_zeros((cumulative.shape[0], 0), dtype=torch.long)
        return (cumulative.unsqueeze(1) - steps[:, None]).abs().argmin(dim=2) + 1


def running_sum(shares: torch.Tensor) -> torch.Tensor:
    """Of shares in 0 .. 1 that sum to at most 1, along the rows of (B, N).

    CUDA has no deterministic kernel for floating-point numbers; of integers the order of the additions does not matter.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return shares.cumsum(dim=1)
    scale = 2.0**52
    return (shares * scale).long().cumsum(dim=1).to(shares.dtype) / scale


def num_quantiles(samples: int) -> int:
    """Length of `quantiles`: K - 1, or K where double arithmetic rounds up (3, 7, 12, 14, 19, ...)."""
    first, last, step = 1 / (2 * samples), (2 * samples - 1) / (2 * samples), 1 / samples
    return math.ceil((last - first) / step)


def quantiles(samples: int) -> torch.Tensor:
    """1 / 2K, 3 / 2K, ... in float32, as published models were trained with."""
    first, last, step = 1 / (2 * samples), (2 * samples - 1) / (2 * samples), 1 / samples
    return torch.arange(first, last, step, dtype=torch.float32, device="cpu")
