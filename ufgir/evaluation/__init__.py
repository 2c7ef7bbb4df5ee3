"""Metrics, predictions of any number of images, and the files they are written to."""

from .metrics import compute_metrics, compute_multilabel_metrics
from .prediction import predict_to_file


__all__ = ["compute_metrics", "compute_multilabel_metrics", "predict_to_file"]
