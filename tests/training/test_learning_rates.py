"""Schedules are equal to the original's, and continue after resuming."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from tests.training.optimizing import GOLDENS, walk
from ufgir.training.optimization import (
    OptimizationArguments,
    make_schedule,
)


# --- schedules -------------------------------------------------------------------------------------------------------


def optimizer_of(*rates: float, freeze_epochs: int = 0) -> torch.optim.Optimizer:
    """Create an optimizer with one parameter per group; the last group is held for `freeze_epochs`."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate, "freeze_epochs": 0} for rate in rates]
    groups[-1]["freeze_epochs"] = freeze_epochs
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize("name", ["cosine_epochs", "cosine_steps", "step_epochs", "step_steps"])
def test_schedules_equal_the_original(name: str) -> None:
    with safe_open(GOLDENS / f"sched_{name}.safetensors", "pt") as file:
        config, expected, initial = (
            json.loads(file.metadata()["config"]),
            file.get_tensor("lr"),
            file.get_tensor("init"),
        )
    values = {"warmup_epochs": config["warmup_epochs"], "warmup_learning_rate": config["warmup_lr"]}
    if config["sched"] == "cosine":
        per = "step" if config["sched_in_steps"] else "epoch"
        values |= {"schedule_epochs": config["epochs"], "min_learning_rate": config["min_lr"], "schedule_per": per}
    else:  # the original's is constant within an epoch either way
        values |= {"decay_epochs": config["decay_epochs"], "decay_rate": config["decay_rate"]}
    args = OptimizationArguments(schedule=f"{config['sched']}_epochs", **values)
    optimizer = optimizer_of(config["lr"], 0.1 * config["lr"], freeze_epochs=2)
    schedule = make_schedule(optimizer, args, config["num_steps_epoch"], num_training_steps=500)
    assert schedule.get_last_lr() == [initial[0].item(), 0.0]  # the second group is held
    torch.testing.assert_close(walk(optimizer, schedule, 500), expected, rtol=1e-9, atol=0)


def test_cosine_runs_over_the_whole_training_by_default() -> None:
    optimizer = optimizer_of(1.0)
    args = OptimizationArguments(schedule="cosine_epochs", schedule_per="step", warmup_epochs=0, min_learning_rate=0.5)
    rates = walk(optimizer, make_schedule(optimizer, args, 4, num_training_steps=10), 12)[:, 0]
    assert rates[0] == 1 and rates[5] == pytest.approx(0.75) and (rates[:10].diff() < 0).all()
    assert rates[10:].tolist() == [0.5, 0.5]


def test_a_schedule_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    args = OptimizationArguments(schedule="cosine_epochs", schedule_epochs=4, schedule_per="step")
    first = optimizer_of(1e-3, 1e-4, freeze_epochs=3)
    schedule = make_schedule(first, args, 5, 25)
    walk(first, schedule, 11)
    torch.save({"optimizer": first.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "state.pt")
    second = optimizer_of(1e-3, 1e-4, freeze_epochs=3)
    resumed = make_schedule(second, args, 5, 25)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["schedule"])
    assert torch.equal(walk(second, resumed, 14), walk(first, schedule, 14))
