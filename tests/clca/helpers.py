"""Helpers shared by tests of models."""

import copy

import torch

from clca import CLCAViTForImageClassification
from tests.helpers import checkpoint_activations, images, labels


# Methods for which the schedule is an upper bound.
COUNT_IS_A_BOUND = {"ats": "quantiles that fall on the same token take it once"}
# Parameters whose gradient is zero by calculation, to be asked only for being there and finite.
NO_EFFECT = {
    r"attention\.k_proj\.bias": "adds the same to all logits of a query, which softmax does not see",
    r"classifier\.(norm_in|aggregate)\.bias": "a constant per channel, which the next BatchNorm takes away in training",
    r"slot_logits\.3\.bias": "sit: adds the same to all tokens of a slot, which its softmax over tokens does not see",
}


def loss_and_gradients(
    model: CLCAViTForImageClassification, count: int = 4
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return loss and gradients of one training step, with fixed random draws."""
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    output = model(images(count), labels=labels(count))
    output.loss.backward()
    return output.loss.detach(), {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def check_activation_checkpointing(model: CLCAViTForImageClassification, reentrant: bool) -> None:
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model))
    checkpoint_activations(model, {"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.vit.layers)
    loss, gradients = loss_and_gradients(model)
    assert (loss - expected_loss).abs() <= 1e-12
    for name, gradient in expected.items():
        assert gradients[name] is not None, name
        assert (gradients[name] - gradient).abs().max() <= 1e-9 * max(1.0, float(gradient.abs().max())), name


TOPK_CACHE = {"reduction": "topk", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1}
