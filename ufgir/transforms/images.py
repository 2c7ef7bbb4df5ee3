"""Open image files and convert them to RGB, whatever their mode, orientation or depth."""

import importlib.util
import os
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps


if importlib.util.find_spec("pillow_heif"):  # an optional package, with which Pillow opens HEIC
    importlib.import_module("pillow_heif").register_heif_opener()

HEIF_SUFFIXES = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))


def open_picture(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """A picture file, or an open one, as RGB: see `to_rgb`.

    Raises:
        ValueError: its numbers cannot be taken for brightness.
        OSError: it is no picture, or a broken one. (Pillow's decoders raise other errors, too.)
    """
    with Image.open(source) as picture:
        return to_rgb(picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture, turned as its camera says, in 8-bit RGB.

    Transparent pixels are laid over white, as transformers' image processors do. Grey levels of more than 8 bits are scaled,
    where Pillow would cut them off at 255: integers up to 255 are levels already, those up to 65535 are of 16 bits;
    floating-point numbers lie in [0, 1], or are levels up to 255.

    Raises:
        ValueError: other numbers, which cannot be taken for brightness.
    """
    if image.getexif().get(ExifTags.Base.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _levels_of_8_bits(image).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(f"{image.mode[:-1]}A")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _levels_of_8_bits(image: Image.Image) -> Image.Image:
    """Grey numbers of 16 or 32 bits, or floating-point ones, as levels (mode L)."""
    numbers = np.asarray(image).astype(np.float64)
    low, high = numbers.min(), numbers.max()  # NaN if one of them is
    if image.mode == "F":
        highest = 1 if high <= 1 else 255
    else:
        highest = 65535 if image.mode.startswith("I;16") or high > 255 else 255
    if not 0 <= low <= high <= highest:
        name = getattr(image, "filename", "") or "the picture"
        allowed = "[0, 1] or [0, 255]" if image.mode == "F" else "[0, 65535]"
        raise ValueError(
            f"{name}: its numbers (mode {image.mode}) must lie in {allowed} to be brightness, got {low:g} to {high:g}: save "
            "it with 8 or 16 bits."
        )
    levels = np.rint(numbers * (255 / highest)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        levels[numbers == transparent] = 255
    return Image.fromarray(levels)
