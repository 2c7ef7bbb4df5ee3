"""Linear layers by oneDNN: when it is used, and when the layer is called instead."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from clca import (
    linear_clca,
)
from clca.linear_clca import linear
from tests.clca.speed import CACHE, count_onednn, make
from tests.helpers import images


def test_onednn_computes_in_inference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is used in float32 without gradients for any shape, with the same results, and never under tracers or
    transforms."""
    seen, layer = count_onednn(monkeypatch), nn.Linear(16, 24)
    tokens = torch.randn(3, 17, 16)
    for part in (
        tokens,
        tokens[:, :1],
        tokens[:, 1::2],
        tokens[:, :0],
        tokens[:0],
        tokens[0],
        tokens[0, 0],
        tokens.transpose(0, 1),
    ):
        expected = nn.functional.linear(part, layer.weight, layer.bias)
        with torch.no_grad():
            assert torch.allclose(linear(layer, part), expected, atol=1e-5)
    assert len(seen) == 8
    seen.clear()
    linear(layer, tokens)  # with gradients
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(layer, tokens).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(layer, tokens)
        assert counter.get_total_flops() == 2 * tokens.numel() * 24
        assert torch.vmap(partial(linear, layer))(tokens).shape == (3, 17, 24)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(tokens, torch.ones_like(tokens))
            assert forward_ad.unpack_dual(linear(layer, dual)).tangent is not None
        with torch.backends.mkldnn.flags(enabled=False):
            linear(layer, tokens)
        for dtype in (torch.float64, torch.bfloat16):
            linear(copy.deepcopy(layer).to(dtype), tokens.to(dtype))
        linear(copy.deepcopy(layer).to("meta"), tokens.to("meta"))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(layer, torch.randn(3, 15))
    assert not seen


@pytest.mark.parametrize(("width", "calls"), [(192, 0), (256, 1)])
def test_tiny_layers_stay_with_blas(width: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fewest = linear_clca._MIN_WEIGHTS
    seen, layer = count_onednn(monkeypatch), nn.Linear(width, width)
    monkeypatch.setattr(linear_clca, "_MIN_WEIGHTS", fewest)
    with torch.no_grad():
        linear(layer, torch.randn(1, 12, width))
    assert len(seen) == calls


def test_onednn_gives_way_to_whoever_listens_or_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with hooks, other classes of layers, and layers with a replaced `forward` (as in offloading)
    are called."""
    seen, tokens = count_onednn(monkeypatch), torch.randn(3, 16)
    called: list[str] = []
    hooked, replaced = nn.Linear(16, 24), nn.Linear(16, 24)
    hooked.register_forward_hook(lambda *_: called.append("hook"))
    replaced.forward = lambda x: called.append("forward") or x
    pruned = prune.l1_unstructured(nn.Linear(16, 24), "weight", amount=0.5)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
    with torch.no_grad():
        for layer in (hooked, replaced, pruned, parametrised, nn.Identity()):
            assert torch.equal(linear(layer, tokens), layer(tokens))
    assert not seen and called == ["hook", "hook", "forward", "forward"]


def test_hooks_on_every_module_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Global module hooks, as tracers and counters use them, also see the tokens that the last layer would skip."""
    seen, model = count_onednn(monkeypatch), make("evit").float()
    called: list[tuple[type, int]] = []
    hook = nn.modules.module.register_module_forward_hook(lambda part, _, out: called.append((part, out)))
    with torch.no_grad():
        count = model(images().float()).token_counts[-1]
    hook.remove()
    outputs = [out for part, out in called if isinstance(part, nn.Linear)]
    assert not seen and len(outputs) == 5 * 6 + 1  # q, k, v, o, fc1 and fc2 of every layer, and the classifier
    assert outputs[-2].shape[1] == count


def test_all_linear_layers_are_torchs_own() -> None:
    """Several libraries for quantization only replace this exact class and silently skip others."""
    model = make("evit", head="cla", use_swiglu_ffn=True)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 5 * 7 and {type(layer) for layer in layers} == {nn.Linear}


@pytest.mark.parametrize("method", ["evit", None])
def test_onednn_changes_no_logits(method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All linear layers of the backbone use it, and logits stay equal, also if it is missing."""
    seen, model = count_onednn(monkeypatch), make(method, **CACHE, head="cla").float()
    with torch.inference_mode():
        logits = model(images().float()).logits
        assert len(seen) == 5 * 6  # q, k, v, o, fc1 and fc2 of every layer
        monkeypatch.setattr(linear_clca, "_onednn_linear", None)
        assert (model(images().float()).logits - logits).abs().max() <= 1e-5
