"""From tokens back to patches: what the assignments of all stages, and the cache between them, add up to.

Shapes: B batch, N tokens in, M tokens out, P patches of the image.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig
from clca.cache_clca import mean_rows, recovery_layers
from clca.reductions_clca import get_reduction, initial_state


class Trace(NamedTuple):
    """Shares of each patch in each token.

    Attributes:
        stages: one (B, M, P) per reduction stage, for the rows that left it.
        final: (B, N, P) for the rows the final norm sees, recalled ones included.
    """

    stages: list[torch.Tensor]
    final: torch.Tensor


def trace_patches(assignments: Sequence[torch.Tensor], config: CLCAViTConfig, num_patches: int | None = None) -> Trace:
    """Compose the assignments of a forward pass with `output_assignments=True`.

    Row m of a trace says how much of each patch went into token m: a kept patch has a single one, a merged token the
    weights of its patches, a recalled GAP those of the rows it averaged. CLS, registers and CLR come from no patch.

    Args:
        assignments: one (B, M, N) per stage, as the model returns them.
        config: the model's configuration.
        num_patches: patches of the images, if not those of `config.image_size`.

    Raises:
        ValueError: no assignments, or another number of them than the model has stages.
    """
    method = get_reduction(config.reduction)
    layers = method.layers(config) if config.reduction else []
    if not assignments or len(assignments) != len(layers):
        raise ValueError(
            f"`assignments` must hold one matrix per stage, {len(layers)} for `reduction`={config.reduction!r}, got "
            f"{len(assignments)}. A model without a reduction has nothing to trace."
        )
    dtype = reduce(torch.promote_types, (assignment.dtype for assignment in assignments), torch.float32)
    by_layer = {layer: assignment.to(dtype) for layer, assignment in zip(layers, assignments, strict=True)}
    state = initial_state(config, config.image_grid if num_patches is None else (1, num_patches))
    recovery = recovery_layers(config)
    first = by_layer[layers[0]]
    patches = torch.eye(state.num_patches, dtype=first.dtype, device=first.device).expand(first.shape[0], -1, -1)
    rows = nn.functional.pad(patches, (0, 0, config.num_prefix_tokens, config.num_clr_tokens))  # (B, N, P)
    real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)  # not padding
    pool_len, cached, stages = state.pool_len, [], []
    for index in range(config.num_hidden_layers):
        if index in by_layer:
            rows = by_layer[index] @ rows
            real = by_layer[index].sum(dim=-1) > 0  # a padding row is made of nothing
            stages.append(rows)
        if index in recovery:
            pool_len = rows.shape[1]
            rows = torch.cat([rows, *cached], dim=1)
            real = nn.functional.pad(real, (0, rows.shape[1] - pool_len), value=True)
            cached = []
        if recovery and index < recovery[-1]:
            if config.cache_gap:
                cached.append(mean_rows(rows, 0 if config.cache_pool_cls else 1, pool_len, real))
            cached.append(rows.new_zeros(rows.shape[0], config.num_clr_tokens, rows.shape[2]))
    return Trace(stages, rows)


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
