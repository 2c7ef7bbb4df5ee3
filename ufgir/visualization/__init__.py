"""Figures of token reduction: the patches that a model keeps, merges and attends to."""

from .. import _moved
from .kinds import attention_columns, comparison, draw, kept_columns, kept_patches_image


__all__ = ["attention_columns", "comparison", "draw", "kept_columns", "kept_patches_image"]

__getattr__ = _moved.names_of(__name__)
