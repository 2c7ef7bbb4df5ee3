"""Image preprocessing for training and evaluation: from an image to `pixel_values`.

Both transforms read all sizes and constants from the image processor that is saved with the model, so they always match its
`preprocessor_config.json`. `crop_pct` is the ratio of the crop size to the resized size:

    evaluation   upright RGB -> resize to a square -> center crop `size` -> rescale -> normalize
    training     upright RGB -> resize to a square -> random crop `size` -> horizontal flip -> rescale -> normalize

The resize does not keep the aspect ratio, as in the original code. For further training augmentation, see
`ufgir.transforms.augmentation`.

All random decisions are drawn from a generator seeded with (seed, epoch, sample index). A sample therefore does not depend on the
number of workers or processes, or on whether training was resumed.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import IMAGE_PROCESSOR_NAME

from clca.image_processing_clca import CLCAImageProcessor, normalize_levels

from ..utils.text import one_sentence
from .images import to_rgb


logger = logging.getLogger(__name__)


def read_image_processor(source: str | os.PathLike[str], revision: str | None = None) -> Any:
    """Load the image processor of a model without torchvision and without remote code.

    Args:
        source: folder or Hub repository.
        revision: revision of the Hub repository.

    Returns:
        A `CLCAImageProcessor` for image processors of this project (any version) and of ViT. Otherwise an instance of the transformers
        class named in the file, in its Pillow variant if there is one.

    Raises:
        OSError: if the folder or repository does not exist, or has no image processor.
        ValueError: if the file is invalid or names an unknown class.
    """
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        if not isinstance(values, dict):
            raise ValueError(f"it must hold a JSON object, got a {type(values).__name__}.")
        named = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
        kind = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
        if kind == "ViTImageProcessor":
            found = CLCAImageProcessor.from_dict(values)
        elif kind.endswith("ImageProcessor") and (known := getattr(transformers, f"{kind}Pil", None)) is not None:
            found = known.from_dict(values)
        else:
            found = AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        _check_numbers(found)
    except OSError as error:
        if not Path(source, IMAGE_PROCESSOR_NAME).exists():
            raise
        raise ValueError(f"the {IMAGE_PROCESSOR_NAME} of {source} cannot be read: {one_sentence(error)}") from error
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # any content of the file
        raise ValueError(f"the {IMAGE_PROCESSOR_NAME} of {source} is invalid: {one_sentence(error)}") from error
    return found


def _check_numbers(image_processor: Any) -> None:
    """Refuse numbers that pixels cannot be made with.

    Raises:
        ValueError: naming the first.
    """
    for name in ("image_mean", "image_std"):
        values = getattr(image_processor, name)
        numbers = isinstance(values, list | tuple) and len(values) == 3 and all(map(_is_finite, values))
        if image_processor.do_normalize and not (numbers and (name == "image_mean" or min(values) > 0)):
            allowed = "finite numbers" if name == "image_mean" else "positive, finite numbers"
            raise ValueError(f"`{name}` must be three {allowed}, for red, green and blue, got {values}.")
    factor = image_processor.rescale_factor
    if image_processor.do_rescale and not (_is_finite(factor) and factor > 0):
        raise ValueError(f"`rescale_factor` must be a positive, finite number, got {factor}.")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def make_image_processor(
    image_size: int,
    resize_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    saved: Any = None,
) -> CLCAImageProcessor:
    """Create an image processor that resizes to a square with bicubic interpolation and crops the center, as the original evaluation.

    Args:
        image_size: side of the crop and of the model's input, pixels.
        resize_size: side of the square before the crop, pixels. None for that of `saved` if its crop size is `image_size`, and
            `int(image_size / 0.875)` otherwise.
        image_mean: three numbers in [0, 1] for red, green and blue. None for those of `saved`, or of ImageNet.
        image_std: likewise.
        saved: image processor of the model that is fine-tuned, see `ufgir.checkpoints.load_image_processor`.

    Raises:
        ValueError: if `resize_size` is smaller than `image_size`, or mean or std are not three numbers.
    """
    if resize_size is None:
        resize_size = int(image_size / 0.875)
        before, after = (None, None) if saved is None else sizes_of(saved)
        if before != after and after[0] == image_size:
            resize_size = before[0]
    if resize_size < image_size:
        raise ValueError(f"`resize_size` must be at least `image_size`, {image_size}, got {resize_size}.")
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None and (len(values) != 3 or (name == "image_std" and min(values) <= 0)):
            raise ValueError(f"`{name}` must be three numbers, for red, green and blue, got {list(values)}.")
    return CLCAImageProcessor(
        do_convert_rgb=True,
        size={"height": image_size, "width": image_size},
        crop_pct=image_size / resize_size,
        resample=Image.Resampling.BICUBIC,
        image_mean=list(image_mean or (saved.image_mean if saved else IMAGENET_DEFAULT_MEAN)),
        image_std=list(image_std or (saved.image_std if saved else IMAGENET_DEFAULT_STD)),
    )


def sizes_of(image_processor: Any) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the (height, width) to which an image processor resizes images, and the (height, width) after the center crop, pixels.

    None for a size that is not given by height and width, such as one given by the shortest edge.
    """
    size = _height_and_width(image_processor.size)
    if size is not None and getattr(image_processor, "crop_pct", None) is not None:
        return image_processor.resize_size, size
    crops = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size is not None
    return size, _height_and_width(image_processor.crop_size) if crops else size


