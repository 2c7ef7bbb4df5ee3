"""From tokens back to patches: what the assignments of all stages, and the cache between them, add up to.

Shapes: B batch, N tokens in, M tokens out, S sources, P patches of the image.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig
from clca.cache_clca import last_rows, mean_rows, recovery_layers
from clca.reductions_clca import get_reduction, initial_state


class Trace(NamedTuple):
    """Shares of each patch, or of any other source, in each token.

    Attributes:
        stages: one (B, M, P) per reduction stage, for the rows that left it.
        final: (B, N, P) for the rows the final norm sees, recalled ones included.
        entered: one (B, N, P) per layer, for the rows that entered it.
        left: one (B, M, P) per layer, for the rows that left it, before the cache was recalled.
    """

    stages: list[torch.Tensor]
    final: torch.Tensor
    entered: list[torch.Tensor]
    left: list[torch.Tensor]


# What a layer does to shares (B, N, S), given its index and, if it holds a stage, its assignment (B, M, N): (B, M, S).
Step = Callable[[int, torch.Tensor, torch.Tensor | None], torch.Tensor]


def regroup(index: int, rows: torch.Tensor, assignment: torch.Tensor | None) -> torch.Tensor:
    """The step of a layer that only hands its tokens on, or reduces them."""
    return rows if assignment is None else assignment @ rows


def trace_patches(
    assignments: Sequence[torch.Tensor],
    config: CLCAViTConfig,
    num_patches: int | None = None,
    recall: bool = True,
) -> Trace:
    """Compose the assignments of a forward pass with `output_assignments=True`.

    Row m of a trace says how much of each patch went into token m: a kept patch has a single one, a merged token the
    weights of its patches, a recalled GAP those of the rows it averaged. CLS, registers and CLR come from no patch.

    Args:
        assignments: one (B, M, N) per stage, as the model returns them.
        config: the model's configuration.
        num_patches: patches of the images, if not those of `config.image_size`.
        recall: whether recalled rows hold what they summarise. If not, a patch is only in the tokens that took its place.

    Raises:
        ValueError: no assignments, another number of them than the model has stages, or another number of patches.
    """
    if not assignments:
        raise ValueError(
            "`assignments` must hold one matrix per stage, got none. A model without a reduction has nothing to trace, nor "
            "has a method that reports no assignments."
        )
    num_patches = config.num_patches if num_patches is None else num_patches
    patches = torch.eye(num_patches, device=assignments[0].device).expand(assignments[0].shape[0], -1, -1)
    rows = nn.functional.pad(patches, (0, 0, config.num_prefix_tokens, config.num_clr_tokens))  # (B, N, P)
    return carry(rows, assignments, config, recall=recall)


def carry(
    rows: torch.Tensor,
    assignments: Sequence[torch.Tensor],
    config: CLCAViTConfig,
    step: Step = regroup,
    recall: bool = True,
) -> Trace:
    """Send shares through the network on the way that its tokens took, through all stages and the cache.

    Args:
        rows: (B, N, S), what each embedded row (CLS, registers, patches, CLR) holds of each source.
        assignments: as of `trace_patches`; none for a model without a reduction.
        config: the model's configuration.
        step: what each layer does to the rows. Rows of zeros are padding, or not visible, and must stay so.
        recall: as of `trace_patches`.

    Raises:
        ValueError: another number of assignments than the model has stages, or assignments that do not fit the rows.
    """
    layers = get_reduction(config.reduction).layers(config) if config.reduction else []
    if len(assignments) != len(layers):
        raise ValueError(
            f"`assignments` must hold one matrix per stage, {len(layers)} for `reduction`={config.reduction!r}, got "
            f"{len(assignments)}."
        )
    dtype = reduce(torch.promote_types, (a.dtype for a in assignments), torch.promote_types(rows.dtype, torch.float32))
    rows = rows.to(dtype)
    by_layer = {layer: assignment.to(dtype) for layer, assignment in zip(layers, assignments, strict=True)}
    num_patches = rows.shape[1] - config.num_prefix_tokens - config.num_clr_tokens
    pool_len = initial_state(config, (1, num_patches)).pool_len
    recovery = recovery_layers(config)
    real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)  # not padding
    cached, entered, left = [], [], []
    for index in range(config.num_hidden_layers):
        entered.append(rows)
        assignment = by_layer.get(index)
        if assignment is not None:
            if assignment.shape[2] != rows.shape[1]:
                raise ValueError(
                    f"`assignments` of layer {index} take in {assignment.shape[2]} tokens, but {num_patches} patches make "
                    f"{rows.shape[1]}: they belong to images with another grid of patches."
                )
            real = assignment.sum(dim=-1) > 0  # a padding row is made of nothing
        rows = step(index, rows, assignment)
        left.append(rows)
        if index in recovery:
            pool_len = rows.shape[1]
            rows = torch.cat([rows, *cached], dim=1)
            real = nn.functional.pad(real, (0, rows.shape[1] - pool_len), value=True)
            cached = []
        if recovery and index < recovery[-1]:
            entry = []
            if config.cache_gap:
                entry.append(mean_rows(rows, 0 if config.cache_pool_cls else 1, pool_len, real))
            if config.num_clr_tokens:
                entry.append(last_rows(rows, config.num_clr_tokens, real))
            cached += entry if recall else [torch.zeros_like(row) for row in entry]
    return Trace([left[layer] for layer in layers], rows, entered, left)


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
