"""Trace tokens back to patches layer by layer, and build feature maps over the patches of an image.

Shapes: B batch, N tokens in, M tokens out, D width, S sources, P patches of the image.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .cache_clca import last_tokens, masked_mean, recovery_layers
from .reductions_clca import get_reduction, initial_state


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


# Maps the layer index, shares (B, N, S) and, if the layer holds a stage, its assignment (B, M, N) to new shares (B, M, S).
Step = Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor]


def regroup(index: int, shares: torch.Tensor, assignment: torch.Tensor | None) -> torch.Tensor:
    """Apply the assignment of a layer to shares (B, N, S), or return them unchanged if there is none."""
    return shares if assignment is None else assignment @ shares


def by_layer(assignments: Sequence[torch.Tensor], config: "CLCAViTConfig") -> dict[int, torch.Tensor]:
    """Return the assignment of each layer that holds a stage, by layer index.

    Raises:
        ValueError: if the number of assignments is not the number of stages of the model.
    """
    layers = get_reduction(config.reduction).layers(config) if config.reduction else []
    if len(assignments) != len(layers):
        raise ValueError(
            f"`assignments` must hold one matrix per stage, {len(layers)} for `reduction`={config.reduction!r}, got "
            f"{len(assignments)}."
        )
    return dict(zip(layers, assignments, strict=True))


def patch_shares(
    config: "CLCAViTConfig", num_patches: int, batch: int, device: torch.device | None = None
) -> torch.Tensor:
    """Return the shares (B, N, P) of the embedded tokens: each patch token holds its own patch; CLS, registers and CLR
    hold none."""
    patches = torch.eye(num_patches, device=device).expand(batch, -1, -1)
    return nn.functional.pad(patches, (0, 0, config.num_prefix_tokens, config.num_clr_tokens))


class TokenTracker:
    """Track which share of each source every token holds, layer by layer, through all stages and the cache.

    Args:
        shares: (B, N, S), the share of each source in each embedded token (CLS, registers, patches, CLR).
        config: the model's configuration.
        retrieve: whether tokens retrieved from the cache hold what they summarize. If not, they hold nothing.

    Attributes:
        shares: (B, N, S) of the tokens that enter the next layer.
    """

    def __init__(self, shares: torch.Tensor, config: "CLCAViTConfig", retrieve: bool = True) -> None:
        self.shares, self.config, self.retrieve = shares, config, retrieve
        self.num_patches = shares.shape[1] - config.num_prefix_tokens - config.num_clr_tokens
        self._pool_len = initial_state(config, (1, self.num_patches)).pool_len
        self._recovery = recovery_layers(config)
        self._real = torch.ones(shares.shape[:2], dtype=torch.bool, device=shares.device)  # not padding
        self._cached: list[torch.Tensor] = []

    def pass_layer(self, index: int, assignment: torch.Tensor | None, step: Step = regroup) -> torch.Tensor:
        """Advance through layer `index`, which must be the next one.

        Args:
            index: the layer, from 0.
            assignment: (B, M, N) of the stage of this layer, or None if it has no stage.
            step: maps the shares before the layer to those after it. Shares of padding and masked tokens are zero and
                must stay zero.

        Returns:
            Shares (B, M, S) of the tokens that leave the layer, before cached tokens are appended.

        Raises:
            ValueError: if the assignment does not fit the number of tokens.
        """
        shares, real = self.shares, self._real
        if assignment is not None:
            shares, real = (
                shares.to(assignment.device),
                real.to(assignment.device),
            )  # layers may be on different devices
            assignment = assignment.to(torch.promote_types(assignment.dtype, shares.dtype))
            shares = shares.to(assignment.dtype)
            if assignment.shape[2] != shares.shape[1]:
                raise ValueError(
                    f"`assignments` of layer {index} must map {shares.shape[1]} tokens for images of {self.num_patches} "
                    f"patches, got {assignment.shape[2]}. They belong to images with another grid of patches."
                )
            real = assignment.sum(dim=-1) > 0  # padding has no shares
        left = shares = step(index, shares, assignment)
        if index in self._recovery:
            self._pool_len = shares.shape[1]
            shares = torch.cat([shares, *(entry.to(shares) for entry in self._cached)], dim=1)
            real = nn.functional.pad(real, (0, shares.shape[1] - self._pool_len), value=True)
            self._cached = []
        if self._recovery and index < self._recovery[-1]:
            self._cached += self._entry(shares, real)
        self.shares, self._real = shares, real
        return left

    def _entry(self, shares: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
        """Return the shares that a layer writes to the cache."""
        config, entry = self.config, []
        if config.cache_gap:
            entry.append(masked_mean(shares, 0 if config.cache_pool_cls else 1, self._pool_len, real))
        if config.num_clr_tokens:
            entry.append(last_tokens(shares, config.num_clr_tokens, real))
        return entry if self.retrieve else [torch.zeros_like(part) for part in entry]


def unmerge(tokens: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Spread tokens back over the patches they came from, for dense predictions and figures.

    Each patch gets the mean of the tokens that hold a share of it, weighted by these shares. A patch that no token
    holds, because it was pruned, gets zeros.

    Args:
        tokens: (B, N, D), for example `last_hidden_state`.
        shares: (B, N, P), for example `Trace.final`.

    Returns:
        (B, P, D), in the order of the patches.

    Raises:
        ValueError: if the shares do not fit the tokens.
    """
    if shares.shape[:2] != tokens.shape[:2]:
        raise ValueError(
            f"`shares` must hold one row per token, {tuple(tokens.shape[:2])}, got {tuple(shares.shape[:2])}."
        )
    total = shares.sum(dim=1, keepdim=True)
    weights = (shares / total.clamp(min=torch.finfo(shares.dtype).tiny)).transpose(1, 2)  # (B, P, N)
    return weights.to(tokens.dtype) @ tokens


