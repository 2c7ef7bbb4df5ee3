"""ToMe: merge the most similar pairs of tokens (https://huggingface.co/papers/2210.09461).

Its official code is CC-BY-NC 4.0 and none of it is used here. Differs from the paper: layers and counts come from keep
rates; registers, CLR and recalled rows may be merged as well; attention is always proportional to the tokens' sizes.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .attention_clca import AttentionContext, RowMap, at_least_float32, full_precision
from .reduction_base import TokenReduction, TokenState, identity_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class MergedRows(RowMap):
    """Sums of rows, each of which goes into one of them.

    Args:
        target: row of the new sequence each row goes to, (B, N).
        share: of each row in it, (B, N); those of a new row add up to one.
        num_rows: rows M of the new sequence.
    """

    def __init__(self, target: torch.Tensor, share: torch.Tensor, num_rows: int) -> None:
        self.target, self.share, self.num_rows = target, share, num_rows

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        index = self.target.unsqueeze(-1).expand_as(values)
        weighted = values * self.share.unsqueeze(-1).to(values.dtype)
        return torch.zeros_like(values[:, : self.num_rows]).scatter_add(1, index, weighted)


class ToMeReduction(TokenReduction):
    """Between attention and MLP, merge pairs of rows with similar keys. The keep rate is a share of the patches,
    cumulative; a stage removes what lies between two targets, but at most half of its rows, and never catches up.

    Rows at even positions are matched with rows at odd ones. The new order is: unmerged even rows, all odd rows.
    """

    name = "tome"

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        return num_rows - cls.num_merged(config, stage, num_rows, state)

    @classmethod
    def num_merged(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """Rows that disappear: the step from the last target to this one, at most half of what can be matched."""
        last = state.num_patches if stage == 0 else state.budget.of_patches(stage - 1, state.num_patches)
        step = last - state.budget.of_patches(stage, state.num_patches)
        return max(min(step, (num_rows - 1) // 2), 0)

    @classmethod
    def attention_mask(cls, state: TokenState) -> torch.Tensor | None:
        """A token that stands for n patches draws n times the attention: log n on its logits."""
        size = state.tracks.get("size")
        return None if size is None else size.log()[:, None, None, :]

    def merge_rows(self, context: AttentionContext, state: TokenState) -> tuple[RowMap | None, TokenState]:
        key = context.key.mean(dim=1)  # (B, N, d)
        num_rows = key.shape[1]
        merged = self.num_merged(self.config, self.stage, num_rows, state)
        if merged == 0:
            return None, state.with_assignment(lambda: identity_assignment(key))
        target = self.match(key, merged)  # (B, N): row of the new sequence each row goes to
        size = state.tracks.get("size")
        if size is None:
            size = at_least_float32(key).new_ones(key.shape[:2])
        new_size = size.new_zeros(size.shape[0], num_rows - merged).scatter_add(1, target, size)
        share = size / new_size.gather(1, target)  # of each row in the row it goes to, (B, N)
        state = state._replace(tracks={"size": new_size}).with_assignment(
            lambda: share.new_zeros(*new_size.shape, num_rows).scatter(1, target.unsqueeze(1), share.unsqueeze(1))
        )
        return MergedRows(target, share, num_rows - merged), state

    @staticmethod
    @torch.no_grad()
    def match(metric: torch.Tensor, merged: int) -> torch.Tensor:
        """New row (B, N) of each row with the features `metric` (B, N, d), when the `merged` most similar pairs merge."""
        metric = nn.functional.normalize(at_least_float32(metric), dim=-1)
        even, odd = metric[:, ::2], metric[:, 1::2]
        with full_precision(metric):
            similarity = even @ odd.transpose(1, 2)
        similarity[:, 0] = -torch.inf  # CLS stays
        best, partner = similarity.max(dim=2)  # (B, rows at even positions)
        order = best.argsort(dim=1, descending=True)
        gone, stay = order[:, :merged], order[:, merged:].sort(dim=1).values
        first_odd = stay.shape[1]
        positions = torch.arange(first_odd, device=metric.device).expand_as(stay)
        new_even = torch.zeros_like(partner).scatter(1, stay, positions)
        new_even = new_even.scatter(1, gone, partner.gather(1, gone) + first_odd)
        new_odd = torch.arange(odd.shape[1], device=metric.device).expand(metric.shape[0], -1) + first_odd
        target = torch.empty(metric.shape[:2], dtype=torch.long, device=metric.device)
        target[:, ::2], target[:, 1::2] = new_even, new_odd
        return target
