"""What a model costs: multiply-adds, time and memory, layer by layer, beside the dense ViT, with growing images, and of the input pipeline."""

from .. import _moved
from .macs import count_macs, dense_config
from .targets import keep_rate_for


__all__ = ["count_macs", "dense_config", "keep_rate_for"]

__getattr__ = _moved.names_of(__name__)
