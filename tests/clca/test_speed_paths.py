"""Fast paths: results stay equal, and skipped computations do not run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clca import (
    CLCAViTConfig,
    CLCAViTForImageClassification,
    TokenReduction,
    layers_clca,
    token_schedule,
)
from clca.attention_clca import AttentionContext
from clca.reduction_ats import quantiles
from tests.clca.speed import CACHE, every_method, make, tokens_seen
from tests.helpers import METHODS, images, labels
from ufgir.profiling.macs import count_macs, dense_config


HEADS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mean": {"pooling": "mean"},
    "map": {"pooling": "map"},
    "cla": {"head": "cla"},
    "ifa": {"head": "ifa"},
    "h2t": {"head": "h2t"},
    "vqt": {"head": "vqt"},
}
# Heads that read token 0 of the last layer and nothing else.
READS_FIRST_ROW = {"linear", "cla", "ifa", "vqt"}
# Methods whose stages skip something: queries, or the projection of tokens that are summed.
SKIPS_IN_STAGES = {"topk", "evit", "tome", "maws", "dmaws", "edar", "nfedar", "atc", "mctf", "pitome", "tofu"}


def step(model: CLCAViTForImageClassification, skip: bool) -> dict[str, torch.Tensor]:
    """Return loss, gradients and changed buffers of a training step, with fixed random draws."""
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
    """For every method and head, with cache and registers: in evaluation, in training, and in reported tensors."""
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
    """LayerScale, qk-norm, drop path, scores by received attention, and stages and retrievals in the last layer."""
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
    if "hidden_dropout_prob" not in options:  # which draws for as many tokens as there are
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
def test_what_tokens_receive_brings_the_output_along(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients, layers that compute received attention do not call a kernel in addition. Logits and scores
    stay equal."""
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
    """If statistics are computed after the attention, or attention maps are recorded, the output is not computed
    twice."""
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


# What is left out.


@pytest.mark.parametrize(
    ("method", "head"),
    [*((m, "linear") for m in METHODS), *((m, h) for m in (None, "evit") for h in HEADS if h != "linear")],
)
def test_what_runs_is_less(method: str | None, head: str) -> None:
    """Executed multiply-adds are fewer than those counted as in the paper if a computation is skipped, and equal
    otherwise."""
    model = make(method, **HEADS[head])
    paper, executed = count_macs(model), count_macs(model, as_executed=True)
    if head in READS_FIRST_ROW or (method in SKIPS_IN_STAGES and head != "h2t"):
        assert executed < paper
    else:
        assert executed == paper
    assert model.vit.skip_unread_rows  # the count leaves the model alone


def test_executed_macs_by_hand() -> None:
    """Without a reduction, the last layer computes queries, output projection and MLP for one token instead of 17.
    With top-k, the stages at layers 1 and 2 keep 9 of 17 and 5 of 9 tokens and skip queries and output projection of
    the others."""
    width, inner, num_tokens = 16, 32, 17

    def queries(count: int, keys: int) -> int:
        return count * (2 * width * width + 2 * keys * width)  # projections, logits and weighted values

    plain = make(None)
    unread = queries(num_tokens - 1, num_tokens) + (num_tokens - 1) * 2 * width * inner
    assert count_macs(plain) - count_macs(plain, as_executed=True) == unread
    topk = make("topk")
    unread = queries(4, 5) + 4 * 2 * width * inner + queries(8, 17) + queries(4, 9)
    # The query of CLS, which chooses, is projected once more, for the tokens that stay.
    assert count_macs(topk) - count_macs(topk, as_executed=True) == unread - 2 * width * width


@pytest.mark.parametrize(("method", "ratio"), [("topk", 3.3), ("evit", 3.15)])
def test_executed_macs_of_the_paper_model(method: str, ratio: float) -> None:
    """ViT-B/16 with CLCA at 448 px and keep rate 0.1: the reduction of executed operations compared with the dense
    model."""
    options = {"image_size": 448, "num_labels": 200, "head": "cla", "cross_layer_cache": True, "num_clr_tokens": 1}
    with torch.device("meta"):
        model = CLCAViTForImageClassification(CLCAViTConfig(**options, reduction=method, keep_rate=0.1))
        dense = CLCAViTForImageClassification(dense_config(model.config))
    assert count_macs(dense) / count_macs(model) == pytest.approx(3.12, abs=0.01)
    assert count_macs(dense) / count_macs(model, as_executed=True) > ratio


@pytest.mark.parametrize(
    ("method", "queries", "outputs"), [("topk", [1, 9], [9]), ("evit", [17], [10]), ("tome", [17], [9])]
)
def test_tokens_that_a_stage_computes(method: str, queries: list[int], outputs: list[int]) -> None:
    """Top-k computes the query of CLS for the scores, then those of kept tokens. EViT and ToMe sum tokens: they
    compute all queries, but the output projection of the sums only."""
    model = make(method)
    attention = model.vit.layers[1].attention
    assert tokens_seen(attention.q_proj, lambda: model(images())) == queries
    assert tokens_seen(attention.o_proj, lambda: model(images())) == outputs


# Constants of a stage.


def constants(model: CLCAViTForImageClassification) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        if isinstance(module, TokenReduction):
            yield from ((f"{name}.{key}", buffer) for key, buffer in module.named_buffers())


@pytest.mark.parametrize("method", ["ats", "heuristic"])
def test_constants_are_not_saved_and_come_back(method: str, tmp_path: Path) -> None:
    """transformers builds models on the meta device and leaves buffers that are not in the file empty."""
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
    """This includes a keep rate that is set on the configuration as a number, not by `set_keep_rate`. The number of
    cached constants is limited."""
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
    """At another image size they equal those of a model made for it."""
    model, large = make(method), make(method, image_size=48)
    shared = {k: v for k, v in model.state_dict().items() if "position" not in k}
    large.load_state_dict(shared, strict=False)
    with torch.no_grad():
        large.vit.embeddings.position_embeddings.copy_(model.vit.embeddings.interpolate_pos_encoding((6, 6)))
        expected = large(images(2, 48, 48))
        output = model(images(2, 48, 48), interpolate_pos_encoding=True)
    assert (output.logits - expected.logits).abs().max() <= 1e-10
