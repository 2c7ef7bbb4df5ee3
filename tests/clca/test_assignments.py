"""Assignments: which share of each incoming token is in each new token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from clca import TokenReduction
from clca.reduction_base import ScoredPruning, gather_rows
from tests.helpers import CASES, Case, images, table, tiny_model


reducing_case = pytest.mark.parametrize("case", table(c for c in CASES if c.method is not None), ids=str)
# Methods whose new tokens are not sums of the incoming tokens.
TRANSFORMS_ITS_ROWS = {
    "patchmerger": "sums of normalized tokens",
    "sinkhorn": "sums of tokens of unit length",
    "tofu": "sums of tokens, made as long as the longest of them",
}
# The weights of the fused token may be negative and have any sum, so they are not shares.
SHARES_ARE_NOT_WEIGHTS = {"glsf"}


# Assignments.


def watch(reduction: TokenReduction) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Record (incoming tokens, new tokens, assignment) of a stage, whichever hook it uses."""
    seen = []

    def watch_hook(name: str) -> None:
        original: Callable[..., Any] = getattr(reduction, name)

        def watched(first: Any, state: Any, *rest: Any) -> Any:
            result, new_state = original(first, state, *rest)
            if "assignment" in new_state.report and "assignment" not in state.report:
                if name == "choose_tokens":  # the attention context, and indices
                    tokens_in = first.hidden_states
                    tokens_out = tokens_in if result is None else gather_rows(tokens_in, result)
                else:
                    tokens_in, tokens_out = first, result
                seen.append((tokens_in, tokens_out, new_state.report["assignment"]))
            return result, new_state

        setattr(reduction, name, watched)

    for name in ("before_layer", "choose_tokens", "before_mlp"):
        watch_hook(name)
    return seen


@reducing_case
def test_assignments_say_which_tokens_made_which(case: Case) -> None:
    """One non-negative matrix (B, M, N) per stage. Multiplied by the incoming tokens it gives the new tokens."""
    model = case.model()
    stages = [layer.reduction for layer in model.vit.layers if layer.reduction is not None]
    records = [watch(stage) for stage in stages]
    with torch.no_grad():
        output = model(images(), output_assignments=True, output_hidden_states=True)
    layers = case.reduction.layers(model.config)
    assert len(output.assignments) == len(layers) == len(stages)
    for layer, assignment, record in zip(layers, output.assignments, records, strict=True):
        shape = (3, output.hidden_states[layer + 1].shape[1], output.token_counts[layer])
        assert assignment.shape == shape, f"layer {layer}"
        assert assignment.min() >= 0
        assert assignment.sum(dim=-1).max() <= 1 + 1e-9
        if model.config.use_class_token:
            assert (assignment[:, 0] == torch.eye(shape[2])[0]).all()  # CLS is itself
        ((tokens_in, tokens_out, reported),) = record
        assert torch.equal(reported, assignment)
        if case.method not in TRANSFORMS_ITS_ROWS:
            real = assignment.sum(dim=-1, keepdim=True) > 0  # rows of zeros: padding and masked tokens
            assert real.float().mean() > 0.2
            if case.method in SHARES_ARE_NOT_WEIGHTS:
                real[:, -1] = False
            assert ((assignment @ tokens_in - tokens_out) * real).abs().max() <= 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if issubclass(c.reduction, ScoredPruning)], ids=str)
def test_pruning_assigns_one_hot_tokens(case: Case) -> None:
    """Kept tokens are different unchanged tokens. A fused token holds shares of all others; their sum is below one unless
    the weights are rescaled."""
    model = case.model()
    with torch.no_grad():
        output = model(images(), output_assignments=True)
    for assignment in output.assignments:
        kept = assignment[:, :-1] if case.reduction.fuse_rest else assignment
        assert ((kept == 0) | (kept == 1)).all()
        assert (kept.sum(dim=-1) == 1).all()
        assert (kept.sum(dim=1) <= 1).all()
        if case.reduction.fuse_rest:
            fused = assignment[:, -1]
            assert ((fused > 0) == (kept.sum(dim=1) == 0)).all()
            most = 1 + 1e-9 if case.method in SHARES_ARE_NOT_WEIGHTS else 1
            assert (fused.sum(dim=-1) < most).all()


@pytest.mark.parametrize("method", ["topk", "evit"])
def test_pruning_keeps_what_cls_attends_to(method: str) -> None:
    """Kept tokens and weights of the fused token follow from the row of CLS in the eager attention map."""
    model = Case(method, "cache", "registers").model()
    with torch.no_grad():
        output = model(images(), output_assignments=True, output_attentions=True)
    for layer, assignment in zip([1, 2], output.assignments, strict=True):
        row = output.attentions[layer][:, :, 0, 1:].mean(dim=1)  # (B, N - 1)
        keep = -(-row.shape[1] // 2)
        best = row.topk(keep, dim=1).indices
        assert torch.equal(assignment[:, 1 : keep + 1].argmax(dim=-1), best + 1)
        if method == "evit":
            assert (assignment[:, -1, 1:] - row.scatter(1, best, 0.0)).abs().max() <= 1e-9


def test_assignments_only_on_request() -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5)
    assert model(images()).assignments is None
    assert tiny_model()(images(), output_assignments=True).assignments == ()
