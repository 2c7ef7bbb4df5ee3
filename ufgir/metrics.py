"""Top-k accuracy and macro-F1: numpy functions, `evaluate.Metric` classes around them, and one function for Trainer.

Everything works offline: nothing is loaded by name from the Hub. Units: all values are fractions in [0, 1].

    TopKAccuracy().compute(predictions=logits, references=labels, k=5)        # {"top5": ...}
    MacroF1().compute(predictions=logits, references=labels)                  # {"macro_f1": ...}
    evaluate.combine([TopKAccuracy(), MacroF1()]).compute(predictions=logits, references=labels)
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


_SCORES = {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
_CLASSES = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}


class _ArrayMetric(evaluate.Metric):
    """A Metric that takes whole arrays as they are.

    `evaluate` sends everything through an Arrow table and Python lists: seconds for thousands of images and classes.
    Only what was collected with `add` or `add_batch` goes that way here.
    """

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float] | None:
        """The value for `predictions` and `references`, or for everything added so far, which is then forgotten."""
        if predictions is None or references is None or len(self) > 0 or self.num_process > 1:
            return evaluate.Metric.compute(self, predictions=predictions, references=references, **kwargs)
        return self._compute(predictions, references, **kwargs)


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


def compute_metrics(eval_prediction: Any) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: `{"top1", "top5", "macro_f1"}`, fractions in [0, 1].

    Args:
        eval_prediction: an `EvalPrediction`, or any pair (logits (N, K), labels (N,)); where the model returned more
            than logits, these are a tuple's first entry. With five classes or fewer, top5 is 1 by definition.
    """
    logits, labels = eval_prediction[0], eval_prediction[1]
    logits = logits[0] if isinstance(logits, tuple) else logits
    top_k, f1 = TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)
    return {
        **top_k.compute(predictions=logits, references=labels, k=1),
        **top_k.compute(predictions=logits, references=labels, k=5),
        **f1.compute(predictions=logits, references=labels),
    }
