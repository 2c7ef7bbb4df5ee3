"""Image processor of a CLCA ViT: from an image of any mode, orientation and bit depth to `pixel_values`, as in
training.

    upright 8-bit RGB -> resize to size / crop_pct -> crop the center to size -> rescale -> normalize

`size` is the input size of the model. `crop_pct` is the share of the resized image that the crop keeps, as in timm.
Files that specify both sizes, `size` before the crop and `crop_size` with `do_center_crop`, are also supported.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers import ViTImageProcessorPil
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs


logger = logging.getLogger(__name__)

_depths_warned_of: set[int] = set()


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """Open an image file, or a file object, as 8-bit RGB, see `to_rgb`. Pillow detects the format from the content.

    Raises:
        ValueError: if its values cannot be interpreted as brightness.
        OSError: if it is not an image or is damaged. (Some decoders of Pillow raise other errors.)
    """
    with Image.open(source) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, upright according to its EXIF orientation.

    Transparent pixels are composited on white, as in transformers' image processors. Gray values of more than 8 bits
    are scaled (Pillow would clip them at 255). Integers up to 255 are kept, integers up to 65535 are taken as 16 bits;
    floating-point values are taken as [0, 1], or as levels up to 255 if they exceed 1. A 16-bit image that uses 14
    bits or fewer is converted with a warning, once per process and number of bits.

    Raises:
        ValueError: if other values occur, which cannot be interpreted as brightness.
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
    """Convert 16-bit, 32-bit or floating-point gray values to 8-bit levels (mode L)."""
    values = np.asarray(image).astype(np.float64)
    name = getattr(image, "filename", "") or "an image"
    low, high = values.min(), values.max()  # NaN if there is a NaN
    if image.mode == "F":
        highest = 1 if high <= 1 else 255
    else:
        highest = 65535 if image.mode.startswith("I;16") or high > 255 else 255
    if not 0 <= low <= high <= highest:
        allowed = "[0, 1] or [0, 255]" if image.mode == "F" else "[0, 65535]"
        raise ValueError(
            f"{name}: its values (mode {image.mode}) must lie in {allowed} to be interpreted as brightness, got {low:g} to "
            f"{high:g}. Save it with 8 or 16 bits."
        )
    if highest == 65535:
        _warn_of_unused_bits(name, int(high))
    levels = np.rint(values * (255 / highest)).astype(np.uint8)
    if (transparent := image.info.get("transparency")) is not None:
        levels[values == transparent] = 255
    return Image.fromarray(levels)


def _warn_of_unused_bits(name: str, high: int) -> None:
    """Warn about a 16-bit image that seems to come from a camera with fewer bits."""
    bits = high.bit_length()
    if not 0 < bits <= 14 or bits in _depths_warned_of:
        return
    _depths_warned_of.add(bits)
    logger.warning(
        "%s has 16 bits but no value above %d, as if it was taken with %d bits. It becomes nearly black, with %d of 256 "
        "levels. If so, multiply its values by %d before saving. (Further images of %d bits are not reported.)",
        name,
        high,
        bits,
        round(high * 255 / 65535) + 1,
        2 ** (16 - bits),
        bits,
    )


def normalize_levels(levels: torch.Tensor, scale: float, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Rescale and normalize 8-bit levels: (levels * scale - mean) / std, in float32.

    Args:
        levels: (3, height, width).
        scale: rescale factor, usually 1 / 255.
        mean, std: (3, 1, 1).
    """
    return (levels * scale).sub_(mean).div_(std)


class CLCAImagesKwargs(ImagesKwargs, total=False):
    """Arguments of `CLCAImageProcessor` in addition to those of transformers' image processors."""

    crop_pct: float | list[float] | tuple[float, float] | None


