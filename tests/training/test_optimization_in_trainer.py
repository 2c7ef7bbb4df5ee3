"""Groups, schedules and freezing in a real Trainer."""

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import tiny_model
from tests.training.optimizing import SIT, RandomImages, flat, trainer, trains, walk
from ufgir.training.freezing import freeze, own_name, part_names
from ufgir.training.optimization import (
    OptimizationArguments,
)
from ufgir.training.trainer import UFGIRTrainer


class Stream(torch.utils.data.IterableDataset):
    """The same images repeatedly, without a length."""

    def __iter__(self) -> Any:
        images = RandomImages(8)
        for i in range(1000):
            yield images[i % 8]


def held(run: UFGIRTrainer) -> set[str]:
    """Return the names of the parameters in groups that are held."""
    return {n for group in run.optimizer.param_groups if group["freeze_epochs"] for n in group["param_names"]}


def test_trainer_follows_the_schedule(tmp_path: Path) -> None:
    """With gradient accumulation, where the last step of an epoch has fewer batches: two steps per epoch."""
    args = OptimizationArguments(schedule="cosine_epochs", schedule_epochs=3, warmup_epochs=1, min_learning_rate=1e-4)
    run = trainer(tmp_path, args, gradient_accumulation_steps=2)
    run.train()
    expected = [[1e-6]] * 2 + [[1e-4 + 9e-4 * 0.75]] * 2 + [[1e-4 + 9e-4 * 0.25]] * 2 + [[1e-4]] * 2
    assert [rates[:1] for rates in run.record.rates] == [pytest.approx(rate) for rate in expected]
    assert all(len(set(rates)) == 1 for rates in run.record.rates)


def test_without_options_only_the_decay_differs_from_transformers(tmp_path: Path) -> None:
    """The learning rates are those of transformers' schedule, and the groups differ only in parameters without weight decay."""
    run = trainer(tmp_path, lr_scheduler_type="cosine", warmup_steps=2)
    run.train()
    reference = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3)
    from transformers import get_cosine_schedule_with_warmup

    expected = walk(reference, get_cosine_schedule_with_warmup(reference, 2, 12), 12)
    torch.testing.assert_close(torch.tensor(run.record.rates, dtype=torch.float64), expected.expand(-1, 2))
    decayed = {group["weight_decay"]: set(group["param_names"]) for group in run.optimizer.param_groups}
    stock = set(run.get_decay_parameter_names(run.model))
    assert decayed[0.05] < stock
    assert {
        name.rpartition(".")[2] for name in stock - decayed[0.05] if "norm" not in name and "logits.0" not in name
    } == {
        "cls_token",
        "clr_tokens",
        "position_embeddings",
        "clr_position_embeddings",
        "scale",
    }


def test_a_stream_has_epochs_of_max_steps(tmp_path: Path) -> None:
    """Without a length, an epoch is `max_steps` divided by num_train_epochs."""
    args = OptimizationArguments(
        schedule="cosine_epochs", warmup_epochs=1, warmup_learning_rate=0, min_learning_rate=0
    )
    run = trainer(tmp_path, args, data=Stream(), max_steps=6, num_train_epochs=3)
    run.train()
    cosine = [1e-3 * 0.75, 1e-3 * 0.25]
    assert [r[0] for r in run.record.rates] == pytest.approx([0, 0, cosine[0], cosine[0], cosine[1], cosine[1]])


