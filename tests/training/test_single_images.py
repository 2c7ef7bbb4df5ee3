"""A last batch of one image, which fails in a BatchNorm, raises an error before the first step."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments

from tests.helpers import variant_model
from ufgir.training import SingleImageGuard, UFGIRTrainer
from ufgir.training.optimization import OptimizationArguments


class Stream(torch.utils.data.IterableDataset):
    """Images without a length."""

    def __init__(self, images: list[dict[str, Any]]) -> None:
        self.images = images

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.images)


def plain(*args: Any, **kwargs: Any) -> transformers.Trainer:
    return transformers.Trainer(*args, callbacks=[SingleImageGuard()], **kwargs)


def trainer(
    kind: Callable[..., transformers.Trainer], folder: Path, images: int, variant: str = "evit", **options: Any
) -> transformers.Trainer:
    options = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1, **options}
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **options)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(images)]
    return kind(variant_model(variant), args, train_dataset=data)


KINDS = pytest.mark.parametrize("kind", [UFGIRTrainer, plain])


@KINDS
@pytest.mark.parametrize(
    ("images", "options"),
    [(9, {}), (9, {"max_steps": 3}), (9, {"gradient_accumulation_steps": 2})],
)
def test_one_image_is_left(kind: Any, images: int, options: dict[str, Any], tmp_path: Path) -> None:
    one = trainer(kind, tmp_path, images, **options)
    with pytest.raises(
        ValueError, match=rf"`per_device_train_batch_size` .* one image .*{images}.*`dataloader_drop_last`"
    ):
        one.train()
    assert one.state.global_step == 0


@KINDS
@pytest.mark.parametrize(
    ("images", "options"),
    [(10, {}), (9, {"dataloader_drop_last": True}), (9, {"max_steps": 2}), (9, {"variant": "ifa"})],
)
def test_no_image_is_left_alone(kind: Any, images: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Or it has no effect: the batch is dropped or does not occur, or the head has no BatchNorm."""
    assert trainer(kind, tmp_path, images, **options).train().global_step > 0


@KINDS
@pytest.mark.parametrize("drop_last", [False, True])
def test_every_image_is_alone(kind: Any, drop_last: bool, tmp_path: Path) -> None:
    one = trainer(kind, tmp_path, 4, per_device_train_batch_size=1, dataloader_drop_last=drop_last)
    with pytest.raises(ValueError, match="`per_device_train_batch_size` 1"):
        one.train()
    assert one.state.global_step == 0


def test_a_frozen_head_needs_two_images_too(tmp_path: Path) -> None:
    kind = functools.partial(UFGIRTrainer, optimization=OptimizationArguments(freeze=["head"]))
    with pytest.raises(ValueError, match="`dataloader_drop_last`"):
        trainer(kind, tmp_path, 9).train()
    one = trainer(kind, tmp_path, 9)
    one.remove_callback(SingleImageGuard)
    with pytest.raises(
        ValueError, match="at least two images"
    ):  # what the guard is for: the model's own word, after two steps
        one.train()
    assert one.state.global_step == 2


@KINDS
def test_images_without_a_length_are_not_refused(kind: Any, tmp_path: Path) -> None:
    one = trainer(kind, tmp_path, 9, max_steps=2)
    one.train_dataset = Stream(one.train_dataset)
    assert one.train().global_step == 2