def _height_and_width(size: Any) -> tuple[int, int] | None:
    values = dict(size) if size is not None else {}
    height, width = values.get("height"), values.get("width")
    return None if height is None or width is None else (int(height), int(width))


def normalization(image_processor: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return (scale, mean, std), where `pixel_values` = (8-bit levels * scale - mean) / std."""
    scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else ([0], [1])
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return scale, mean, std


class _Transform:
    """Base class of both transforms: sizes and constants read from an image processor.

    Args:
        image_processor: a `CLCAImageProcessor`, or another one that resizes and crops to squares.

    Raises:
        ValueError: if a size is not a square, or the crop is larger than the resized image.
    """

    def __init__(self, image_processor: Any) -> None:
        before, after = sizes_of(image_processor)
        for size in (before, after):
            if size is None or size[0] != size[1]:
                raise ValueError(
                    "`size` and `crop_size` of the image processor must be squares with 'height' and 'width', got "
                    f"{image_processor.size} and {image_processor.crop_size}."
                )
        self.resize_size, self.crop_size = before[0], after[0]  # pixels
        if self.crop_size > self.resize_size:
            raise ValueError(
                f"`crop_size` ({self.crop_size}) must not be larger than `size` ({self.resize_size}), both in pixels."
            )
        self.resample = int(image_processor.resample)
        self.scale, self.mean, self.std = normalization(image_processor)

    def _resize(self, image: Image.Image) -> Image.Image:
        return to_rgb(image).resize((self.resize_size, self.resize_size), resample=self.resample)

    def _crop(self, image: Image.Image, top: int, left: int) -> Image.Image:
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))

    @staticmethod
    def _levels(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())  # (3, H, W), uint8

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        return normalize_levels(self._levels(image), self.scale, self.mean, self.std)  # (3, H, W), float32


class EvalTransform(_Transform):
    """Resize to a square and crop the center, with the same result as the image processor."""

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """Transform an image of any mode and size to (3, crop_size, crop_size), float32. `generator` is ignored."""
        margin = (self.resize_size - self.crop_size) // 2
        return self._to_tensor(self._crop(self._resize(image), margin, margin))


def random_rectangle(
    generator: np.random.Generator, height: int, width: int, areas: Sequence[float], aspects: Sequence[float]
) -> tuple[int, int, int, int] | None:
    """Draw a random rectangle inside an image.

    Args:
        generator: random generator.
        height: image height, pixels.
        width: image width, pixels.
        areas: smallest and largest share of the image's area; uniform.
        aspects: smallest and largest height / width; log-uniform.

    Returns:
        Top, left, height and width in pixels, or None if ten rectangles did not fit.
    """
    areas_drawn = height * width * generator.uniform(*areas, size=10)
    ratios = np.exp(generator.uniform(*np.log(aspects), size=10))
    heights = np.maximum(np.sqrt(areas_drawn * ratios).round().astype(int), 1)
    widths = np.maximum(np.sqrt(areas_drawn / ratios).round().astype(int), 1)
    fitting = np.flatnonzero((heights <= height) & (widths <= width))
    if len(fitting) == 0:
        return None
    own_height, own_width = int(heights[fitting[0]]), int(widths[fitting[0]])
    top, left = generator.integers(0, [height - own_height + 1, width - own_width + 1])
    return int(top), int(left), own_height, own_width


class RandomDraws(Protocol):
    """The interface of an augmentation that `TrainTransform` uses: draw the random numbers of one image."""

    def draw(self, generator: np.random.Generator) -> torch.Tensor: ...


class TrainTransform(_Transform):
    """Resize to a square, crop at a random position and flip horizontally at random.

    Args:
        image_processor: see `_Transform`.
        flip_probability: probability of a horizontal flip, in [0, 1].
        random_resized_crop: if given, crop a random rectangle of at least this share of the image's area, in (0, 1], with an aspect
            ratio of 3:4 to 4:3, and resize it (https://huggingface.co/papers/1409.4842).
        augmentation: the augmentation that is applied later, see `ufgir.transforms.augmentation`.
    """

    def __init__(
        self,
        image_processor: Any,
        flip_probability: float = 0.5,
        random_resized_crop: float | None = None,
        augmentation: RandomDraws | None = None,
    ) -> None:
        super().__init__(image_processor)
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"`flip_probability` must be in [0, 1], got {flip_probability}.")
        if random_resized_crop is not None and not 0 < random_resized_crop <= 1:
            raise ValueError(f"`random_resized_crop` must be in (0, 1], got {random_resized_crop}.")
        self.flip_probability = flip_probability
        self.random_resized_crop = random_resized_crop
        self.augmentation = augmentation

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor | dict[str, torch.Tensor]:
        """Transform an image of any mode and size to (3, crop_size, crop_size), with random numbers from `generator`.

        Returns:
            float32, normalized; with an augmentation, `{"pixel_values": uint8, not normalized, "draws": (D,)}` instead.
        """
        if self.random_resized_crop is None:
            top, left = generator.integers(0, self.resize_size - self.crop_size + 1, size=2)
            image = self._crop(self._resize(image), int(top), int(left))
        else:
            image = self._resize_random_crop(to_rgb(image), generator)
        if generator.random() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augmentation is None:
            return self._to_tensor(image)
        return {"pixel_values": self._levels(image), "draws": self.augmentation.draw(generator)}

    def _resize_random_crop(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        width, height = image.size
        box = random_rectangle(generator, height, width, (self.random_resized_crop, 1.0), (3 / 4, 4 / 3))
        if box is None:  # very long image: the largest centered rectangle with an allowed aspect ratio
            own_height, own_width = min(height, math.ceil(width * 4 / 3)), min(width, math.ceil(height * 4 / 3))
            box = (height - own_height) // 2, (width - own_width) // 2, own_height, own_width
        top, left, own_height, own_width = box
        corners = (left, top, left + own_width, top + own_height)
        return image.resize((self.crop_size, self.crop_size), resample=self.resample, box=corners)


class ImageTransform(Protocol):
    """The interface of a transform for `TransformedImages`: an image and a generator to (3, H, W) or several columns."""

    def __call__(
        self, image: Image.Image, generator: np.random.Generator
    ) -> torch.Tensor | dict[str, torch.Tensor]: ...
