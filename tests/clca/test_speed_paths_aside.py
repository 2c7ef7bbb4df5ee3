"""Shortcuts step aside for whoever reads what they leave out."""

from typing import Any

import pytest
import torch
from torch import nn

from clca import (
    REDUCTIONS,
    register_reduction,
)
from clca.attention_clca import TakenRows
from clca.reduction_base import ScoredPruning
from tests.clca.speed import CACHE, every_method, make, rows_seen
from tests.helpers import images, labels


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
