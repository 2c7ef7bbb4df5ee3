"""Metrics as numpy functions, as `evaluate.Metric` classes, and as `compute_metrics` functions for Trainer.

Single-label: top-k accuracy and macro-F1. Multi-label: mean average precision (mAP), micro- and macro-F1. Everything works
offline; no metric is loaded from the Hub. All values are fractions in [0, 1].

    TopKAccuracy().compute(predictions=logits, references=labels, k=5)        # {"top5": ...}
    MacroF1().compute(predictions=logits, references=labels)                  # {"macro_f1": ...}
    evaluate.combine([TopKAccuracy(), MacroF1()]).compute(predictions=logits, references=labels)
    MeanAveragePrecision().compute(predictions=logits, references=targets)    # {"map": ...}, targets (N, K) of 0 and 1
    MultiLabelF1().compute(predictions=logits, references=targets)            # {"micro_f1": ..., "macro_f1": ...}
"""

from typing import Any

import datasets
import evaluate
import numpy as np


def _check(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (N, K) and labels (N,) as arrays; raise ValueError if they do not match."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2:
        raise ValueError(f"`predictions` must be scores of shape (images, classes), got shape {scores.shape}.")
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"`references` must have one class index per image, shape ({len(scores)},), got {labels.shape}."
        )
    if len(labels) == 0:
        raise ValueError("`references` must not be empty.")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"`references` must lie in 0 ... {scores.shape[1] - 1}, got {labels.min()} ... {labels.max()}."
        )
    return scores, labels


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Compute the share of images whose class is among the `k` highest scores.

    Ties are broken in favor of the lower class index; a class with a NaN score is never among the highest. With K <= k classes
    the value is 1 (unless scores are NaN).

    Args:
        scores: (N, K) logits or probabilities.
        labels: (N,) class indices in 0 ... K - 1.
        k: a positive integer.

    Raises:
        ValueError: if shapes do not match, a label is out of range, or `k` is below 1.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    scores, labels = _check(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (N, 1)
    lower_index = np.arange(scores.shape[1]) < labels[:, None]  # (N, K)
    ahead = (scores > own) | ((scores == own) & lower_index)
    return float(np.mean((ahead.sum(axis=1) < k) & ~np.isnan(own[:, 0])))


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Compute the unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN).

    The mean is over the classes that occur as a label or as a prediction, as in scikit-learn's `f1_score(average="macro")`.

    Args:
        predicted: (N,) class indices.
        labels: (N,) class indices.

    Raises:
        ValueError: if shapes differ or there are no images.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ValueError(
            f"`predictions` and `references` must be lists of equal length, got {predicted.shape}, {labels.shape}."
        )
    if len(labels) == 0:
        raise ValueError("`references` must not be empty.")
    classes, indices = np.unique(np.concatenate([predicted, labels]), return_inverse=True)
    predicted, labels = np.split(indices, 2)
    count = len(classes)
    true_positive = np.bincount(labels[predicted == labels], minlength=count)
    # TP + FP predictions plus TP + FN labels per class: never 0, because every class occurs
    total = np.bincount(predicted, minlength=count) + np.bincount(labels, minlength=count)
    return float(np.mean(2 * true_positive / total))


def predicted_classes(scores: np.ndarray) -> np.ndarray:
    """Return the index of the highest score per image, (N, K) -> (N,); ties go to the lower index, NaN is last."""
    scores = np.asarray(scores)
    return np.argmax(np.where(np.isnan(scores), -np.inf, scores), axis=1)


