"""Open image files and convert them to RGB, for any mode, orientation or bit depth.

The conversion is implemented in `clca.image_processing_clca`, which is saved with a model. Pillow detects the format from the content
of the file, and supports MPO and AVIF. It supports HEIC if pillow-heif is installed; this module registers it.
"""

import importlib.util

from clca.image_processing_clca import open_image, to_rgb


if importlib.util.find_spec("pillow_heif"):  # optional package that adds HEIC to Pillow
    importlib.import_module("pillow_heif").register_heif_opener()

HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))

__all__ = ["HEIF_SUFFIXES", "open_image", "to_rgb"]
