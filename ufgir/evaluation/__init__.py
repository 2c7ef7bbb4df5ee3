"""Evaluate classifiers: metrics, predictions for any number of images, and prediction files."""

from .metrics import compute_metrics, compute_multilabel_metrics
from .prediction import predict_to_file


__all__ = ["compute_metrics", "compute_multilabel_metrics", "predict_to_file"]
