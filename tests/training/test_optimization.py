"""Parameter groups are equal to the original's; defaults, options and precision."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments

from clca import CLCAViTForImageClassification
from tests.helpers import CASES, tiny_model
from tests.training.optimizing import GOLDENS, SIT, flat, trainer
from ufgir.checkpoints.original_keys import convert_original_state, original_config
from ufgir.training.freezing import freeze, own_name
from ufgir.training.optimization import (
    OptimizationArguments,
    parameter_groups,
    resolve_precision,
    set_precision,
)


GROUPS = json.loads((GOLDENS / "optim_groups.json").read_text())


# --- parameter groups ------------------------------------------------------------------------------------------------


def original_model(name: str) -> tuple[CLCAViTForImageClassification, dict[str, str]]:
    """Return our model for an entry of optim_groups.json, and our parameter name -> the original's."""
    golden = {"vqt": "vqt_loc13", "h2t": "h2t_loc13", "evit_constcls": "evit_clc_clr1"}.get(name, name)
    with safe_open(GOLDENS.parent / "goldens" / f"{golden}.safetensors", "pt") as file:
        spec = json.loads(file.metadata()["config"])
        state = {k.removeprefix("state."): file.get_tensor(k) for k in file.keys() if k.startswith("state.")}  # noqa: SIM118
    if name == "vit_clca":  # this one has registers and half the layers
        spec["dims"] |= {"reg_tokens": 1, "depth": 6}
        state = {k: v for k, v in state.items() if not re.match(r"blocks\.([6-9]|1\d)\.", k)}
        state["reg_token"] = state["cls_token"]
        state["pos_embed"] = torch.cat([state["pos_embed"], state["pos_embed"][:, :1]], dim=1)
    config = original_config(spec)
    names = list(state)
    numbered = {key: torch.full_like(tensor, i, dtype=torch.float64) for i, (key, tensor) in enumerate(state.items())}
    converted = convert_original_state(numbered, config)
    return CLCAViTForImageClassification(config), {k: names[int(v.flatten()[0])] for k, v in converted.items()}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_equal_the_original(name: str) -> None:
    """Every parameter has the original's learning rate, weight decay and frozen epochs, for eight models."""
    model, originals = original_model(name)
    kept = set()
    if name == "evit_constcls":
        freeze(model, ["cls_token", "position_embeddings"])
        kept = {"vit.embeddings.clr_position_embeddings"}  # theirs is a part of pos_embed; ours, new, trains
    args = OptimizationArguments(parameter_groups="original", backbone_lr_scale=0.1, freeze_epochs=2)
    ours = {
        originals[parameter]: (group["lr"], group["weight_decay"], group["freeze_epochs"])
        for group in parameter_groups(model, args, learning_rate=1e-4, weight_decay=0.05)
        for parameter in group["param_names"]
        if parameter not in kept
    }
    theirs = {
        parameter: (pytest.approx(group["lr"]), group["weight_decay"], group["fix_step"])
        for group in GROUPS[name].values()
        if "fix_step" in group
        for parameter in group["params"]
    }
    stale = {"head.weight", "head.bias"} if "classifier.weight" not in originals else set()
    assert ours == {k: v for k, v in theirs.items() if k not in stale}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.method is None or (c.cache, c.tokens) == ("clca", "registers")], ids=str
)
def test_only_matrices_decay(case: Any) -> None:
    """CLS, positions, CLR, registers, LayerScale, norms, queries and biases have no weight decay, with any method, cache and backbone."""
    model = case.model(layerscale_value=0.1, use_qk_norm=True, pre_norm=True)
    group_of = flat(parameter_groups(model, OptimizationArguments(), 1e-4, 0.05))
    matrices = {
        f"{owner}.weight"
        for owner, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert group_of.keys() == trainable.keys()
    assert {name for name, group in group_of.items() if group["weight_decay"] == 0.05} == matrices & trainable.keys()
    for name in matrices:
        assert trainable[name].ndim > 1
    assert {group["lr"] for group in group_of.values()} == {1e-4}


def test_tokens_and_queries_do_not_decay() -> None:
    """They are selected by name, because a rule about dimensions would include them."""
    options = {"num_register_tokens": 2, "num_clr_tokens": 1, "cross_layer_cache": True}
    tokens = ("cls_token", "register_tokens", "clr_tokens", "position_embeddings", "clr_position_embeddings")
    for method, head, own in (
        ("patchmerger", "vqt", "queries"),
        ("sinkhorn", "cla", "prototypes"),
        ("sit", "cla", "scale"),
    ):
        model = tiny_model(reduction=method, keep_rate=0.5, head=head, **options)
        group_of = flat(parameter_groups(model, OptimizationArguments(), 1e-4, 0.05))
        found = {name.rpartition(".")[2] for name, group in group_of.items() if group["weight_decay"] == 0}
        assert found >= {*tokens, own}
    pooled = flat(parameter_groups(tiny_model(pooling="map"), OptimizationArguments(), 1e-4, 0.05))
    assert pooled["vit.attention_pooling.query"]["weight_decay"] == 0


def test_rates_of_backbone_and_layers() -> None:
    model = tiny_model(**SIT)
    args = OptimizationArguments(backbone_lr_scale=0.1, layer_lr_decay=0.5, freeze_epochs=3)
    groups = parameter_groups(model, args, 1.0, 0.05)
    assert groups[0]["lr"] == 1.0  # Trainer logs the first group's rate
    depth = model.config.num_hidden_layers
    for name, group in flat(groups).items():
        own = own_name(name)
        if own.startswith("classifier.") or ".reduction." in own or ".clr_" in own:
            expected = 1.0, 0
        elif own.startswith("embeddings."):
            expected = 0.1 * 0.5 ** (depth + 1), 3
        else:
            expected = 0.1 * 0.5 ** (depth - int(own.split(".")[1])), 3
        assert (pytest.approx(group["lr"]), group["freeze_epochs"]) == expected, name
    after = flat(parameter_groups(tiny_model(), args, 1.0, 0.05))["vit.layernorm.weight"]
    assert after["lr"] == pytest.approx(0.1)  # after the last layer


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "cosine"},
            "`schedule` must be trainer, cosine_epochs or step_epochs, got cosine; did you mean cos",
        ),
        (
            {"parameter_groups": "orginal"},
            "`parameter_groups` must be default or original, got orginal; did you mean or",
        ),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be auto, no, fp16 or bf16, got fp8$"),
        ({"schedule": "cosine_epochs", "schedule_per": "batch"}, "`schedule_per` must be step or epoch, got batch"),
        ({"schedule": "cosine_epochs", "min_learning_rate": -1e-5}, "`min_learning_rate` must be a number 0 or above"),
        ({"schedule": "cosine_epochs", "schedule_epochs": 2.0}, "`warmup_epochs` 2 must be below `schedule_epochs` 2"),
        ({"schedule": "step_epochs", "decay_epochs": 0.0}, "`decay_epochs` must be a number above 0, got 0.0"),
        ({"backbone_lr_scale": 0.0}, "`backbone_lr_scale` must be a number above 0, got 0.0"),
        ({"backbone_lr_scale": float("nan")}, "`backbone_lr_scale` must be a number above 0, got nan"),
        ({"layer_lr_decay": 1.5}, "`layer_lr_decay` must be at most 1, got 1.5"),
        ({"layer_lr_decay": 0.5, "parameter_groups": "original"}, "`layer_lr_decay` needs `parameter_groups` default"),
        ({"freeze_epochs": -1}, "`freeze_epochs` must be a number 0 or above, got -1"),
        ({"freeze": ["heads"]}, "`freeze` must be one of backbone, head, .*, got heads; did you mean head?"),
        (
            {"freeze": ["backbone"], "unfreeze": ["layer.0"]},
            "`unfreeze` must be one of .* or layers.<number>, got layer.0",
        ),
    ],
)
def test_options_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizationArguments(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_epochs": 2.0}, ["`warmup_epochs`", "`schedule` cosine_epochs or step_epochs"]),
        ({"schedule": "cosine_epochs", "decay_rate": 0.1}, ["`decay_rate`", "`schedule` step_epochs"]),
        ({"schedule": "step_epochs", "schedule_epochs": 1.0}, ["`schedule_epochs`", "`schedule` cosine_epochs"]),
        ({"unfreeze": ["cls_token"]}, ["`unfreeze`", "`freeze`"]),
    ],
)
def test_options_without_effect(options: dict[str, Any], words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    OptimizationArguments(**options)
    (record,) = caplog.records
    assert all(word in record.getMessage() for word in words)


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        (
            {"freeze_epochs": 2},
            {"num_train_epochs": 2},
            "`freeze_epochs` 2 must be below `num_train_epochs` 2",
        ),
        ({"schedule": "step_epochs"}, {"num_train_epochs": 2}, "`warmup_epochs` 2 must be below `num_train_epochs` 2"),
        (
            {"freeze_epochs": 1},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "`freeze_epochs` does not work with `lr_scheduler_type` reduce_lr_on_plateau",
        ),
    ],
)
def test_options_refused_beside_trainers(options: dict, training: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, OptimizationArguments(**options), **training)


