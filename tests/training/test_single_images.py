"""A last batch of one image, which no BatchNorm can be trained with, is told before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.helpers import variant_model
from ufgir.training.trainer import UFGIRTrainer


def trainer(folder: Path, images: int, variant: str = "evit", **options: Any) -> UFGIRTrainer:
    options = {"per_device_train_batch_size": 4, "max_steps": -1, "num_train_epochs": 1, **options}
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **options)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(images)]
    return UFGIRTrainer(variant_model(variant), args, train_dataset=data)


@pytest.mark.parametrize(
    ("images", "options"), [(9, {}), (4, {"per_device_train_batch_size": 1}), (9, {"max_steps": 3})]
)
def test_one_image_is_left(images: int, options: dict[str, Any], tmp_path: Path) -> None:
    one = trainer(tmp_path, images, **options)
    with pytest.raises(
        ValueError, match=rf"`per_device_train_batch_size` .* one image of {images}.*`dataloader_drop_last`"
    ):
        one.train()
    assert one.state.global_step == 0


@pytest.mark.parametrize(
    ("images", "options"),
    [(10, {}), (9, {"dataloader_drop_last": True}), (9, {"max_steps": 2}), (9, {"variant": "ifa"})],
)
def test_no_image_is_left_alone(images: int, options: dict[str, Any], tmp_path: Path) -> None:
    """Or it does not matter: the batch is dropped or never comes, or the head has no BatchNorm."""
    assert trainer(tmp_path, images, **options).train().global_step > 0
