"""Killed and resumed: the weights are those of a training that was never stopped, and a checkpoint that was cut off is never
loaded. Trainings are killed for good, by SIGKILL, in forks of this process (a fresh one would import torch for seconds)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
)
from transformers.trainer_callback import ExportableState

from tests.training.resuming import (
    assert_same,
    die,
    killed,
    make_trainer,
    train,
    weights,
)
from ufgir.training.checkpointing import (
    checkpoint_folders,
)
from ufgir.training.optimization import OptimizationArguments
from ufgir.training.trainer import UFGIRTrainer


STEPS = 12  # 3 epochs of 4 steps
SAVED = (3, 6, 9, 12)  # in the middle of epochs, and at the end


# Killed while it trains


def test_the_training_is_as_random_as_it_can_be(whole: Path, tmp_path: Path) -> None:
    """Another seed gives other weights, and the average differs from the model; otherwise the tests of this file would show little."""
    train(tmp_path, seed=4)
    expected, other = weights(whole), weights(tmp_path)
    assert not any(torch.equal(other[name], expected[name]) for name in expected if name.endswith("proj.weight"))
    assert not torch.equal(expected["classifier.out_proj.weight"], expected["average.classifier.out_proj.weight"])


def test_killed_at_every_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training is killed in the middle of each of its steps."""
    step = UFGIRTrainer.training_step
    for fatal in range(STEPS):

        def training_step(trainer: UFGIRTrainer, *args: Any, fatal: int = fatal, **kwargs: Any) -> torch.Tensor:
            loss = step(trainer, *args, **kwargs)
            if trainer.state.global_step == fatal:
                die()
            return loss

        monkeypatch.setattr(UFGIRTrainer, "training_step", training_step)
        killed(lambda: train(tmp_path))
        done = [n for n in SAVED if n <= fatal]
        assert [f.name for f in checkpoint_folders(tmp_path)] == [f"checkpoint-{n}" for n in done[-2:]]
    monkeypatch.setattr(UFGIRTrainer, "training_step", step)
    train(tmp_path)
    assert_same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2, "save_steps": 1},
        pytest.param({"save_steps": 4}, marks=pytest.mark.slow),  # an epoch, at whose end there is an evaluation
        pytest.param(
            {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 0.1, "eval_strategy": "no"},
            marks=pytest.mark.slow,
        ),
        {"model": {"reduction": "dyvit", "head": "linear"}},  # draws its decisions while training
        {"copies": 2},
        {"optimization": OptimizationArguments(freeze_epochs=1, schedule="cosine_epochs", warmup_epochs=1)},
    ],
    ids=["workers", "accumulation", "epoch", "clipping", "dyvit", "repeated", "held"],
)
def test_resumed_from_every_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, changes = tmp_path / "whole", {"num_train_epochs": 2} | changes
    train(whole, save_total_limit=None, **changes)
    for checkpoint in checkpoint_folders(whole)[:-1]:
        stopped = tmp_path / checkpoint.name
        shutil.copytree(checkpoint, stopped / checkpoint.name)
        train(stopped, **changes)
        assert_same(weights(stopped), weights(whole))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_an_adapter_is_resumed(tmp_path: Path) -> None:
    """A LoRA checkpoint contains the adapter and the new parts of the model."""
    trained = []
    for checkpoint in (None, tmp_path / "checkpoint-3"):
        trainer = make_trainer(tmp_path, lora=True, num_train_epochs=2, save_total_limit=None)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trained.append(trainer.model.state_dict())
    assert trainer.state.global_step == 8 and not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert_same(trained[1], trained[0])


def test_what_the_log_says_is_the_same(whole: Path, tmp_path: Path) -> None:
    """Every loss and metric of a resumed training is exactly equal on a CPU."""
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    train(tmp_path, save_total_limit=None)
    logs = [
        json.loads((f / "checkpoint-12" / "trainer_state.json").read_text())["log_history"] for f in (whole, tmp_path)
    ]
    for expected, actual in zip(*logs, strict=True):
        for name in ("step", "loss", "learning_rate", "grad_norm", "eval_top1", "eval_loss", "eval_ema_top1"):
            assert expected.get(name) == actual.get(name)


# At the end, and beyond


def test_a_training_that_has_ended_takes_no_further_step(tmp_path: Path) -> None:
    """It ended by its number of steps in the middle of an epoch; resuming gives the same end, and more steps continue it."""
    train(tmp_path, max_steps=6)
    expected = weights(tmp_path)
    train(tmp_path, max_steps=6)
    assert_same(weights(tmp_path), expected)
    train(tmp_path, max_steps=7)
    assert checkpoint_folders(tmp_path)[-1].name == "checkpoint-7"


def test_early_stopping_remembers_what_it_has_counted(tmp_path: Path) -> None:
    """Two evaluations without a better metric end the training, also with an interruption between or after them."""

    def run(folder: Path, checkpoint: Path | None, patience: int = 2) -> int:
        plan = {"save_strategy": "epoch", "metric_for_best_model": "score", "num_train_epochs": 6}
        trainer = make_trainer(folder, (EarlyStoppingCallback(patience),), save_total_limit=None, **plan)
        trainer.compute_metrics = lambda prediction: {"score": 0.5}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer.state.global_step

    assert run(tmp_path / "whole", None) == 12  # the first epoch is the best, the third the last
    for step in (4, 8, 12):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert run(tmp_path / str(step), checkpoint) == 12
    assert run(tmp_path / "patient", checkpoint, patience=3) == 16


def test_the_state_of_callbacks_that_were_not_there_before(tmp_path: Path) -> None:
    """Trainer would fail at its next checkpoint, because the old state does not contain the new callback."""
    train(tmp_path, max_steps=3)
    plan = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "top1"}
    trainer = make_trainer(tmp_path, (EarlyStoppingCallback(9),), **plan)
    assert any(isinstance(c, ExportableState) for c in trainer.callback_handler.callbacks)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_the_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is not deleted with others, is loaded at the end, is found after the folder was moved, and is reset if it was deleted."""
    plan: dict[str, Any] = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "score"}

    def run(folder: Path, scores: list[float], checkpoint: Path | None = None, **changes: Any) -> UFGIRTrainer:
        trainer = make_trainer(folder, **plan | {"save_total_limit": 1, "num_train_epochs": 4} | changes)
        values = iter(scores)
        trainer.compute_metrics = lambda prediction: {"score": next(values)}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer

    first = run(tmp_path / "a", [0.2, 0.6, 0.4, 0.5], save_total_limit=2)
    assert [f.name for f in checkpoint_folders(tmp_path / "a")] == ["checkpoint-8", "checkpoint-16"]
    assert first.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-8")
    saved = load_file(tmp_path / "a" / "checkpoint-8" / "model.safetensors")
    assert_same(first.model.state_dict(), saved)

    moved = tmp_path / "b"
    shutil.move(tmp_path / "a", moved)
    again = run(moved, [0.1], moved / "checkpoint-16", num_train_epochs=5, save_total_limit=2)
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-8")
    assert_same(again.model.state_dict(), saved)

    shutil.rmtree(moved / "checkpoint-8")
    worse = run(moved, [0.4, 0.3], moved / "checkpoint-20", num_train_epochs=7)
    assert "checkpoint-8, is missing" in caplog.text and worse.state.best_metric == 0.4
    assert worse.state.best_model_checkpoint == str(moved / "checkpoint-24")
