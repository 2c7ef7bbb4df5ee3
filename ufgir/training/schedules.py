"""Learning rate schedules counted in epochs. Warm-up and minimum rate are the same for all parameter groups, as in the original.

`SCHEDULES` lists them. One more: a function here, and its arguments as options of
`ufgir.training.optimization.OptimizationArguments`. transformers' own schedules are `--lr_scheduler_type`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


Course = Callable[[float, int], float]  # a group's own learning rate, steps done -> learning rate


class GroupSchedule(LRScheduler):
    """One course of the learning rate for all parameter groups, some of which are held at 0 first.

    The course is not in the state: a resumed training goes on with the one it was made with.
    """

    def __init__(self, optimizer: Optimizer, course: Course, held_steps: Sequence[int]) -> None:
        self.course, self.held_steps = course, list(held_steps)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Rate of each group at the next step of the optimizer."""
        step = self.last_epoch  # torch's name for the number of calls
        pairs = zip(self.base_lrs, self.held_steps, strict=True)
        return [0.0 if step < held else self.course(base, step) for base, held in pairs]

    def state_dict(self) -> dict:
        """Without the course and what is held."""
        return {name: value for name, value in super().state_dict().items() if name not in ("course", "held_steps")}


def cosine_epochs(
    steps_per_epoch: float,
    schedule_epochs: float | None = None,
    warmup_epochs: float = 2.0,
    warmup_learning_rate: float = 1e-6,
    min_learning_rate: float = 1e-5,
    schedule_per: str = "epoch",
) -> Course:
    """Linear warm-up, half a cosine down to `min_learning_rate`, and that rate from there on.

    The cosine starts with the warm-up, not after it, so the rate jumps down a little where the warm-up ends. First and last
    rate are the same for every group: one whose own rate is below `min_learning_rate` rises.

    Args:
        steps_per_epoch: steps of the optimizer.
        schedule_epochs: epochs until the end of the cosine; `make_schedule` fills in the whole training for None.
        warmup_epochs: epochs of warm-up.
        schedule_per: "epoch" keeps the rate constant within an epoch, "step" changes it at every step.
    """

    def course(base: float, step: int) -> float:
        epoch = step / steps_per_epoch if schedule_per == "step" else step // steps_per_epoch
        if epoch < warmup_epochs:
            return warmup_learning_rate + epoch * (base - warmup_learning_rate) / warmup_epochs
        if epoch < schedule_epochs:
            return (
                min_learning_rate + (base - min_learning_rate) * (1 + math.cos(math.pi * epoch / schedule_epochs)) / 2
            )
        return min_learning_rate

    return course


def step_epochs(
    steps_per_epoch: float,
    warmup_epochs: float = 2.0,
    warmup_learning_rate: float = 1e-6,
    decay_epochs: float = 30.0,
    decay_rate: float = 0.1,
) -> Course:
    """Linear warm-up, after it a drop to `decay_rate` of the rate every `decay_epochs`; constant within an epoch."""

    def course(base: float, step: int) -> float:
        epoch = step // steps_per_epoch
        if epoch < warmup_epochs:
            return warmup_learning_rate + epoch * (base - warmup_learning_rate) / warmup_epochs
        return base * decay_rate ** ((epoch - warmup_epochs) // decay_epochs)

    return course


# Their arguments after the first are the options of the same names.
SCHEDULES: dict[str, Callable[..., Course]] = {"cosine_epochs": cosine_epochs, "step_epochs": step_epochs}


def schedule_options(name: str) -> dict[str, Any]:
    """The options of a schedule, and their defaults."""
    _, *arguments = inspect.signature(SCHEDULES[name]).parameters.values()
    return {argument.name: argument.default for argument in arguments}
