"""Analysis of whole data sets and comparison of models: a pass that stores the model's output for every image, similarity of two
models, embeddings of features, and figures of the results."""

from .. import _moved
from .comparison import compare_models
from .dataset_pass import analyze
from .embedding import embed


__all__ = ["analyze", "compare_models", "embed"]

__getattr__ = _moved.names_of(__name__)
