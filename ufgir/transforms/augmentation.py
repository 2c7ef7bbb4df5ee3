"""Random augmentation of training images and their labels.

    crop, flip                              `ufgir.transforms.preprocessing.TrainTransform`, in a worker process
    TrivialAugment or RandAugment, erasing  `Augmentation`, in a worker process or on the device
    MixUp or CutMix, label smoothing        `Augmentation`, likewise

The data set draws all random numbers of a sample from a generator seeded with (seed, epoch, sample index, copy), and returns them
with the sample as a vector, `draws`. `Augmentation` applies them without further randomness. The result therefore does not depend
on the process, the device or the batch that augments a sample, or on whether training was resumed.

In MixUp and CutMix, the partner of an image is its neighbor in the order of the sampler: the first is mixed with the second, the
third with the fourth. The order depends on the seed and the epoch. Batches per process must have an even size, so that a pair is
always in one batch and partners do not depend on the number of processes. The only exception is the last, incomplete batch of an
epoch, which several processes fill with images from the beginning of the epoch.
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from ..utils.arguments import option
from ..utils.extras import install_command
from ..utils.options import OptionGroup, Requirement
from .operations import HIGHEST_LEVEL, apply_operations, draw_operation, from_levels, to_levels
from .preprocessing import TrainTransform, normalization, random_rectangle


@dataclass
class AugmentationArguments(OptionGroup):
    """Random augmentation of the training images. The defaults are those of the paper: random crop and flip only."""

    _argument_group_name = "augmentation"

    flip_probability: float = option("probability of a horizontal flip", 0.5)
    random_resized_crop: float | None = option(
        "crop a random rectangle of at least this share of the image's area, in (0, 1], instead of a random crop of the "
        "resized square; its aspect ratio is between 3:4 and 4:3 [none]"
    )
    trivial_augment: bool = option(
        "TrivialAugment (wide): one of 14 operations per image, at random strength; needs kornia", False
    )
    rand_augment_ops: int = option("RandAugment: number of operations per image, 0 for none; needs kornia", 0)
    rand_augment_magnitude: int = option("RandAugment: strength of the operations, 0 to 30", 9)
    augment_interpolation: str = option(
        "interpolation for shear, translation and rotation: nearest, as in TrivialAugment, or bilinear", "nearest"
    )
    random_erasing_probability: float = option("probability of erasing a random rectangle", 0.0)
    random_erasing_area: list[float] = field(
        default_factory=lambda: [0.02, 0.4],
        metadata={"help": "random erasing: smallest and largest share of the image's area [0.02 0.4]"},
    )
    random_erasing_aspect: list[float] = field(
        default_factory=lambda: [0.3, 3.3],
        metadata={"help": "random erasing: smallest and largest height / width [0.3 3.3]"},
    )
    random_erasing_count: int = option(
        "random erasing: number of rectangles per image, each erased with the given probability", 1
    )
    random_erasing_fill: str = option("random erasing: mean, the color image_mean, or noise", "mean")
    repeated_augmentation: int = option(
        "number of consecutive, differently augmented copies of an image; the number of steps per epoch is unchanged, so "
        "an epoch uses that many times fewer images",
        1,
    )
    mixup_alpha: float = option("MixUp: draw the weight of an image from Beta(alpha, alpha); 0 for no MixUp", 0.0)
    cutmix_alpha: float = option("CutMix: draw the area of the image from Beta(alpha, alpha); 0 for no CutMix", 0.0)
    mix_probability: float = option("probability that an image is mixed with another, by MixUp or CutMix", 1.0)
    mix_switch_probability: float = option("probability of CutMix rather than MixUp if both are enabled", 0.5)
    label_smoothing: float = option(
        "share of the target that is distributed evenly over all classes, in [0, 1); replaces transformers' "
        "label_smoothing_factor",
        0.0,
    )
    augmentation_device: str = option(
        "where to augment images after crop and flip: cpu, in the data loader's worker processes; device, on the device "
        "of the model; auto, device unless that is a CPU",
        "auto",
    )

    requirements = (
        Requirement(
            ("random_erasing_area", "random_erasing_aspect", "random_erasing_count", "random_erasing_fill"),
            "`random_erasing_probability`",
            lambda group: group.random_erasing_probability,
        ),
        Requirement(("rand_augment_magnitude",), "`rand_augment_ops`", lambda group: group.rand_augment_ops),
        Requirement(
            ("mix_probability", "mix_switch_probability"),
            "`mixup_alpha` or `cutmix_alpha`",
            lambda group: group.mixup_alpha or group.cutmix_alpha,
        ),
        Requirement(
            ("rand_augment_ops",), "`trivial_augment` false", lambda group: not group.trivial_augment, refused=True
        ),
    )

    def __post_init__(self) -> None:
        for name in (
            "flip_probability",
            "random_erasing_probability",
            "mix_probability",
            "mix_switch_probability",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if self.random_resized_crop is not None and not 0 < self.random_resized_crop <= 1:
            raise ValueError(f"`random_resized_crop` must be in (0, 1], got {self.random_resized_crop}.")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        for name, least in (("rand_augment_ops", 0), ("random_erasing_count", 1), ("repeated_augmentation", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.rand_augment_magnitude <= HIGHEST_LEVEL:
            raise ValueError(
                f"`rand_augment_magnitude` must be from 0 to {HIGHEST_LEVEL}, got {self.rand_augment_magnitude}."
            )
        for name, largest in (("random_erasing_area", 1), ("random_erasing_aspect", float("inf"))):
            values = getattr(self, name)
            if len(values) != 2 or not 0 < values[0] <= values[1] <= largest or values[1] == float("inf"):
                below = f", both in (0, {largest}]" if name == "random_erasing_area" else ", both positive"
                raise ValueError(f"`{name}` must be two numbers, the smaller first{below}, got {values}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {self.label_smoothing}.")
        for name, allowed in (
            ("augment_interpolation", ("nearest", "bilinear")),
            ("random_erasing_fill", ("mean", "noise")),
            ("augmentation_device", ("auto", "cpu", "device")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(allowed)}, got {getattr(self, name)!r}.")
        super().__post_init__()
        if (self.trivial_augment or self.rand_augment_ops) and importlib.util.find_spec("kornia") is None:
            name = "trivial_augment" if self.trivial_augment else "rand_augment_ops"
            raise ValueError(f"`{name}` needs kornia: {install_command('augmentation')}")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def num_operations(self) -> int:
        """Number of operations per image."""
        return 1 if self.trivial_augment else self.rand_augment_ops

    @property
    def num_erasings(self) -> int:
        """Maximal number of erased rectangles per image."""
        return self.random_erasing_count if self.random_erasing_probability > 0 else 0

    @property
    def beyond_crop_and_flip(self) -> bool:
        """Whether any augmentation other than crop and flip is enabled."""
        return bool(self.num_operations or self.num_erasings or self.mixes or self.label_smoothing)

    def check(self, args: TrainingArguments) -> None:
        """Check the compatibility with the arguments of Trainer.

        Raises:
            ValueError: if `label_smoothing_factor` is set, images are mixed in batches of odd size, repeated augmentation is combined with a
                sampling strategy other than random, or unused columns are removed.
        """
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` must be 0, got {args.label_smoothing_factor}. Use `label_smoothing` instead: transformers' "
                "option ignores the losses of reductions, heads and teachers."
            )
        if self.mixes and args.per_device_train_batch_size % 2:
            raise ValueError(
                "`per_device_train_batch_size` must be even, since `mixup_alpha` and `cutmix_alpha` mix neighbors, "
                f"got {args.per_device_train_batch_size}."
            )
        if self.beyond_crop_and_flip and args.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be false, since the draws of an image are a column.")
        if self.repeated_augmentation > 1 and args.train_sampling_strategy != "random":
            raise ValueError(
                "`train_sampling_strategy` must be random with `repeated_augmentation`, which has a sampler of its "
                f"own, got {args.train_sampling_strategy}."
            )


class Augmentation:
    """Draws the random numbers for the augmentation of an image, and applies them to a batch.

    The draws of an image are a vector of D numbers in this order; D depends on the arguments:

        operations   index and value of each operation, see `ufgir.transforms.operations.apply_operations`
        erasings     top, left, height, width and noise seed of each rectangle; an empty one erases nothing
        mixing       weight of the image in MixUp; top, left, height, width of the area replaced by the partner in CutMix

    Args:
        arguments: the augmentation options.
        image_processor: gives size, mean and std of the images.
        num_labels: K, the number of classes.
    """

    def __init__(self, arguments: AugmentationArguments, image_processor: Any, num_labels: int) -> None:
        self.arguments = arguments
        self.size = TrainTransform(image_processor).crop_size  # pixels
        self.scale, self.mean, self.std = normalization(image_processor)
        self.num_labels = num_labels

    def draw(self, generator: np.random.Generator) -> torch.Tensor:
        """Draw the random numbers of one image, (D,), float32."""
        options = self.arguments
        draws: list[float] = []
        for _ in range(options.num_operations):
            level = None if options.trivial_augment else options.rand_augment_magnitude
            draws += draw_operation(generator, self.size, level)
        for _ in range(options.num_erasings):
            wanted = generator.random() < options.random_erasing_probability
            limits = (options.random_erasing_area, options.random_erasing_aspect)
            rectangle = random_rectangle(generator, self.size, self.size, *limits) if wanted else None
            draws += [
                *(rectangle or (0, 0, 0, 0)),
                generator.integers(2**24),
            ]  # a seed that float32 represents exactly
        if options.mixes:
            draws += self._draw_mixing(generator)
        return torch.tensor(draws, dtype=torch.float32)

    def _draw_mixing(self, generator: np.random.Generator) -> list[float]:
        options = self.arguments
        wanted, switch = generator.random(2)
        if wanted >= options.mix_probability:
            return [1, 0, 0, 0, 0]
        cutmix = options.cutmix_alpha > 0
        if options.mixup_alpha > 0 and switch >= options.mix_switch_probability:
            cutmix = False
        alpha = options.cutmix_alpha if cutmix else options.mixup_alpha
        weight = generator.beta(alpha, alpha)
        if not cutmix:
            return [weight, 0, 0, 0, 0]
        side = round(self.size * math.sqrt(1 - weight))
        start = generator.integers(self.size, size=2) - side // 2
        start, end = np.clip(start, 0, self.size), np.clip(start + side, 0, self.size)
        return [1, *start, *(end - start)]

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, draws: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Augment a batch on its device.

        Args:
            pixel_values: (B, 3, H, W), uint8, cropped and flipped.
            draws: (B, D), see `draw`.
            labels: classes (B,), or zeros and ones (B, K) for multi-label data, or None.

        Returns:
            Images (B, 3, H, W), float32, normalized, and the labels: (B, K) float32 if they were mixed or smoothed.
        """
        draws = draws.cpu()
        # On a CPU, one image at a time is faster, since it fits into the CPU cache.
        size = 1 if pixel_values.device.type == "cpu" else len(pixel_values)
        parts = zip(pixel_values.split(size), draws.split(size), strict=True)
        pixels = torch.cat([self.change_images(*part) for part in parts])
        if not self.arguments.mixes:
            return pixels, self._soft_labels(labels)
        partners = [
            min(index ^ 1, len(pixels) - 1) for index in range(len(pixels))
        ]  # the last image of an odd batch has itself as partner
        pixels, shares = self._mix(pixels, partners, draws[:, -5:])
        return pixels, self._soft_labels(labels, partners, shares)

    def change_images(self, pixel_values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Apply the operations, normalization and erasing of each image. Arguments as in `__call__`."""
        options = self.arguments
        pixels = from_levels(pixel_values)
        for i in range(options.num_operations):
            if i > 0:
                pixels = from_levels(to_levels(pixels))
            operations, values = draws[:, 2 * i : 2 * i + 2].unbind(1)
            pixels = apply_operations(pixels, operations, values, options.augment_interpolation)
        mean, std = self.mean.to(pixels.device), self.std.to(pixels.device)
        pixels = (pixels * (255 * self.scale)).sub_(mean).div_(std)
        for i in range(options.num_erasings):
            first = 2 * options.num_operations + 5 * i
            self._erase(pixels, draws[:, first : first + 5])
        return pixels

    def _erase(self, pixels: torch.Tensor, rectangles: torch.Tensor) -> None:
        """Fill a rectangle of each image in place. After normalization, zero is the mean color."""
        for image, rectangle in zip(pixels, rectangles.int().tolist(), strict=True):
            top, left, height, width, seed = rectangle
            if height * width == 0:
                continue
            area = image[:, top : top + height, left : left + width]
            if self.arguments.random_erasing_fill == "mean":
                area.zero_()
            else:
                noise = np.random.default_rng(seed).standard_normal(area.shape, dtype=np.float32)
                area.copy_(torch.from_numpy(noise))

    def _mix(
        self, pixels: torch.Tensor, partners: Sequence[int], mixing: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        """Mix images with their partners; return them and the share of each original image."""
        mixed, shares = pixels.clone(), []
        for image, original, partner, draws in zip(mixed, pixels, pixels[partners], mixing.tolist(), strict=True):
            weight, (top, left, height, width) = draws[0], map(int, draws[1:])
            if weight < 1:
                image.copy_(weight * original + (1 - weight) * partner)
            area = (slice(None), slice(top, top + height), slice(left, left + width))
            image[area] = partner[area]
            shares.append(weight * (1 - height * width / image[0].numel()))  # one of the two factors is 1
        return mixed, shares

    def _soft_labels(
        self, labels: torch.Tensor | None, partners: Sequence[int] = (), shares: Sequence[float] = ()
    ) -> torch.Tensor | None:
        """Mix labels as the images, then smooth them. Classes (B,) become (B, K), unless neither applies."""
        smoothing = self.arguments.label_smoothing
        if labels is None or (not shares and smoothing == 0):
            return labels
        one_class = labels.dim() == 1
        targets = torch.nn.functional.one_hot(labels, self.num_labels).float() if one_class else labels
        if shares:
            share = torch.tensor(shares, device=labels.device)[:, None]
            targets = share * targets + (1 - share) * targets[partners]
        return (1 - smoothing) * targets + smoothing / (
            self.num_labels if one_class else 2
        )  # multi-label targets are binary
