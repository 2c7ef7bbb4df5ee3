"""Open image files and convert them to RGB, whatever their mode, orientation or depth.

The conversion is part of the image processor that is saved with a model, `clca.image_processing_clca`. Pillow tells the format
of a file by its content, and opens MPO and AVIF itself. It opens HEIC where pillow-heif is installed, which is registered here.
"""

import importlib.util

from clca.image_processing_clca import open_image as open_picture
from clca.image_processing_clca import to_rgb


if importlib.util.find_spec("pillow_heif"):  # an optional package, with which Pillow opens HEIC
    importlib.import_module("pillow_heif").register_heif_opener()

HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))

__all__ = ["HEIF_SUFFIXES", "open_picture", "to_rgb"]
