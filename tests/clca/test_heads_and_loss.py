"""Heads, their pooling, and the loss for every kind of labels."""

import re
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device

from clca.cache_clca import masked_mean
from clca.heads_clca import HEADS, heads_reading
from tests.clca.helpers import NO_EFFECT, TOPK_CACHE, check_activation_checkpointing, loss_and_gradients
from tests.helpers import METHODS, images, labels, tiny_model


# Heads and loss.


@pytest.mark.parametrize("num_labels", [1, 2, 5])
@pytest.mark.parametrize("head", HEADS)
def test_heads_give_one_logit_per_class(head: str, num_labels: int) -> None:
    model = tiny_model(head=head, num_labels=num_labels)
    assert model(images()).logits.shape == (3, num_labels)


HEAD_CASES = [
    (head, options)
    for head in HEADS
    for options in ({}, {"reduction": "evit", "keep_rate": 0.5}, TOPK_CACHE | {"num_register_tokens": 1})
]


@pytest.mark.parametrize(("head", "options"), HEAD_CASES, ids=str)
def test_every_head_trains(head: str, options: dict[str, Any]) -> None:
    """With and without reduction and cache, all parameters that are not frozen get gradients, and logits do not depend
    on the batch."""
    model = tiny_model(head=head, **options)
    with torch.no_grad():
        assert (model(images()).logits[1:2] - model(images()[1:2]).logits).abs().max() <= 1e-9
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before_norm = {"vit.layernorm.weight", "vit.layernorm.bias"} if HEADS[head].before_norm else set()
    assert frozen == before_norm
    _, gradients = loss_and_gradients(model)
    unmoved = [name for name, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()]
    assert not [name for name in unmoved if not any(re.search(pattern, name) for pattern in NO_EFFECT)]


@pytest.mark.parametrize(
    ("head", "options", "reentrant"),
    [
        (head, options, reentrant)
        for head, options in HEAD_CASES
        for reentrant in (False, True)
        if not (reentrant and head in heads_reading("probes"))  # refused, see above
    ],
    ids=str,
)
def test_activation_checkpointing_with_every_head(head: str, options: dict[str, Any], reentrant: bool) -> None:
    """Gradients are equal, also through features that a head reads from the layers."""
    check_activation_checkpointing(tiny_model(head=head, **options), reentrant)