def _check_targets(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (N, K) and targets (N, K), bool; raise ValueError if they do not match."""
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(
            "`predictions` and `references` must both have the shape (images, classes), got "
            f"{scores.shape}, {targets.shape}."
        )
    if len(targets) == 0:
        raise ValueError("`references` must not be empty.")
    if not np.isin(targets, (0, 1)).all():
        odd = targets[~np.isin(targets, (0, 1))].flat[0]
        raise ValueError(f"`references` must be 1 for the classes of an image and 0 for the others, got {odd}.")
    return scores, targets.astype(bool)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the average precision per class: the mean over its images of the precision among the images with at least its score.

    Without ties, this is the mean of the precision at each positive in descending order of scores. Images with equal scores are
    counted together, as in scikit-learn's `average_precision_score`. Images with a NaN score are last.

    Args:
        scores: (N, K) logits or probabilities.
        targets: (N, K) of 0 and 1.

    Returns:
        (K,) in [0, 1]; NaN for a class without images.

    Raises:
        ValueError: if shapes differ, there are no images, or targets are not 0 or 1.
    """
    scores, targets = _check_targets(scores, targets)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    hits = np.take_along_axis(targets, order, axis=0)
    found = np.cumsum(hits, axis=0)  # positives up to this rank
    # last rank of each run of equal scores; its precision applies to the whole run
    ends = np.vstack([ranked[1:] != ranked[:-1], np.ones_like(ranked[:1], dtype=bool)])
    ranks = np.arange(len(ranked))[:, None]
    end = np.minimum.accumulate(np.where(ends, ranks, len(ranked))[::-1], axis=0)[::-1]
    precision = np.take_along_axis(found, end, axis=0) / (end + 1)
    positives = found[-1]
    total = (precision * hits).sum(axis=0)
    return np.divide(total, positives, out=np.full(len(total), np.nan), where=positives > 0)


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Compute the mean of `average_precision` over the classes that have at least one image.

    (The original counts a class without images as 0, and reports percent.)

    Args:
        scores: (N, K) logits or probabilities.
        targets: (N, K) of 0 and 1.

    Raises:
        ValueError: if shapes differ, or no image has a class.
    """
    values = average_precision(scores, targets)
    if np.isnan(values).all():
        raise ValueError("`references` must have at least one 1, got only 0.")
    return float(np.nanmean(values))


def multilabel_f1(predicted: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Compute micro- and macro-F1 of multi-label predictions.

    Micro: F1 = 2 TP / (2 TP + FP + FN) over all pairs of image and class. Macro: the unweighted mean of F1 over the classes that
    occur in the targets or predictions. Both are 0 if no class occurs.

    Args:
        predicted: (N, K) of 0 and 1.
        targets: (N, K) of 0 and 1.

    Returns:
        Micro-F1 and macro-F1.
    """
    predicted, targets = _check_targets(predicted, targets)
    predicted = predicted.astype(bool)
    true_positive = (predicted & targets).sum(axis=0)
    total = predicted.sum(axis=0) + targets.sum(axis=0)
    occurs = total > 0
    if not occurs.any():
        return 0.0, 0.0
    micro = 2 * true_positive.sum() / total.sum()
    return float(micro), float(np.mean(2 * true_positive[occurs] / total[occurs]))


_SCORES = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
_CLASSES = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
_TARGETS = {name: datasets.Sequence(datasets.Value("float64")) for name in ("predictions", "references")}


class _ArrayMetric(evaluate.Metric):
    """Metric that takes whole arrays without converting them.

    `evaluate` converts all inputs to an Arrow table and Python lists, which takes seconds for thousands of images and classes.
    Here, only batches collected with `add` or `add_batch` are converted.
    """

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """Compute the value for `predictions` and `references`, or for all batches added so far, which are then cleared."""
        if predictions is None or references is None or len(self) > 0 or self.num_process > 1:
            return evaluate.Metric.compute(self, predictions=predictions, references=references, **kwargs)
        return self._compute(predictions=predictions, references=references, **kwargs)


class TopKAccuracy(_ArrayMetric):
    """Top-k accuracy of scores (N, K); `compute(..., k=1)` returns `{"top<k>": value}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of images whose class is among the k highest scores.",
            citation="",
            inputs_description=(
                "predictions: one list of scores per image; references: class indices; k: number of highest scores (1)."
            ),
            features=datasets.Features(_SCORES),
        )

    def _compute(self, predictions: Any, references: Any, k: int = 1) -> dict[str, float]:
        return {f"top{k}": top_k_accuracy(np.asarray(predictions), np.asarray(references), k)}


class MacroF1(_ArrayMetric):
    """Macro-averaged F1 of class indices (N,) or of scores (N, K); `compute` returns `{"macro_f1": value}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Unweighted mean over classes of the harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions: class indices, or one list of scores per image; references: class indices.",
            features=[datasets.Features(_CLASSES), datasets.Features(_SCORES)],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions = np.asarray(predictions)
        if predictions.ndim == 2:
            predictions = predicted_classes(predictions)
        return {"macro_f1": macro_f1(predictions, np.asarray(references))}


class MeanAveragePrecision(_ArrayMetric):
    """mAP of scores (N, K) against targets (N, K) of 0 and 1; `compute` returns `{"map": value}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean over classes of the average precision.",
            citation="",
            inputs_description="predictions: one list of scores per image; references: lists of 1 for its classes, else 0.",
            features=datasets.Features(_TARGETS),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"map": mean_average_precision(np.asarray(predictions), np.asarray(references))}


