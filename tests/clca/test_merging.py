"""ATC, PiToMe, MCTF and ToFu, which merge rows without training: their numbers, and the rules that numbers do not reach.

The files of tests/goldens_free hold what functions of official code (of ToFu: of code that its rivals compare with) made of random
tensors: `tokens` (B, N, D), `keys` (B, H, N, d) or `metric` (B, N, D), `received` (B, N) and `sizes` (B, N) to `out.*`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from clca import REDUCTIONS, CLCAViTConfig, token_schedule
from clca.attention_clca import AttentionContext
from clca.reduction_atc import ATCReduction, cosine_distance
from clca.reduction_base import Merging, TokenState, falling_order, match_halves
from clca.reductions_clca import initial_state
from tests.helpers import TINY, images, tiny_config, tiny_model


GOLDENS = Path(__file__).parents[1] / "goldens_free"
FILES = sorted(path.stem for path in GOLDENS.glob("*.safetensors"))
OPTIONS = ("linkage", "matching", "tau_sim", "tau_info", "tau_size", "bidirectional")
METHODS = ["atc", "mctf", "pitome", "tofu"]
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}


def make_stage(method: str, layer: int = 1, **options: Any) -> Merging:
    """A stage without parameters, of a model of 5 layers."""
    config = tiny_config(reduction=method, reduction_layers=[layer], reduction_kwargs=options, keep_rate=0.5)
    return REDUCTIONS[method](config, 0, **options)


def make_context(keys: torch.Tensor, sizes: torch.Tensor | None = None) -> tuple[AttentionContext, TokenState]:
    """What a stage is given, with `keys` (B, H, N, d) and `sizes` (B, N)."""
    state = initial_state(tiny_config(), (1, keys.shape[2] - 1), record_assignments=True)
    if sizes is not None:
        state = state.with_tracks(size=sizes)
    return AttentionContext(nn.Identity(), keys[:, 0], keys, keys, None, state), state


class Reduced:
    """What a stage makes of tokens (B, N, D)."""

    def __init__(
        self,
        stage: Merging,
        tokens: torch.Tensor,
        removed: int,
        context: AttentionContext,
        state: TokenState,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(type(stage), "num_merged", staticmethod(lambda *_: removed))
        self.tokens, self.state = stage.before_mlp(tokens, state, context)
        self.assignment = self.state.report["assignment"]
        share, target = self.assignment.max(dim=1)  # each row goes to one
        self.target, self.share = target.masked_fill(share == 0, -1), share
        self.sizes = self.state.tracks.get("size", torch.ones_like(self.tokens[..., 0]))


@pytest.mark.parametrize("name", [*FILES, *(f"{name} without scipy" for name in FILES if name.startswith("atc"))])
def test_goldens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets exactly; tokens, sizes, shares and assignment to 1e-12 in float64 and 2e-6 in float32."""
    name, _, without_scipy = name.partition(" ")
    if without_scipy:
        monkeypatch.setattr("clca.reduction_atc.scipy_functions", lambda: None)
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as opened:
        settings = json.loads(opened.metadata()["settings"])
        golden = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    method, tolerance = settings["method"], {"float64": 1e-12, "float32": 2e-6}[settings["dtype"]]
    tokens, keys = golden["tokens"], golden["keys" if "keys" in golden else "metric"]
    keys = keys if keys.dim() == 4 else keys.unsqueeze(1)
    hidden = (
        0 if settings["class_token"] else 1
    )  # row 0 is never merged: where the function knew none, there is one more
    tokens, keys = nn.functional.pad(tokens, (0, 0, hidden, 0)), nn.functional.pad(keys, (0, 0, hidden, 0))

    options = {name: settings[name] for name in OPTIONS if name in settings}
    if method == "mctf":
        options["pooling"] = {"attention*size": "attention", "size": "size"}[settings["pooling"]]
    if method == "tofu":
        options["merge_from"] = 2 if settings["mode"] == "prune" else 0
    stage = make_stage(method, **options)
    if method == "pitome":
        stage.margin = settings["margin"]
        metric = nn.functional.normalize(keys.mean(dim=1)[:, 1:], dim=-1)
        assert (stage.energy(metric @ metric.transpose(1, 2)) - golden["out.energy"]).abs().max() <= tolerance
    context, state = make_context(keys, golden.get("sizes"))
    if method == "mctf":
        context.layer_input = golden["metric"]
        monkeypatch.setattr(context, "received_attention", lambda: golden["received"])

    got = Reduced(stage, tokens, settings["removed"], context, state, monkeypatch)
    target = torch.where(got.target[:, hidden:] < 0, -1, got.target[:, hidden:] - hidden)
    assert torch.equal(target, golden["out.target"])
    if settings.get("mode") in ("mean", "tofu"):
        return  # the matching is ToFu's, the mean is not
    for part, value in (
        ("tokens", got.tokens[:, hidden:]),
        ("sizes", got.sizes[:, hidden:]),
        ("share", got.share[:, hidden:]),
        ("assignment", got.assignment[:, hidden:, hidden:]),
    ):
        expected = golden.get(f"out.{part}")
        if expected is not None:
            assert value.dtype == expected.dtype
            assert ((value - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all(), part
