"""Options and optimizers for several tests."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from tests.helpers import CACHES, images, labels, tiny_model
from ufgir.training.optimization import (
    OptimizationArguments,
)
from ufgir.training.trainer import UFGIRTrainer


GOLDENS = Path(__file__).parents[1] / "goldens_misc"
SIT = {"reduction": "sit", "keep_rate": 0.5} | CACHES["clca"]


def walk(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> torch.Tensor:
    """Return the learning rates (steps, groups) at each step."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


def flat(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return parameter name -> its group; fail if a parameter is in two groups."""
    names = [name for group in groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    for group in groups:
        assert len(group["params"]) == len(group["param_names"])
    return {name: group for group in groups for name in group["param_names"]}


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class RandomImages(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.pixels, self.labels = images(count).float(), labels(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Record(TrainerCallback):
    """Learning rates of all groups at each step, and copies of the weights after it."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in model.named_parameters()})


def trainer(
    folder: Path,
    optimization: OptimizationArguments | None = None,
    model: nn.Module | None = None,
    data: Any = None,
    **training: Any,
) -> UFGIRTrainer:
    """Create a trainer of ten images in batches of four: two full batches per epoch, and one of two images."""
    torch.manual_seed(0)
    defaults = {"num_train_epochs": 4, "learning_rate": 1e-3, "weight_decay": 0.05, "per_device_train_batch_size": 4}
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "seed": 3,
    }
    settings |= {"dataloader_pin_memory": False}
    result = UFGIRTrainer(
        model=model or tiny_model(**SIT).float(),
        args=TrainingArguments(str(folder), **(defaults | settings | training)),
        train_dataset=data or RandomImages(10),
        eval_dataset=RandomImages(4),
        optimization=optimization,
    )
    result.record = Record()
    result.add_callback(result.record)
    return result
