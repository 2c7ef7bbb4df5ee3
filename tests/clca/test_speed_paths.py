"""What a forward leaves out because nobody reads it: results stay equal, and what is left out is really not computed."""

import copy
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from clca import (
    REDUCTIONS,
    CLCAViTConfig,
    CLCAViTForImageClassification,
    TokenReduction,
    layers_clca,
    linear_clca,
    register_reduction,
    set_fast_paths,
    token_schedule,
)
from clca.attention_clca import AttentionContext, TakenRows
from clca.linear_clca import linear
from clca.reduction_ats import quantiles
from clca.reduction_base import ScoredPruning
from tests.helpers import METHODS, images, labels, tiny_model
from ufgir.profiling.macs import count_macs, dense_config


CACHE = {"cross_layer_cache": True, "num_clr_tokens": 1, "num_register_tokens": 1}
HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mean": {"pooling": "mean"},
    "map": {"pooling": "map"},
    "cla": {"head": "cla"},
    "ifa": {"head": "ifa"},
    "h2t": {"head": "h2t"},
    "vqt": {"head": "vqt"},
}
# Heads that read row 0 of the last layer and nothing else.
READS_FIRST_ROW = {"linear", "cla", "ifa", "vqt"}
# Methods whose stages skip something: queries, or the projection of rows that are summed.
SKIPS_IN_STAGES = {"topk", "evit", "tome", "atc", "mctf", "pitome", "tofu"}
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def make(method: str | None, **options: Any) -> CLCAViTForImageClassification:
    """A model with biases that are not zero, as a trained one has them."""
    model = tiny_model(**options | ({"reduction": method, "keep_rate": 0.5} if method else {}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def step(model: CLCAViTForImageClassification, skip: bool) -> dict[str, torch.Tensor]:
    """Loss, gradients and changed buffers of a training step, always with the same draws."""
    model.vit.skip_unread_rows = skip
    model.train().zero_grad()
    torch.manual_seed(7)
    loss = model(images(4), labels=labels(4)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# Equal results.


@pytest.mark.parametrize("head", HEADS)
@every_method
def test_logits_and_gradients_stay_equal(method: str | None, head: str) -> None:
    """For every method and head, with cache and registers: in evaluation, in training, and in what is reported."""
    model = make(method, **CACHE | HEADS[head])
    outputs = []
    with torch.no_grad():
        for skip in (False, True):
            model.vit.skip_unread_rows = skip
            outputs.append(model(images()))
    assert (outputs[0].logits - outputs[1].logits).abs().max() <= 1e-10
    assert outputs[0].token_counts == outputs[1].token_counts
    expected, got = step(model, False), step(model, True)
    assert expected.keys() == got.keys()  # nobody loses a gradient, which distributed training would wait for
    for name, value in expected.items():
        assert (value - got[name]).abs().max() <= 1e-9 * max(1.0, float(value.abs().max())), name


@pytest.mark.parametrize("method", ["evit", "topk", None])
@pytest.mark.parametrize(
    "options",
    [
        {"layerscale_value": 0.3, "use_qk_norm": True, "use_swiglu_ffn": True},
        {"drop_path_rate": 0.5},
        {"hidden_dropout_prob": 0.5},
        {"use_class_token": False, "pooling": "mean"},
        {"reduction_kwargs": {"score_by": "received"}},
        {"reduction_layers": [2, 4]},
        {"reduction_layers": [4], "cross_layer_cache": True},
        {"hidden_act": "gelu_new", "qkv_bias": False},
    ],
    ids=str,
)
def test_with_other_backbones(method: str | None, options: dict[str, Any]) -> None:
    """LayerScale, qk-norm, dropped paths, scores by what is received, stages and recalls in the last layer."""
    if method is None:
        options = {k: v for k, v in options.items() if k != "reduction_kwargs"}
    model = make(method, **options)
    with torch.no_grad():
        model.vit.skip_unread_rows = False
        expected = model(images())
        model.vit.skip_unread_rows = True
        got = model(images())
    assert (expected.logits - got.logits).abs().max() <= 1e-10
    assert got.token_counts == expected.token_counts == tuple(token_schedule(model.config).before)
    if "hidden_dropout_prob" not in options:  # which draws for as many rows as there are
        expected, got = step(model, False), step(model, True)
        assert all((value - got[name]).abs().max() <= 1e-9 for name, value in expected.items())


@pytest.mark.parametrize("method", ["evit", "topk", "tome", "atc", "mctf", "pitome", "tofu"])
def test_in_single_and_half_precision(method: str) -> None:
    model = make(method, **CACHE, head="cla").float()
    with torch.no_grad():
        logits = {}
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
            model.to(dtype)
            for skip in (False, True):
                model.vit.skip_unread_rows = skip
                logits[skip] = model(images()).logits
            assert (logits[False] - logits[True]).abs().max() <= tolerance
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert model(images()).logits.isfinite().all()


@pytest.mark.parametrize("method", ["kmedoids", "topk", "evit"])
def test_what_rows_receive_brings_the_output_along(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients the layers that ask what their rows receive call no kernel beside; logits and answers stay equal."""
    options = {} if method == "kmedoids" else {"reduction_kwargs": {"score_by": "received"}}
    model = make(method, **CACHE, head="cla", **options)
    kernels: list[torch.Tensor] = []
    sdpa = nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kernels.append(query)
        return sdpa(query, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        logits = model(images()).logits
    assert len(kernels) == 5 - 2  # layers, less those that ask
    kernels.clear()
    outputs = model(images())  # with gradients all go through the kernel
    assert len(kernels) == 5
    assert (outputs.logits - logits).abs().max() <= 1e-10
    outputs.logits.sum().backward()
    assert model.vit.layers[0].attention.q_proj.weight.grad.abs().max() > 0
    model.train()
    model.config.attention_probs_dropout_prob = 0.5
    kernels.clear()
    with torch.no_grad():
        model(images())
    assert len(kernels) == 5


def test_no_output_is_made_for_nobody() -> None:
    """Where rows are asked about after the attention, or attention maps are wanted, the output is not computed twice."""
    model = make("topk", reduction_kwargs={"score_by": "received"})
    made: list[bool] = []
    may_give = AttentionContext._may_give_output

    class Noted(AttentionContext):
        def _may_give_output(self) -> bool:
            made.append(may_give(self))
            return made[-1]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_clca, "AttentionContext", Noted)
        expected = model(images()).logits
        assert made == [True, True]
        for recording in ("output_hidden_states", "output_attentions"):
            made.clear()
            assert torch.allclose(model(images(), **{recording: True}).logits, expected, atol=1e-10)
            assert made == [False, False]


# Linear layers by oneDNN.


def count_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN is called with, also by tiny layers."""
    monkeypatch.setattr(linear_clca, "_FEWEST_WEIGHTS", 0)
    seen: list[tuple[int, ...]] = []
    original = linear_clca._onednn_linear

    def watched(rows: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return original(rows, *args)

    monkeypatch.setattr(linear_clca, "_onednn_linear", watched)
    return seen


def test_onednn_computes_in_inference_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 and without gradients, for any rows; the same numbers, and never where its operator would be in the way."""
    seen, layer = count_onednn(monkeypatch), nn.Linear(16, 24)
    rows = torch.randn(3, 17, 16)
    for part in (rows, rows[:, :1], rows[:, 1::2], rows[:, :0], rows[:0], rows[0], rows[0, 0], rows.transpose(0, 1)):
        expected = nn.functional.linear(part, layer.weight, layer.bias)
        with torch.no_grad():
            assert torch.allclose(linear(layer, part), expected, atol=1e-5)
    assert len(seen) == 8
    seen.clear()
    linear(layer, rows)  # with gradients
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(layer, rows).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(layer, rows)
        assert counter.get_total_flops() == 2 * rows.numel() * 24
        assert torch.vmap(partial(linear, layer))(rows).shape == (3, 17, 24)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(rows, torch.ones_like(rows))
            assert forward_ad.unpack_dual(linear(layer, dual)).tangent is not None
        with torch.backends.mkldnn.flags(enabled=False):
            linear(layer, rows)
        for dtype in (torch.float64, torch.bfloat16):
            linear(copy.deepcopy(layer).to(dtype), rows.to(dtype))
        linear(copy.deepcopy(layer).to("meta"), rows.to("meta"))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(layer, torch.randn(3, 15))
    assert not seen


@pytest.mark.parametrize(("width", "calls"), [(192, 0), (256, 1)])
def test_tiny_layers_stay_with_blas(width: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fewest = linear_clca._FEWEST_WEIGHTS
    seen, layer = count_onednn(monkeypatch), nn.Linear(width, width)
    monkeypatch.setattr(linear_clca, "_FEWEST_WEIGHTS", fewest)
    with torch.no_grad():
        linear(layer, torch.randn(1, 12, width))
    assert len(seen) == calls


def test_onednn_gives_way_to_whoever_listens_or_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are called, and so are other layers and a `forward` of the layer's own, as offloading sets it."""
    seen, rows = count_onednn(monkeypatch), torch.randn(3, 16)
    called: list[str] = []
    hooked, replaced = nn.Linear(16, 24), nn.Linear(16, 24)
    hooked.register_forward_hook(lambda *_: called.append("hook"))
    replaced.forward = lambda x: called.append("forward") or x
    pruned = prune.l1_unstructured(nn.Linear(16, 24), "weight", amount=0.5)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))
    with torch.no_grad():
        for layer in (hooked, replaced, pruned, parametrised, nn.Identity()):
            assert torch.equal(linear(layer, rows), layer(rows))
    assert not seen and called == ["hook", "hook", "forward", "forward"]


def test_hooks_on_every_module_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracers and counters of calls set them; they see the rows that the last layer would leave out, too."""
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
    """Quantisation of several libraries takes no other: by exact class, without a word about those it passes over."""
    model = make("evit", head="cla", use_swiglu_ffn=True)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 5 * 7 and {type(layer) for layer in layers} == {nn.Linear}


@pytest.mark.parametrize("method", ["evit", None])
def test_onednn_changes_no_logits(method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All linear layers of the backbone go through it, and logits stay equal; where it is missing, too."""
    seen, model = count_onednn(monkeypatch), make(method, **CACHE, head="cla").float()
    with torch.inference_mode():
        logits = model(images().float()).logits
        assert len(seen) == 5 * 6  # q, k, v, o, fc1 and fc2 of every layer
        monkeypatch.setattr(linear_clca, "_onednn_linear", None)
        assert (model(images().float()).logits - logits).abs().max() <= 1e-5


# What is left out.


@pytest.mark.parametrize(
    ("method", "head"),
    [*((m, "linear") for m in METHODS), *((m, h) for m in (None, "evit") for h in HEADS if h != "linear")],
)
def test_what_runs_is_less(method: str | None, head: str) -> None:
    """Multiply-adds as the paper counts them, and as executed: fewer where something can be left out, else the same."""
    model = make(method, **HEADS[head])
    paper, executed = count_macs(model), count_macs(model, as_executed=True)
    if head in READS_FIRST_ROW or (method in SKIPS_IN_STAGES and head != "h2t"):
        assert executed < paper
    else:
        assert executed == paper
    assert model.vit.skip_unread_rows  # the count leaves the model alone


def test_executed_macs_by_hand() -> None:
    """Without reduction: the last layer's queries, output projection and MLP are those of one row instead of 17. With
    top-k, whose stages at layer 1 and 2 keep 9 of 17 and 5 of 9 rows: queries and output projection of the others."""
    width, inner, rows = 16, 32, 17

    def queries(count: int, keys: int) -> int:
        return count * (2 * width * width + 2 * keys * width)  # projections, logits and weighted values

    plain = make(None)
    unread = queries(rows - 1, rows) + (rows - 1) * 2 * width * inner
    assert count_macs(plain) - count_macs(plain, as_executed=True) == unread
    topk = make("topk")
    unread = queries(4, 5) + 4 * 2 * width * inner + queries(8, 17) + queries(4, 9)
    # The query of CLS, which chooses, is projected once more, for the rows that stay.
    assert count_macs(topk) - count_macs(topk, as_executed=True) == unread - 2 * width * width


@pytest.mark.parametrize(("method", "ratio"), [("topk", 3.3), ("evit", 3.15)])
def test_executed_macs_of_the_paper_model(method: str, ratio: float) -> None:
    """ViT-B/16 with CLCA at 448 px, keep rate 0.1: how much less than the dense model really runs."""
    options = {"image_size": 448, "num_labels": 200, "head": "cla", "cross_layer_cache": True, "num_clr_tokens": 1}
    with torch.device("meta"):
        model = CLCAViTForImageClassification(CLCAViTConfig(**options, reduction=method, keep_rate=0.1))
        dense = CLCAViTForImageClassification(dense_config(model.config))
    assert count_macs(dense) / count_macs(model) == pytest.approx(3.12, abs=0.01)
    assert count_macs(dense) / count_macs(model, as_executed=True) > ratio


def rows_seen(module: nn.Module, call: Callable[[], Any]) -> list[int]:
    """Rows (B, rows, D) that a module is called with."""
    seen: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    call()
    hook.remove()
    return seen


@pytest.mark.parametrize(
    ("method", "queries", "outputs"), [("topk", [1, 9], [9]), ("evit", [17], [10]), ("tome", [17], [9])]
)
def test_rows_that_a_stage_computes(method: str, queries: list[int], outputs: list[int]) -> None:
    """Top-k: CLS to choose by, then the queries of those chosen. EViT and ToMe sum rows: all of their queries, but the
    output projection of the sums alone."""
    model = make(method)
    attention = model.vit.layers[1].attention
    assert rows_seen(attention.q_proj, lambda: model(images())) == queries
    assert rows_seen(attention.o_proj, lambda: model(images())) == outputs


# Stepping aside.


@pytest.mark.parametrize("recording", ["output_hidden_states", "output_attentions", "output_assignments"])
@pytest.mark.parametrize("method", [None, "topk", "evit"])
def test_records_are_complete(method: str | None, recording: str) -> None:
    """Whoever records gets all rows of all layers, and the same logits."""
    model = make(method, head="cla", **CACHE)
    with torch.no_grad():
        logits = model(images()).logits
        output = model(images(), **{recording: True})
    assert (output.logits - logits).abs().max() <= 1e-10
    if recording == "output_hidden_states":
        assert output.hidden_states[-1].shape[1] == output.token_counts[-1] > 1
    if recording == "output_attentions":
        counts = output.token_counts[:-1]
        assert [a.shape[-2:] for a in output.attentions] == [(n, n) for n in counts]


@every_method
def test_the_backbone_alone_gives_all_rows(method: str | None) -> None:
    """`last_hidden_state` of a call without the classifier; CLS of it is what the classifier reads."""
    model = make(method, **CACHE)
    with torch.no_grad():
        output = model.vit(images())
        assert output.last_hidden_state.shape[1] == output.token_counts[-1] > 1
        assert (model.classifier(output.pooler_output) - model(images()).logits).abs().max() <= 1e-10
        short = model.vit(images(), for_head=True)
    assert short.last_hidden_state.shape[1] == 1
    assert (short.pooler_output - output.pooler_output).abs().max() <= 1e-10
    assert short.token_counts == output.token_counts


LAST = "layers.4"


@pytest.mark.parametrize(
    "part", [LAST, f"{LAST}.mlp", f"{LAST}.mlp.fc1", f"{LAST}.layernorm_after", f"{LAST}.attention", "layernorm", ""]
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_in_or_behind_the_last_layer_see_all_rows(part: str, kind: str) -> None:
    """Grad-CAM and the like put hooks there. What they see is not changed behind their back, either."""
    model = make("evit", **CACHE)
    seen: list[torch.Tensor] = []
    module = model.vit.get_submodule(part)
    if part == "" and "backward" in kind:
        pytest.skip("the output of the backbone is no tensor, which a backward hook would need")
    first = lambda value: value if isinstance(value, torch.Tensor) else value[0]  # noqa: E731
    hook = getattr(module, kind)(lambda *args: seen.append(first(args[-1])))
    output = model(images())
    output.logits.sum().backward()
    assert seen[0].shape[1] == output.token_counts[-1]
    hook.remove()
    assert rows_seen(model.vit.layers[-1].mlp.fc2, lambda: model(images())) == [
        output.token_counts[-1]
    ]  # itself a hook


def test_hooks_of_libraries_do_not_count() -> None:
    """Recording once leaves transformers' hooks on the layers for good."""
    model = make(None)
    with torch.no_grad():
        model(images(), output_hidden_states=True)
        assert model.vit.layers[-1]._forward_hooks
        assert model.vit.shortcuts(for_head=True, recording=False).only_first


def test_hooks_that_read_no_rows_do_not_count() -> None:
    """A clock, say, which must not change what it measures."""
    model = make(None)

    def clock(*_: Any) -> None:
        pass

    clock.reads_no_rows = True
    model.vit.layers[-1].register_forward_hook(clock)
    model.vit.layernorm.register_forward_pre_hook(clock)
    assert model.vit.shortcuts(for_head=True, recording=False).only_first


def only_first(model: CLCAViTForImageClassification) -> bool:
    return model.vit.shortcuts(for_head=True, recording=False).only_first


def ignore(*_: Any) -> None:
    """A hook."""


def test_hooks_are_found_in_parts_that_were_replaced() -> None:
    """Layers, parts and parts of parts that are put into a model that has run, with hooks set before or after."""
    model = make(None)
    last = model.vit.layers[-1]
    assert only_first(model)
    last.mlp.fc1 = nn.Sequential(last.mlp.fc1)  # as an adapter wraps it
    assert only_first(model)
    hook = last.mlp.fc1[0].register_forward_hook(ignore)
    assert not only_first(model)
    hook.remove()
    assert only_first(model)
    hooked = nn.Identity()
    hooked.register_forward_hook(ignore)
    last.mlp.fc1.append(hooked)
    assert not only_first(model)
    del last.mlp.fc1[1]
    assert only_first(model)
    last.attention.q_proj.add_module("child", hooked)  # of what had no parts
    assert not only_first(model)
    del last.attention.q_proj.child
    other = copy.deepcopy(last)
    other.attention.o_proj.register_forward_hook(ignore)
    model.vit.layers[-1] = other
    assert not only_first(model) and not only_first(copy.deepcopy(model))
    model.vit.layers[-1] = last
    assert only_first(model) and only_first(copy.deepcopy(model))


def test_a_quiet_model_is_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree of modules is walked in the first forward alone."""
    model = make("evit", **CACHE, head="cla")
    with torch.no_grad():
        model(images())
        monkeypatch.setattr(nn.Module, "named_modules", None)
        monkeypatch.setattr(nn.Module, "modules", None)
        model(images())


def test_a_hook_may_change_what_enters_the_attention() -> None:
    """Other tokens, put in their place by a hook, have their own keys and values."""
    model, other = make(None), make(None)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(other.vit.layers[2].attention, name).weight.mul_(2)
        model.vit.layers[2].attention.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
        assert (model(images()).logits - other(images()).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("method", ["tome", None])
def test_gradients_of_what_enters_the_attention(method: str | None) -> None:
    """As a hook of the backward pass is given them: all, by queries, keys and values."""
    model = make(method)
    layer, seen, expected = model.vit.layers[1], [], []

    def watch_output(_: nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.register_hook(expected.append)

    layer.layernorm_before.register_forward_hook(watch_output)
    layer.attention.register_full_backward_hook(lambda _, inputs, outputs: seen.append(inputs[0]))
    model(images()).logits.sum().backward()
    assert expected[0].abs().max() > 0
    assert torch.allclose(seen[0], expected[0], atol=1e-12)


# One switch for all of them.


@pytest.mark.parametrize("method", ["topk", "evit", "kmedoids", None])
def test_the_switch_turns_all_of_them_off(method: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is called for all tokens, and logits stay equal. What is set as a function stays, a block ends."""
    seen, model = count_onednn(monkeypatch), make(method, **CACHE).float()
    layers, called = [m for m in model.vit.modules() if isinstance(m, nn.Linear)], []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: called.append((self, x.shape[1])) or forward(self, x))
    pixels = images().float()
    with torch.no_grad():
        expected, fast = model(pixels), len(seen)
        assert fast >= 5 * 6 and not set(layers) & {layer for layer, _ in called}
        with set_fast_paths(False):
            output = model(pixels)
            assert len(seen) == fast and set(layers) <= {layer for layer, _ in called}
            rows = [count for layer, count in called if layer is model.vit.layers[-1].mlp.fc1]
            assert rows == [output.token_counts[-1]]
            with set_fast_paths(True):
                model(pixels)
            assert len(seen) == 2 * fast
            assert model.vit.shortcuts(for_head=True, recording=False) == (False, False)
        assert only_first(model)
        set_fast_paths(False)
        assert not only_first(model)
        set_fast_paths(True)
    assert (output.logits - expected.logits).abs().max() <= 1e-5
    assert output.token_counts == expected.token_counts


@pytest.mark.parametrize("enabled", [True, False])
def test_gelu_in_place_is_switched(enabled: bool) -> None:
    """By the address of what the activation gives."""
    mlp, given = make(None).vit.layers[0].mlp, []
    rows = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad(), set_fast_paths(enabled), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers_clca, "linear", lambda layer, x: given.append(layer(x)) or given[-1])
        hidden = mlp.hidden(rows)
    assert (hidden.data_ptr() == given[0].data_ptr()) is enabled


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("head", ["linear", "h2t"])
def test_parts_of_the_mlp_are_called(head: str, grad: bool) -> None:
    """The MLP and its activation, whoever took the place of it, with and without gradients."""
    model, called = make("topk", head=head), []
    mlp = model.vit.layers[0].mlp
    with torch.set_grad_enabled(grad):
        expected = model(images()).logits
        hooks = [part.register_forward_hook(lambda part, *_: called.append(part)) for part in (mlp, mlp.activation_fn)]
        assert torch.allclose(model(images()).logits, expected, atol=1e-10)
        assert set(called) == {mlp, mlp.activation_fn}
        for hook in hooks:
            hook.remove()
        mlp.activation_fn = nn.ReLU()
        assert not torch.allclose(model(images()).logits, expected, atol=1e-3)
        relu = model(images()).logits
    assert torch.allclose(model(images()).logits, relu, atol=1e-10)


def test_what_a_hook_on_fc1_has_seen_stays() -> None:
    """Without gradients GELU is computed in place, but not under the eyes of a hook."""
    model = make(None)
    fc1 = model.vit.layers[0].mlp.fc1
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    hook = fc1.register_forward_hook(lambda _, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        expected = model(images()).logits
    assert torch.equal(*kept[0])
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(images()).logits, expected)
    assert torch.equal(model(images()).logits, expected)  # and with gradients


def test_a_loss_that_reads_tokens_gets_them() -> None:
    """DynamicViT's distillation compares all tokens with a teacher's."""
    model = make("dyvit").train()
    teacher = torch.zeros(3, 16, 16, dtype=torch.float64)
    output = model(images(), labels=labels(), teacher_tokens=teacher)
    assert output.loss_terms["token_distillation"].isfinite()


def test_methods_of_ones_own_keep_their_hooks() -> None:
    """One that overrides `before_mlp` is called there; one that overrides `observe`, too, sees the attention before it."""

    class Own(ScoredPruning):
        name = "own_of_a_test"
        called: list[tuple[str, int]] = []

        def merge_rows(self, context, state):
            self.called.append(("merge", context.key.shape[2]))
            return TakenRows(slice(0, 5)), state

        def before_mlp(self, hidden_states, state, context):
            self.called.append(("before_mlp", hidden_states.shape[1]))
            return super().before_mlp(hidden_states, state, context)

        @classmethod
        def observe(cls, context, state, before_stage):
            cls.called.append(("observe", context.key.shape[2]))
            return state

        @classmethod
        def count(cls, config, stage, num_rows, state):
            return min(num_rows, 5)

    register_reduction(Own)
    try:
        model = make(Own.name)
        assert model(images()).token_counts == (17, 17, 5, 5, 5, 5)
        assert Own.called[1:4] == [("observe", 17), ("before_mlp", 17), ("merge", 17)]
    finally:
        del REDUCTIONS[Own.name]


# Memory, shapes and the host.


class Watch(TorchDispatchMode):
    """Notes every tensor that an operator makes: its storage's size, how many large ones live at a time, its device, and
    operators that wait for the device or whose result's shape depends on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self, large: int = 0) -> None:
        super().__init__()
        self.large, self.most, self.peak = large, 0, 0
        self.living: dict[int, weakref.ref] = {}
        self.devices: set[str] = set()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.WAITING or by_mask:
            self.waiting.append(name)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.devices.add(tensor.device.type)
                size = tensor.untyped_storage().nbytes()
                self.most = max(self.most, size)
                if size >= self.large:
                    self.living[id(tensor)] = weakref.ref(tensor)
        alive = [t for t in (ref() for ref in self.living.values()) if t is not None]
        self.peak = max(self.peak, len({t.untyped_storage().data_ptr() for t in alive}))
        return result


LARGE = {"image_size": 144, "reduction_layers": [1, 2], "num_hidden_layers": 4}  # 324 patches


@pytest.mark.parametrize("cache", [{}, CACHE | {"head": "cla"}], ids=["plain", "clca"])
@every_method
def test_no_attention_map_is_made(method: str | None, cache: dict[str, Any]) -> None:
    """The largest tensor of an evaluation is smaller than an attention map (B, H, N, N). (With sdpa; k-medoids takes what
    tokens receive from some rows of it at a time.)"""
    model = make(method, **LARGE | cache)
    rows = token_schedule(model.config).before[0]
    with torch.no_grad(), Watch() as watch:
        model(images(2, 144, 144))
    assert 0 < watch.most < 2 * 2 * rows * rows * 8
    with torch.no_grad(), Watch() as watch:
        model(images(2, 144, 144), output_attentions=True)
    assert watch.most >= 2 * 2 * rows * rows * 8  # which the watch would see


@pytest.mark.parametrize("method", ["dpcknn", "kmedoids"])
def test_clustering_keeps_one_distance_matrix(method: str) -> None:
    """No second square beside the distances: nothing of their size lives with them."""
    model = make(method, **LARGE, reduction_kwargs={"equal_weight": True})
    stage = model.vit.layers[1].reduction
    tokens = torch.randn(2, 600, 16, dtype=torch.float64)
    arguments = (tokens, 300) if method == "dpcknn" else (tokens, 300, None)
    with Watch(large=2 * 600 * 600 * 8) as watch:
        stage.label(*arguments)
    assert watch.peak == 1
    with Watch(large=2 * 300 * 600 * 8) as watch:  # and nothing of half of it but a piece at a time
        stage.label(*arguments)
    assert watch.peak <= 2


def test_sinkhorn_keeps_one_plan() -> None:
    """The last one and the next, and no third."""
    stage = make("sinkhorn").vit.layers[1].reduction
    similarity = torch.randn(2, 400, 200, dtype=torch.float64)
    with torch.no_grad(), Watch(large=2 * 400 * 200 * 8) as watch:
        plan = stage.transport(similarity)
    assert watch.peak == 2
    assert torch.allclose(plan, stage.transport(similarity.clone().requires_grad_()))


@pytest.mark.parametrize("keep_rate", [None, 0.25])
@every_method
def test_the_host_waits_for_nothing(method: str | None, keep_rate: float | None) -> None:
    """No operator reads a number back, or has a result whose shape depends on numbers; none makes a tensor on the host. At
    another keep rate than the model's own, from the second forward on."""
    options = {"reduction_kwargs": {"pad_to_bound": True}} if method == "ats" else {}
    model = make(method, **CACHE | {"head": "cla"} | options).to("meta")
    if keep_rate is not None and (method is None or model.vit.method.fixed_rate(model.config)):
        pytest.skip("its keep rate is fixed")
    pixels = images().to("meta")
    with torch.no_grad():
        if keep_rate is not None:
            model(pixels, keep_rate=keep_rate)
        with Watch() as watch:
            output = model(pixels, keep_rate=keep_rate)
    assert not watch.waiting
    assert watch.devices == {"meta"}
    assert output.token_counts == tuple(token_schedule(model.config, keep_rate=keep_rate).before)


def test_ats_waits_once_a_stage() -> None:
    """For the width of the longest image, unless it pads to its bound."""
    model = make("ats", **CACHE)
    with torch.no_grad(), Watch() as watch:
        model(images())
    assert watch.waiting == ["_local_scalar_dense"] * 2


def test_padding_to_the_bound_changes_nothing_but_shapes() -> None:
    model, padded = (make("ats", **CACHE, reduction_kwargs={"pad_to_bound": bound}) for bound in (False, True))
    padded.load_state_dict(model.state_dict())
    with torch.no_grad():
        output = padded(images())
        assert (output.logits - model(images()).logits).abs().max() <= 1e-10
    assert output.token_counts == tuple(token_schedule(model.config).before)


# Constants of a stage.


def constants(model: CLCAViTForImageClassification) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, TokenReduction):
            yield from ((f"{name}.{key}", buffer) for key, buffer in module.named_buffers())


@pytest.mark.parametrize("method", ["ats", "heuristic"])
def test_constants_are_not_saved_and_come_back(method: str, tmp_path: Path) -> None:
    """transformers makes models without memory and leaves what is not in the file empty."""
    model = make(method, **CACHE)
    own = dict(constants(model))
    assert len(own) == 2
    assert not set(own) & set(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(buffer, own[name]) for name, buffer in constants(loaded))
    other = CLCAViTForImageClassification.from_pretrained(tmp_path, keep_rate=0.25, dtype=torch.bfloat16)
    assert all(torch.equal(b, a) for (_, a), (_, b) in zip(constants(make_like(other)), constants(other), strict=True))
    with torch.no_grad():
        assert torch.equal(loaded(images()).logits, model(images()).logits)


def make_like(model: CLCAViTForImageClassification) -> CLCAViTForImageClassification:
    return CLCAViTForImageClassification(model.config)


def test_half_precision_does_not_round_the_quantiles() -> None:
    stage = make("ats", image_size=128).bfloat16().double().vit.layers[1].reduction
    assert torch.equal(stage.quantile_bits.view(torch.float32), quantiles(129))


@pytest.mark.parametrize("method", ["ats", "heuristic"])
def test_constants_follow_a_changed_configuration(method: str) -> None:
    """Also where the keep rate is set on the configuration, as a number, and not by `set_keep_rate`; and there are not
    more and more of them."""
    model, other = make(method), make(method)
    other.set_keep_rate(0.25)
    model.config.keep_rate = 0.25
    with torch.no_grad():
        assert model(images()).token_counts == other(images()).token_counts
        assert torch.equal(model(images()).logits, other(images()).logits)
        for step in range(1, 100):
            model(images(1), keep_rate=step / 100)
    stage = model.vit.layers[1].reduction
    assert 0 < len(stage._other_constants) <= 64


@pytest.mark.parametrize("method", ["ats", "heuristic"])
def test_constants_follow_the_image(method: str) -> None:
    """Another image size: what a model made for it computes."""
    model, large = make(method), make(method, image_size=48)
    shared = {k: v for k, v in model.state_dict().items() if "position" not in k}
    large.load_state_dict(shared, strict=False)
    with torch.no_grad():
        large.vit.embeddings.position_embeddings.copy_(model.vit.embeddings.interpolate_pos_encoding((6, 6)))
        expected = large(images(2, 48, 48))
        output = model(images(2, 48, 48), interpolate_pos_encoding=True)
    assert (output.logits - expected.logits).abs().max() <= 1e-10
