"""Images of noise and of leaves, and networks with known attention."""

import numpy as np
from PIL import Image
from transformers import ViTImageProcessorPil


def processor(height: int = 32, width: int = 32) -> ViTImageProcessorPil:
    """Return an image processor that only scales pixels to [0, 1]."""
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, resample=Image.Resampling.NEAREST, do_normalize=False
    )


def noise(count: int = 2, height: int = 32, width: int = 32) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def cell(sheet: Image.Image, column: int, width: int = 40, height: int = 24) -> np.ndarray:
    """Return the pixels (height, width, 3) of the first row's image in one column of a sheet without titles."""
    left = 4 + column * (width + 4)
    return np.asarray(sheet.crop((left, 16, left + width, 16 + height)), dtype=int)
