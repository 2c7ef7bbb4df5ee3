"""How similar each patch's feature is to CLS and to the mean, also where tokens were reduced.

Shapes: B batch, N tokens, D width, P patches of the image.
"""

from collections.abc import Sequence

import torch
from torch import nn

from clca import CLCAViTForImageClassification
from clca.attention_clca import at_least_float32

from .attention_maps import (
    check_class_token,
    check_rows_stay,
    checked_layers,
    embedded_rows,
    evaluation_mode,
    of_patches,
)
from .tracing import carry, unmerge


def feature_similarity(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    to: str = "mean",
    layers: Sequence[int] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Cosine between the feature of each patch and CLS, or the mean of the tokens that hold patches.

    A patch that was merged has the mean cosine of the tokens that hold a part of it, weighted by the parts. Recalled rows
    stand for no patch here.

    Args:
        model: any CLCA model.
        pixel_values: normalised images (B, C, height, width).
        to: `cls` or `mean`.
        layers: 0-based, their outputs are compared; None for the tokens after the final norm.
        interpolate_pos_encoding: accept images of another size than the model's.

    Returns:
        (B, layers, P) in [-1, 1], one layer for None; NaN for patches that no token holds any more.

    Raises:
        ValueError: another `to`, `cls` of a model without CLS, or a layer that does not exist.
    """
    if to not in ("cls", "mean"):
        raise ValueError(f"`to` must be 'cls' or 'mean', got {to!r}.")
    config = model.config
    if to == "cls":
        check_class_token(config, "the similarity to CLS")
    check_rows_stay(config)
    chosen = None if layers is None else checked_layers(layers, config)
    with evaluation_mode(model):
        output = model.vit(
            pixel_values.to(model.device),
            interpolate_pos_encoding,
            output_assignments=True,
            output_hidden_states=chosen is not None,
        )
        trace = carry(embedded_rows(model, pixel_values), output.assignments, config, recall=False)
        if chosen is None:
            pairs = [(output.last_hidden_state, trace.final)]
        else:
            pairs = [(output.hidden_states[layer + 1], trace.left[layer]) for layer in chosen]
        return torch.stack([_similarity(rows, of_patches(shares, config), to) for rows, shares in pairs], dim=1)


def _similarity(rows: torch.Tensor, shares: torch.Tensor, to: str) -> torch.Tensor:
    """Cosines (B, P) of tokens (B, N, D) that hold `shares` (B, N, P) of the patches."""
    rows, shares = at_least_float32(rows), shares.to(torch.promote_types(rows.dtype, torch.float32))
    if to == "cls":
        reference = rows[:, :1]
    else:
        holds = (shares.sum(dim=-1) > 0).to(rows.dtype).unsqueeze(-1)
        reference = (rows * holds).sum(dim=1, keepdim=True) / holds.sum(dim=1, keepdim=True).clamp(min=1)
    cosine = nn.functional.cosine_similarity(rows, reference, dim=-1)
    spread = unmerge(cosine.unsqueeze(-1), shares).squeeze(-1)
    return spread.masked_fill(shares.sum(dim=1) == 0, torch.nan)
