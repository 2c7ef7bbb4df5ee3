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

# Parts of our models that a backbone need not have: regular expressions of whole names.
NEW_PARTS = (
    r"vit\.embeddings\.clr_(?:tokens|position_embeddings)",
    r"vit\.layers\.\d+\.(?:reduction|probe)\..*",
    r"vit\.attention_pooling\..*",
    r"classifier\..*",
)


class Weights(NamedTuple):
    """Weights of a source under the names of our models, and the configuration of the model that they are all of."""

    state: Mapping[str, torch.Tensor]
    config: CLCAViTConfig


class Found(NamedTuple):
    """A model, and what its source did not have for it.

    Attributes:
        model: in evaluation mode.
        missing: names of its weights that the source lacks: they are new.
        mismatched: (name, shape at the source, shape in the model) of weights that are new because their shapes differ.
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
    """Make a model of another configuration from weights. Position embeddings and patch projection are resampled; of `NEW_PARTS`,
    those that are lacking, that serve another head or pooling, or whose shapes differ start as the model starts them.

    Args:
        weights: of the source.
        config: of the model wanted.
        source: what the weights are called in an error.
        dtype: of the model.
        attn_implementation: as `from_pretrained` takes it.

    Raises:
        ValueError: other weights that are missing, unexpected, or of another shape, by name.
    """
    saved, state = weights.config, resample_weights(weights.state, weights.config, config)
    if (saved.head, saved.pooling) != (config.head, config.pooling):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = CLCAViTForImageClassification._from_config(config, **attention).eval().to(dtype)
    new_parts = list(NEW_PARTS)
    if HEADS[saved.head].before_norm:  # the original drops the final norm where the head reads CLS before it
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
    """Put weights into a model. What may be missing keeps its initial values, but CLR tokens start from CLS.

    Args:
        model: the model; its dtype stays.
        weights: tensors under the model's names.
        new_parts: regular expressions of whole names that may be missing.
        source: what the weights are called in an error.

    Returns:
        The names of the weights that were missing.

    Raises:
        ValueError: weights that are missing, unexpected, or of another shape, by name.
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
        logger.info("New, not from the source: %s.", ", ".join(new))
    model.load_state_dict(weights, strict=False)
    embeddings = model.vit.embeddings
    if "vit.embeddings.clr_tokens" in new:
        with torch.no_grad():
            embeddings.clr_tokens.copy_(embeddings.cls_token.expand_as(embeddings.clr_tokens))
    return new


def common_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The dtype of all floating-point weights, if they have one in common."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None


def tensor_shapes(file: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file on the meta device: names and shapes, read from its header.

    Raises:
        SafetensorError: it is no complete safetensors file.
    """
    with safe_open(file, framework="pt") as tensors:
        return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}  # noqa: SIM118
