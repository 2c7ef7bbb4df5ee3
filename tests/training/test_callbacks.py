"""What watches a training: gradient records, the guard against NaN, averaged weights, early stopping, the last model."""

import csv
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from clca import CLCAViTForImageClassification
from tests.helpers import images, labels, tiny_config
from ufgir.training.adapters import adapt, merge
from ufgir.training.callbacks import CallbackArguments, LastModel, NaNGuard, make_callbacks
from ufgir.training.ema import EMACallback, ema_function
from ufgir.training.gradients import (
    GradientRecorder,
    _sizes_fused,
    _sizes_in_place,
    gradient_statistics,
    layer_of,
    read_gradients,
)
from ufgir.training.trainer import UFGIRTrainer
from ufgir.utils.arguments import RecipeParser


STATISTICS = ("max_grad_all", "mean_max_grad_layer", "std_max_grad_layer", "mean_avg_grad_layer", "std_avg_grad_layer")
CLCA = {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}


class Samples(torch.utils.data.Dataset):
    """Random pictures with a label each, in the columns that a model takes."""

    def __init__(self, count: int = 16) -> None:
        self.pixels, self.labels = images(count).float(), labels(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def make_model() -> CLCAViTForImageClassification:
    torch.manual_seed(0)
    return CLCAViTForImageClassification(tiny_config(num_hidden_layers=3, reduction_layers=[1], **CLCA))


def top1(prediction: transformers.EvalPrediction) -> dict[str, float]:
    return {"top1": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(folder: Path, *callbacks: TrainerCallback, **options) -> UFGIRTrainer:
    """16 images in batches of 4: 4 steps an epoch, 12 in all, unless `options` say otherwise."""
    defaults = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 4,
        "metric_for_best_model": "top1" if "eval_strategy" in options else None,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    args = transformers.TrainingArguments(output_dir=str(folder), **(defaults | options))
    return UFGIRTrainer(
        model=make_model(),
        args=args,
        train_dataset=Samples(),
        eval_dataset=Samples(8),
        compute_metrics=top1,
        callbacks=list(callbacks),
    )


def weights(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), "not bit-identical"


class Snapshots(TrainerCallback):
    """All weights after each step."""

    def __init__(self) -> None:
        self.taken: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.taken.append({name: value.clone() for name, value in model.state_dict().items()})


class Stop(TrainerCallback):
    """Ends a training at a step, as an interruption would, a little after a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Gradients


def test_statistics_are_the_originals(golden_gradients):
    stored, parameters = golden_gradients
    found = gradient_statistics(parameters)
    assert set(found) == set(STATISTICS)
    for name, value in found.items():
        assert value == pytest.approx(stored[f"out.{name}"].item(), rel=1e-6), name


@pytest.fixture
def golden_gradients() -> tuple[dict, dict]:
    stored = load_file(Path(__file__).parents[1] / "goldens_misc" / "get_gradients.safetensors")
    parameters = {}
    for name, gradient in stored.items():
        if not name.startswith("out."):
            parameters[name] = torch.nn.Parameter(torch.zeros_like(gradient), requires_grad=name != "d.weight")
            parameters[name].grad = gradient
    return stored, parameters


def test_biases_frozen_and_unused_parameters_do_not_count(golden_gradients):
    _, parameters = golden_gradients
    before = gradient_statistics(parameters)
    parameters["a.bias"].grad = parameters["a.bias"].grad * 100
    parameters["d.weight"].grad = parameters["d.weight"].grad * 100
    parameters["unused.weight"] = torch.nn.Parameter(torch.ones(3))
    assert gradient_statistics(parameters) == before
    parameters["c.gamma"].grad = parameters["c.gamma"].grad * 100
    assert gradient_statistics(parameters)["max_grad_all"] > before["max_grad_all"]
    with pytest.raises(ValueError, match="trainable"):
        gradient_statistics({name: parameters[name] for name in ("a.bias", "d.weight", "unused.weight")})


def test_both_ways_to_measure_agree():
    """The fused one is for GPUs; NaN and infinity show in both."""
    gradients = [torch.randn(shape) for shape in ((7, 5), (3,), (1, 2, 3), ())]
    torch.testing.assert_close(_sizes_fused(gradients), _sizes_in_place(gradients), rtol=1e-6, atol=0)
    gradients[0][1, 1], gradients[2][0, 0, 0] = float("nan"), float("inf")
    for sizes in (_sizes_fused(gradients), _sizes_in_place(gradients)):
        assert sizes[:, 0].isnan().all()
        assert sizes[:, 2].isinf().all()
        assert sizes[:, [1, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vit.layers.3.attention.q_proj.weight", "vit.layers.3"),
        ("vit.layers.11.reduction.score.0.weight", "vit.layers.11"),
        ("vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings"),
        ("vit.layernorm.weight", "vit.layernorm"),
        ("classifier.norm_in.weight", "classifier"),
        ("base_model.model.vit.layers.3.mlp.fc1.lora_A.default.weight", "base_model.model.vit.layers.3"),
        ("weight", "weight"),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


class Spy(TrainerCallback):
    """The gradients of the first step, by the names of the parameters, and the batches they came from."""

    def on_gradients(self, args, state, model, scale) -> None:
        if state.global_step == 0:
            self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_recorded_are_whole_batches_before_clipping(tmp_path, clip):
    """Two accumulated batches of 4 have the gradient of one batch of 8, whatever is clipped from it later. (The head is
    linear: BatchNorm sees 4 images or 8.)"""
    spy = Spy()
    trainer = make_trainer(tmp_path, GradientRecorder(), spy, gradient_accumulation_steps=2, max_grad_norm=clip)
    trainer.model = trainer.model_wrapped = CLCAViTForImageClassification(tiny_config(num_hidden_layers=3))
    batch = next(iter(torch.utils.data.DataLoader(Samples(8), batch_size=8)))
    trainer.train_dataset = Samples(8)
    trainer.model(**batch).loss.backward()
    expected = gradient_statistics(dict(trainer.model.named_parameters()))
    by_layer = trainer.model.vit.layers[1]
    largest = max(p.grad.abs().max().item() for n, p in by_layer.named_parameters() if "bias" not in n)
    numbers = torch.cat([p.grad.flatten() for n, p in by_layer.named_parameters() if "bias" not in n])
    trainer.model.zero_grad()
    trainer.train()
    table = read_gradients(tmp_path / "gradients.csv")
    assert table["step"].tolist() == [1, 2, 3]
    for name in STATISTICS:
        assert table[name][0] == pytest.approx(expected[name], rel=1e-4), name
    assert table["max/vit.layers.1"][0] == pytest.approx(largest, rel=1e-4)
    assert table["mean/vit.layers.1"][0] == pytest.approx(numbers.abs().mean().item(), rel=1e-4)
    assert {"max/vit.embeddings", "max/vit.layernorm", "max/classifier", "mean/vit.layers.2"} <= set(table)
    # to the precision of the file, the numbers are those of the callback itself
    own = gradient_statistics(
        {n: SimpleNamespace(grad=g, requires_grad=True, numel=g.numel) for n, g in spy.seen.items()}
    )
    assert [table[name][0] for name in STATISTICS] == pytest.approx([own[name] for name in STATISTICS], rel=1e-6)
    assert (tmp_path / "gradients.png").stat().st_size > 5000


def test_loss_scale_of_fp16_is_taken_out(tmp_path):
    model = make_model()
    model(**next(iter(torch.utils.data.DataLoader(Samples(4), batch_size=4)))).loss.backward()
    for scale in (1.0, 1024.0):
        recorder = GradientRecorder(tmp_path / f"{scale}.csv")
        recorder.on_gradients(None, SimpleNamespace(global_step=0, is_world_process_zero=True), model, scale)
        recorder.flush()
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad * 1024
    assert (tmp_path / "1.0.csv").read_text() == (tmp_path / "1024.0.csv").read_text()


def test_record_of_a_resumed_training_is_that_of_an_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
    make_trainer(tmp_path / "whole", GradientRecorder(flush_every=4), **saving).train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "cut", GradientRecorder(flush_every=2), Stop(9), **saving).train()
    cut = tmp_path / "cut" / "gradients.csv"
    assert read_gradients(cut)["step"].tolist() == list(range(1, 10))  # also what led to the end
    with cut.open("a") as file:
        file.write("10,0.5,0.2")  # killed while it wrote
    make_trainer(tmp_path / "cut", GradientRecorder(), **saving).train(resume_from_checkpoint=True)
    assert cut.read_bytes() == (tmp_path / "whole" / "gradients.csv").read_bytes()
    assert read_gradients(cut)["step"].tolist() == list(range(1, 13))


def test_checkpoint_is_never_ahead_of_the_record(tmp_path):
    """A process that is killed right after a checkpoint has written the lines of all steps before it."""

    class Look(TrainerCallback):
        def save_to_checkpoint(self, folder):
            self.steps = read_gradients(tmp_path / "gradients.csv")["step"].tolist()

    look = Look()
    make_trainer(
        tmp_path, GradientRecorder(flush_every=100), look, save_strategy="best", eval_strategy="epoch", max_steps=4
    ).train()
    assert look.steps == [1, 2, 3, 4]


def test_a_new_training_starts_a_new_record_and_a_missing_one_is_told(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, GradientRecorder(), max_steps=3, **saving).train()
    make_trainer(tmp_path, GradientRecorder(), max_steps=3, **saving).train()
    assert read_gradients(tmp_path / "gradients.csv")["step"].tolist() == [1, 2, 3]
    (tmp_path / "gradients.csv").unlink()
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, GradientRecorder(), max_steps=5, **saving).train(resume_from_checkpoint=True)
    assert "only 0 of the 3 steps" in caplog.text
    assert read_gradients(tmp_path / "gradients.csv")["step"].tolist() == [4, 5]


def test_parameters_that_train_later_have_columns_with_empty_cells_before(tmp_path):
    model, recorder = make_model(), GradientRecorder(tmp_path / "g.csv")
    batch = next(iter(torch.utils.data.DataLoader(Samples(4), batch_size=4)))
    for step, frozen in enumerate((True, True, False)):
        model.vit.requires_grad_(not frozen)
        model(**batch).loss.backward()
        recorder.on_gradients(None, SimpleNamespace(global_step=step, is_world_process_zero=True), model, 1.0)
    recorder.flush()
    table = read_gradients(tmp_path / "g.csv")
    assert table["step"].tolist() == [1, 2, 3]
    assert np.isnan(table["max/vit.layers.0"]).tolist() == [True, True, False]
    assert np.isfinite(table["max/classifier"]).all()


def test_only_the_first_process_writes_and_hidden_gradients_are_told_once(tmp_path, caplog):
    model = make_model()
    recorder = GradientRecorder(tmp_path / "g.csv")
    for first in (False, True, True):
        recorder.on_gradients(None, SimpleNamespace(global_step=0, is_world_process_zero=first), model, 1.0)
    recorder.flush()
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("No gradients are recorded") == 1
    with pytest.raises(ValueError, match="`flush_every` must be at least 1"):
        GradientRecorder(flush_every=0)


@pytest.mark.parametrize("text", [None, "", "step,a\n", "epoch,a\n1,2\n", "step,a\n1,x\n"])
def test_files_that_are_no_record_are_named(tmp_path, text):
    if text is not None:
        (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=r"`csv_files`: .*g\.csv"):
        read_gradients(tmp_path / "g.csv")


# The guard


class Poison(TrainerCallback):
    """Spoils one value at a step."""

    def __init__(
        self, what: str, step: int, name: str = "vit.layers.1.mlp.fc1.weight", value: float = float("nan")
    ) -> None:
        self.what, self.step, self.name, self.value = what, step, name, value

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        if state.global_step + 1 == self.step and self.what == "gradient":
            parameter = model.get_parameter(self.name)

            def spoil(gradient):
                gradient = gradient.clone()
                gradient.view(-1)[-1] = self.value
                return gradient

            self.hook = parameter.register_hook(spoil)
        if state.global_step + 1 == self.step and self.what == "loss":
            model.config.problem_type = "single_label_classification"
            model.classifier.register_forward_hook(lambda module, inputs, output: output * self.value)

    def on_optimizer_step(self, args, state, control, model, **kwargs) -> None:
        if state.global_step + 1 == self.step and self.what == "weight":
            model.state_dict()[self.name].view(-1)[0] = self.value


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("clip", [0.0, 1.0])  # clipping by a norm that is NaN makes every gradient NaN
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (
            Poison("gradient", 3),
            r"step 3: the gradient of vit\.layers\.1\.mlp\.fc1\.weight is not finite in 1 of 512 ",
        ),
        (
            Poison("gradient", 3, "classifier.out_proj.bias", INF),
            r"step 3: the gradient of classifier\.out_proj\.bias ",
        ),
        (Poison("loss", 3), r"step 3: the loss is nan; "),
        (
            Poison("weight", 3, value=INF),
            r"step 3: the weight of vit\.layers\.1\.mlp\.fc1\.weight is not finite in 1 ",
        ),
        (Poison("weight", 3, "classifier.norm_in.running_var"), r"the weight of classifier\.norm_in\.running_var "),
    ],
)
def test_guard_names_step_and_parameter_and_keeps_checkpoints_sound(tmp_path, poison, message, clip):
    guard, recorder = NaNGuard(), GradientRecorder()
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_grad_norm": clip, "max_steps": 4}
    trainer = make_trainer(tmp_path, recorder, poison, guard, EMACallback(0.9), **options)
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    for file in ("model.safetensors", "ema.safetensors"):
        assert all(value.isfinite().all() for value in load_file(tmp_path / "checkpoint-2" / file).values())
    steps = read_gradients(tmp_path / "gradients.csv")
    assert steps["step"].tolist() == [1, 2, 3]  # the step that failed is in the record
    assert np.isfinite(steps["max_grad_all"][:-1]).all()
    assert np.isfinite(steps["max_grad_all"][-1]) == (poison.what == "weight" or poison.name.endswith("bias"))


def test_without_the_guard_the_poison_spreads(tmp_path):
    """What the guard is for: transformers trains on, and saves."""
    trainer = make_trainer(tmp_path, Poison("gradient", 3), max_steps=4)
    trainer.train()
    assert not all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_guard_leaves_overflow_in_fp16_to_the_scaler_while_it_can():
    model, guard = make_model(), NaNGuard()
    model(**next(iter(torch.utils.data.DataLoader(Samples(4), batch_size=4)))).loss.backward()
    model.classifier.out_proj.weight.grad[0, 0] = INF
    args, state = SimpleNamespace(output_dir="out"), SimpleNamespace(global_step=0)
    guard.on_loss(torch.tensor(1.0))
    guard.on_gradients(args, state, model, 65536.0)
    with pytest.raises(FloatingPointError, match=r"gradient of classifier\.out_proj\.weight"):
        guard.on_gradients(args, state, model, 1.0)
    guard.on_loss(torch.tensor(NAN))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        guard.on_gradients(args, state, model, 65536.0)


def test_guard_accepts_large_and_missing_values():
    """Squares of 1e30 overflow in float32, the values do not; and an empty parameter has no maximum."""
    model, guard = torch.nn.Linear(2, 2), NaNGuard()
    model.register_parameter("none", torch.nn.Parameter(torch.zeros(0)))
    args, state = SimpleNamespace(output_dir="out"), SimpleNamespace(global_step=0)
    guard.on_gradients(args, state, model, 1.0)
    model.weight.grad = torch.full((2, 2), 1e30)
    model.none.grad = torch.zeros(0)
    guard.on_gradients(args, state, model, 1.0)
    guard.on_step_end(args, state, None, model)


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


def test_checkpoint_without_an_average_starts_one_with_a_warning(tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, max_steps=4, **saving).train()
    ema = EMACallback(0.9)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, ema, **saving).train(resume_from_checkpoint=True)
    assert "holds no averaged weights" in caplog.text
    assert ema.average.n_averaged == 8


class Worse(TrainerCallback):
    """Makes the first evaluation the best."""

    def __init__(self, metric: str) -> None:
        self.metric, self.value = metric, 1.0

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        metrics[self.metric] = self.value
        self.value /= 2


BEST = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1}


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
    """transformers' `full_determinism`: operations without a deterministic form are refused, and the run is repeatable."""
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
