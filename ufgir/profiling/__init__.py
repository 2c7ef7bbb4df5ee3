"""Cost of a model: multiply-adds, time and memory, per layer, compared with the dense ViT, and of the input pipeline."""

from .. import _moved
from .macs import count_macs, dense_config
from .targets import keep_rate_for


__all__ = ["count_macs", "dense_config", "keep_rate_for"]

__getattr__ = _moved.names_of(__name__)