def nearest_held(held: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Return, for each patch of a grid, the nearest patch that is held, by Euclidean distance; of equally near ones
    the lowest index.

    Args:
        held: (B, P), True for held patches.
        grid: (rows, columns) of patches.

    Returns:
        Indices (B, P). They are arbitrary for an image without held patches.
    """
    axes = [torch.arange(side, device=held.device, dtype=torch.float32) for side in grid]
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    squares = (rows - rows[:, None]).square() + (columns - columns[:, None]).square()  # (P, P), exact
    return squares.masked_fill(~held.unsqueeze(1), torch.inf).argmin(dim=2)


def feature_maps(
    hidden_states: Sequence[torch.Tensor],
    assignments: Sequence[torch.Tensor],
    config: "CLCAViTConfig",
    grid: tuple[int, int],
    indices: Sequence[int],
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Build feature maps over the grid of patches from the tokens of some layers.

    Each patch gets the mean of the tokens that hold a share of it (see `unmerge`; tokens from the cache hold none). If
    no token holds it, `config.feature_fill` decides: `last`, its value in the last layer in which a token held it;
    `nearest`, the value of the nearest held patch; `zero`, zeros.

    Args:
        hidden_states: the embeddings (B, N, D) and the output of each layer, before cached tokens are appended.
        assignments: (B, M, N) of each stage; empty for a model without a reduction.
        config: the model's configuration.
        grid: (rows, columns) of patches of the images.
        indices: indices of the hidden states to return, ascending; 0 for the embeddings.
        norm: function to apply to the tokens first.

    Returns:
        One map (B, D, rows, columns) per index.

    Raises:
        ValueError: if the assignments do not fit the configuration or the grid.
    """
    stages = by_layer(assignments, config)
    first_stage = min(stages, default=len(hidden_states))
    prefix, num_patches = config.num_prefix_tokens, grid[0] * grid[1]
    embedded = hidden_states[0]
    shares = patch_shares(config, num_patches, embedded.shape[0], embedded.device)
    tracker = TokenTracker(shares, config, retrieve=False)
    last: torch.Tensor | None = None  # (B, P, D), what each patch had before the latest stage
    maps = []
    for index, tokens in enumerate(hidden_states[: max(indices) + 1]):
        if index > 0:
            shares = tracker.pass_layer(index - 1, stages.get(index - 1))
        before_stage = index in stages and config.feature_fill == "last"
        if index not in indices and not before_stage:
            continue
        tokens = tokens if norm is None else norm(tokens)
        if index <= first_stage:  # tokens are still in the order of the patches
            patches = tokens[:, prefix : prefix + num_patches]
        else:
            patches = _filled(unmerge(tokens, shares.to(tokens.device)), shares, last, config.feature_fill, grid)
        if before_stage:
            last = patches
        if index in indices:
            maps.append(patches.transpose(1, 2).unflatten(2, grid).contiguous())
    return tuple(maps)


def _filled(
    patches: torch.Tensor, shares: torch.Tensor, last: torch.Tensor | None, fill: str, grid: tuple[int, int]
) -> torch.Tensor:
    """Fill the patches (B, P, D) that no token holds, which are zero, as `fill` says."""
    if fill == "zero":
        return patches
    held = (shares.sum(dim=1) > 0).to(patches.device)  # (B, P)
    if fill == "nearest":
        return patches.gather(1, nearest_held(held, grid).unsqueeze(-1).expand_as(patches))
    assert last is not None  # patches without a token were dropped by an earlier stage
    return torch.where(held.unsqueeze(-1), patches, last.to(patches))