@pytest.mark.parametrize("schedule", ["trainer", "cosine_epochs"])
def test_held_backbone(schedule: str, tmp_path: Path) -> None:
    """For two epochs the backbone neither changes nor accumulates moments, and is not part of the clipped norm; then it is trained."""
    run = trainer(tmp_path, OptimizationArguments(schedule=schedule, freeze_epochs=2), max_grad_norm=1.0)
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    names = held(run)
    assert names == {n for n, part in part_names(run.model).items() if part == "backbone"} & trains(run.model)
    for name in trains(run.model):
        assert torch.equal(run.record.weights[5][name], start[name]) == (name in names), name
    moved = [n for n in names if not torch.equal(run.record.weights[-1][n], start[n])]
    assert len(moved) > 0.8 * len(names)  # the keys' biases have no gradient
    steps = {
        n: int(run.optimizer.state[p]["step"])
        for group in run.optimizer.param_groups
        for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert {steps[n] for n in names} == {6} and {steps[n] for n in steps if n not in names} == {12}
    assert all((rates[-1] == 0) == (i < 6) for i, rates in enumerate(run.record.rates[:-1]))
    probe = trainer(tmp_path, OptimizationArguments(schedule=schedule, freeze=["backbone"]), max_grad_norm=1.0)
    probe.train()  # the same as a linear probe until then
    # What a softmax or a BatchNorm takes out again has no gradient but rounding, of which AdamW makes steps.
    without_effect = re.compile(r"slot_logits\.\d+\.bias|norm_in\.(weight|bias)|aggregate\.bias")
    compared = [name for name in trains(probe.model) if not without_effect.search(name)]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(probe.record.weights[5][name], run.record.weights[5][name])


@pytest.mark.parametrize("groups", ["default", "original"])
def test_frozen_as_in_the_original(groups: str, tmp_path: Path) -> None:
    """A frozen backbone includes CLR's position embeddings with `parameter_groups` original, but not by default; CLR is trained."""
    run = trainer(tmp_path, OptimizationArguments(freeze=["backbone"], parameter_groups=groups))
    embeddings = {own_name(name) for name in trains(run.model) if "embeddings." in name}
    positions = {"embeddings.clr_position_embeddings"} if groups == "default" else set()
    assert embeddings == {"embeddings.clr_tokens"} | positions


def test_held_as_in_the_original(tmp_path: Path) -> None:
    """Position and patch embeddings are trained from the start, CLR is held, and moments of all parameters accumulate (K10, K13)."""
    run = trainer(tmp_path, OptimizationArguments(freeze_epochs=2, parameter_groups="original"))
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    assert {own_name(n) for n in held(run) if "embeddings." in n} == {"embeddings.cls_token", "embeddings.clr_tokens"}
    for name in held(run):
        assert torch.equal(run.record.weights[5][name], start[name])
    moved = "vit.embeddings.position_embeddings"
    assert not torch.equal(run.record.weights[5][moved], start[moved])
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {12}


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    """Resuming in the middle of the third epoch, with groups, a held backbone and a schedule, gives exactly the same weights."""
    args = OptimizationArguments(
        schedule="cosine_epochs", schedule_per="step", freeze_epochs=2, backbone_lr_scale=0.5, layer_lr_decay=0.8
    )
    whole = trainer(tmp_path, args, save_strategy="steps", save_steps=5)
    whole.train()
    resumed = trainer(tmp_path, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert resumed.record.rates == whole.record.rates[5:]
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.record.weights[-1][name])


def test_frozen_parts_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ufgir.training.optimization"):
        run = trainer(tmp_path, OptimizationArguments(freeze=["backbone"], unfreeze=["layers.4"]), num_train_epochs=1)
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    same = {n for n, p in run.model.named_parameters() if torch.equal(p, start[n])}
    assert not any(n.startswith(("classifier.", "vit.layers.4.mlp")) or ".reduction." in n for n in same)
    assert len([n for n in same if ".layers.4." not in n]) == sum(not p.requires_grad for p in run.model.parameters())
    assert "Frozen: " in caplog.text


def test_two_trainings_in_a_row(tmp_path: Path) -> None:
    """Trainer creates a schedule for each, on the same optimizer."""
    run = trainer(tmp_path, OptimizationArguments(schedule="cosine_epochs", freeze_epochs=1), num_train_epochs=3)
    run.train()
    run.train()
    assert run.record.rates[9:] == run.record.rates[:9] and len(run.record.rates) == 18


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_other_optimizers_take_the_groups(optim: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, OptimizationArguments(backbone_lr_scale=0.1), optim=optim, num_train_epochs=1)
    run.train()
    assert [group["initial_lr"] for group in run.optimizer.param_groups] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, OptimizationArguments(layer_lr_decay=0.9))
    monkeypatch.setattr(run, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, {"optimizer_dict": {}}))
    with pytest.raises(ValueError, match=r"`layer_lr_decay` .* `optim` adamw_torch_fused"):
        run.create_optimizer()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft(tmp_path: Path) -> None:
    """Adapters and new parts do not belong to the backbone, and freezing it has no effect."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -c constraints.txt -e .[peft]")
    from ufgir.training.adapters import ATTENTION, adapt

    model = adapt(tiny_model(**SIT).float(), peft.LoraConfig(r=2, target_modules=list(ATTENTION)))
    assert freeze(copy.deepcopy(model), ["backbone"]) == []
    args = OptimizationArguments(schedule="cosine_epochs", warmup_epochs=1, backbone_lr_scale=0.1, freeze_epochs=1)
    run = trainer(tmp_path, args, model=model, num_train_epochs=2)
    run.train()
    group_of = flat(run.optimizer.param_groups)
    assert {group["initial_lr"] for group in group_of.values()} == {1e-3} and held(run) == set()
    decayed = {name for name, group in group_of.items() if group["weight_decay"]}
    assert {name for name in decayed if "lora_A" in name} and not any("clr" in name for name in decayed)
    assert {part_names(model)[name] for name in group_of} == {"adapter", "head", "reductions", "clr_tokens"}
    attention = "base_model.model.vit.layers.0.attention.q_proj.base_layer.weight"
    assert own_name(attention) == "layers.0.attention.q_proj.weight" and part_names(model)[attention] == "backbone"
