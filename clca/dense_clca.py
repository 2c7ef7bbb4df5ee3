"""From tokens back to patches: which patches each token holds, layer by layer, and feature maps over the patches of an image.

Shapes: B batch, N tokens in, M tokens out, D width, S sources, P patches of the image.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .cache_clca import last_rows, mean_rows, recovery_layers
from .reductions_clca import get_reduction, initial_state


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


# What a layer does to shares (B, N, S), given its index and, if it holds a stage, its assignment (B, M, N): (B, M, S).
Step = Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor]


def regroup(index: int, rows: torch.Tensor, assignment: torch.Tensor | None) -> torch.Tensor:
    """The step of a layer that only hands its tokens on, or reduces them."""
    return rows if assignment is None else assignment @ rows


def by_layer(assignments: Sequence[torch.Tensor], config: "CLCAViTConfig") -> dict[int, torch.Tensor]:
    """The assignment of each layer that holds a stage.

    Raises:
        ValueError: another number of assignments than the model has stages.
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
    """Shares (B, N, P) of the embedded tokens: each patch holds itself. CLS, registers and CLR come from no patch."""
    patches = torch.eye(num_patches, device=device).expand(batch, -1, -1)
    return nn.functional.pad(patches, (0, 0, config.num_prefix_tokens, config.num_clr_tokens))


class TokenTracker:
    """Follow what each token holds of each source, from layer to layer, through all stages and the cache.

    Args:
        rows: (B, N, S), what each embedded token (CLS, registers, patches, CLR) holds of each source.
        config: the model's configuration.
        retrieve: whether retrieved tokens hold what they summarise. If not, a patch is only in the tokens that took its place.

    Attributes:
        rows: (B, N, S) for the tokens that enter the next layer.
    """

    def __init__(self, rows: torch.Tensor, config: "CLCAViTConfig", retrieve: bool = True) -> None:
        self.rows, self.config, self.retrieve = rows, config, retrieve
        self.num_patches = rows.shape[1] - config.num_prefix_tokens - config.num_clr_tokens
        self._pool_len = initial_state(config, (1, self.num_patches)).pool_len
        self._recovery = recovery_layers(config)
        self._real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)  # not padding
        self._cached: list[torch.Tensor] = []

    def pass_layer(self, index: int, assignment: torch.Tensor | None, step: Step = regroup) -> torch.Tensor:
        """Go through layer `index`, the next one.

        Args:
            index: of the layer, from 0.
            assignment: (B, M, N) of the layer's stage. None for a layer without a stage.
            step: what the layer does to the shares. Rows of zeros are padding, or not attended to, and must stay so.

        Returns:
            (B, M, S) for the tokens that leave the layer, before the cache is retrieved.

        Raises:
            ValueError: an assignment that does not fit the tokens.
        """
        rows, real = self.rows, self._real
        if assignment is not None:
            rows, real = rows.to(assignment.device), real.to(assignment.device)  # layers may lie on different devices
            assignment = assignment.to(torch.promote_types(assignment.dtype, rows.dtype))
            rows = rows.to(assignment.dtype)
            if assignment.shape[2] != rows.shape[1]:
                raise ValueError(
                    f"`assignments` of layer {index} take in {assignment.shape[2]} tokens, but {self.num_patches} patches "
                    f"make {rows.shape[1]}: they belong to images with another grid of patches."
                )
            real = assignment.sum(dim=-1) > 0  # a padding row is made of nothing
        left = rows = step(index, rows, assignment)
        if index in self._recovery:
            self._pool_len = rows.shape[1]
            rows = torch.cat([rows, *(entry.to(rows) for entry in self._cached)], dim=1)
            real = nn.functional.pad(real, (0, rows.shape[1] - self._pool_len), value=True)
            self._cached = []
        if self._recovery and index < self._recovery[-1]:
            self._cached += self._entry(rows, real)
        self.rows, self._real = rows, real
        return left

    def _entry(self, rows: torch.Tensor, real: torch.Tensor) -> list[torch.Tensor]:
        """What a layer writes to the cache."""
        config, entry = self.config, []
        if config.cache_gap:
            entry.append(mean_rows(rows, 0 if config.cache_pool_cls else 1, self._pool_len, real))
        if config.num_clr_tokens:
            entry.append(last_rows(rows, config.num_clr_tokens, real))
        return entry if self.retrieve else [torch.zeros_like(row) for row in entry]


def unmerge(tokens: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Spread tokens back over the patches they came from: for dense predictions, and for pictures.

    A patch gets the mean of the tokens that hold a part of it, weighted by the parts; a patch that no token holds, which
    pruning leaves behind, gets zeros.

    Args:
        tokens: (B, N, D), for example `last_hidden_state`.
        shares: (B, N, P), for example `Trace.final`.

    Returns:
        (B, P, D), in the order of the patches.

    Raises:
        ValueError: shares that do not belong to the tokens.
    """
    if shares.shape[:2] != tokens.shape[:2]:
        raise ValueError(
            f"`shares` must hold one row per token, {tuple(tokens.shape[:2])}, got {tuple(shares.shape[:2])}."
        )
    total = shares.sum(dim=1, keepdim=True)
    weights = (shares / total.clamp(min=torch.finfo(shares.dtype).tiny)).transpose(1, 2)  # (B, P, N)
    return weights.to(tokens.dtype) @ tokens


def nearest_held(held: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """For each patch of a grid (rows, columns) the nearest one that is `held` (B, P), by Euclidean distance, of several the one
    with the lowest index: (B, P). Any patch where an image has none."""
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
    """Put the tokens of some layers back on the grid of patches.

    A patch gets the mean of the tokens that hold a part of it (`unmerge`; tokens from the cache hold none). Where no token holds
    it, `config.feature_fill` says what it gets: what it had in the last layer in which a token held it (`last`), what the
    nearest patch has that is held (`nearest`), or zeros (`zero`).

    Args:
        hidden_states: the embeddings (B, N, D) and the output of each layer, before the cache is retrieved.
        assignments: one (B, M, N) per stage; none for a model without a reduction.
        config: the model's configuration.
        grid: patches of the images: rows, columns.
        indices: of the hidden states that are wanted, ascending, from 0 for the embeddings.
        norm: what to apply to the tokens first.

    Returns:
        One map (B, D, rows, columns) per index.

    Raises:
        ValueError: assignments that do not belong to the configuration or to the grid.
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
        if index <= first_stage:  # nothing has moved yet
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
    """Patches (B, P, D), which are zero where no token holds them, after filling those."""
    if fill == "zero":
        return patches
    held = (shares.sum(dim=1) > 0).to(patches.device)  # (B, P)
    if fill == "nearest":
        return patches.gather(1, nearest_held(held, grid).unsqueeze(-1).expand_as(patches))
    assert last is not None  # what no token holds was dropped by a stage
    return torch.where(held.unsqueeze(-1), patches, last.to(patches))
