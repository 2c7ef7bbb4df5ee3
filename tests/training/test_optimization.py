"""Parameter groups and schedules equal the original's; the defaults, freezing and precision; all of it in a real Trainer."""

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from clca import CLCAViTForImageClassification
from tests.helpers import CACHES, CASES, images, labels, tiny_model
from ufgir.checkpoints.original_keys import convert_original_state, original_config
from ufgir.training.freezing import NEW_PARTS, freeze, own_name, part_names
from ufgir.training.optimization import (
    OptimizationArguments,
    make_schedule,
    parameter_groups,
    resolve_precision,
    set_precision,
)
from ufgir.training.trainer import UFGIRTrainer


GOLDENS = Path(__file__).parents[1] / "goldens_misc"
GROUPS = json.loads((GOLDENS / "optim_groups.json").read_text())
SIT = {"reduction": "sit", "keep_rate": 0.5} | CACHES["clca"]


# --- schedules -------------------------------------------------------------------------------------------------------


def optimizer_of(*rates: float, freeze_epochs: int = 0) -> torch.optim.Optimizer:
    """Each group one parameter; the last is held for `freeze_epochs`."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate, "freeze_epochs": 0} for rate in rates]
    groups[-1]["freeze_epochs"] = freeze_epochs
    return torch.optim.AdamW(groups)


def walk(optimizer: torch.optim.Optimizer, schedule: Any, steps: int) -> torch.Tensor:
    """(steps, groups): the rates in force at each step."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates, dtype=torch.float64)


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


def test_cosine_runs_over_the_whole_training_unless_told() -> None:
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


# --- parameter groups ------------------------------------------------------------------------------------------------


def original_model(name: str) -> tuple[CLCAViTForImageClassification, dict[str, str]]:
    """Our model for one of optim_groups.json, and our parameter name -> the original's."""
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
    """Every parameter has the original's rate, decay and frozen epochs, for the eight models."""
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


