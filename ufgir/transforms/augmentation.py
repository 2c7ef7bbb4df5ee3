"""How training images are changed at random, and how their labels change with them.

    in the picture      crop, flip                              `ufgir.transforms.preprocessing.TrainTransform`, a worker process
    in the image        TrivialAugment or RandAugment, erasing  `Augmentation`, a worker process or the device
    between two images  MixUp or CutMix, label smoothing        `Augmentation`, likewise

What is done to a sample is drawn by the data set from (seed, epoch, sample index, copy) and from nothing else, and
travels with the sample as a row of numbers, `draws`. `Augmentation` only carries it out. So images do not depend on
where, in which process, or beside which others they are augmented, nor on whether training was interrupted before.

The partner of an image in MixUp and CutMix is its neighbour in the order of the sampler: the first with the second, the
third with the fourth. That order depends on the seed and the epoch. As long as the batch of a process is even, which
is asked for, a pair is never torn apart, and the number of processes changes no partner either. What is left: the last,
incomplete batch of an epoch, which several processes fill up with images from its beginning.
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
from ..utils.options import OptionGroup, Requirement
from .operations import HIGHEST_LEVEL, apply_operations, draw_operation, from_levels, to_levels
from .preprocessing import TrainTransform, normalization, random_rectangle


@dataclass
class AugmentationArguments(OptionGroup):
    """Random changes of the training images. The defaults are the paper's: random crop and flip, nothing else."""

    _argument_group_name = "augmentation"

    flip_probability: float = option("chance of a flip from left to right", 0.5)
    random_resized_crop: float | None = option(
        "crop a random rectangle of at least this share of the picture's area, in (0, 1], instead of the random crop "
        "from the resized square; its aspect ratio is between 3:4 and 4:3 [none]"
    )
    trivial_augment: bool = option(
        "TrivialAugment, wide: one of 14 operations an image, at random strength; needs kornia", False
    )
    rand_augment_ops: int = option("RandAugment: operations an image, 0 for none; needs kornia", 0)
    rand_augment_magnitude: int = option("RandAugment: strength of the operations, 0 to 30", 9)
    augment_interpolation: str = option(
        "pixels of sheared, moved and rotated images: nearest, as TrivialAugment, or bilinear", "nearest"
    )
    random_erasing_probability: float = option("chance of erasing a random rectangle", 0.0)
    random_erasing_area: list[float] = field(
        default_factory=lambda: [0.02, 0.4],
        metadata={"help": "random erasing: smallest and largest share of the image's area [0.02 0.4]"},
    )
    random_erasing_aspect: list[float] = field(
        default_factory=lambda: [0.3, 3.3],
        metadata={"help": "random erasing: smallest and largest height / width [0.3 3.3]"},
    )
    random_erasing_count: int = option("random erasing: rectangles an image, each with the probability", 1)
    random_erasing_fill: str = option("random erasing: mean, the colour image_mean, or noise", "mean")
    repeated_augmentation: int = option(
        "copies of an image, augmented differently, that stand together; an epoch has as many steps as without and "
        "sees that many times fewer images",
        1,
    )
    mixup_alpha: float = option("MixUp: the weight of an image is drawn from Beta(alpha, alpha); 0 for no MixUp", 0.0)
    cutmix_alpha: float = option("CutMix: the same for the area of the image; 0 for no CutMix", 0.0)
    mix_probability: float = option("chance that an image is mixed with another, by MixUp or CutMix", 1.0)
    mix_switch_probability: float = option("chance of CutMix rather than MixUp if both are on", 0.5)
    label_smoothing: float = option(
        "share of the target that all classes get alike, in [0, 1); instead of transformers' label_smoothing_factor",
        0.0,
    )
    augmentation_device: str = option(
        "where images are augmented after crop and flip: cpu, by the worker processes of the data; device, where the "
        "model is; auto, device unless that is a CPU",
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
            raise ValueError(f"`{name}` needs kornia: pip install 'clca-vit[augmentation]'.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with each other."""
        return self.mix_probability > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)

    @property
    def num_operations(self) -> int:
        """Operations an image."""
        return 1 if self.trivial_augment else self.rand_augment_ops

    @property
    def num_erasings(self) -> int:
        """Rectangles an image that may be erased."""
        return self.random_erasing_count if self.random_erasing_probability > 0 else 0

    @property
    def beyond_crop_and_flip(self) -> bool:
        """Whether there is anything for `Augmentation` to do."""
        return bool(self.num_operations or self.num_erasings or self.mixes or self.label_smoothing)

    def check(self, args: TrainingArguments) -> None:
        """What does not go together with the arguments of Trainer.

        Raises:
            ValueError: `label_smoothing_factor` is set; images are to be mixed in odd batches; copies of images are to be
                sampled in an order other than random; columns would be removed.
        """
        if args.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` must be 0, use `label_smoothing`: transformers' own leaves out the losses of "
                f"reductions, heads and teachers, got {args.label_smoothing_factor}."
            )
        if self.mixes and args.per_device_train_batch_size % 2:
            raise ValueError(
                "`per_device_train_batch_size` must be even, since `mixup_alpha` and `cutmix_alpha` mix neighbours, "
                f"got {args.per_device_train_batch_size}."
            )
        if self.beyond_crop_and_flip and args.remove_unused_columns:
            raise ValueError("`remove_unused_columns` must be false: what is drawn for an image is a column, too.")
        if self.repeated_augmentation > 1 and args.train_sampling_strategy != "random":
            raise ValueError(
                "`train_sampling_strategy` must be random with `repeated_augmentation`, which has a sampler of its "
                f"own, got {args.train_sampling_strategy}."
            )


class Augmentation:
    """Draws what happens to an image after crop and flip, and does it to a batch.

    The draws of an image are a row of D numbers, in this order and as many as the arguments ask for:

        operations   index and value, see `image_operations.apply_operations`, of each operation
        erasings     top, left, height, width and seed of the noise of each rectangle; an empty one erases nothing
        mixing       weight of the image in MixUp; top, left, height, width of what the partner covers in CutMix

    Args:
        arguments: what is wanted.
        image_processor: size, mean and deviation of the images, see `transforms`.
        num_labels: K, the number of classes.
    """

    def __init__(self, arguments: AugmentationArguments, image_processor: Any, num_labels: int) -> None:
        self.arguments = arguments
        self.size = TrainTransform(image_processor).crop_size  # pixels
        self.scale, self.mean, self.std = normalization(image_processor)
        self.num_labels = num_labels

    def draw(self, generator: np.random.Generator) -> torch.Tensor:
        """The draws of one image, (D,), float32."""
        options = self.arguments
        draws: list[float] = []
        for _ in range(options.num_operations):
            level = None if options.trivial_augment else options.rand_augment_magnitude
            draws += draw_operation(generator, self.size, level)
        for _ in range(options.num_erasings):
            wanted = generator.random() < options.random_erasing_probability
            limits = (options.random_erasing_area, options.random_erasing_aspect)
            rectangle = random_rectangle(generator, self.size, self.size, *limits) if wanted else None
            draws += [*(rectangle or (0, 0, 0, 0)), generator.integers(2**24)]  # a seed that float32 holds
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
        """Augment a batch, on the device it is on.

        Args:
            pixel_values: (B, 3, H, W), uint8, cropped and flipped.
            draws: (B, D), see `draw`.
            labels: classes (B,), or zeros and ones (B, K) for images of several classes, or None.

        Returns:
            (B, 3, H, W) float32, normalised, and the labels: (B, K) float32 if they were mixed or smoothed.
        """
        draws = draws.cpu()
        # A CPU is faster with one image at a time, which stays in its cache.
        size = 1 if pixel_values.device.type == "cpu" else len(pixel_values)
        parts = zip(pixel_values.split(size), draws.split(size), strict=True)
        pixels = torch.cat([self.change_images(*part) for part in parts])
        if not self.arguments.mixes:
            return pixels, self._soft_labels(labels)
        partners = [min(row ^ 1, len(pixels) - 1) for row in range(len(pixels))]  # a last one alone: itself
        pixels, shares = self._mix(pixels, partners, draws[:, -5:])
        return pixels, self._soft_labels(labels, partners, shares)

    def change_images(self, pixel_values: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """What is done to every image by itself: operations, normalisation, erasing. Arguments as `__call__`."""
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
        """Fill a rectangle of each image, in place. After normalisation zero is the mean colour."""
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
        """Images mixed with their partners, and the share of each that is its own."""
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
        """Labels mixed as the images were, then smoothed; classes (B,) become (B, K), unless nothing is to be done."""
        smoothing = self.arguments.label_smoothing
        if labels is None or (not shares and smoothing == 0):
            return labels
        one_class = labels.dim() == 1
        targets = torch.nn.functional.one_hot(labels, self.num_labels).float() if one_class else labels
        if shares:
            share = torch.tensor(shares, device=labels.device)[:, None]
            targets = share * targets + (1 - share) * targets[partners]
        return (1 - smoothing) * targets + smoothing / (self.num_labels if one_class else 2)  # else yes or no
