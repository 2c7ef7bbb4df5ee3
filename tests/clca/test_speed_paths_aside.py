"""Fast paths are not taken when skipped computations would be noticed."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from clca import (
    REDUCTIONS,
    CLCAViTForImageClassification,
    register_reduction,
    set_fast_paths,
)
from clca.attention_clca import SelectedTokens
from clca.reduction_base import ScoredPruning
from tests.clca.speed import CACHE, count_onednn, every_method, make, tokens_seen
from tests.helpers import images, labels


# Stepping aside.


@pytest.mark.parametrize("recording", ["output_hidden_states", "output_attentions", "output_assignments"])
@pytest.mark.parametrize("method", [None, "topk", "evit"])
def test_records_are_complete(method: str | None, recording: str) -> None:
    """Recorded tensors contain all tokens of all layers, and the logits are the same."""
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
def test_the_backbone_alone_gives_all_tokens(method: str | None) -> None:
    """`last_hidden_state` of the backbone has all tokens, and its CLS is what the classifier reads."""
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
def test_hooks_in_or_behind_the_last_layer_see_all_tokens(part: str, kind: str) -> None:
    """Grad-CAM and similar tools place hooks there. The tensors they receive are not changed later."""
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
    assert tokens_seen(model.vit.layers[-1].mlp.fc2, lambda: model(images())) == [
        output.token_counts[-1]
    ]  # itself a hook


def test_hooks_of_libraries_do_not_count() -> None:
    """After recording once, transformers leaves its hooks on the layers permanently."""
    model = make(None)
    with torch.no_grad():
        model(images(), output_hidden_states=True)
        assert model.vit.layers[-1]._forward_hooks
        assert model.vit.shortcuts(for_head=True, recording=False).only_first


def test_hooks_that_read_no_tokens_do_not_count() -> None:
    """A timer, for example, must not change what it measures."""
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
    """Do nothing, as a hook."""


def test_hooks_are_found_in_parts_that_were_replaced() -> None:
    """Layers and nested submodules are replaced in a model that has run, with hooks registered before or after."""
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
    """The module tree is walked only in the first forward pass."""
    model = make("evit", **CACHE, head="cla")
    with torch.no_grad():
        model(images())
        monkeypatch.setattr(nn.Module, "named_modules", None)
        monkeypatch.setattr(nn.Module, "modules", None)
        model(images())


def test_a_hook_may_change_what_enters_the_attention() -> None:
    """If a hook replaces the tokens, their keys and values are recomputed."""
    model, other = make(None), make(None)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(other.vit.layers[2].attention, name).weight.mul_(2)
        model.vit.layers[2].attention.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
        assert (model(images()).logits - other(images()).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("method", ["tome", None])
def test_gradients_of_what_enters_the_attention(method: str | None) -> None:
    """A backward hook receives the complete gradient, through queries, keys and values."""
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
    """Every module is called for all tokens, and logits stay equal. A call of the function is permanent, a `with`
    block ends."""
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
            tokens = [count for layer, count in called if layer is model.vit.layers[-1].mlp.fc1]
            assert tokens == [output.token_counts[-1]]
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
    """This is tested by the address of the result of the activation."""
    mlp, given = make(None).vit.layers[0].mlp, []
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    product = nn.functional.linear
    with torch.no_grad(), set_fast_paths(enabled), pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", lambda *args: given.append(product(*args)) or given[-1])
        hidden = mlp.hidden(tokens)
    assert (hidden.data_ptr() == given[0].data_ptr()) is enabled


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("head", ["linear", "h2t"])
def test_parts_of_the_mlp_are_called(head: str, grad: bool) -> None:
    """The MLP and its activation are called, also if they were replaced, with and without gradients."""
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
    """Without gradients GELU is computed in place, but not if a hook on fc1 received the tensor."""
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
    """DynamicViT's distillation compares all tokens with those of a teacher."""
    model = make("dyvit").train()
    teacher = torch.zeros(3, 16, 16, dtype=torch.float64)
    output = model(images(), labels=labels(), teacher_tokens=teacher)
    assert output.loss_terms["token_distillation"].isfinite()


def test_methods_of_ones_own_keep_their_hooks() -> None:
    """An override of `before_mlp` is called, and an override of `observe` receives the attention before it."""

    class Own(ScoredPruning):
        name = "own_of_a_test"
        called: list[tuple[str, int]] = []

        def merge_tokens(self, context, state):
            self.called.append(("merge", context.key.shape[2]))
            return SelectedTokens(slice(0, 5)), state

        def before_mlp(self, hidden_states, state, context):
            self.called.append(("before_mlp", hidden_states.shape[1]))
            return super().before_mlp(hidden_states, state, context)

        @classmethod
        def observe(cls, context, state, before_stage):
            cls.called.append(("observe", context.key.shape[2]))
            return state

        @classmethod
        def count(cls, config, stage, num_tokens, state):
            return min(num_tokens, 5)

    register_reduction(Own)
    try:
        model = make(Own.name)
        assert model(images()).token_counts == (17, 17, 5, 5, 5, 5)
        assert Own.called[1:4] == [("observe", 17), ("before_mlp", 17), ("merge", 17)]
    finally:
        del REDUCTIONS[Own.name]
