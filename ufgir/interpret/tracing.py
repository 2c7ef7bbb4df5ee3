"""Traces of tokens to patches: compose the assignments of all stages and the cache between them.

Shapes: B batch, N tokens in, M tokens out, S sources, P patches per image.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from clca import CLCAViTConfig
from clca.dense_clca import Step, TokenTracker, by_layer, patch_shares, regroup, unmerge


class Trace(NamedTuple):
    """Share of each patch, or of any other source, in each token.

    Attributes:
        stages: one (B, M, P) per reduction stage, for its output tokens.
        final: (B, N, P) for the tokens at the final norm, including those retrieved from the cache.
        entered: one (B, N, P) per layer, for its input tokens.
        left: one (B, M, P) per layer, for its output tokens, before tokens are retrieved from the cache.
    """

    stages: list[torch.Tensor]
    final: torch.Tensor
    entered: list[torch.Tensor]
    left: list[torch.Tensor]


def trace_patches(
    assignments: Sequence[torch.Tensor],
    config: CLCAViTConfig,
    num_patches: int | None = None,
    retrieve: bool = True,
) -> Trace:
    """Compose the assignments of a forward pass with `output_assignments=True`.

    Row m of a trace holds the share of each patch in token m. A kept patch has a share of one in its token, a merged token holds the
    weights of its patches, and a GAP token retrieved from the cache holds the mean of the tokens it averaged. CLS, registers and CLR
    hold no patch.

    Args:
        assignments: one (B, M, N) per stage, as returned by the model.
        config: the model's configuration.
        num_patches: patches per image; None for those of `config.image_size`.
        retrieve: whether tokens retrieved from the cache hold the patches they summarize. If False, they hold none.

    Raises:
        ValueError: if there are no assignments, or the number of assignments or patches does not match.
    """
    if not assignments:
        raise ValueError(
            "`assignments` must hold one matrix per stage, got none. Use a model with a reduction whose method reports "
            "assignments."
        )
    num_patches = config.num_patches if num_patches is None else num_patches
    shares = patch_shares(config, num_patches, assignments[0].shape[0], assignments[0].device)
    return propagate_shares(shares, assignments, config, retrieve=retrieve)


def propagate_shares(
    shares: torch.Tensor,
    assignments: Sequence[torch.Tensor],
    config: CLCAViTConfig,
    step: Step = regroup,
    retrieve: bool = True,
) -> Trace:
    """Propagate shares through all stages and the cache, as the forward pass propagates tokens.

    Args:
        shares: (B, N, S), share of each source in each embedded token (CLS, registers, patches, CLR).
        assignments: see `trace_patches`; empty for a model without a reduction.
        config: the model's configuration.
        step: function that each layer applies to the shares. Shares of padding and masked tokens are zero and must remain zero.
        retrieve: see `trace_patches`.

    Raises:
        ValueError: if the number of assignments differs from that of stages, or an assignment does not fit the tokens.
    """
    stages = by_layer(assignments, config)
    dtype = reduce(
        torch.promote_types, (a.dtype for a in assignments), torch.promote_types(shares.dtype, torch.float32)
    )
    tracker = TokenTracker(shares.to(dtype), config, retrieve)
    entered, left = [], []
    for index in range(config.num_hidden_layers):
        entered.append(tracker.shares)
        left.append(tracker.pass_layer(index, stages.get(index), step))
    return Trace([left[layer] for layer in stages], tracker.shares, entered, left)


__all__ = ["Step", "Trace", "propagate_shares", "regroup", "trace_patches", "unmerge"]