def test_the_cla_head_by_hand() -> None:
    """The head computes BatchNorm, a depth-wise convolution over the layers with `cla_multiplier` kernels per channel,
    BatchNorm, GELU and a linear classifier."""
    model = tiny_model(head="cla", cla_multiplier=3)
    head, layers = model.classifier, len(model.config.aggregation_layers)
    with torch.no_grad():
        for parameter in (*head.parameters(), head.norm_in.running_mean, head.norm_out.running_mean):
            parameter.add_(0.3 * torch.randn_like(parameter))
        cls_tokens = model.vit(images()).cls_tokens
        logits = model(images()).logits
        assert head.aggregate.weight.shape == (16 * 3, 1, layers)
        norm, out = head.norm_in, head.norm_out
        x = (cls_tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        kernel = head.aggregate.weight.view(16, 3, layers)
        x = torch.einsum("bmd,dkm->bdk", x, kernel).flatten(1) + head.aggregate.bias
        x = (x - out.running_mean) / (out.running_var + out.eps).sqrt() * out.weight + out.bias
        x = torch.nn.functional.gelu(x)
        expected = x @ head.out_proj.weight.squeeze(-1).T + head.out_proj.bias
    assert (logits - expected).abs().max() <= 1e-9


def test_the_ifa_head_by_hand() -> None:
    """The head computes a weighted sum over layers, ReLU, LayerNorm and a linear classifier."""
    model = tiny_model(head="ifa")
    head = model.classifier
    with torch.no_grad():
        cls_tokens = model.vit(images()).cls_tokens
        x = torch.einsum("bmd,m->bd", cls_tokens, head.aggregate.weight[0]) + head.aggregate.bias
        x = x.clamp(min=0)
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected = (x * head.layernorm.weight + head.layernorm.bias) @ head.out_proj.weight.T + head.out_proj.bias
        assert (model(images()).logits - expected).abs().max() <= 1e-9


def test_mean_pooling_leaves_out_the_prefix() -> None:
    """`mean` averages all tokens except CLS and registers, before the final norm."""
    model = tiny_model(pooling="mean", num_register_tokens=2, num_clr_tokens=1)
    with torch.no_grad():
        output = model.vit(images(), output_hidden_states=True)
        expected = model.vit.layernorm(output.hidden_states[-1][:, 3:].mean(dim=1))
    assert (output.pooler_output - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("head", ["cla", "h2t", "vqt"])
@pytest.mark.parametrize("method", [None, "topk", "tome", "ats"])
def test_layers_on_different_devices(method: str | None, head: str) -> None:
    """Cache and head combine tensors of layers on different devices. (The second device is the meta device.)"""
    model = tiny_model(cross_layer_cache=True, num_clr_tokens=1, head=head, reduction=method)

    def move(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return send_to_device(args, "meta"), kwargs

    for part in (*model.vit.layers[2:], model.vit.layernorm, model.classifier):
        part.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    if method == "ats":
        model.vit.layers[2].reduction.pad_to_bound = True  # it cannot ask how many tokens there are
    with torch.no_grad():
        assert model(images()).logits.device.type == "meta"


def test_means_over_masked_tokens_do_not_overflow() -> None:
    """A sum over hundreds of tokens overflows in half precision; their mean does not."""
    tokens = torch.full((1, 800, 4), 100.0, dtype=torch.float16)
    key_mask = torch.ones(1, 800, dtype=torch.bool)
    assert masked_mean(tokens, 1, 800, key_mask).tolist() == [[[100.0] * 4]]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_attention_pooling(method: str | None) -> None:
    model = tiny_model(pooling="map", use_class_token=False, reduction=method, keep_rate=0.5)
    _, gradients = loss_and_gradients(model)
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    model.eval()
    together = model(images(2)).logits
    assert (together[:1] - model(images(2)[:1]).logits).abs().max() <= 1e-9


def test_loss_of_class_indices() -> None:
    model = tiny_model()
    output = model(images(), labels=labels())
    expected = -output.logits.log_softmax(dim=-1)[range(3), labels()].mean()
    assert (output.loss - expected).abs() <= 1e-9
    assert set(output.loss_terms) == {"classification"}
    assert not output.loss_terms["classification"].requires_grad
    assert model(images()).loss is None


def test_loss_of_soft_labels() -> None:
    """Class probabilities, as made by MixUp, are accepted. One-hot labels give the same loss as class indices."""
    model = tiny_model(problem_type="single_label_classification")
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    output = model(images(), labels=soft)
    expected = -(output.logits.log_softmax(dim=-1) * soft).sum(dim=-1).mean()
    assert (output.loss - expected).abs() <= 1e-9
    one_hot = torch.nn.functional.one_hot(labels(), 3).float()
    assert (model(images(), labels=one_hot).loss - model(images(), labels=labels()).loss).abs() <= 1e-9


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_loss_of_several_labels(problem_type: str | None) -> None:
    model = tiny_model(problem_type=problem_type)
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    output = model(images(), labels=targets)
    p = output.logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert (output.loss - expected).abs() <= 1e-9


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_loss_of_a_regression(shape: tuple[int, ...]) -> None:
    model = tiny_model(num_labels=1)
    targets = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    output = model(images(), labels=targets.reshape(shape))
    assert (output.loss - (output.logits[:, 0] - targets).square().mean()).abs() <= 1e-9


def test_the_loss_leaves_the_configuration_alone() -> None:
    """The same model accepts soft labels and then class indices without a `problem_type`."""
    model = tiny_model()
    before = model.config.to_dict()
    model(images(), labels=torch.full((3, 3), 0.5, dtype=torch.float64))
    model(images(), labels=labels())
    assert model.config.to_dict() == before
    assert model.config.problem_type is None


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_labels_of_a_wrong_shape_are_refused(problem_type: str) -> None:
    with pytest.raises(ValueError, match="`labels`"):
        tiny_model(problem_type=problem_type)(images(), labels=torch.zeros(3, 4))
