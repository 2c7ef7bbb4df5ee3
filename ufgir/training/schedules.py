"""Learning rate schedules counted in epochs.

Warmup and minimum rate are the same for all parameter groups, as in the original.

`SCHEDULES` lists them. To add one, write a function here and add its arguments as options of
`ufgir.training.optimization.OptimizationArguments`. transformers' own schedules are available with
`--lr_scheduler_type`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


RateFunction = Callable[[float, int], float]  # (the group's base learning rate, number of steps done) -> learning rate


class GroupSchedule(LRScheduler):
    """A learning rate schedule for all parameter groups, some of which are first held at a rate of 0.

    The schedule is not part of the state dict: a resumed training creates it again.
    """

    def __init__(self, optimizer: Optimizer, rate_at: RateFunction, held_steps: Sequence[int]) -> None:
        self.rate_at, self.held_steps = rate_at, list(held_steps)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Return the learning rate of each group at the next optimizer step."""
        step = self.last_epoch  # torch's name for the number of calls
        pairs = zip(self.base_lrs, self.held_steps, strict=True)
        return [0.0 if step < held else self.rate_at(base, step) for base, held in pairs]

    def state_dict(self) -> dict:
        """Return the state without the schedule and the held steps."""
        return {name: value for name, value in super().state_dict().items() if name not in ("rate_at", "held_steps")}


def cosine_epochs(
    steps_per_epoch: float,
    schedule_epochs: float | None = None,
    warmup_epochs: float = 2.0,
    warmup_learning_rate: float = 1e-6,
    min_learning_rate: float = 1e-5,
    schedule_per: str = "epoch",
) -> RateFunction:
    """Linear warmup, half a cosine down to `min_learning_rate`, then that rate until the end.

    The cosine starts at the first step, not after the warmup, so that the rate drops slightly where the warmup ends.
    The first and last rates are the same for every group: the rate of a group with a base rate below
    `min_learning_rate` rises.

    Args:
        steps_per_epoch: optimizer steps per epoch.
        schedule_epochs: epochs until the end of the cosine; `make_schedule` replaces None by the whole training.
        warmup_epochs: epochs of warmup.
        warmup_learning_rate: rate at the first step.
        min_learning_rate: rate at the end of the cosine and after it.
        schedule_per: "epoch" keeps the rate constant within an epoch, "step" changes it at every step.
    """

    def rate_at(base: float, step: int) -> float:
        epoch = step / steps_per_epoch if schedule_per == "step" else step // steps_per_epoch
        if epoch < warmup_epochs:
            return warmup_learning_rate + epoch * (base - warmup_learning_rate) / warmup_epochs
        if epoch < schedule_epochs:
            return (
                min_learning_rate + (base - min_learning_rate) * (1 + math.cos(math.pi * epoch / schedule_epochs)) / 2
            )
        return min_learning_rate

    return rate_at


def step_epochs(
    steps_per_epoch: float,
    warmup_epochs: float = 2.0,
    warmup_learning_rate: float = 1e-6,
    decay_epochs: float = 30.0,
    decay_rate: float = 0.1,
) -> RateFunction:
    """Linear warmup, then multiply the rate by `decay_rate` every `decay_epochs`; constant within an epoch."""

    def rate_at(base: float, step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch < warmup_epochs:
            return warmup_learning_rate + epoch * (base - warmup_learning_rate) / warmup_epochs
        return base * decay_rate ** ((epoch - warmup_epochs) // decay_epochs)

    return rate_at


# The arguments after the first are options of the same name.
SCHEDULES: dict[str, Callable[..., RateFunction]] = {"cosine_epochs": cosine_epochs, "step_epochs": step_epochs}


def schedule_options(name: str) -> dict[str, Any]:
    """Return the options of a schedule with their defaults."""
    _, *arguments = inspect.signature(SCHEDULES[name]).parameters.values()
    return {argument.name: argument.default for argument in arguments}
