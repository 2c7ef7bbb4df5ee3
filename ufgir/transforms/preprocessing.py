"""From a picture to `pixel_values`, for training and for evaluation.

Both transforms take every number from the image processor that is saved with the model, so a model and its
`preprocessor_config.json` cannot disagree. Its `crop_pct` is the ratio of the two squares:

    evaluation   upright RGB -> resize to a square -> centre crop `size` -> rescale -> normalise
    training     upright RGB -> resize to a square -> random crop `size` -> horizontal flip -> rescale -> normalise

The resize does not keep the aspect ratio: the original squashes every picture into a square. What training may do
besides is `ufgir.transforms.augmentation`.

Random decisions come from a generator seeded with (seed, epoch, sample index) and from nothing else. A sample therefore
looks the same whatever the number of workers or processes, and whether or not training was interrupted before it.
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
    """Load the image processor of a model, without torchvision and without running code of the model's folder.

    Args:
        source: folder or Hub repository.
        revision: of the Hub repository.

    Returns:
        A `CLCAImageProcessor` for those of this project, of any version, and of ViT. Otherwise transformers' class that the
        file names, its Pillow variant where it has one.

    Raises:
        OSError: there is no such folder or repository, or it has no image processor.
        ValueError: the file is invalid, or names a class that transformers does not have.
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
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:  # whatever stands in the file
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
    """An image processor that resizes to a square, bicubic, and crops the centre: evaluation as the original does it.

    Args:
        image_size: side of the crop and of the model's input, pixels.
        resize_size: side of the square, pixels; by default that of `saved` if its crop has this `image_size`, or else
            `int(image_size / 0.875)`.
        image_mean, image_std: three numbers each, of red, green and blue in [0, 1]; by default those of `saved`, or
            ImageNet's.
        saved: image processor of the model that is trained on, see `ufgir.checkpoints.load_image_processor`.

    Raises:
        ValueError: `resize_size` is smaller than `image_size`, or not three numbers.
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
    """What an image processor resizes images to, and what is left after the centre crop: height and width each, pixels.

    None stands for a size that is not given by height and width, such as one by the shortest edge.
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
    """(scale, mean, std): 8-bit levels times scale, less the mean, over the std, are `pixel_values`."""
    scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = (image_processor.image_mean, image_processor.image_std) if image_processor.do_normalize else ([0], [1])
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return scale, mean, std


class _Transform:
    """The numbers that both transforms share, read from an image processor.

    Args:
        image_processor: a `CLCAImageProcessor`, or another one that resizes and crops to squares.

    Raises:
        ValueError: a size is not a square, or the crop is larger than the resized picture.
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