class CLCAImageProcessor(ViTImageProcessorPil):
    """Convert images to `pixel_values` (B, 3, height, width), float32, as in training and evaluation. Does not need
    torchvision.

    Args:
        size: height and width of the model's input in pixels, or its `shortest_edge` for images that keep their aspect
            ratio.
        crop_pct: share of the resized image that the center crop keeps, in (0, 1], or a pair for height and width. The
            image is resized to `round(size / crop_pct)` and then cropped. None: resize to `size`, do not crop.
        kwargs: as for `ViTImageProcessor`. `do_center_crop` with a `crop_size` not larger than `size` means the same
            as there: `crop_size` becomes `size`, and `crop_pct` their ratio.

    Raises:
        ValueError: if `crop_pct` is out of range.
    """

    valid_kwargs = CLCAImagesKwargs
    crop_pct: float | list[float] | None = None

    @property
    def resize_size(self) -> tuple[int, int]:
        """Height and width that images are resized to before the crop, in pixels.

        Raises:
            ValueError: if `size` is not a height and a width.
        """
        resized = _before_crop(self.size, self.crop_pct)
        if "height" not in resized or "width" not in resized:
            raise ValueError(f"`size` of the image processor must be a height and a width, got {resized}.")
        return resized["height"], resized["width"]

    def to_dict(self) -> dict[str, Any]:
        """Return the values to save.

        The type is saved as `ViTImageProcessor`: clients that do not run the code of a model folder load this class,
        which does not crop."""
        return super().to_dict() | {"image_processor_type": "ViTImageProcessor"}

    @staticmethod
    def open_image(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
        """Open an image file as upright 8-bit RGB. Use it with pipelines, whose own loader mishandles 16-bit images
        and alpha channels."""
        return open_image(source)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open local files in a nested list of images, files and URLs."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Convert an image to an array (channels, height, width). Pillow images become RGB, see `to_rgb`; arrays stay
        unchanged."""
        if isinstance(image, Image.Image):
            return np.asarray(to_rgb(image)).transpose(2, 0, 1)
        image = super().process_image(image, *args, **kwargs)
        return image.repeat(3, axis=0) if len(image) == 1 else image

    def _standardize_kwargs(
        self,
        *args: Any,
        crop_pct: float | Sequence[float] | None = None,
        do_resize: bool | None = None,
        do_center_crop: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(*args, **kwargs)
        size, crop = (None if kwargs[name] is None else dict(kwargs[name]) for name in ("size", "crop_size"))
        if do_resize and do_center_crop and size and crop:
            edge = size.get("shortest_edge")
            if size.keys() == crop.keys() and all(crop[side] <= size[side] for side in crop):
                crop_pct = [crop["height"] / size["height"], crop["width"] / size["width"]]
                kwargs |= {"size": kwargs["crop_size"], "crop_size": None}
                do_center_crop = None
            elif crop_pct is None and [*size] == ["shortest_edge"] and crop["height"] == crop["width"] < edge:
                crop_pct = crop["height"] / edge
                kwargs["size"] = SizeDict(shortest_edge=crop["height"])
        if crop_pct is not None:
            crop_pct = [float(share) for share in _pair(crop_pct)]
            if len(crop_pct) != 2 or not all(0 < share <= 1 for share in crop_pct):
                raise ValueError(f"`crop_pct` must be in (0, 1], one number or height and width, got {crop_pct}.")
            crop_pct = crop_pct[0] if crop_pct[0] == crop_pct[1] else crop_pct
        return kwargs | {"crop_pct": crop_pct, "do_resize": do_resize, "do_center_crop": do_center_crop}

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool | None,
        crop_size: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float] | None,
        image_std: float | Sequence[float] | None,
        do_pad: bool | None = None,
        pad_size: Any = None,
        return_tensors: Any = None,
        *,
        crop_pct: float | Sequence[float] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
        processed = []
        for image in images:
            if do_resize:
                image = self.resize(image, SizeDict(**_before_crop(size, crop_pct)), resample)
            if do_resize and crop_pct is not None and size.height:
                top, left = (image.shape[1] - size.height) // 2, (image.shape[2] - size.width) // 2
                image = image[:, top : top + size.height, left : left + size.width]
            if do_center_crop:
                image = self.center_crop(image, crop_size)
            levels = torch.from_numpy(np.array(image, copy=True))
            levels = levels if levels.dtype == torch.uint8 else levels.to(torch.float32)
            processed.append(normalize_levels(levels, rescale_factor if do_rescale else 1.0, mean, std).numpy())
        if do_pad:
            processed = self.pad(processed, pad_size=pad_size)
        return BatchFeature(data={"pixel_values": processed}, tensor_type=return_tensors)


def _pair(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, Sequence) else (value, value)


def _before_crop(size: Any, crop_pct: float | Sequence[float] | None) -> dict[str, int]:
    """Return the size in pixels before the crop, of which the crop to `size` keeps the share `crop_pct`."""
    height, width = (1.0, 1.0) if crop_pct is None else _pair(crop_pct)
    shares = {"width": width, "max_width": width}
    return {
        side: round(pixels / shares.get(side, height)) for side, pixels in dict(size).items() if pixels is not None
    }
