"""Apply a transform to images and labels in a PyTorch data set, with a callback that sets the epoch."""

from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainerCallback

from ..transforms.preprocessing import ImageTransform
from .checks import DatasetError, file_of, problem_of


class TransformedImages(torch.utils.data.Dataset):
    """Map-style data set of `{"pixel_values": (3, H, W), "labels": int}` and other outputs of the transform.

    Args:
        dataset: rows are dicts, e.g. a `datasets.Dataset`.
        transform: `TrainTransform` or `EvalTransform`.
        seed: first part of (seed, epoch, index), a non-negative integer.
        image_column: name of the column of PIL images.
        label_column: name of the column of class indices; None for images without labels.
        num_labels: number of classes K if the column has a list of class indices per image; labels are then (K,) float32, one
            for the classes of the image.
        copies: number of differently transformed copies of an image per epoch: index `i + c * len(dataset)` is copy `c` of
            image `i`. The length is that of `dataset`; see `augmentation.RepeatedSampler`.

    Raises:
        ValueError: if the seed is negative, or there is less than one copy.
        DatasetError: on access, if an image cannot be read; the message names the file.
    """

    def __init__(
        self,
        dataset: Any,
        transform: ImageTransform,
        seed: int = 0,
        image_column: str = "image",
        label_column: str | None = "label",
        num_labels: int | None = None,
        copies: int = 1,
    ) -> None:
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        if copies < 1:
            raise ValueError(f"`copies` must be at least 1, got {copies}.")
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.image_column = image_column
        self.label_column = label_column
        self.num_labels = num_labels
        self.copies = copies
        # In shared memory, so that persistent worker processes see changes, for every start method.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch, from 0, used for random decisions."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch in this process and all workers."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self)
        if not -count <= index < count * self.copies:
            raise IndexError(f"index {index} is outside a dataset of {count} images")
        copy, index = divmod(int(index) + (count if index < 0 else 0), count)
        try:
            row = self.dataset[index]
        except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
            raise self._unreadable(index, error) from error
        if row[self.image_column] is None:
            raise self._unreadable(index, None)
        generator = np.random.default_rng((self.seed, self.epoch, index, copy))
        columns = self.transform(row[self.image_column], generator)
        sample: dict[str, Any] = columns if isinstance(columns, dict) else {"pixel_values": columns}
        if self.label_column is not None:
            sample["labels"] = self._labels(row[self.label_column], index)
        return sample

    def _unreadable(self, index: int, error: Exception | None) -> DatasetError:
        """Return the error for an image that cannot be read; the undecoded image is read again to find its file."""
        name, why = None, None
        if isinstance(self.dataset, datasets.Dataset):
            raw = self.dataset.cast_column(self.image_column, datasets.Image(decode=False))[index][self.image_column]
            name, why = file_of(raw), problem_of(raw)
        why = why or (f"{type(error).__name__}: {error}" if error else "the image is missing (null)")
        return DatasetError(f"{name or f'image {index}'} cannot be read: {why}.")

    def _labels(self, value: Any, index: int) -> int | torch.Tensor:
        if self.num_labels is None:
            return int(value)
        wrong = [label for label in value if not 0 <= label < self.num_labels]
        if wrong:
            raise ValueError(f"image {index} has the class {wrong[0]}, which is not in 0 to {self.num_labels - 1}.")
        labels = torch.zeros(self.num_labels)
        labels[list(value)] = 1.0
        return labels


class SetEpoch(TrainerCallback):
    """Callback that sets the epoch of a `TransformedImages`, also if training resumes in the middle of an epoch.

    (Trainer and accelerate forward the epoch to samplers, and to data sets only in some cases.)
    """

    def __init__(self, dataset: TransformedImages) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))
