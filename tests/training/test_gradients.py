"""Records of gradients: values of the original, whole batches, and files when a training stops."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from clca import CLCAViTForImageClassification
from tests.helpers import tiny_config
from tests.training.watching import Samples, Stop, make_model, make_trainer
from ufgir.training.gradients import (
    GradientRecorder,
    _sizes_fused,
    _sizes_in_place,
    gradient_statistics,
    layer_of,
    read_gradients,
)


STATISTICS = ("max_grad_all", "mean_max_grad_layer", "std_max_grad_layer", "mean_avg_grad_layer", "std_avg_grad_layer")


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
    """The fused implementation is for GPUs; NaN and infinity are visible in both."""
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
    """Records the gradients of the first step, by the names of the parameters, and its batches."""

    def on_gradients(self, args, state, model, scale) -> None:
        if state.global_step == 0:
            self.seen = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_recorded_are_whole_batches_before_clipping(tmp_path, clip):
    """Two accumulated batches of 4 have the gradient of one batch of 8, regardless of clipping. (The head is linear, because BatchNorm
    depends on the batch.)"""
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
    """If a process is killed immediately after a checkpoint, all previous steps have been written."""

    class Look(TrainerCallback):
        def save_to_checkpoint(self, folder):
            self.steps = read_gradients(tmp_path / "gradients.csv")["step"].tolist()

    look = Look()
    make_trainer(
        tmp_path, GradientRecorder(flush_every=100), look, save_strategy="best", eval_strategy="epoch", max_steps=4
    ).train()
    assert look.steps == [1, 2, 3, 4]


def test_a_new_training_starts_a_new_record_and_a_missing_one_is_logged(tmp_path, caplog):
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


def test_only_the_first_process_writes_and_hidden_gradients_are_logged_once(tmp_path, caplog):
    model = make_model()
    recorder = GradientRecorder(tmp_path / "g.csv")
    for first in (False, True, True):
        recorder.on_gradients(None, SimpleNamespace(global_step=0, is_world_process_zero=first), model, 1.0)
    recorder.flush()
    assert not list(tmp_path.iterdir())
    assert caplog.text.count("Gradients are not recorded") == 1
    with pytest.raises(ValueError, match="`flush_every` must be at least 1"):
        GradientRecorder(flush_every=0)


@pytest.mark.parametrize("text", [None, "", "step,a\n", "epoch,a\n1,2\n", "step,a\n1,x\n"])
def test_files_that_are_no_record_are_named(tmp_path, text):
    if text is not None:
        (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=r"`csv_files`: .*g\.csv"):
        read_gradients(tmp_path / "g.csv")
