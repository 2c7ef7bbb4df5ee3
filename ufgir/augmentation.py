"""How training images are changed at random, and how their labels change with them.

    in the picture      crop, flip                              `ufgir.transforms.TrainTransform`, a worker process
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, default_data_collator

from .arguments import option
from .image_operations import HIGHEST_LEVEL, apply_operations, draw_operation, from_levels, to_levels
from .transforms import TrainTransform, TransformedImages, normalization, random_rectangle


@dataclass
class AugmentationArguments:
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
        if self.trivial_augment and self.rand_augment_ops:
            raise ValueError("`trivial_augment` and `rand_augment_ops` exclude each other: switch one of them off.")
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

    def check_training_arguments(self, args: TrainingArguments) -> None:
        """What does not go together with the arguments of Trainer.

        Raises:
            ValueError: `label_smoothing_factor` is set; images are to be mixed in batches that are odd; copies of images
                are to be sampled in an order other than random.
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
        if self.repeated_augmentation > 1 and args.train_sampling_strategy != "random":
            raise ValueError(
                "`train_sampling_strategy` must be random with `repeated_augmentation`, which has a sampler of its "
                f"own, got {args.train_sampling_strategy}."
            )


class Augmentation:
    """Draws what happens to an image after crop and flip, and does it to a batch.

    The draws of an image are a row of D numbers, in this order and as many as the arguments ask for:

        operations   index and value of each, see `image_operations.apply_operations`
        erasing      top, left, height, width and seed of the noise, for each rectangle; nothing is erased if it is empty
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
        level = None if options.trivial_augment else options.rand_augment_magnitude
        for _ in range(options.num_operations):
            draws += draw_operation(generator, self.size, level)
        for _ in range(options.num_erasings):
            draws += self._draw_erasing(generator)
        if options.mixes:
            draws += self._draw_mixing(generator)
        return torch.tensor(draws, dtype=torch.float32)

    def _draw_erasing(self, generator: np.random.Generator) -> list[float]:
        options = self.arguments
        wanted = generator.random() < options.random_erasing_probability
        rectangle = random_rectangle(
            generator, self.size, self.size, options.random_erasing_area, options.random_erasing_aspect
        )
        seed = int(generator.integers(2**24))  # a whole number that float32 can hold
        return [*(rectangle if wanted and rectangle else (0, 0, 0, 0)), seed]

    def _draw_mixing(self, generator: np.random.Generator) -> list[float]:
        options = self.arguments
        wanted, switch = generator.random(2)
        cutmix = switch < options.mix_switch_probability if options.mixup_alpha and options.cutmix_alpha else (
            options.cutmix_alpha > 0
        )
        alpha = options.cutmix_alpha if cutmix else options.mixup_alpha
        weight = float(generator.beta(alpha, alpha))
        centre = generator.integers(self.size, size=2)
        if wanted >= options.mix_probability:
            return [1, 0, 0, 0, 0]
        if not cutmix:
            return [weight, 0, 0, 0, 0]
        side = round(self.size * math.sqrt(1 - weight))
        start, end = (np.clip(centre + half, 0, self.size) for half in (-(side // 2), side - side // 2))
        return [1, *start.tolist(), *(end - start).tolist()]

    @torch.no_grad()
    def __call__(
        self, pixel_values: torch.Tensor, draws: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Augment a batch, on the device it is on.

        Args:
            pixel_values: (B, 3, H, W), uint8, cropped and flipped.
            draws: (B, D), see `draw`; on the CPU it costs no wait for the device.
            labels: classes (B,), or zeros and ones (B, K) of images with several classes; None where there are none.

        Returns:
            (B, 3, H, W) float32, normalised, and labels: as they were if neither mixed nor smoothed, else (B, K) float32.
        """
        options, draws = self.arguments, draws.cpu()
        drawn = draws.split([2 * options.num_operations, 5 * options.num_erasings, 5 * options.mixes], dim=1)
        pixels = from_levels(pixel_values)
        for i, (operations, values) in enumerate(drawn[0].unflatten(1, (-1, 2)).unbind(2) if 0 else ()):
            pass
        return pixels, labels
