"""Early stopping, the best and the last model, and the deterministic mode."""

import csv
import json
import re

import pytest
import torch
import transformers
from transformers import EarlyStoppingCallback

from clca import CLCAViTForImageClassification
from tests.training.watching import (
    BEST,
    Snapshots,
    Worse,
    assert_same,
    make_trainer,
    weights,
)
from ufgir.training.callbacks import CallbackArguments, LastModel, NaNGuard, make_callbacks
from ufgir.training.ema import EMACallback
from ufgir.training.gradients import (
    GradientRecorder,
)
from ufgir.utils.arguments import RecipeParser
from ufgir.utils.checksums import FILE_LIST


# Early stopping, best and last model


def test_early_stopping_keeps_best_and_last_model(tmp_path):
    args = CallbackArguments(early_stopping_patience=2, save_last_model=True)
    snapshots = Snapshots()
    trainer = make_trainer(tmp_path, Worse("eval_top1"), snapshots, **(BEST | {"num_train_epochs": 6}))
    for callback in make_callbacks(args, trainer.args):
        trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 12  # the best evaluation, and two that were worse, of six
    assert_same(weights(trainer), snapshots.taken[3])
    last = CLCAViTForImageClassification.from_pretrained(tmp_path / "last")
    assert_same(last.state_dict(), snapshots.taken[11])
    assert list(json.loads((tmp_path / "last" / FILE_LIST).read_text())["files"]) == ["model.safetensors"]
    assert {f.name for f in tmp_path.iterdir() if f.is_dir()} == {"last", "checkpoint-4"}


@pytest.mark.parametrize(
    "options", [{"eval_strategy": "no"}, {"eval_strategy": "epoch", "metric_for_best_model": None}]
)
def test_early_stopping_needs_evaluations(tmp_path, options):
    training = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    with pytest.raises(ValueError, match="`early_stopping_patience` needs validation images"):
        make_callbacks(CallbackArguments(early_stopping_patience=2), training)


def test_callbacks_that_are_asked_for(tmp_path, monkeypatch):
    training = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, eval_strategy="epoch")
    training.metric_for_best_model = "top1"
    assert [type(c) for c in make_callbacks(CallbackArguments(), training)] == [NaNGuard]
    assert make_callbacks(CallbackArguments(nan_guard=False), training) == []
    everything = CallbackArguments(True, True, 0.9, True, True, 3, 0.1, True)
    kinds = [GradientRecorder, NaNGuard, EMACallback, EarlyStoppingCallback, LastModel]
    assert [type(c) for c in make_callbacks(everything, training)] == kinds
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`ema_decay` does not work with FSDP"):
        make_callbacks(everything, training)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--ema_decay 1", r"`ema_decay` must be in \[0, 1\)"),
        ("--ema_decay nan", r"`ema_decay` must be in \[0, 1\)"),
        ("--early_stopping_patience 0", "`early_stopping_patience` must be at least 1"),
        (
            "--early_stopping_patience 1 --early_stopping_threshold -1",
            "`early_stopping_threshold` must not be negative",
        ),
    ],
)
def test_mistakes_are_said_at_once(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        RecipeParser((CallbackArguments,), prog="x").parse(words.split())
    assert ended.value.code == 2
    assert re.fullmatch(f"x: error: {message}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--ema_warmup true", ["`ema_warmup`", "`ema_decay`"]),
        ("--ema_warmup true --ema_as_final true", ["`ema_warmup`", "`ema_as_final`", "`ema_decay`"]),
        ("--early_stopping_threshold 0.1", ["`early_stopping_threshold`", "`early_stopping_patience`"]),
    ],
)
def test_options_without_effect(words, names, caplog):
    RecipeParser((CallbackArguments,), prog="x").parse(words.split())
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in names)


# Deterministic mode


def test_deterministic_mode_gives_the_same_weights_twice(tmp_path):
    """With transformers' `full_determinism`, operations without a deterministic implementation raise errors, and the run is repeatable."""
    ends = []
    try:
        for _ in range(2):
            trainer = make_trainer(tmp_path, full_determinism=True, max_steps=2)
            assert torch.are_deterministic_algorithms_enabled()
            trainer.train()
            ends.append(weights(trainer))
            torch.rand(3)  # the state that one run leaves does not matter to the next
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(*ends)


def test_csv_is_plain(tmp_path):
    make_trainer(tmp_path, GradientRecorder(), max_steps=2).train()
    with (tmp_path / "gradients.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][:2] == ["step", "max_grad_all"]
    assert [line[0] for line in lines[1:]] == ["1", "2"]
    assert {len(line) for line in lines} == {len(lines[0])}
