"""Augmentation in Trainer: a collator that augments batches, a sampler for repeated augmentation, and their mixin."""

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
    """Collate samples into batches for Trainer. Samples with `draws` (training) are also augmented.

    Args:
        augmentation: applied to training samples.
        on_device: augment later, in `finish`, which `UFGIRTrainer` calls once the batch is on the device.
    """

    def __init__(self, augmentation: Augmentation, on_device: bool = False) -> None:
        self.augmentation = augmentation
        self.on_device = on_device

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the columns of all samples, stacked."""
        batch = default_data_collator(samples)
        return batch if self.on_device else self.finish(batch)

    def finish(self, batch: dict[str, torch.Tensor], device: torch.device | None = None) -> dict[str, torch.Tensor]:
        """Augment a batch that has `draws`, and remove them. Other batches (evaluation) are returned unchanged.

        Args:
            batch: column -> stacked values.
            device: where to augment; None for the device of the batch.

        Raises:
            ValueError: if the `draws` of training images are missing.
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
    """Sampler for repeated augmentation (https://huggingface.co/papers/1901.09335).

    Copies of an image are close together. The length of an epoch does not change. The copies of two images alternate,
    so that the neighbor of an image, its partner in MixUp and CutMix, is another image. The order depends on the seed
    and the epoch of the data set. Every process iterates over all indices, and accelerate distributes the batches.

    Args:
        dataset: a data set with `copies` > 1, whose indices count all images, then all second copies, and so on.
    """

    def __init__(self, dataset: TransformedImages) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        return islice(self._indices(), len(self))

    def _indices(self) -> Iterator[int]:
        count, copies = len(self.dataset), self.dataset.copies
        # `count` is not the index of an image, so no image shares this generator
        generator = np.random.default_rng((self.dataset.seed, self.dataset.epoch, count))
        chosen = generator.permutation(count)[: math.ceil(count / copies)].tolist()
        for first in range(0, len(chosen), 2):
            for copy in range(copies):
                yield from (image + copy * count for image in chosen[first : first + 2])


class AugmentationMixin:
    """Mixin for `transformers.Trainer` that supports `AugmentingCollator` and data sets with `copies`."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if isinstance(
            self.data_collator, AugmentingCollator
        ):  # before Trainer casts inputs to half precision for DeepSpeed
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
    """Return the transform of training images and the collator for Trainer.

    The data set also needs `copies=arguments.repeated_augmentation`.

    Args:
        arguments: options of the augmentation.
        args: options of the training.
        image_processor: size, mean and std of the images.
        num_labels: number of classes.

    Returns:
        the transform, and a collator or None for Trainer's default.

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
