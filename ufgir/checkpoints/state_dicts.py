"""Strict state-dict loading: missing, unexpected or mismatched keys raise."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.heads_clca import HEADS
from clca.modeling_clca import check_finite
from clca.resample_clca import resample_weights

from ..utils.text import listed


logger = logging.getLogger(__name__)

# Weights that a backbone may lack: regular expressions of complete names.
NEW_PARTS = (
    r"vit\.embeddings\.clr_(?:tokens|position_embeddings)",
    r"vit\.layers\.\d+\.(?:reduction|probe)\..*",
    r"vit\.attention_pooling\..*",
    r"classifier\..*",
)


class Weights(NamedTuple):
    """Weights of a source under our names, with the configuration that they match."""

    state: Mapping[str, torch.Tensor]
    config: CLCAViTConfig


class Found(NamedTuple):
    """Model, and the differences between its weights and the source.

    Attributes:
        model: in evaluation mode.
        missing: names of weights that are not in the source and were initialized.
        mismatched: (name, shape in the source, shape in the model) of weights that were re-initialized because the shapes differ.
    """

    model: CLCAViTForImageClassification
    missing: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


def fit_model(
    weights: Weights,
    config: CLCAViTConfig,
    source: str = "weights of the `source`",
    dtype: torch.dtype | None = torch.float32,
    attn_implementation: str | None = None,
) -> Found:
    """Build a model of another configuration from weights. Position embeddings and patch projection are resampled. Weights in
    `NEW_PARTS` are initialized if they are missing, belong to another head or pooling, or have another shape.

    Args:
        weights: weights of the source.
        config: configuration of the model.
        source: description of the weights, for errors.
        dtype: dtype of the model.
        attn_implementation: as in `from_pretrained`.

    Raises:
        ValueError: if other weights are missing, unexpected, or of another shape; the message lists them.
    """
    saved, state = weights.config, resample_weights(weights.state, weights.config, config)
    if (saved.head, saved.pooling) != (config.head, config.pooling):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = CLCAViTForImageClassification._from_config(config, **attention).eval().to(dtype)
    new_parts = list(NEW_PARTS)
    if HEADS[saved.head].before_norm:  # the original code drops the final norm if the head uses CLS before it
        new_parts.append(r"vit\.layernorm\..*")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mismatched = []
    for name in [name for name in state if _matches(name, new_parts)]:
        shape = tuple(state[name].shape)
        if shape != shapes.get(name):
            del state[name]
            if name in shapes:
                mismatched.append((name, shape, shapes[name]))
    missing = fill_model(model, state, new_parts, source)
    unread = r"vit\.layernorm\..*" if HEADS[config.head].before_norm else ""
    differing = {name for name, *_ in mismatched}
    missing = [name for name in missing if name not in differing and not re.fullmatch(unread, name)]
    return Found(model, missing, mismatched)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def fill_model(
    model: CLCAViTForImageClassification,
    weights: Mapping[str, torch.Tensor],
    new_parts: Iterable[str] = (),
    source: str = "weights of the `source`",
) -> list[str]:
    """Load weights into a model. Weights that may be missing keep their initial values, except CLR tokens, which are copies of CLS.

    Args:
        model: the model; its dtype is kept.
        weights: tensors under the model's names.
        new_parts: regular expressions of complete names that may be missing.
        source: description of the weights, for errors.

    Returns:
        The names of the weights that were missing.

    Raises:
        ValueError: if weights are missing, unexpected, or of another shape; the message lists them.
    """
    own, new_parts = model.state_dict(), tuple(new_parts)
    new = [key for key in own if key not in weights and _matches(key, new_parts)]
    problems = [f"{key} is missing" for key in own if key not in weights and key not in new]
    for key, tensor in weights.items():
        if key not in own:
            problems.append(f"{key} is unexpected")
        elif tensor.shape != own[key].shape:
            problems.append(f"{key} has the shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
        elif own[key].is_floating_point() and not tensor.is_floating_point():
            problems.append(f"{key} holds {tensor.dtype}, not floating-point numbers")
    if problems:
        raise ValueError(f"{source} do not fit the model: {listed(problems)}.")
    check_finite(weights, source)
    if new:
        logger.info("Initialized weights that are not in the source: %s.", ", ".join(new))
    model.load_state_dict(weights, strict=False)
    embeddings = model.vit.embeddings
    if "vit.embeddings.clr_tokens" in new:
        with torch.no_grad():
            embeddings.clr_tokens.copy_(embeddings.cls_token.expand_as(embeddings.clr_tokens))
    return new


def common_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """Return the common dtype of all floating-point weights; None if they differ."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def tensor_shapes(file: str | Path) -> dict[str, torch.Tensor]:
    """Read names and shapes of a safetensors file from its header, as tensors on the meta device.

    Raises:
        SafetensorError: if the file is not a complete safetensors file.
    """
    with safe_open(file, framework="pt") as tensors:
        return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}  # noqa: SIM118
