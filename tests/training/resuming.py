"""Trainings in forks of this process that are killed and resumed."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, TINY
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.evaluation.metrics import compute_metrics
from ufgir.training.adapters import AdapterArguments
from ufgir.training.augmentation import AugmentingCollator
from ufgir.training.checkpointing import (
    last_complete_checkpoint,
)
from ufgir.training.ema import EMACallback
from ufgir.training.optimization import OptimizationArguments
from ufgir.training.trainer import UFGIRTrainer
from ufgir.transforms.augmentation import Augmentation, AugmentationArguments
from ufgir.transforms.preprocessing import EvalTransform, TrainTransform, make_image_processor


PROCESSOR = make_image_processor(32)
STEERED = AugmentationArguments(
    random_erasing_probability=0.5, random_erasing_fill="noise", mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1
)


def make_images(count: int, seed: int) -> list[dict[str, Any]]:
    """Return noisy images in three colors, labeled with the color."""
    rows = []
    for i in range(count):
        noise = np.random.default_rng((seed, i)).integers(0, 100, (40, 40, 3))
        noise[..., i % 3] += 120
        rows.append({"image": Image.fromarray(noise.astype(np.uint8)), "label": i % 3})
    return rows


TRAIN, VALIDATION = make_images(17, 0), make_images(9, 1)  # batches of 4: the last image of an epoch is dropped


def make_trainer(
    folder: Path,
    callbacks: tuple[TrainerCallback, ...] = (),
    model: dict[str, Any] | None = None,
    copies: int = 1,
    optimization: OptimizationArguments | None = None,
    lora: bool = False,
    **changes: Any,
) -> UFGIRTrainer:
    """Create a trainer with all kinds of randomness: drop path, dropout, order, crops, erasing, MixUp and CutMix."""
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 2,
            "dataloader_drop_last": True,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **changes,
        },
    )
    set_seed(args.seed)
    options = TINY | CACHES["clca"] | {"reduction": "evit", "keep_rate": 0.5, "initializer_range": 0.02}
    config = CLCAViTConfig(**options | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1} | (model or {}))
    config.problem_type = "single_label_classification"
    augmentation = Augmentation(STEERED, PROCESSOR, config.num_labels)
    train = TransformedImages(
        TRAIN, TrainTransform(PROCESSOR, augmentation=augmentation), seed=args.seed, copies=copies
    )
    network = CLCAViTForImageClassification(config)
    return UFGIRTrainer(
        model=AdapterArguments(lora_rank=2, lora_dropout=0.1).adapt(network) if lora else network,
        args=args,
        train_dataset=train,
        eval_dataset=TransformedImages(VALIDATION, EvalTransform(PROCESSOR)),
        data_collator=AugmentingCollator(augmentation),
        compute_metrics=compute_metrics,
        callbacks=[SetEpoch(train), *callbacks],
        optimization=optimization,
    )


def averaging() -> EMACallback:
    return EMACallback(0.8)


def train(folder: Path, **changes: Any) -> None:
    """Train to the end, from the last complete checkpoint in `folder`, if there is one, and save the model."""
    trainer = make_trainer(folder, (averaging(),), **changes)
    last = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model()


def killed(action: Callable[[], None]) -> None:
    """Run a training in a fork; fail unless it kills itself."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model in a folder and, as `average.*`, of the averaged model next to it."""
    own = load_file(folder / "model.safetensors")
    return own | {f"average.{k}": v for k, v in load_file(folder / "ema" / "model.safetensors").items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    odd = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not odd, odd
