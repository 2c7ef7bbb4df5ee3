"""A tiny training, and callbacks that observe or stop it."""

from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback

from clca import CLCAViTForImageClassification
from tests.helpers import images, labels, tiny_config
from ufgir.training.trainer import UFGIRTrainer


CLCA = {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}


class Samples(torch.utils.data.Dataset):
    """Random images with labels, in the columns of a model's inputs."""

    def __init__(self, count: int = 16) -> None:
        self.pixels, self.labels = images(count).float(), labels(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def make_model() -> CLCAViTForImageClassification:
    torch.manual_seed(0)
    return CLCAViTForImageClassification(tiny_config(num_hidden_layers=3, reduction_layers=[1], **CLCA))


def top1(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"top1": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder: Path, *callbacks: TrainerCallback, **options) -> UFGIRTrainer:
    """Create a trainer of 16 images in batches of 4: 4 steps per epoch, 12 in total, unless `options` change this."""
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 4,
        "metric_for_best_model": "top1" if "eval_strategy" in options else None,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **(defaults | options))
    return UFGIRTrainer(
        model=make_model(),
        args=args,
        train_dataset=Samples(),
        eval_dataset=Samples(8),
        compute_metrics=top1,
        callbacks=list(callbacks),
    )


def weights(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "not bit-identical"


class Snapshots(TrainerCallback):
    """Copies all weights after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.taken.append({name: value.clone() for name, value in model.state_dict().items()})


class Stop(TrainerCallback):
    """Stops a training at a step, like an interruption shortly after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Worse(TrainerCallback):
    """Scores the first evaluation best."""

    def __init__(self, metric: str) -> None:
        self.metric, self.value = metric, 1.0

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        metrics[self.metric] = self.value
        self.value /= 2


BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}
