"""Traces match the tokens of networks whose layers only reduce tokens and use the cache."""

import pytest
import torch

from tests.helpers import CASES, TINY, images, tiny_config, tiny_model
from tests.interpret.helpers import table
from ufgir.interpret.tracing import propagate_shares, trace_patches


# The first two make new tokens of normalised ones, glsf one with weights that are no shares. Heads and pooling change nothing here.
IDLE = [
    case
    for case in CASES
    if case.method not in ("patchmerger", "sinkhorn", "glsf") and case.cache != "clca" and case.tokens != "cls_mean"
]
# Tokens that are made as long as their longest member are no sums: here every stage drops.
SUMS = {"tofu": {"reduction_kwargs": {"merge_from": TINY["num_hidden_layers"]}}}


def idle(case, **changes):
    """Create a model whose layers do not change their tokens."""
    model = case.model(**changes)
    with torch.no_grad():
        for layer in model.vit.layers:
            for part in (layer.attention.o_proj, layer.mlp.fc2):
                part.weight.zero_()
                part.bias.zero_()
    return model


@pytest.mark.parametrize("layers", [[1, 2], [0, 3]], ids=str)
@pytest.mark.parametrize("case", table(IDLE), ids=str)
def test_tokens_match_their_traces(case, layers) -> None:
    """Every token of every layer, retrieved GAP and CLR tokens included, is the sum of the embedded tokens weighted by its shares.
    A stage in layer 0 has an empty cache."""
    model = idle(case, reduction_layers=layers, **SUMS.get(case.method, {}))
    pixels = images()
    output = model.vit(pixels, output_hidden_states=True, output_assignments=True)
    embedded = output.hidden_states[0]
    sources = torch.eye(embedded.shape[1], dtype=torch.float64).expand(3, -1, -1)
    trace = propagate_shares(sources, output.assignments, model.config)
    for shares, rows in zip(trace.left, output.hidden_states[1:], strict=True):
        visible = shares.sum(dim=-1) > 0  # not padding, nor outside the heuristic's circle
        assert shares.shape[1] == rows.shape[1]
        assert (shares @ embedded - rows)[visible].abs().max() <= 1e-9
    assert [shares.shape[1] for shares in (*trace.entered, trace.final)] == list(output.token_counts)
    final = model.vit.layernorm(trace.final @ embedded) - output.last_hidden_state
    assert final[trace.final.sum(dim=-1) > 0].abs().max() <= 1e-9
    if case.method is None:
        return

    patches = slice(model.config.num_prefix_tokens, model.config.num_prefix_tokens + 16)
    of_patches = trace_patches(output.assignments, model.config)
    assert (of_patches.final - trace.final[..., patches]).abs().max() <= 1e-12
    assert len(of_patches.stages) == 2 and torch.equal(of_patches.stages[1], of_patches.left[layers[1]])
    own = trace_patches(output.assignments, model.config, retrieve=False)
    assert (own.final <= of_patches.final + 1e-12).all()
    assert own.final.sum() < of_patches.final.sum() or case.cache == "plain"


def test_assignments_of_another_grid_are_refused() -> None:
    model = tiny_model(reduction="topk", keep_rate=0.5)
    assignments = model(images(), output_assignments=True).assignments
    with pytest.raises(ValueError, match=r"`assignments` of layer 1 .*26.*25 patches, got 17"):
        trace_patches(assignments, model.config, 25)
    with pytest.raises(ValueError, match="one matrix per stage, 3 for `reduction`='topk', got 2"):
        trace_patches(assignments, tiny_config(reduction="topk", keep_rate=0.5, reduction_layers=[1, 2, 3]))
