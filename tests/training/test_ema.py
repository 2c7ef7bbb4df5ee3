"""Averaged weights: the formula, evaluation, saving, resuming, and the final model."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from clca import CLCAViTForImageClassification
from tests.training.watching import (
    BEST,
    Samples,
    Snapshots,
    Stop,
    Worse,
    assert_same,
    make_trainer,
    weights,
)
from ufgir.training.adapters import adapt, merge
from ufgir.training.callbacks import LastModel
from ufgir.training.ema import EMACallback, ema_function


# Averaged weights


@pytest.mark.parametrize("warmup", [False, True])
def test_average_is_the_formula(tmp_path, warmup):
    ema, snapshots = EMACallback(0.8, warmup), Snapshots()
    make_trainer(tmp_path, snapshots, ema).train()
    average = {name: value.double() for name, value in snapshots.taken[0].items()}
    for n, taken in enumerate(snapshots.taken[1:], start=1):
        decay = min(0.8, (1 + n) / (10 + n)) if warmup else 0.8
        for name, value in taken.items():
            average[name] = decay * average[name] + (1 - decay) * value.double()
    found = ema.average.module.state_dict()
    for name, value in found.items():
        if value.is_floating_point():  # BatchNorm's statistics, too
            torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
        else:
            assert value == snapshots.taken[-1][name] == 12, name  # batches that a BatchNorm has seen
    assert any("running_mean" in name for name in found)
    assert not torch.allclose(
        found["classifier.norm_in.running_var"], snapshots.taken[-1]["classifier.norm_in.running_var"]
    )


def test_average_does_not_change_the_training(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 6}
    trainers = [
        make_trainer(tmp_path / "a", **evaluating),
        make_trainer(tmp_path / "b", EMACallback(0.9), **evaluating),
    ]
    for trainer in trainers:
        trainer.train()
    assert_same(*map(weights, trainers))


def test_average_is_evaluated_and_saved_as_a_model(tmp_path):
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, eval_strategy="epoch", metric_for_best_model="ema_top1")
    trainer.train()
    logged = [line for line in trainer.state.log_history if "eval_ema_loss" in line]
    assert len(logged) == 3
    assert all({"eval_top1", "eval_ema_top1", "eval_loss"} <= set(line) for line in logged)
    assert trainer.state.best_metric == max(line["eval_ema_top1"] for line in logged)
    saved = CLCAViTForImageClassification.from_pretrained(tmp_path / "ema")
    assert_same(saved.state_dict(), ema.average.module.state_dict())
    before = weights(trainer)
    output = trainer.predict(Samples(8), metric_key_prefix="test")
    alone = trainer.evaluate_average(Samples(8), "test")
    assert set(alone) >= {"test_ema_loss", "test_ema_top1"} and alone.items() <= output.metrics.items()
    assert_same(weights(trainer), before)
    trainer.remove_callback(ema)
    assert trainer.evaluate_average(Samples(8)) == {}
    assert trainer.evaluate()["eval_loss"] == output.metrics["test_loss"]
    trainer.model.load_state_dict(saved.state_dict())
    assert trainer.evaluate()["eval_loss"] == output.metrics["test_ema_loss"] != output.metrics["test_loss"]


def test_weights_come_back_when_an_evaluation_fails(tmp_path):
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, max_steps=2)
    trainer.train()
    before, calls = weights(trainer), []

    def failing(prediction):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("metrics")
        return {}

    trainer.compute_metrics = failing
    with pytest.raises(RuntimeError, match="metrics"):
        trainer.evaluate()
    assert_same(weights(trainer), before)


@pytest.mark.parametrize("step", [5, 8])  # in the middle of an epoch, and at its end
def test_average_is_resumed_bit_by_bit(tmp_path, step):
    saving = {"save_strategy": "steps", "save_steps": step}
    whole, cut, resumed = EMACallback(0.9, warmup=True), EMACallback(0.9, warmup=True), EMACallback(0.9, warmup=True)
    trainer = make_trainer(tmp_path / "whole", whole, **saving)
    trainer.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", cut, Stop(step + 2), **saving).train()
    checkpoint = tmp_path / "cut" / f"checkpoint-{step}"
    assert "ema.safetensors" in json.loads((checkpoint / "checkpoint_files.json").read_text())["files"]
    assert load_file(checkpoint / "ema.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
    again = make_trainer(tmp_path / "cut", resumed, **saving)
    again.train(resume_from_checkpoint=True)
    assert_same(weights(again), weights(trainer))
    assert_same(resumed.average.state_dict(), whole.average.state_dict())
    assert resumed.average.n_averaged == 12


def test_one_average_is_one_file(tmp_path):
    """The bytes do not depend on the writing process, so that checksums of resumed trainings are equal."""
    ema = EMACallback(0.9)
    ema.on_train_begin(None, None, None, model=torch.nn.BatchNorm1d(3))
    files = set()
    for _ in range(20):
        ema.save_to_checkpoint(tmp_path)
        files.add((tmp_path / "ema.safetensors").read_bytes())
    assert len(files) == 1


def test_checkpoint_without_an_average_starts_one_with_a_warning(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, max_steps=4, **saving).train()
    ema = EMACallback(0.9)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, ema, **saving).train(resume_from_checkpoint=True)
    assert "has no averaged weights" in caplog.text
    assert ema.average.n_averaged == 8


def test_with_the_best_model_comes_its_average(tmp_path):
    ema = EMACallback(0.9)
    make_trainer(tmp_path, Worse("eval_top1"), ema, LastModel(), **BEST).train()
    averages = load_file(tmp_path / "checkpoint-4" / "ema.safetensors")
    assert_same(load_file(tmp_path / "ema" / "model.safetensors"), averages)


def test_average_as_final_is_what_is_evaluated_and_left(tmp_path):
    ema, snapshots = EMACallback(0.9, as_final=True), Snapshots()
    trainer = make_trainer(tmp_path, Worse("eval_top1"), snapshots, ema, **BEST)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(lines) == 3
    assert not any("ema" in key for line in lines for key in line)
    checkpoint = tmp_path / "checkpoint-4"
    average = load_file(checkpoint / "ema.safetensors")
    assert_same(weights(trainer), average)
    assert_same(load_file(checkpoint / "model.safetensors"), snapshots.taken[3])
    assert lines[0]["eval_loss"] == pytest.approx(
        trainer.evaluate()["eval_loss"], rel=1e-6
    )  # of the first epoch's average
    assert not (tmp_path / "ema").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_average_of_an_adapter_becomes_a_whole_model(tmp_path):
    peft = pytest.importorskip("peft")
    ema = EMACallback(0.5)
    trainer = make_trainer(tmp_path, ema, max_steps=3)
    adapted = adapt(trainer.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainer.model = trainer.model_wrapped = adapted
    trainer.train()
    saved = CLCAViTForImageClassification.from_pretrained(tmp_path / "ema")
    trainer.model = trainer.model_wrapped = merge(trainer.model)
    metrics = trainer.evaluate()
    trainer.remove_callback(ema)
    trainer.model.load_state_dict(saved.state_dict())
    assert trainer.evaluate()["eval_loss"] == metrics["eval_ema_loss"] != metrics["eval_loss"]


def test_average_of_integers_is_the_newest():
    average = [torch.tensor([3])]
    ema_function(0.9)(average, [torch.tensor([7])], 1)
    assert average[0].item() == 7
    with pytest.raises(ValueError, match=r"`decay` must be in \(0, 1\)"):
        EMACallback(1.0)