def flat(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group; no parameter stands in two."""
    names = [name for group in groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    for group in groups:
        assert len(group["params"]) == len(group["param_names"])
    return {name: group for group in groups for name in group["param_names"]}


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.method is None or (c.cache, c.tokens) == ("clca", "registers")], ids=str
)
def test_only_matrices_decay(case: Any) -> None:
    """CLS, positions, CLR, registers, LayerScale, norms, queries and biases never do, with any method, cache and backbone."""
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
    """By name, for the parameters that a rule about dimensions would catch."""
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


# --- freezing --------------------------------------------------------------------------------------------------------


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("case", [case for case in CASES if case.tokens == "registers"], ids=str)
def test_a_linear_probe_trains_what_is_new(case: Any) -> None:
    """The original leaves parameters of reductions frozen at random (F14); here they learn, as do CLR and the head."""
    model = case.model()
    trained = trains(model)
    assert set(freeze(model, ["backbone"])) == trained - trains(model)
    new = (".reduction.", ".probe.", "classifier.", "embeddings.clr_")
    assert trains(model) == {name for name in trained if any(part in name for part in new)} != set()
    model.train()(images(), labels=labels()).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


def test_queries_of_a_probing_head_train() -> None:
    model = tiny_model(head="vqt", reduction="dyvit", keep_rate=0.5)
    freeze(model, ["backbone"])
    assert {part_names(model)[name] for name in trains(model)} == {"head", "reductions", "query_tokens"}


@pytest.mark.parametrize(
    ("parts", "unfreeze", "expected"),
    [
        (["backbone"], ["cls_token"], {"embeddings.cls_token"}),
        (["backbone"], ["position_embeddings", "layer_scale"], {"embeddings.position_embeddings", "lambda1"}),
        (["backbone"], ["attention"], {"attention."}),  # the original's attn_only, with position_embeddings
        (["backbone"], ["layers.0"], {"layers.0."}),
        (["attention", "mlp", "cls_token", "position_embeddings", "patch_embeddings"], ["norms"], {"norm", "lambda1"}),
        (["backbone", "reductions"], [], set()),
    ],
)
def test_parts(parts: list[str], unfreeze: list[str], expected: set[str]) -> None:
    model = tiny_model(layerscale_value=0.1, use_qk_norm=True, **SIT)
    wanted = trains(model)
    freeze(model, parts, unfreeze)
    new = ("classifier.", "embeddings.clr_", *(() if "reductions" in parts else (".reduction.",)))
    assert trains(model) == {name for name in wanted if any(part in name for part in (*new, *expected))}


def test_nothing_frozen_starts_to_train() -> None:
    model = tiny_model(**SIT)  # the final norm is frozen: the CLA head does not read it
    freeze(model, ["backbone"], ["norms"])
    assert not model.vit.layernorm.weight.requires_grad and model.vit.layers[0].layernorm_before.weight.requires_grad


def test_freeze_says_what_is_wrong() -> None:
    model = tiny_model()
    before = trains(model)
    with pytest.raises(ValueError, match=r"`freeze` must name .*, got atention; did you mean attention"):
        freeze(model, ["atention"])
    with pytest.raises(ValueError, match="`freeze`: the model has no clr_tokens"):
        freeze(model, ["clr_tokens"])
    with pytest.raises(ValueError, match=r"`unfreeze`: the model has no layers\.7"):
        freeze(model, ["backbone"], ["layers.7"])
    with pytest.raises(ValueError, match="`freeze` backbone head leaves nothing to train"):
        freeze(model, ["backbone", "head"])
    assert trains(model) == before
    assert set(NEW_PARTS) & {"backbone"} == set() and freeze(model, []) == []


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
        ({"freeze": ["heads"]}, "`freeze` must name backbone, head, .*, got heads; did you mean head?"),
        ({"freeze": ["backbone"], "unfreeze": ["layer.0"]}, "`unfreeze` must name .* or layers.<number>, got layer.0"),
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
            "`freeze_epochs` 2 must be below `num_train_epochs` 2; to hold",
        ),
        ({"schedule": "step_epochs"}, {"num_train_epochs": 2}, "`warmup_epochs` 2 must be below `num_train_epochs` 2"),
        (
            {"freeze_epochs": 1},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "`freeze_epochs` does not go with `lr_scheduler_type` reduce_lr_on_plateau",
        ),
    ],
)
def test_options_refused_beside_trainers(options: dict, training: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, OptimizationArguments(**options), **training)


def test_warnings_of_a_cut_or_rising_schedule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = OptimizationArguments(schedule="cosine_epochs", schedule_epochs=45)
    trainer(tmp_path, args, num_train_epochs=9, learning_rate=5e-6)
    assert "The schedule of 45 epochs is cut off: training ends after 9." in caplog.text
    assert "`min_learning_rate` 1e-05 is above `learning_rate` 5e-06: the rate rises." in caplog.text


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
    with pytest.raises(ValueError, match="`mixed_precision` fp16 needs a GPU: use auto, no or bf16"):
        resolve_precision("fp16", use_cpu=True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    with pytest.raises(ValueError, match="`bf16` contradicts `mixed_precision` no: give only one of them"):
        set_precision(args, "no")


# --- in a Trainer ----------------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.pixels, self.labels = images(count).float(), labels(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


class Stream(torch.utils.data.IterableDataset):
    """The same pictures again and again, without a length."""

    def __iter__(self) -> Any:
        pictures = Pictures(8)
        for i in range(1000):
            yield pictures[i % 8]


class Record(TrainerCallback):
    """The rates of all groups at each step, and copies of the weights after it."""

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
    """Ten pictures, four a batch: two batches an epoch, and one of two pictures."""
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
        train_dataset=data or Pictures(10),
        eval_dataset=Pictures(4),
        optimization=optimization,
    )
    result.record = Record()
    result.add_callback(result.record)
    return result


def held(run: UFGIRTrainer) -> set[str]:
    """Names of the parameters of the groups that are held."""
    return {n for group in run.optimizer.param_groups if group["freeze_epochs"] for n in group["param_names"]}


def test_trainer_follows_the_schedule(tmp_path: Path) -> None:
    """With accumulated gradients, whose last share of an epoch is a smaller one: two steps an epoch."""
    args = OptimizationArguments(schedule="cosine_epochs", schedule_epochs=3, warmup_epochs=1, min_learning_rate=1e-4)
    run = trainer(tmp_path, args, gradient_accumulation_steps=2)
    run.train()
    expected = [[1e-6]] * 2 + [[1e-4 + 9e-4 * 0.75]] * 2 + [[1e-4 + 9e-4 * 0.25]] * 2 + [[1e-4]] * 2
    assert [rates[:1] for rates in run.record.rates] == [pytest.approx(rate) for rate in expected]
    assert all(len(set(rates)) == 1 for rates in run.record.rates)


def test_without_options_only_the_decay_differs_from_transformers(tmp_path: Path) -> None:
    """The same rates as transformers' own schedule, and the same groups but for what never decays."""
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
    """Without a length, an epoch is the share of `max_steps` that num_train_epochs makes of it."""
    args = OptimizationArguments(
        schedule="cosine_epochs", warmup_epochs=1, warmup_learning_rate=0, min_learning_rate=0
    )
    run = trainer(tmp_path, args, data=Stream(), max_steps=6, num_train_epochs=3)
    run.train()
    cosine = [1e-3 * 0.75, 1e-3 * 0.25]
    assert [r[0] for r in run.record.rates] == pytest.approx([0, 0, cosine[0], cosine[0], cosine[1], cosine[1]])


@pytest.mark.parametrize("schedule", ["trainer", "cosine_epochs"])
def test_held_backbone(schedule: str, tmp_path: Path) -> None:
    """For two epochs the backbone neither moves nor gathers moments, and does not enter the clipped norm; then it trains."""
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
    without_effect = re.compile(r"slot_logits\.\d+\.bias|norm_in\.bias|aggregate\.bias")
    compared = [name for name in trains(probe.model) if not without_effect.search(name)]
    assert len(compared) > 10
    for name in compared:
        torch.testing.assert_close(probe.record.weights[5][name], run.record.weights[5][name])


def test_held_as_in_the_original(tmp_path: Path) -> None:
    """Position and patch embeddings train from the beginning, CLR is held, and the moments of all gather (K10, K13)."""
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
    """From a checkpoint in the middle of the third epoch, with groups, a held backbone and a schedule: equal bits."""
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
    """Trainer makes a schedule for each, on the same optimizer."""
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
    with pytest.raises(
        ValueError, match="`layer_lr_decay` does not go with `optim` adamw_torch_fused, which makes its"
    ):
        run.create_optimizer()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft(tmp_path: Path) -> None:
    """Adapters and new parts are not of the backbone, and freezing it changes nothing."""
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
