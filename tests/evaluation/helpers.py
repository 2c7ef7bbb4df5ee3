"""A model, images to predict, and a reader of predictions."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import TINY
from ufgir.transforms.preprocessing import make_image_processor


NAMES = [
    "ash",
    "beech",
    "cedar",
    "date palm",
    'elm, "wych"',
    "fir",
    "ginkgo",
]  # more than five, so that top5 is computed
PROCESSOR = make_image_processor(32)


class Pixels(torch.utils.data.Dataset):
    """Random images and labels that record the requested indices.

    Args:
        labels: of the images, None for none.
        fatal: the image at which something is done instead.
    """

    def __init__(
        self, count: int, labels: Any = None, fatal: int | None = None, action: Callable | None = None
    ) -> None:
        self.count, self.labels, self.fatal, self.action = count, labels, fatal, action
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        if index == self.fatal:
            self.action()
        generator = torch.Generator().manual_seed(index)
        sample = {"pixel_values": torch.randn(3, 32, 32, generator=generator)}
        return sample if self.labels is None else sample | {"labels": self.labels[index]}


def make_model(seed: int = 0, **changes: Any) -> CLCAViTForImageClassification:
    torch.manual_seed(seed)
    options = TINY | {"num_labels": len(NAMES), "reduction": "topk", "keep_rate": 0.5}
    config = CLCAViTConfig(**options, **changes)
    config.problem_type = "single_label_classification"
    return CLCAViTForImageClassification(config)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(1).integers(0, len(NAMES), count)]


class Stopped(Exception):
    pass
