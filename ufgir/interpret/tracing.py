"""From tokens back to patches: what the assignments of all stages, and the cache between them, add up to.

Shapes: B batch, N tokens in, M tokens out, S sources, P patches of the image.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch

from clca import CLCAViTConfig
from clca.dense_clca import Step, TokenTracker, by_layer, patch_shares, regroup, unmerge


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
    rows = patch_shares(config, num_patches, assignments[0].shape[0], assignments[0].device)
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
    stages = by_layer(assignments, config)
    dtype = reduce(torch.promote_types, (a.dtype for a in assignments), torch.promote_types(rows.dtype, torch.float32))
    tracker = TokenTracker(rows.to(dtype), config, recall)
    entered, left = [], []
    for index in range(config.num_hidden_layers):
        entered.append(tracker.rows)
        left.append(tracker.pass_layer(index, stages.get(index), step))
    return Trace([left[layer] for layer in stages], tracker.rows, entered, left)


__all__ = ["Step", "Trace", "carry", "regroup", "trace_patches", "unmerge"]
