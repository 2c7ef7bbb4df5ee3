"""Parity with the original: every golden file holds the weights and results of one tiny model, recorded from the
original code.

`pytest tests/clca/test_goldens.py --goldens DIR` tests any folder of such files.
"""

from pathlib import Path

import pytest
import torch

from clca import REDUCTIONS, CLCAViTForImageClassification, token_schedule
from clca.modeling_clca import CLCAViTSlicingLayer
from clca.reduction_base import ScoredPruning, TokenState
from clca.reduction_dpcknn import DPCKNNReduction
from clca.reduction_dyvit import DyViTReduction
from clca.reduction_kmedoids import KMedoidsReduction
from clca.reduction_sinkhorn import SinkhornReduction
from tests.golden_files import Golden
from ufgir.checkpoints.from_original import load_original
from ufgir.checkpoints.original_keys import convert_original_state


@pytest.fixture
def golden(golden_file: Path) -> Golden:
    return Golden(golden_file)


class Record:
    """Record intermediate results that are not part of the output."""

    def __init__(self, model: CLCAViTForImageClassification, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[torch.Tensor] = []  # after each layer
        self.tracks: list[dict[str, torch.Tensor]] = []  # after each layer
        self.labels: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each stage that clusters
        self.plans: list[torch.Tensor] = []  # of each stage that transports
        self.scores: list[torch.Tensor] = []  # of each stage that scores, before they are normalized
        for layer in model.vit.layers:
            layer.register_forward_hook(self.note)
        for cls, name, record in (
            (DPCKNNReduction, "label", self.labels),
            (KMedoidsReduction, "label", self.labels),
            (SinkhornReduction, "transport", self.plans),
        ):
            monkeypatch.setattr(cls, name, self.recording(getattr(cls, name), record))
        keep_best = ScoredPruning.keep_best

        def note_scores(stage: ScoredPruning, state: TokenState, scores: torch.Tensor):
            self.scores.append(stage.weigh(scores))
            return keep_best(stage, state, scores)

        monkeypatch.setattr(ScoredPruning, "keep_best", note_scores)

    def note(self, layer: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        tokens, state = output
        if isinstance(layer, CLCAViTSlicingLayer):  # the files of VQT hold what there was before the slice
            tokens = torch.cat([state.report["probe"], tokens], dim=1)
        self.tokens.append(tokens)
        self.tracks.append(state.tracks)

    @staticmethod
    def recording(method, record: list):
        def wrapper(*args):
            record.append(method(*args))
            return record[-1]

        return wrapper


def inject_noise(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = iter([tensor for _, tensor in golden.per_layer("gumbel")])
    monkeypatch.setattr(DyViTReduction, "draw_gumbel", staticmethod(lambda scores: next(noise).to(scores)))


def test_float64(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, loss, gradients, CLS after each layer and token counts are equal, in training with the
    recorded noise."""
    model = load_original(golden.state, golden.spec).double().train(golden.training)
    inject_noise(golden, monkeypatch)
    record = Record(model, monkeypatch)
    output = model(golden.images.double(), labels=golden["targets"])
    if not golden.spec.get("all_finite", True):  # F2: an empty mean made the original NaN
        assert output.logits.isfinite().all()
    else:
        assert (output.logits - golden["logits"]).abs().max() <= 1e-9
        assert (output.loss - golden["loss"]).abs() <= 1e-9
        for index, expected in golden.per_layer("cls"):
            difference = (record.tokens[index][:, 0] - expected).abs().max()
            assert difference <= 1e-9, f"CLS after layer {index}"

    counts = [count.item() for _, count in golden.per_layer("tokens")]
    if counts:
        assert [tokens.shape[1] for tokens in record.tokens] == counts
    if "tokens.final" in golden.tensors:
        assert output.token_counts[-1] == golden["tokens.final"]

    for stage, (_, expected) in enumerate(golden.per_layer("score")):
        assert ((record.scores[stage] - expected).abs() <= 1e-9 * expected.abs()).all(), f"stage {stage}"

    for (_, expected), decision in zip(
        golden.per_layer("out_pred"), (output.reports or {}).get("decision", ()), strict=True
    ):
        assert torch.equal(decision.detach(), expected)

    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if golden.spec.get("all_finite", True):
        for name, gradient in convert_original_state(golden.group("grad"), model.config).items():
            assert (gradients[name] - gradient).abs().max() <= 1e-8 * gradient.abs().max(), name
    else:
        assert all(gradient.isfinite().all() for gradient in gradients.values())

    state = dict(model.named_buffers())
    for name, expected in convert_original_state(golden.group("state_after"), model.config).items():
        assert (state[name] - expected).abs().max() <= 1e-9, name


def test_token_schedule(golden: Golden) -> None:
    """Token counts follow from the configuration alone; for ATS they are upper bounds."""
    if golden.training and golden.spec["method"] == "dyvit":
        pytest.skip("in training DynamicViT removes nothing")
    model = load_original(golden.state, golden.spec)
    with torch.no_grad():
        output = model(golden.images, output_hidden_states=True)
    before, after = token_schedule(model.config)
    counts = output.token_counts, tuple(h.shape[1] for h in output.hidden_states[1:])
    if golden.spec["method"] == "ats":
        assert all(n <= bound for n, bound in zip(counts[0] + counts[1], before + after, strict=True))
    else:
        assert counts == (tuple(before), tuple(after))


def test_choices(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tokens, clusters, sizes and masks are equal. The logits do not depend on the order of kept tokens, so it is
    tested here."""
    model = load_original(golden.state, golden.spec).double()
    method = golden.spec["method"].removesuffix("_old")
    record = Record(model, monkeypatch)
    with torch.no_grad():
        assignments = model(golden.images.double(), output_assignments=True).assignments

    prefix = model.config.num_prefix_tokens
    for stage, (_, expected) in enumerate(golden.per_layer("kept")):
        if method in ("dpcknn", "kmedoids"):
            kept = record.labels[stage][0]
        elif method == "ats":
            tokens = assignments[stage][:, 1:]
            kept = torch.where(tokens.sum(dim=-1) > 0, tokens.argmax(dim=-1) - 1, -1)  # pads are made of nothing
        else:
            if issubclass(REDUCTIONS[method], ScoredPruning) and method != "dyvit":
                expected = expected[:, :-1]  # the original appends a -1 for the fused token, also where there is none
            kept = assignments[stage].argmax(dim=-1)[:, 1 : 1 + expected.shape[1]] - 1
        assert torch.equal(kept, expected), f"stage {stage}"

    for stage, (_, expected) in enumerate(golden.per_layer("kept_abs")):
        attended = assignments[stage].diagonal(dim1=1, dim2=2)[:, 1:]
        assert torch.equal(attended.nonzero()[:, 1].view(len(attended), -1), expected), f"stage {stage}"

    for stage, (_, expected) in enumerate(golden.per_layer("assign")):
        if method in ("dpcknn", "kmedoids"):
            groups = record.labels[stage][1]
        elif method == "sinkhorn":
            groups = record.plans[stage].argmax(dim=2)
        elif method == "tome":
            groups = assignments[stage].argmax(dim=1)[:, 1:] - 1
        else:
            groups = assignments[stage][:, prefix:, prefix:].argmax(dim=1)
        assert torch.equal(groups, expected), f"stage {stage}"

    for layer, expected in golden.per_layer("size"):
        assert torch.equal(record.tracks[layer]["size"].unsqueeze(-1), expected), f"layer {layer}"
    for layer, expected in golden.per_layer("mask"):
        valid = record.tracks[layer].get("valid", torch.ones_like(expected))
        assert torch.equal(valid.bool(), expected.bool()), f"layer {layer}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float32(golden: Golden, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are equal in single precision, with both attention implementations."""
    if not golden.spec.get("all_finite", True):
        pytest.skip("the original's logits are NaN")
    model = load_original(golden.state, golden.spec).train(golden.training)
    model.set_attn_implementation(attention)
    inject_noise(golden, monkeypatch)
    with torch.no_grad():
        logits = model(golden.images).logits
    assert logits.dtype == torch.float32
    assert (logits - golden["logits"]).abs().max() <= 2e-5
