"""The classification loss. transformers' own takes soft labels for multi-label ones and changes the config on the way.

Shapes: B batch, K classes.
"""

import torch
from torch import nn

from .configuration_clca import CLCAViTConfig


def classification_loss(logits: torch.Tensor, labels: torch.Tensor, config: CLCAViTConfig) -> torch.Tensor:
    """Mean loss of a batch.

    Args:
        logits: (B, K).
        labels: class indices (B,), or class probabilities (B, K) with `problem_type="single_label_classification"` (MixUp
            and label smoothing make those), or zeros and ones (B, K) with `problem_type="multi_label_classification"`, or
            targets (B,) for regression with one label. Without a `problem_type`, integer labels (B,) are classes and
            (B, K) labels are multi-label.
        config: read, never changed.

    Raises:
        ValueError: labels whose shape does not fit.
    """
    problem = config.problem_type or _guess_problem(logits, labels)
    if problem == "regression":
        return nn.functional.mse_loss(logits.squeeze(-1), labels.squeeze(-1).to(logits.dtype))
    if problem == "multi_label_classification":
        _check_same_shape(logits, labels, problem)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if labels.dim() > 1:
        _check_same_shape(logits, labels, problem)
        return nn.functional.cross_entropy(logits, labels.to(logits.dtype))
    return nn.functional.cross_entropy(logits, labels.long())


def _guess_problem(logits: torch.Tensor, labels: torch.Tensor) -> str:
    if logits.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if labels.dim() > 1 else "single_label_classification"


def _check_same_shape(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> None:
    if labels.shape != logits.shape:
        raise ValueError(
            f"`labels` must have the shape of the logits, {tuple(logits.shape)}, for {problem.replace('_', ' ')} with "
            f"one value per class, got {tuple(labels.shape)}."
        )
