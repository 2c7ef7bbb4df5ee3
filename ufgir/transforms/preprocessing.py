"""From a picture to `pixel_values`, for training and for evaluation.

Both transforms take every number from the image processor that is saved with the model, so a model and its
`preprocessor_config.json` cannot disagree:

    evaluation   upright RGB -> resize to the square `size` -> centre crop `crop_size` -> rescale -> normalise
    training     upright RGB -> resize to the square `size` -> random crop `crop_size` -> horizontal flip -> rescale -> normalise

The resize does not keep the aspect ratio: the original squashes every picture into a square. What training may do
besides is `ufgir.transforms.augmentation`.

Random decisions come from a generator seeded with (seed, epoch, sample index) and from nothing else. A sample therefore
looks the same whatever the number of workers or processes, and whether or not training was interrupted before it.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .images import to_rgb


logger = logging.getLogger(__name__)


def make_image_processor(
    image_size: int,
    resize_size: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    checkpoint: str | None = None,
    revision: str | None = None,
) -> ViTImageProcessorPil:
    """An image processor that resizes to a square, bicubic, and crops the centre: evaluation as the original does it.

    Args:
        image_size: side of the crop and of the model's input, pixels.
        resize_size: side of the square, pixels; by default the checkpoint's if its crop has this `image_size`, or else
            `int(image_size / 0.875)`.
        image_mean, image_std: three numbers each, of red, green and blue in [0, 1]; by default the checkpoint's, or
            ImageNet's.
        checkpoint: folder or Hub repository of a model; it may lack an image processor.
        revision: of the Hub repository.

    Raises:
        ValueError: `resize_size` is smaller than `image_size`, or not three numbers.
    """
    saved = None
    if checkpoint is not None:
        try:
            saved = AutoImageProcessor.from_pretrained(checkpoint, revision=revision)
        except (OSError, ValueError):
            logger.warning("%s has no image processor: ImageNet's mean and deviation are used", checkpoint)
    if resize_size is None:
        resize_size = int(image_size / 0.875)
        if saved is not None and saved.do_center_crop and saved.crop_size["height"] == image_size:
            resize_size = saved.size["height"] or resize_size
    if resize_size < image_size:
        raise ValueError(f"`resize_size` must be at least `image_size`, {image_size}, got {resize_size}.")
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None and (len(values) != 3 or (name == "image_std" and min(values) <= 0)):
            raise ValueError(f"`{name}` must be three numbers, for red, green and blue, got {list(values)}.")
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": resize_size, "width": resize_size},
        resample=Image.Resampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(image_mean or (saved.image_mean if saved else IMAGENET_DEFAULT_MEAN)),
        image_std=list(image_std or (saved.image_std if saved else IMAGENET_DEFAULT_STD)),
    )


def _side(name: str, size: Any) -> int:
    """The edge in pixels of a square `size` or `crop_size` of an image processor; ValueError if it is not a square."""
    height = size.get("height") if isinstance(size, dict) else getattr(size, "height", None)
    width = size.get("width") if isinstance(size, dict) else getattr(size, "width", None)
    if height is None or height != width:
        raise ValueError(f"`{name}` of the image processor must be a square with 'height' and 'width', got {size}.")
    return int(height)


def normalization(image_processor: Any) -> tuple[float, torch.Tensor, torch.Tensor]:
    """(scale, mean, deviation): 8-bit levels times scale, less the mean, over the deviation, are `pixel_values`."""
    scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else ([0], [1])
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return scale, mean, std


class _Transform:
    """The numbers that both transforms share, read from an image processor.

    Args:
        image_processor: one with a square `size`, a square `crop_size` (where it crops), `resample`, `image_mean`,
            `image_std` and `rescale_factor`, e.g. `ViTImageProcessorPil`.

    Raises:
        ValueError: a size is not a square, or the crop is larger than the resized picture.
    """

    def __init__(self, image_processor: Any) -> None:
        self.resize_size = _side("size", image_processor.size)  # pixels
        crops = getattr(image_processor, "do_center_crop", False) and image_processor.crop_size is not None
        self.crop_size = _side("crop_size", image_processor.crop_size) if crops else self.resize_size  # pixels
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
        return (self._levels(image) * self.scale).sub_(self.mean).div_(self.std)  # (3, H, W), float32


class EvalTransform(_Transform):
    """Resize to a square, crop the centre: what calling the image processor itself gives."""

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """A picture of any mode and size -> (3, crop_size, crop_size), float32. `generator` is not used."""
        margin = (self.resize_size - self.crop_size) // 2
        return self._to_tensor(self._crop(self._resize(image), margin, margin))


def random_rectangle(
    generator: np.random.Generator, height: int, width: int, areas: Sequence[float], aspects: Sequence[float]
) -> tuple[int, int, int, int] | None:
    """A random rectangle inside a picture.

    Args:
        generator: where chance comes from.
        height, width: of the picture, pixels.
        areas: smallest and largest share of the picture's area; all between are alike.
        aspects: smallest and largest height / width; all ratios between are alike.

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
    """What `TrainTransform` asks of an augmentation: the numbers that it will need for one image."""

    def draw(self, generator: np.random.Generator) -> torch.Tensor: ...


class TrainTransform(_Transform):
    """Resize to a square, crop anywhere, flip left to right.

    Args:
        image_processor: see `_Transform`.
        flip_probability: chance of a horizontal flip, in [0, 1].
        random_resized_crop: where given, crop a random rectangle of at least this share of the picture's area, in (0, 1],
            3:4 to 4:3 in shape, and resize that (https://huggingface.co/papers/1409.4842).
        augmentation: what happens to the image next, elsewhere, see `ufgir.transforms.augmentation`.
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
        """A picture of any mode and size -> (3, crop_size, crop_size), all chance drawn from `generator`.

        float32, normalised; with an augmentation instead `{"pixel_values": uint8, not normalised, "draws": (D,)}`.
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
        if box is None:  # a very long picture: as much of its middle as the shape allows
            own_height, own_width = min(height, math.ceil(width * 4 / 3)), min(width, math.ceil(height * 4 / 3))
            box = (height - own_height) // 2, (width - own_width) // 2, own_height, own_width
        top, left, own_height, own_width = box
        corners = (left, top, left + own_width, top + own_height)
        return image.resize((self.crop_size, self.crop_size), resample=self.resample, box=corners)


class ImageTransform(Protocol):
    """What `TransformedImages` applies: a picture and a generator in, (3, H, W) or several columns out."""

    def __call__(
        self, image: Image.Image, generator: np.random.Generator
    ) -> torch.Tensor | dict[str, torch.Tensor]: ...