class MultiLabelF1(_ArrayMetric):
    """Micro- and macro-F1 of scores (N, K) above `threshold`; `compute` returns `{"micro_f1": ..., "macro_f1": ...}`.

    The default threshold 0 is for logits: a logit above 0 is a probability above 0.5.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 over all pairs of image and class, and the unweighted mean of F1 over classes.",
            citation="",
            inputs_description=(
                "predictions: one list of scores per image; references: lists of 1 for its classes, else 0; threshold: a "
                "class is predicted if its score is higher (0)."
            ),
            features=datasets.Features(_TARGETS),
        )

    def _compute(self, predictions: Any, references: Any, threshold: float = 0.0) -> dict[str, float]:
        micro, macro = multilabel_f1(np.asarray(predictions) > threshold, np.asarray(references))
        return {"micro_f1": micro, "macro_f1": macro}


def _logits_and_labels(eval_prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = eval_prediction[0], eval_prediction[1]
    return logits[0] if isinstance(logits, tuple) else logits, labels


def compute_metrics(eval_prediction: Any) -> dict[str, float]:
    """Compute `{"top1", "top5", "macro_f1"}` for `Trainer(compute_metrics=...)`, fractions in [0, 1].

    top5 is left out with five classes or fewer, because it would always be 1.

    Args:
        eval_prediction: an `EvalPrediction`, or any pair (logits (N, K), labels (N,)). If the model returned other outputs as
            well, logits are the first entry of a tuple.
    """
    logits, labels = _logits_and_labels(eval_prediction)
    top_k, f1 = TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)
    metrics = {}
    for k in (1, 5):
        if k == 1 or np.shape(logits)[-1] > k:
            metrics |= top_k.compute(predictions=logits, references=labels, k=k)
    return metrics | f1.compute(predictions=logits, references=labels)


def compute_multilabel_metrics(eval_prediction: Any) -> dict[str, float]:
    """Compute `{"map", "micro_f1", "macro_f1"}` for `Trainer(compute_metrics=...)` with multi-label data, in [0, 1].

    For F1, a class is predicted if its logit is above 0, its probability above 0.5.

    Args:
        eval_prediction: as for `compute_metrics`, with targets (N, K) of 0 and 1 as labels.
    """
    logits, targets = _logits_and_labels(eval_prediction)
    mean_ap, f1 = MeanAveragePrecision(keep_in_memory=True), MultiLabelF1(keep_in_memory=True)
    return {
        **mean_ap.compute(predictions=logits, references=targets),
        **f1.compute(predictions=logits, references=targets),
    }
