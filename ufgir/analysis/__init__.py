"""Statistics over whole data sets and between models: one pass that stores what a model says of every image, comparison of two models,
embeddings of features, and their figures."""

from .. import _moved
from .comparison import compare_models
from .dataset_pass import analyze
from .embedding import embed


__all__ = ["analyze", "compare_models", "embed"]

__getattr__ = _moved.names_of(__name__)
