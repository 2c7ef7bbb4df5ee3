"""Losses for classification, and the terms of reductions, heads and teachers. All are functions of tensors.

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
    """Return the mean classification loss of a batch.

    It replaces transformers' own, which takes soft labels for multi-label ones and changes the configuration.

    Args:
        logits: (B, K).
        labels: one of
            class indices (B,);
            class probabilities (B, K) with `problem_type="single_label_classification"`, as made by MixUp and label
            smoothing;
            zeros and ones (B, K) with `problem_type="multi_label_classification"`;
            regression targets (B, K), or (B,) for one label.
            Without a `problem_type`, integer labels (B,) are classes and labels (B, K) are multi-label.
        config: read, never changed; `multi_label_loss` selects one of two losses for multi-label classification.
        label_smoothing: share of the target that is spread evenly over all classes; in multi-label classification,
            over the two outcomes of each class.

    Raises:
        ValueError: if `problem_type` is unknown, the shape of the labels does not fit, or labels of a regression are
            smoothed.
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
    """Return the asymmetric multi-label loss (https://huggingface.co/papers/2009.14119), summed over images and
    classes.

    It down-weights easy negatives. It is computed in float32 or float64, because half precision cannot represent its
    lower bound.

    Args:
        logits: (B, K).
        targets: (B, K), zeros and ones.
        gamma_negative, gamma_positive: focusing exponents.
        clip: negatives with a smaller probability do not contribute.
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
    """Return KL(teacher || student) of the softmax distributions over the last axis, averaged over the first."""
    log_student, log_teacher = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
    return nn.functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def distillation_loss(
    logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str = "soft", temperature: float = 1.0
) -> torch.Tensor:
    """Return the distance of `logits` (B, K) from those of a teacher (https://huggingface.co/papers/2012.12877).

    Args:
        logits: (B, K).
        teacher_logits: (B, K).
        kind: `soft`, KL divergence at a temperature, times its square; `hard`, cross-entropy with the class that the
            teacher predicts.
        temperature: divides both logits; only for `soft`.

    Raises:
        ValueError: if the kind is unknown or the temperature is not positive.
    """
    if kind == "hard":
        return nn.functional.cross_entropy(logits, teacher_logits.argmax(dim=-1))
    if kind != "soft":
        raise ValueError(f"`kind` must be 'soft' or 'hard', got {kind!r}.")
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}.")
    return temperature**2 * kl_divergence(logits / temperature, teacher_logits / temperature)


def keep_ratio_loss(decisions: Sequence[torch.Tensor], targets: Sequence[float]) -> torch.Tensor:
    """Return the squared difference between the share of kept tokens and its target
    (https://huggingface.co/papers/2106.02034).

    It is averaged over images and the S stages.

    Args:
        decisions: for each stage, (B, n), one for kept tokens and zero for the others.
        targets: for each stage, the target share.
    """
    terms = [(d.mean(dim=1) - target).square().mean() for d, target in zip(decisions, targets, strict=True)]
    return torch.stack(terms).mean()


def token_distillation_loss(
    tokens: torch.Tensor, teacher_tokens: torch.Tensor, kept: torch.Tensor, kind: str = "mse"
) -> torch.Tensor:
    """Return the mean distance of the kept tokens from those of a teacher, or zero if none is kept.

    Args:
        tokens: (B, n, D).
        teacher_tokens: (B, n, D).
        kept: (B, n), one for kept tokens and zero for the others.
        kind: `mse`, or `kl` between softmax distributions over the width.

    Raises:
        ValueError: if the shapes of the tokens differ.
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
    """Return the sum of the L2 norms of groups of the `weight` (K, features, ...) of a classifier.

    Args:
        weight: (K, features, ...).
        dim: axis within a group: 0 for one group per feature, 1 for one group per class.
    """
    return weight.norm(dim=dim).sum()


def supervised_contrastive_loss(
    features: torch.Tensor, labels: torch.Tensor | None = None, temperature: float = 0.07
) -> torch.Tensor:
    """Return the supervised contrastive loss (https://huggingface.co/papers/2004.11362).

    It pulls views of the same class together; without labels, views of the same image.

    Args:
        features: (B, views, D). They are normalized to unit length here.
        labels: (B,).
        temperature: divides the cosine similarities.

    Raises:
        ValueError: if there are fewer than two views in total, or the number of labels is wrong.
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
