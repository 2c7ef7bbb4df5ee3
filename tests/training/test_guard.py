"""The guard against NaN names step and parameter, and keeps checkpoints valid."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.training.watching import Samples, make_model, make_trainer
from ufgir.training.callbacks import NaNGuard
from ufgir.training.ema import EMACallback
from ufgir.training.gradients import (
    GradientRecorder,
    read_gradients,
)


# The guard


class Poison(TrainerCallback):
    """Sets one value to NaN at a step."""

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
        (Poison("loss", 3), r"step 3: the loss is nan. "),
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
    """Without the guard, transformers continues training and saves the model."""
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
    """Squares of 1e30 overflow in float32, but the values do not; an empty parameter has no maximum."""
    model, guard = torch.nn.Linear(2, 2), NaNGuard()
    model.register_parameter("none", torch.nn.Parameter(torch.zeros(0)))
    args, state = SimpleNamespace(output_dir="out"), SimpleNamespace(global_step=0)
    guard.on_gradients(args, state, model, 1.0)
    model.weight.grad = torch.full((2, 2), 1e30)
    model.none.grad = torch.zeros(0)
    guard.on_gradients(args, state, model, 1.0)
    guard.on_step_end(args, state, None, model)
