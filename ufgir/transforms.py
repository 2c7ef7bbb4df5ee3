"""From a picture to `pixel_values`, for training and for evaluation.

Both transforms take every number from the image processor that is saved with the model, so a model and its
`preprocessor_config.json` cannot disagree:

    evaluation   RGB -> resize to the square `size` -> centre crop `crop_size` -> rescale -> normalise
    training     RGB -> resize to the square `size` -> random crop `crop_size` -> horizontal flip -> rescale -> normalise

The resize does not keep the aspect ratio: the original squashes every picture into a square.

Random decisions come from a generator seeded with (seed, epoch, sample index) and from nothing else. A sample therefore
looks the same whatever the number of workers or processes, and whether or not training was interrupted before it.
"""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, TrainerCallback, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB. Transparent pixels are laid over white, as transformers' image processors do."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, (255, 255, 255, 255))
        canvas.alpha_composite(image)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _side(name: str, size: Any) -> int:
    """The edge in pixels of a square `size` or `crop_size` of an image processor; ValueError if it is not a square."""
    height = size.get("height") if isinstance(size, dict) else getattr(size, "height", None)
    width = size.get("width") if isinstance(size, dict) else getattr(size, "width", None)
    if height is None or height != width:
        raise ValueError(f"`{name}` of the image processor must be a square with 'height' and 'width', got {size}.")
    return int(height)


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
        self.scale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        self.mean = np.asarray(image_processor.image_mean if image_processor.do_normalize else [0.0], dtype=np.float32)
        self.std = np.asarray(image_processor.image_std if image_processor.do_normalize else [1.0], dtype=np.float32)

    def _resize(self, image: Image.Image) -> Image.Image:
        return to_rgb(image).resize((self.resize_size, self.resize_size), resample=self.resample)

    def _crop(self, image: Image.Image, top: int, left: int) -> Image.Image:
        return image.crop((left, top, left + self.crop_size, top + self.crop_size))

    def _to_tensor(self, image: Image.Image) -> torch.Tensor:
        pixels = (np.asarray(image, dtype=np.float64) * self.scale).astype(np.float32)  # (H, W, 3)
        pixels = (pixels - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, H, W)


class EvalTransform(_Transform):
    """Resize to a square, crop the centre: what calling the image processor itself gives."""

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        """A picture of any mode and size -> (3, crop_size, crop_size), float32. `generator` is not used."""
        margin = (self.resize_size - self.crop_size) // 2
        return self._to_tensor(self._crop(self._resize(image), margin, margin))


class TrainTransform(_Transform):
    """Resize to a square, crop anywhere, flip left to right.

    Args:
        image_processor: see `_Transform`.
        flip_probability: chance of a horizontal flip, in [0, 1].
    """

    def __init__(self, image_processor: Any, flip_probability: float = 0.5) -> None:
        super().__init__(image_processor)
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"`flip_probability` must be in [0, 1], got {flip_probability}.")
        self.flip_probability = flip_probability

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        """A picture of any mode and size -> (3, crop_size, crop_size), float32, all chance drawn from `generator`."""
        top, left = generator.integers(0, self.resize_size - self.crop_size + 1, size=2)
        image = self._crop(self._resize(image), int(top), int(left))
        if generator.random() < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._to_tensor(image)


def random_subset(dataset: Any, count: int | None, seed: int) -> Any:
    """`count` rows of a `datasets.Dataset`, drawn at random and in their old order; all rows if `count` is None."""
    if count is None or count >= len(dataset):
        return dataset
    if count < 1:
        raise ValueError(f"the number of images to use must be at least 1, got {count}")
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:count]))


class ImageTransform(Protocol):
    """What `TransformedImages` applies: a picture and a generator in, (3, H, W) out."""

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor: ...


class TransformedImages(torch.utils.data.Dataset):
    """A map-style dataset of `{"pixel_values": (3, H, W) float32, "labels": int}`, the columns a model takes.

    Args:
        dataset: rows are dicts, e.g. a `datasets.Dataset`.
        transform: `TrainTransform` or `EvalTransform`.
        seed: first part of (seed, epoch, index), a non-negative integer.
        image_column: name of the column of PIL pictures.
        label_column: name of the column of class indices.
    """

    def __init__(
        self,
        dataset: Any,
        transform: ImageTransform,
        seed: int = 0,
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.image_column = image_column
        self.label_column = label_column
        # Shared memory: worker processes that outlive an epoch see the change, whatever their start method.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that random decisions belong to."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Move on to `epoch`, in this process and in all workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a dataset of {len(self)} images")
        index = int(index) % len(self)
        row = self.dataset[index]
        generator = np.random.default_rng((self.seed, self.epoch, index))
        return {
            "pixel_values": self.transform(row[self.image_column], generator),
            "labels": int(row[self.label_column]),
        }


class SetEpoch(TrainerCallback):
    """Tells a `TransformedImages` which epoch begins, also when training resumes in the middle of one.

    (Trainer and accelerate forward the epoch to samplers, and to datasets only on some paths.)
    """

    def __init__(self, dataset: TransformedImages) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))
