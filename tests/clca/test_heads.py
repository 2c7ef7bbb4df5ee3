"""A head is one class and one entry in `HEADS`: heads defined here work everywhere without other changes to the
package.
"""

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification, heads_clca
from clca.heads_clca import HEADS, AggregationHead, Head, LayerTrace, NetworkEnds, Probe
from tests.helpers import checkpoint_activations, images, labels, tiny_model


class MeanHead(AggregationHead):
    """Aggregate like CLA: a linear layer on the mean CLS, with a factor that has its own initialization."""

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(1))
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def init_weights(self) -> None:
        heads_clca.init.constant_(self.factor, 3.0)

    @classmethod
    def check(cls, config: CLCAViTConfig) -> None:
        if config.cross_layer_cache:
            raise ValueError("`head`='own' knows no `cross_layer_cache`.")

    @classmethod
    def takes_rate(cls, config: CLCAViTConfig) -> bool:
        return True

    def forward(self, cls_tokens: torch.Tensor, rate: float) -> torch.Tensor:
        return self.out_proj(cls_tokens.mean(dim=1) * self.factor) * rate


class KeyProbe(Probe):
    """Return the mean key, and pass an additional token through the layer."""

    reads_tokens = False

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__(config)
        self.token = nn.Parameter(torch.ones(1, 1, config.hidden_size))

    def forward(self, answer: Any, trace: LayerTrace) -> torch.Tensor:
        key = trace.context.key.transpose(1, 2).flatten(2).mean(dim=1)  # (B, D)
        return key + answer(self.token.expand(len(key), -1, -1), trace.context).squeeze(1)


class KeyHead(Head):
    reads = "probes"
    probe = KeyProbe

    @classmethod
    def num_features(cls, config: CLCAViTConfig) -> int:
        return (len(config.probe_layers) + 1) * config.hidden_size

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        return [*probed, ends.normalized[:, 0]]


class MaxHead(Head):
    """Read what a linear head reads."""

    @classmethod
    def build(cls, config: CLCAViTConfig) -> nn.Module:
        return nn.Sequential(nn.ReLU(), nn.Linear(config.hidden_size, config.num_labels))


OWN = {"mean": MeanHead, "key": KeyHead, "max": MaxHead}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("options", [{}, {"reduction": "evit", "keep_rate": 0.5}], ids=str)
def test_a_head_of_ones_own(
    own: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It works with configuration, forward pass, training step, saving and loading."""
    monkeypatch.setitem(HEADS, "own", OWN[own])
    model = tiny_model(head="own", **options).float()
    assert model.vit.layernorm.weight.requires_grad is not OWN[own].before_norm
    with torch.no_grad():
        logits = model(images().float()).logits
        assert logits.shape == (3, 3)
        model.vit.skip_unread_rows = False
        assert torch.allclose(model(images().float()).logits, logits, atol=1e-5)
        model.vit.skip_unread_rows = True
    model.train()
    model(images().float(), labels=labels()).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any(g.any() for name, g in gradients.items() if name.startswith("classifier"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * (0 if parameter.grad is None else parameter.grad)
    model.save_pretrained(tmp_path)
    loaded, info = CLCAViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images().float()).logits, model.eval()(images().float()).logits)


def test_an_aggregating_head_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It initializes its own parameters, receives the keep rate, refuses unsupported configurations, and requires CLS
    and classes."""
    monkeypatch.setitem(HEADS, "own", MeanHead)
    model = tiny_model(head="own", reduction="evit", keep_rate=1.0)
    fresh = CLCAViTForImageClassification(model.config).classifier
    assert fresh.factor.item() == 3.0
    assert model.vit.aggregation_layers == model.config.aggregation_layers
    with torch.no_grad():
        head, cls_tokens = model.classifier, model.vit(images(), keep_rate=0.5).cls_tokens
        assert torch.allclose(model(images(), keep_rate=0.5).logits, head(cls_tokens, 0.5))
    for refused, named in (
        ({"cross_layer_cache": True}, "cross_layer_cache"),
        ({"use_class_token": False, "pooling": "mean"}, "head"),
        ({"num_labels": 0}, "num_labels"),
        ({"num_selected_features": 3}, "num_selected_features"),
    ):
        with pytest.raises(ValueError, match=f"`{named}`"):
            tiny_model(head="own", **refused)


def test_a_probing_head_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its probes are placed in the layers and features can be selected. Pooling and reentrant checkpointing are
    refused."""
    monkeypatch.setitem(HEADS, "own", KeyHead)
    model = tiny_model(head="own", reduction="topk", keep_rate=0.5)
    probes = [index for index, layer in enumerate(model.vit.layers) if layer.probe is not None]
    assert probes == model.config.probe_layers == model.config.reduction_layers
    assert len(model.select_features(0.5)) == model.config.num_selected_features == 3 * 16 // 2
    assert model(images()).logits.shape == (3, 3)
    with pytest.raises(ValueError, match="`use_reentrant`"):
        checkpoint_activations(model, {"use_reentrant": True})
    with pytest.raises(ValueError, match="`pooling`"):
        tiny_model(head="own", pooling="mean")


def test_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match="`head` must be one of linear, cla, ifa, h2t, vqt, got 'own'"):
        tiny_model(head="own")


def test_the_code_of_an_own_head_is_not_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(HEADS, "own", MaxHead)
    model, warned = tiny_model(head="own"), []
    monkeypatch.setattr("clca.modeling_clca.logger.warning", lambda message, *args: warned.append(message % args))
    model.save_pretrained(tmp_path)
    assert len(warned) == 1 and "`head`='own'" in warned[0]


def test_no_head_is_named_outside_its_class() -> None:
    """No code of the package compares `head` to a name or lists names of heads."""
    package = Path(heads_clca.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert not set(values) & set(HEADS), f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Tuple | ast.List | ast.Set):
                assert not {getattr(e, "value", None) for e in node.elts} & set(HEADS), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("from_hub", [False, True])
def test_the_kernels_of_cla_are_not_drawn_as_those_of_wide_layers(
    from_hub: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds for code from the Hub, where transformers only initializes modules with their own parameters."""
    monkeypatch.setattr(CLCAViTForImageClassification, "is_custom_code", lambda self: from_hub)
    weight = tiny_model(head="cla", initializer_range=0.02).classifier.aggregate.weight
    bound = weight.shape[-1] ** -0.5
    assert 0.8 * bound < weight.abs().max() <= bound
