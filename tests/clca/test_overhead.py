"""What a forward pass does besides arithmetic: calls and operators are counted, and hooks and replaced parts still take
part."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from clca import CLCAViTConfig, CLCAViTForImageClassification, set_fast_paths
from clca.heads_clca import LayerConvolution
from clca.linear_clca import activated_linear
from tests.clca.speed import CACHE, count_onednn, every_method, make
from tests.helpers import images


# Too small to compute anything, as deep as a real model.
SMALL: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 10,
}
CLCA: dict[str, Any] = {
    "reduction": "evit",
    "reduction_layers": [3, 6, 9],
    "keep_rate": 0.1,
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "head": "cla",
}


class CountedOperators(TorchDispatchMode):
    """Count the operators that Python calls."""

    count = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def counts(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of operators and of module calls in a forward pass."""
    pixels, called = torch.zeros(1, 3, 64, 64), []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is nn.Module._call_impl.__code__:
            called.append(frame)

    with torch.inference_mode():
        with CountedOperators() as operators:
            model(pixels)
        sys.setprofile(note)
        try:
            model(pixels)
        finally:
            sys.setprofile(None)
    return operators.count, len(called)


@pytest.mark.parametrize(
    ("options", "operators", "modules"), [({}, 0.95, 0.4), (CLCA, 1.42, 0.4)], ids=["no reduction", "EViT and CLCA"]
)
def test_small_models_do_little_besides_arithmetic(options: dict[str, Any], operators: float, modules: float) -> None:
    """Relative to transformers' ViT, which calls every module."""
    model = CLCAViTForImageClassification(CLCAViTConfig(**SMALL, **options)).eval()
    stock = counts(ViTForImageClassification(ViTConfig(**SMALL, attn_implementation="sdpa")).eval())
    counted = counts(model)
    assert counted[0] <= operators * stock[0]
    assert counted[1] <= modules * stock[1]
    with set_fast_paths(False):
        assert counts(model)[1] > stock[1]


@every_method
def test_shortcuts_are_exact(method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits in float32 are the same with and without any shortcut."""
    products = count_onednn(monkeypatch)
    model = make(method, **CACHE, head="cla").float()
    pixels = images().float()
    with torch.inference_mode():
        output = model(pixels)
        assert products
        products.clear()
        with set_fast_paths(False):
            plain = model(pixels)
    assert not products
    assert (output.logits - plain.logits).abs().max() <= 1e-5
    assert output.token_counts == plain.token_counts


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"pre_norm": True, "use_qk_norm": True, "layerscale_value": 0.1, "use_swiglu_ffn": True}],
    ids=["plain", "scaled"],
)
def test_a_hook_on_any_module_fires(options: dict[str, Any], inference: bool) -> None:
    """As often as without shortcuts, also if no other module has a hook."""
    model = make("evit", **CACHE, head="cla", **options)
    fired: list[str] = []
    with torch.inference_mode(inference):
        for name, module in model.named_modules():
            with module.register_forward_hook(lambda *_, name=name: fired.append(name)):
                model(images(1))
                fast = fired.count(name)
                with set_fast_paths(False):
                    model(images(1))
            assert fast == fired.count(name) - fast, name
    assert len(set(fired)) > 5 * 12
    assert {"vit.layers.0.dropout", "vit.layers.0.drop_path", "vit.layers.0.tokens"} <= set(fired)


def test_replaced_parts_take_part() -> None:
    """Dropout that stays on in evaluation, as for Monte Carlo estimates, and modules of other classes or with another
    `forward`."""
    model = make(None, hidden_dropout_prob=0.5)
    layer = model.vit.layers[1]
    with torch.inference_mode():
        expected = model(images()).logits
        assert torch.equal(model(images()).logits, expected)
        layer.dropout.train()
        assert not torch.equal(model(images()).logits, model(images()).logits)
        layer.dropout.eval()
        assert torch.equal(model(images()).logits, expected)
        for name in ("dropout", "drop_path", "tokens", "layernorm_after", "mlp.fc1", "mlp.activation_fn"):
            parent, _, last = f"vit.layers.1.{name}".rpartition(".")
            part = model.get_submodule(parent)
            original = getattr(part, last)
            setattr(part, last, nn.Sequential(original, nn.Tanh()))
            assert not torch.equal(model(images()).logits, expected), name
            setattr(part, last, original)
            original.forward = lambda x, own=original.forward: 2 * own(x)
            assert not torch.equal(model(images()).logits, expected), name
            del original.forward
        assert torch.equal(model(images()).logits, expected)


def test_gelu_and_product_in_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is the same, and a hook on either of the two modules sees its own."""
    seen, mlp = count_onednn(monkeypatch), make(None).float().vit.layers[0].mlp
    tokens = torch.randn(2, 5, 16)
    with torch.inference_mode():
        expected = mlp.activation_fn(mlp.fc1(tokens))
        assert not seen
        assert torch.allclose(activated_linear(mlp.fc1, mlp.activation_fn, tokens), expected, atol=1e-6)
        assert len(seen) == 1
        outputs: list[torch.Tensor] = []
        for part in (mlp.fc1, mlp.activation_fn):
            with part.register_forward_hook(lambda *call: outputs.append(call[2])):
                activated_linear(mlp.fc1, mlp.activation_fn, tokens)
        assert torch.allclose(nn.functional.gelu(outputs[0]), outputs[1], atol=1e-6)


@pytest.mark.parametrize(("bias", "length"), [(True, 4), (False, 4), (True, 5)])
def test_aggregation_of_layers_is_a_convolution(bias: bool, length: int) -> None:
    convolution = LayerConvolution(6, 12, kernel_size=4, groups=6, bias=bias).double()
    cls_tokens = torch.randn(3, 6, length, dtype=torch.float64)
    expected = nn.functional.conv1d(cls_tokens, convolution.weight, convolution.bias, groups=6)
    with torch.inference_mode():
        assert torch.allclose(convolution(cls_tokens), expected, atol=1e-12)
    assert torch.equal(convolution(cls_tokens), expected)  # in training, to the last bit


def test_aggregation_under_autocast() -> None:
    """The result has the precision of a convolution."""
    convolution, cls_tokens = LayerConvolution(6, 12, kernel_size=4, groups=6), torch.randn(3, 6, 4)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ours = convolution(cls_tokens)
        with set_fast_paths(False):
            theirs = convolution(cls_tokens)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.allclose(ours, theirs, atol=0.05)


def test_compiled_modules_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are modules that torch.fx traces: its graph is of modules, not of their functions."""
    mlp = make(None).vit.layers[0].mlp
    called: list[torch.Tensor] = []
    monkeypatch.setattr(mlp.fc1, "_compiled_call_impl", lambda x: called.append(x) or nn.Linear.forward(mlp.fc1, x))
    mlp(torch.randn(1, 2, 16, dtype=torch.float64))
    assert len(called) == 1
    graph = torch.fx.symbolic_trace(make(None).vit.layers[0].mlp).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["fc1", "fc2"]


def test_exported_scores_are_kept_out_of_autocast() -> None:
    """A program that was exported without autocast may be called under autocast later."""
    model = make("topk", head="cla").float().eval()
    program = torch.export.export(model.vit, (images().float(),), strict=False)
    assert any("autocast" in str(node.target) for node in program.graph.nodes)
