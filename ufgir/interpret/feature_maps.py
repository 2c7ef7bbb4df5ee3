"""Cosine similarity of patch features to CLS and to the mean, also for models that reduce tokens.

Shapes: B batch, N tokens, D width, P patches per image.
"""

from collections.abc import Sequence

import torch
from torch import nn

from clca import CLCAViTForImageClassification
from clca.attention_clca import at_least_float32

from .attention_maps import (
    check_class_token,
    check_traceable,
    checked_layers,
    embedded_tokens,
    evaluation_mode,
    of_patches,
)
from .tracing import propagate_shares, unmerge


def feature_similarity(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    to: str = "mean",
    layers: Sequence[int] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Compute the cosine similarity of each patch's feature to CLS, or to the mean of the patch tokens.

    A merged patch has the mean similarity of the tokens that hold a part of it, weighted by the parts. Tokens retrieved from the
    cache are ignored.

    Args:
        model: any CLCA model.
        pixel_values: normalized images (B, C, height, width).
        to: `cls` or `mean`.
        layers: 0-based indices of the layers whose outputs are compared; None for the output of the final norm.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Returns:
        (B, layers, P) in [-1, 1]; one layer if `layers` is None. NaN for patches held by no token.

    Raises:
        ValueError: if `to` has another value, if it is `cls` and the model has no CLS token, or if there is no such layer.
    """
    if to not in ("cls", "mean"):
        raise ValueError(f"`to` must be 'cls' or 'mean', got {to!r}.")
    config = model.config
    if to == "cls":
        check_class_token(config, "the similarity to CLS")
    check_traceable(config)
    chosen = None if layers is None else checked_layers(layers, config)
    with evaluation_mode(model):
        output = model.vit(
            pixel_values.to(model.device),
            interpolate_pos_encoding,
            output_assignments=True,
            output_hidden_states=chosen is not None,
        )
        trace = propagate_shares(embedded_tokens(model, pixel_values), output.assignments, config, retrieve=False)
        if chosen is None:
            pairs = [(output.last_hidden_state, trace.final)]
        else:
            pairs = [(output.hidden_states[layer + 1], trace.left[layer]) for layer in chosen]
        return torch.stack([_similarity(tokens, of_patches(shares, config), to) for tokens, shares in pairs], dim=1)


def _similarity(tokens: torch.Tensor, shares: torch.Tensor, to: str) -> torch.Tensor:
    """Return similarities (B, P) for tokens (B, N, D) with `shares` (B, N, P) of the patches."""
    tokens, shares = at_least_float32(tokens), shares.to(torch.promote_types(tokens.dtype, torch.float32))
    if to == "cls":
        reference = tokens[:, :1]
    else:
        holds = (shares.sum(dim=-1) > 0).to(tokens.dtype).unsqueeze(-1)
        reference = (tokens * holds).sum(dim=1, keepdim=True) / holds.sum(dim=1, keepdim=True).clamp(min=1)
    cosine = nn.functional.cosine_similarity(tokens, reference, dim=-1)
    spread = unmerge(cosine.unsqueeze(-1), shares).squeeze(-1)
    return spread.masked_fill(shares.sum(dim=1) == 0, torch.nan)
