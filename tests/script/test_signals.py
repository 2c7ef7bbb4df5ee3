"""Signals that end a training: one sentence, an exit status for queues, no record, and a checkpoint that resumes exactly."""

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from tests.script.helpers import recipe, run, weights
from ufgir.runs.records import RECORD, read_run_records
from ufgir.training.checkpointing import checkpoint_problem
from ufgir.training.trainer import UFGIRTrainer


PLAN: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "no", "load_best_model_at_end": False}
PLAN |= {"save_steps": 2, "save_total_limit": 9, "drop_path_rate": 0.2, "do_predict": True, "num_pictures": 0}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], None]) -> None:
    """Do something between the backward pass and the optimizer's step `step`, counted from 1."""
    original = UFGIRTrainer.training_step

    def training_step(trainer: UFGIRTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(trainer, *args, **kwargs)
        if trainer.state.global_step == step - 1:
            what()
        return loss

    monkeypatch.setattr(UFGIRTrainer, "training_step", training_step)


def ends(capsys: pytest.CaptureFixture, status: int, *argv: str) -> str:
    """Return the last message of an interrupted training."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_ufgir.py: ")]
    assert ended.value.code == status and len(said) == 1
    return said[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_preempted_training(leaves: Path, tmp_path: Path, capsys, monkeypatch, number: int) -> None:
    """By default it ends immediately; the message names the checkpoint, and the run counts as unfinished."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        said = ends(capsys, 128 + number, recipe(tmp_path, leaves, out, **PLAN))
    name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
    assert name in said and str(out / "checkpoint-2") in said and "--resume_from_checkpoint true" in said
    assert not any((out / file).exists() for file in (RECORD, "README.md", "predictions.csv", "model.safetensors"))
    found = read_run_records([out])
    assert not found.finished and list(found.unfinished) == [out.resolve()]


def test_a_checkpoint_is_saved_first(leaves: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """With `enable_jit_checkpoint`, it is saved after the step, so that BatchNorm of the CLA head counts the batch once. Nothing is
    evaluated, recorded or uploaded. After resuming, all weights are those of an uninterrupted training."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(recipe(tmp_path, leaves, whole, **PLAN))
    plan = PLAN | {"save_strategy": "no", "enable_jit_checkpoint": True}
    file = recipe(tmp_path, leaves, out, **plan)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        said = ends(capsys, 128 + signal.SIGTERM, file)
    assert str(out / "checkpoint-3") in said and [f.name for f in out.iterdir()] == ["checkpoint-3"]
    assert checkpoint_problem(out / "checkpoint-3", read=True) is None
    run(file, "--resume_from_checkpoint", "true")
    expected, actual = weights(whole), weights(out)
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_after_the_last_step(leaves: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """No step is left for the checkpoint, and the run ends anyway."""
    monkeypatch.setattr(UFGIRTrainer, "_load_best_model", lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    plan = {"enable_jit_checkpoint": True, "num_train_epochs": 1, "save_strategy": "epoch"}
    said = ends(capsys, 128 + signal.SIGTERM, recipe(tmp_path, leaves, tmp_path / "out", **plan))
    assert "checkpoint-4" in said and not (tmp_path / "out" / RECORD).exists()


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(leaves: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """One sentence names the file, the required space and the last complete checkpoint; the incomplete one is deleted."""
    save, calls = torch.save, iter(range(99))
    monkeypatch.setattr(torch, "save", lambda *a, **k: (save if next(calls) < 6 else full)(*a, **k))
    said = ends(capsys, 1, recipe(tmp_path, leaves, tmp_path / "out", **PLAN))
    assert "disk is full" in said and "MB are needed" in said and "checkpoint-4/" in said
    assert said.endswith(f"to resume from {tmp_path / 'out' / 'checkpoint-2'}")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_that_does_not_fit(leaves: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Errors that occur only while loading, such as an optimizer of other shapes or a rejected pickle: one sentence each, status 2."""
    out, plan = tmp_path / "out", PLAN | {"max_steps": 2, "do_predict": False}
    run(recipe(tmp_path, leaves, out, **plan))
    folder = out / "checkpoint-2"
    (folder / "checkpoint_files.json").unlink()  # which would detect it earlier
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    optimizer["state"][0]["exp_avg"] = torch.zeros(3)
    file = recipe(tmp_path, leaves, out, **PLAN | {"do_predict": False})
    for name, content, words in (
        ("optimizer.pt", optimizer, "exp_avg"),
        ("optimizer.pt", {"state": {}, "param_groups": []}, "optimizer"),
        ("scheduler.pt", Path, "schedule"),
        ("rng_state.pth", {"python": 1}, "random state"),
    ):
        before = (folder / name).read_bytes()
        torch.save(content, folder / name)
        said = ends(capsys, 2, file, "--resume_from_checkpoint", "true")
        assert words in said and str(folder) in said
        (folder / name).write_bytes(before)


def test_places_that_are_taken(leaves: Path, tmp_path: Path, capsys) -> None:
    for name, kind in (("run.json", "folder"), ("model.safetensors", "folder"), ("my.csv", "folder"), ("ema", "file")):
        out = tmp_path / name
        out.mkdir()
        (out / name).mkdir() if kind == "folder" else (out / name).write_text("")
        said = ends(capsys, 2, recipe(tmp_path, leaves, out, predictions_file="my.csv"))
        assert "`output_dir`" in said and f"{kind} {name}" in said


def test_results_that_cannot_be_read_are_replaced(leaves: Path, tmp_path: Path, capsys, caplog) -> None:
    """A kill of an earlier version truncated them; training, evaluation and record are completed."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("all_results.json", "train_results.json", RECORD):
        (out / name).write_text('{"train_loss": 1.0, "ep')
    (out / ".ema.a1b2c3d4.tmp").mkdir()
    run(recipe(tmp_path, leaves, out, num_train_epochs=1, do_predict=True, num_pictures=0))
    assert "all_results.json" in caplog.text
    assert {"train_loss", "test_top1"} <= json.loads((out / "all_results.json").read_text()).keys()
    assert len(read_run_records([out]).finished) == 1
    assert not [f.name for f in out.iterdir() if f.name[0] in "._"]
    modes = {f.name: f.stat().st_mode & 0o777 for f in out.rglob("*") if f.is_file()}
    assert set(modes.values()) == {modes["run.json"]}, modes  # safetensors would let the owner alone read


def test_processes_that_do_not_know_of_each_other(leaves: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """For torchrun on a CPU without `use_cpu`, the error names this cause instead of a folder in use."""
    for name, value in (("_setup_devices", torch.device("cpu")), ("world_size", 1)):  # as accelerate finds it there
        monkeypatch.setattr(TrainingArguments, name, property(lambda _, value=value: value))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    said = ends(capsys, 2, recipe(tmp_path, leaves, tmp_path / "out", use_cpu=False))
    assert "`use_cpu`" in said and "2 processes" in said


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_signal_that_becomes_another_error(leaves: Path, tmp_path: Path, capsys, monkeypatch, error: type) -> None:
    """Before the training starts: code that converts exceptions, or a process that is waited for."""

    def load(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise error("something else") from None

    monkeypatch.setattr("run_ufgir.load_data", load)
    assert ends(capsys, 128 + signal.SIGTERM, recipe(tmp_path, leaves, tmp_path / "out")).endswith("SIGTERM")