def test_warnings_of_a_cut_or_rising_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = OptimizationArguments(schedule="cosine_epochs", schedule_epochs=45)
    trainer(tmp_path, args, num_train_epochs=9, learning_rate=5e-6)
    assert "`schedule_epochs` 45 is longer than the training of 9 epochs" in caplog.text
    assert "`min_learning_rate` 1e-05 is above `learning_rate` 5e-06" in caplog.text


def test_none_unfreezes_what_a_recipe_freezes() -> None:
    assert OptimizationArguments(freeze=["none"]).freeze == []


@pytest.mark.parametrize(
    ("gpu", "has_bf16", "name", "expected"),
    [
        (False, False, "auto", {"fp16": False, "bf16": False}),
        (True, False, "auto", {"fp16": True, "bf16": False}),
        (True, True, "auto", {"fp16": False, "bf16": True}),
        (True, True, "fp16", {"fp16": True, "bf16": False}),
        (False, False, "bf16", {"fp16": False, "bf16": True}),
        (True, True, "no", {"fp16": False, "bf16": False}),
        (True, True, None, {}),
    ],
)
def test_precision(
    gpu: bool, has_bf16: bool, name: str | None, expected: dict, monkeypatch: Any, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("ufgir.training.optimization.is_torch_bf16_gpu_available", lambda: has_bf16)
    assert resolve_precision(name) == expected
    if gpu:  # that is not used
        assert name in (None, "fp16") or not resolve_precision(name, use_cpu=True)["fp16"]
        args.use_cpu = False
    set_precision(args, name)
    assert args.mixed_precision == next((kind for kind, value in expected.items() if value), "no")
    assert {kind: getattr(args, kind) for kind in expected} == expected


def test_precision_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`mixed_precision` fp16 needs a GPU"):
        resolve_precision("fp16", use_cpu=True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    with pytest.raises(ValueError, match="`bf16` contradicts `mixed_precision` no"):
        set_precision(args, "no")
