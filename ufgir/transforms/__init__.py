"""Transforms from image files to `pixel_values`: open images, convert them to RGB, resize, crop, augment and normalize them."""

from .. import _moved
from .images import open_image, to_rgb
from .preprocessing import EvalTransform, TrainTransform, make_image_processor, read_image_processor


__all__ = ["EvalTransform", "TrainTransform", "make_image_processor", "open_image", "read_image_processor", "to_rgb"]

__getattr__ = _moved.names_of(__name__)
