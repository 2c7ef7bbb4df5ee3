"""Augmentation inside a Trainer: the collator that augments batches, the sampler that repeats images, and the mixin that uses both."""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments, default_data_collator

from ..data.transformed import TransformedImages
from ..transforms.augmentation import Augmentation, AugmentationArguments
from ..transforms.preprocessing import TrainTransform


class AugmentingCollator:
    """Samples to batches, for Trainer. Training samples carry `draws` and are augmented; others are only stacked.

    Args:
        augmentation: what to do to training samples.
        on_device: leave it to `finish`, which `UFGIRTrainer` calls once the batch is on the device.
    """

    def __init__(self, augmentation: Augmentation, on_device: bool = False) -> None:
        self.augmentation = augmentation
        self.on_device = on_device

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The columns of all samples, stacked."""
        batch = default_data_collator(samples)
        return batch if self.on_device else self.finish(batch)

    def finish(self, batch: dict[str, torch.Tensor], device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Augment a batch that still has `draws`, and take these away; on `device`, by default where the batch is.

        Batches without draws, of evaluation images, stay as they are.

        Raises:
            ValueError: the draws of training images were lost on the way.
        """
        if "draws" not in batch:
            if batch["pixel_values"].dtype == torch.uint8:
                raise ValueError("`remove_unused_columns` must be false: the column `draws` of the images is missing.")
            return batch
        rest = {name: column for name, column in batch.items() if name != "draws"}
        pixels, labels = self.augmentation(rest["pixel_values"].to(device), batch["draws"], rest.get("labels"))
        rest["pixel_values"] = pixels
        return rest if labels is None else rest | {"labels": labels}


class RepeatedSampler(torch.utils.data.Sampler[int]):
    """Repeated augmentation (https://huggingface.co/papers/1901.09335): several copies of an image close together.

    An epoch is as long as without. Two images take turns, so that a neighbour, the partner in MixUp and CutMix, is
    another image. The order depends on the seed and the epoch of the data set; every process goes through all of it,
    and accelerate gives each its batches.

    Args:
        dataset: one with `copies` of more than 1, whose index counts all images, then all second copies, and so on.
    """

    def __init__(self, dataset: TransformedImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return islice(self._in_turns(), len(self))

    def _in_turns(self) -> Iterator[int]:
        count, copies = len(self.dataset), self.dataset.copies
        # no image has the index `count`: none of them shares this generator
        generator = np.random.default_rng((self.dataset.seed, self.dataset.epoch, count))
        chosen = generator.permutation(count)[: math.ceil(count / copies)].tolist()
        for first in range(0, len(chosen), 2):
            for copy in range(copies):
                yield from (image + copy * count for image in chosen[first : first + 2])


class AugmentationMixin:
    """What a Trainer needs for `AugmentingCollator` and for data sets with `copies`."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self.data_collator, AugmentingCollator):  # first: DeepSpeed's half precision comes after it
            inputs = self.data_collator.finish(inputs, self.args.device)
        return super()._prepare_inputs(inputs)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if getattr(dataset, "copies", 1) > 1:
            return RepeatedSampler(dataset)
        return super()._get_train_sampler(train_dataset)


def prepare_augmentation(
    arguments: AugmentationArguments, args: TrainingArguments, image_processor: Any, num_labels: int
) -> tuple[TrainTransform, AugmentingCollator | None]:
    """What Trainer and its data set need: the transform of training images, and the collator.

    The data set also needs `copies=arguments.repeated_augmentation`.

    Args:
        arguments: what is wanted.
        args: of the training.
        image_processor: size, mean and deviation of the images.
        num_labels: number of classes.

    Returns:
        A transform, and a collator or None for Trainer's own.

    Raises:
        ValueError: see `AugmentationArguments.check`.
    """
    arguments.check(args)
    augmentation = None
    if arguments.beyond_crop_and_flip:
        augmentation = Augmentation(arguments, image_processor, num_labels)
    transform = TrainTransform(
        image_processor, arguments.flip_probability, arguments.random_resized_crop, augmentation
    )
    if augmentation is None:
        return transform, None
    wanted = arguments.augmentation_device
    on_device = wanted == "device" or (wanted == "auto" and args.device.type != "cpu")
    return transform, AugmentingCollator(augmentation, on_device)
