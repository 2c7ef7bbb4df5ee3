"""Metrics as numpy functions, `evaluate.Metric` classes around them, and functions for Trainer.

One class an image: top-k accuracy and macro-F1. Several classes an image: mean average precision (mAP), micro- and macro-F1.
Everything works offline: nothing is loaded by name from the Hub. Units: all values are fractions in [0, 1].

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
    """Scores (N, K) and labels (N,) as arrays; ValueError where they do not fit together."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2:
        raise ValueError(f"`predictions` must be scores of shape (images, classes), got shape {scores.shape}.")
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"`references` must hold one class index for each of {len(scores)} images, got {labels.shape}."
        )
    if len(labels) == 0:
        raise ValueError("`references` is empty: there is nothing to measure.")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"`references` must lie in 0 ... {scores.shape[1] - 1}, got {labels.min()} ... {labels.max()}."
        )
    return scores, labels


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """The share of images whose class is among the `k` highest scores.

    Of equal scores the class with the lower index comes first; a class whose score is NaN is never among the highest.
    With K <= k classes every class is among the highest: the value is 1 (unless scores are NaN).

    Args:
        scores: (N, K) logits or probabilities.
        labels: (N,) class indices in 0 ... K - 1.
        k: a positive integer.
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    scores, labels = _check(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)  # (N, 1)
    lower_index = np.arange(scores.shape[1]) < labels[:, None]  # (N, K)
    ahead = (scores > own) | ((scores == own) & lower_index)
    return float(np.mean((ahead.sum(axis=1) < k) & ~np.isnan(own[:, 0])))


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The unweighted mean of each class's F1 = 2 TP / (2 TP + FP + FN).

    The mean is over the classes that occur, as a label or as a prediction: a class that is neither in this split nor
    ever predicted has no F1. (The same as scikit-learn's `f1_score(average="macro")`.)

    Args:
        predicted: (N,) class indices.
        labels: (N,) class indices.
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    if predicted.shape != labels.shape or predicted.ndim != 1:
        raise ValueError(
            f"`predictions` and `references` must be lists of equal length, got {predicted.shape}, {labels.shape}."
        )
    if len(labels) == 0:
        raise ValueError("`references` is empty: there is nothing to measure.")
    classes, indices = np.unique(np.concatenate([predicted, labels]), return_inverse=True)
    predicted, labels = np.split(indices, 2)
    count = len(classes)
    true_positive = np.bincount(labels[predicted == labels], minlength=count)
    # a class is predicted TP + FP times and occurs TP + FN times: at least one of both, so nothing is divided by zero
    total = np.bincount(predicted, minlength=count) + np.bincount(labels, minlength=count)
    return float(np.mean(2 * true_positive / total))


def predicted_classes(scores: np.ndarray) -> np.ndarray:
    """(N, K) scores -> (N,) indices of the highest; the lower index of equals, NaN last."""
    scores = np.asarray(scores)
    return np.argmax(np.where(np.isnan(scores), -np.inf, scores), axis=1)


def _check_targets(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (N, K) and targets (N, K), bool; ValueError where they do not fit together."""
    scores, targets = np.asarray(scores), np.asarray(targets)
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(
            "`predictions` and `references` must both have the shape (images, classes), got "
            f"{scores.shape}, {targets.shape}."
        )
    if len(targets) == 0:
        raise ValueError("`references` is empty: there is nothing to measure.")
    if not np.isin(targets, (0, 1)).all():
        odd = targets[~np.isin(targets, (0, 1))].flat[0]
        raise ValueError(f"`references` must be 1 for the classes of an image and 0 for the others, got {odd}.")
    return scores, targets.astype(bool)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Average precision of each class: the mean, over its images, of the precision among the images with at least its score.

    Without equal scores this is the mean of the precision at each positive in descending order of scores. Images of equal
    score count together, whatever their order. (The same as scikit-learn's `average_precision_score`.) An image whose score
    is NaN comes last.

    Args:
        scores: (N, K) logits or probabilities.
        targets: (N, K) of 0 and 1.

    Returns:
        (K,) in [0, 1]; NaN for a class that no image has.
    """
    scores, targets = _check_targets(scores, targets)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    hits = np.take_along_axis(targets, order, axis=0)
    found = np.cumsum(hits, axis=0)  # positives up to this rank
    # the last rank of each run of equal scores: the precision of all in the run is that at its end
    ends = np.vstack([ranked[1:] != ranked[:-1], np.ones_like(ranked[:1], dtype=bool)])
    ranks = np.arange(len(ranked))[:, None]
    end = np.minimum.accumulate(np.where(ends, ranks, len(ranked))[::-1], axis=0)[::-1]
    precision = np.take_along_axis(found, end, axis=0) / (end + 1)
    positives = found[-1]
    total = (precision * hits).sum(axis=0)
    return np.divide(total, positives, out=np.full(len(total), np.nan), where=positives > 0)


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes of `average_precision`: of those that at least one image has.

    (The original gives a class without images the value 0, and counts in percent.)

    Args:
        scores: (N, K) logits or probabilities.
        targets: (N, K) of 0 and 1.

    Raises:
        ValueError: shapes differ, or no image has a class.
    """
    values = average_precision(scores, targets)
    if np.isnan(values).all():
        raise ValueError("`references` holds no positive: there is nothing to measure.")
    return float(np.nanmean(values))


def multilabel_f1(predicted: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Micro- and macro-F1 of several classes an image.

    Micro: F1 = 2 TP / (2 TP + FP + FN) of all pairs of image and class together. Macro: the unweighted mean of each class's
    F1, over the classes that occur, in the targets or as a prediction. Both are 0 where nothing occurs.

    Args:
        predicted: (N, K) of 0 and 1.
        targets: (N, K) of 0 and 1.
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
    """A Metric that takes whole arrays as they are.

    `evaluate` sends everything through an Arrow table and Python lists: seconds for thousands of images and classes.
    Only what was collected with `add` or `add_batch` goes that way here.
    """

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """The value for `predictions` and `references`, or for everything added so far, which is then forgotten."""
        if predictions is None or references is None or len(self) > 0 or self.num_process > 1:
            return evaluate.Metric.compute(self, predictions=predictions, references=references, **kwargs)
        return self._compute(predictions=predictions, references=references, **kwargs)


class TopKAccuracy(_ArrayMetric):
    """Top-k accuracy of scores (N, K); `compute(..., k=1)` returns `{"top<k>": value}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The share of images whose class is among the k highest scores.",
            citation="",
            inputs_description=(
                "predictions: one list of scores an image; references: class indices; k: how many guesses count (1)."
            ),
            features=datasets.Features(_SCORES),
        )

    def _compute(self, predictions: Any, references: Any, k: int = 1) -> dict[str, float]:
        return {f"top{k}": top_k_accuracy(np.asarray(predictions), np.asarray(references), k)}


class MacroF1(_ArrayMetric):
    """Macro-averaged F1 of class indices (N,) or of scores (N, K); `compute` returns `{"macro_f1": value}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="The unweighted mean over classes of the harmonic mean of precision and recall.",
            citation="",
            inputs_description="predictions: class indices, or one list of scores an image; references: class indices.",
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
            description="The mean over classes of the average precision.",
            citation="",
            inputs_description="predictions: one list of scores an image; references: as long, 1 for each class it has.",
            features=datasets.Features(_TARGETS),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"map": mean_average_precision(np.asarray(predictions), np.asarray(references))}


class MultiLabelF1(_ArrayMetric):
    """Micro- and macro-F1 of scores (N, K) above `threshold`; `compute` returns `{"micro_f1": ..., "macro_f1": ...}`.

    The default is that of logits: above 0 the probability is above 0.5.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of all pairs of image and class, and the unweighted mean over classes of their F1.",
            citation="",
            inputs_description=(
                "predictions: one list of scores an image; references: as long, 1 for each class it has; threshold: a "
                "class is predicted where its score is higher (0)."
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
    """For `Trainer(compute_metrics=...)`: `{"top1", "top5", "macro_f1"}`, fractions in [0, 1].

    With five classes or fewer, top5 would be 1 whatever the model: it is left out.

    Args:
        eval_prediction: an `EvalPrediction`, or any pair (logits (N, K), labels (N,)); where the model returned more
            than logits, these are a tuple's first entry.
    """
    logits, labels = _logits_and_labels(eval_prediction)
    top_k, f1 = TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)
    metrics = {}
    for k in (1, 5):
        if k == 1 or np.shape(logits)[-1] > k:
            metrics |= top_k.compute(predictions=logits, references=labels, k=k)
    return metrics | f1.compute(predictions=logits, references=labels)


def compute_multilabel_metrics(eval_prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)` with several classes an image: `{"map", "micro_f1", "macro_f1"}`, in [0, 1].

    F1 counts a class as predicted where its logit is above 0, its probability above 0.5.

    Args:
        eval_prediction: as for `compute_metrics`, with targets (N, K) of 0 and 1 as labels.
    """
    logits, targets = _logits_and_labels(eval_prediction)
    mean_ap, f1 = MeanAveragePrecision(keep_in_memory=True), MultiLabelF1(keep_in_memory=True)
    return {
        **mean_ap.compute(predictions=logits, references=targets),
        **f1.compute(predictions=logits, references=targets),
    }
