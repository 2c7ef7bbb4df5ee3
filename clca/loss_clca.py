"""Losses: classification, and what reductions, heads and teachers add to it. Every one is a function of tensors.

Shapes: B batch, K classes, n tokens, D width, S stages.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, config: "CLCAViTConfig", label_smoothing: float = 0.0
) -> torch.Tensor:
    """Mean loss of a batch. (transformers' own takes soft labels for multi-label ones and changes the config on the way.)

    Args:
        logits: (B, K).
        labels: class indices (B,), or class probabilities (B, K) with `problem_type="single_label_classification"` (MixUp
            and label smoothing make those), or zeros and ones (B, K) with `problem_type="multi_label_classification"`, or
            targets (B, K), or (B,) of one label, for regression. Without a `problem_type`, integer labels (B,) are classes and
            (B, K) labels are multi-label.
        config: read, never changed; `multi_label_loss` chooses between two losses of multi-label classification.
        label_smoothing: share of the targets that all classes get alike, in multi-label classification yes and no of each class.

    Raises:
        ValueError: another `problem_type`, labels whose shape does not fit, or label smoothing for regression.
    """
    problem = config.problem_type or _guess_problem(logits, labels)
    if problem not in PROBLEMS:
        raise ValueError(f"`problem_type` must be one of {', '.join(PROBLEMS)}, got {problem!r}.")
    if problem == "regression":
        if label_smoothing:
            raise ValueError(
                f"`label_smoothing` must be 0 for regression, which has no classes, got {label_smoothing}."
            )
        targets = labels[:, None] if labels.dim() == 1 else labels
        _check_same_shape(logits, targets, problem)
        return nn.functional.mse_loss(logits, targets.to(logits.dtype))
    if problem == "multi_label_classification":
        _check_same_shape(logits, labels, problem)
        targets = (1 - label_smoothing) * labels.to(logits.dtype) + label_smoothing / 2
        if config.multi_label_loss == "asymmetric":
            return asymmetric_loss(logits, targets) / len(logits)
        return nn.functional.binary_cross_entropy_with_logits(logits, targets)
    if labels.dim() > 1:
        _check_same_shape(logits, labels, problem)
        return nn.functional.cross_entropy(logits, labels.to(logits.dtype), label_smoothing=label_smoothing)
    return nn.functional.cross_entropy(logits, labels.long(), label_smoothing=label_smoothing)


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


def asymmetric_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    gamma_negative: float = 4.0,
    gamma_positive: float = 1.0,
    clip: float = 0.05,
) -> torch.Tensor:
    """Multi-label loss that forgives easy negatives (https://huggingface.co/papers/2009.14119), summed over logits and
    `targets` (B, K) of zeros and ones; in float32 at least, since half precision has no number as small as its bound.

    Args:
        gamma_negative, gamma_positive: focusing exponents.
        clip: probability below which a negative costs nothing.
    """
    precise = torch.promote_types(logits.dtype, torch.float32)
    logits, targets = logits.to(precise), targets.to(precise)
    positive = logits.sigmoid()
    negative = (1 - positive + clip).clamp(max=1.0)
    smallest = 1e-8
    log_likelihood = targets * positive.clamp(min=smallest).log() + (1 - targets) * negative.clamp(min=smallest).log()
    certainty = positive * targets + negative * (1 - targets)
    gamma = gamma_positive * targets + gamma_negative * (1 - targets)
    return -(log_likelihood * (1 - certainty) ** gamma).sum()


def kl_divergence(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of the softmax distributions over the last axis, averaged over the first."""
    log_student, log_teacher = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    return nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "soft", temperature: float = 1.0
) -> torch.Tensor:
    """Distance of `logits` (B, K) from a teacher's (https://huggingface.co/papers/2012.12877).

    Args:
        kind: `soft`, KL at a temperature, times its square; `hard`, cross-entropy to the teacher's class.
        temperature: divides both logits, soft only.

    Raises:
        ValueError: another kind, or a temperature that is not positive.
    """
    if kind == "hard":
        return nn.functional.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    if kind != "soft":
        raise ValueError(f"`kind` must be 'soft' or 'hard', got {kind!r}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    return temperature**2 * kl_divergence(logits / temperature, teacher_logits / temperature)


def keep_ratio_loss(decisions: Sequence[torch.Tensor], targets: Sequence[float]) -> torch.Tensor:
    """Squared distance of the share of kept tokens from its target, averaged over images and the S stages
    (https://huggingface.co/papers/2106.02034).

    Args:
        decisions: per stage, which tokens are kept, (B, n) of zeros and ones.
        targets: per stage, the share.
    """
    terms = [(d.mean(dim=1) - target).square().mean() for d, target in zip(decisions, targets, strict=True)]
    return torch.stack(terms).mean()


def token_distillation_loss(
    tokens: torch.Tensor, teacher_tokens: torch.Tensor, kept: torch.Tensor, kind: str = "mse"
) -> torch.Tensor:
    """Distance of the kept tokens from a teacher's, (B, n, D) each, where `kept` (B, n) is one; zero if none is.

    Args:
        kind: `mse`, or `kl` between softmaxes over the width.

    Raises:
        ValueError: tokens of different shapes.
    """
    if tokens.shape != teacher_tokens.shape:
        raise ValueError(
            f"`teacher_tokens` must have the shape of the student's, {tuple(tokens.shape)}, got "
            f"{tuple(teacher_tokens.shape)}: the teacher needs the same patches and width."
        )
    weights = (kept > 0.5).to(tokens.dtype)
    count = weights.sum().clamp(min=1.0)
    if kind == "mse":
        per_token = (tokens - teacher_tokens).square().mean(dim=-1)
    else:
        log_student, log_teacher = tokens.log_softmax(dim=-1), teacher_tokens.log_softmax(dim=-1)
        per_token = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    return (per_token * weights).sum() / count


def group_lasso(weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sum of the L2 norms of groups of a classifier's `weight` (K, features, ...).

    Args:
        dim: the axis inside a group: 0, one group per feature; 1, one per class.
    """
    return weight.norm(dim=dim).sum()


def supervised_contrastive_loss(
    features: torch.Tensor, labels: torch.Tensor | None = None, temperature: float = 0.07
) -> torch.Tensor:
    """Pull views of the same class together (https://huggingface.co/papers/2004.11362), without labels the views of the
    same image.

    Args:
        features: (B, views, D), brought to unit length here.
        labels: (B,).
        temperature: divides the cosine similarities.

    Raises:
        ValueError: fewer than two views in all, or labels of another number.
    """
    batch, views = features.shape[:2]
    if batch * views < 2:
        raise ValueError(f"`features` must hold at least two views, got {tuple(features.shape)}.")
    labels = torch.arange(batch, device=features.device) if labels is None else labels
    if labels.shape != (batch,):
        raise ValueError(f"`labels` must have the shape ({batch},), got {tuple(labels.shape)}.")
    flat = nn.functional.normalize(features, dim=-1).transpose(0, 1).flatten(0, 1)  # (views * B, D)
    labels = labels.repeat(views)
    others = ~torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    similarity = (flat @ flat.T / temperature).masked_fill(~others, -torch.inf)
    log_probability = similarity.log_softmax(dim=1).masked_fill(~others, 0.0)
    positive = (labels[:, None] == labels) & others
    count = positive.sum(dim=1)
    per_anchor = (log_probability * positive).sum(dim=1)[count > 0] / count[count > 0]
    return -per_anchor.mean()
