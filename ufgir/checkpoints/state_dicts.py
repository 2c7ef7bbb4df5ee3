"""Strict state-dict loading: missing, unexpected or mismatched keys raise."""

import logging
import re
from collections.abc import Iterable, Mapping

import torch

from clca import CLCAViTForImageClassification

from ..utils.text import listed


logger = logging.getLogger(__name__)


def fill_model(
    model: CLCAViTForImageClassification,
    weights: Mapping[str, torch.Tensor],
    new_parts: Iterable[str] = (),
    source: str = "weights of the `source`",
) -> None:
    """Put weights into a model. What may be missing keeps its initial values, but CLR tokens start from CLS.

    Args:
        model: the model; its dtype stays.
        weights: tensors under the model's names.
        new_parts: regular expressions of whole names that may be missing.
        source: what the weights are called in an error.

    Raises:
        ValueError: weights that are missing, unexpected, or of another shape, by name.
    """
    own = model.state_dict()
    new = [key for key in own if key not in weights and any(re.fullmatch(part, key) for part in new_parts)]
    problems = [f"{key} is missing" for key in own if key not in weights and key not in new]
    for key, tensor in weights.items():
        if key not in own:
            problems.append(f"{key} is unexpected")
        elif tensor.shape != own[key].shape:
            problems.append(f"{key} has the shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
    if problems:
        raise ValueError(f"{source} do not fit the model: {listed(problems)}.")
    if new:
        logger.info("New, not from the source: %s.", ", ".join(new))
    model.load_state_dict(weights, strict=False)
    embeddings = model.vit.embeddings
    if "vit.embeddings.clr_tokens" in new:
        with torch.no_grad():
            embeddings.clr_tokens.copy_(embeddings.cls_token.expand_as(embeddings.clr_tokens))


def common_dtype(weights: Mapping[str, torch.Tensor]) -> torch.dtype | None:
    """The dtype of all floating-point weights, if they have one in common."""
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else None
