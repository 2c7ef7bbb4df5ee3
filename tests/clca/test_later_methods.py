"""Properties of the methods of the later CLCA code (maws, dmaws, edar, nfedar, glsf) that goldens do not cover.

Scores are compared with their definitions on full attention maps, which the methods themselves never compute.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clca import CLCAViTForImageClassification, set_fast_paths, token_schedule
from clca.attention_clca import AttentionContext
from clca.layers_clca import CLCAViTAttention
from clca.reduction_base import ScoredPruning
from tests.helpers import checkpoint_activations, images, labels, tiny_config, tiny_model
from ufgir.checkpoints.original_keys import original_config
from ufgir.profiling.macs import count_macs


BY_ATTENTION = ("maws", "dmaws", "edar", "nfedar")
LATER = (*BY_ATTENTION, "glsf")
FUSED: dict[str, dict[str, Any]] = {
    "maws": {"reduction": "maws", "reduction_kwargs": {"fuse_rest": True}},
    "dmaws": {"reduction": "dmaws", "reduction_kwargs": {"fuse_rest": True}},
    "edar": {"reduction": "edar", "reduction_kwargs": {"fuse_rest": True}},
    "dmaws-normalized": {"reduction": "dmaws", "reduction_kwargs": {"fuse_rest": True, "normalize_weights": True}},
    "edar-normalized": {"reduction": "edar", "reduction_kwargs": {"fuse_rest": True, "normalize_weights": True}},
    "glsf": {"reduction": "glsf"},
}
CACHE = {"cross_layer_cache": True, "num_clr_tokens": 1}
every_later = pytest.mark.parametrize("method", LATER)
every_fused = pytest.mark.parametrize("options", FUSED.values(), ids=FUSED)


def make(method: str, **options: Any) -> CLCAViTForImageClassification:
    """Return a model with queries and keys large enough that its attention is not uniform."""
    model = tiny_model(**{"reduction": method, "keep_rate": 0.5} | options)
    with torch.no_grad():
        for layer in model.vit.layers:
            for part in (layer.attention.q_proj, layer.attention.k_proj):
                part.weight.mul_(2)
                part.bias.normal_()
    return model


class Record:
    """Record the attention contexts of all layers, and the weights that each stage would give to tokens 1 .. N - 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.contexts: list[AttentionContext] = []
        self.weights: list[torch.Tensor] = []
        make_context, keep_best = CLCAViTAttention.make_context, ScoredPruning.keep_best

        def note_context(*args: Any) -> AttentionContext:
            self.contexts.append(make_context(*args))
            return self.contexts[-1]

        def note_scores(stage: ScoredPruning, state: Any, scores: torch.Tensor) -> Any:
            self.weights.append(stage.weigh(scores))
            return keep_best(stage, state, scores)

        monkeypatch.setattr(CLCAViTAttention, "make_context", note_context)
        monkeypatch.setattr(ScoredPruning, "keep_best", note_scores)

    def logits(self, layer: int) -> torch.Tensor:
        """Return the attention logits (B, H, N, N) of a layer."""
        context = self.contexts[layer]
        return context.query() * context.attention.scaling @ context.key.transpose(2, 3)

    def scores(self, method: str, layer: int, two_layers: bool) -> torch.Tensor:
        """Compute the scores (B, N - 1) of a stage by definition, with or without the layer before."""
        if method == "nfedar":
            method = "edar"
        if method == "maws" or (method == "dmaws" and not two_layers):
            return mutual(self.logits(layer))
        if method == "dmaws":
            return mutual(self.logits(layer - 1)) * mutual(self.logits(layer))
        if not two_layers:
            return rollout(self.logits(layer))[:, 0, 1:]
        return (rollout(self.logits(layer))[:, :1] @ rollout(self.logits(layer - 1)))[:, 0, 1:]


def mutual(logits: torch.Tensor) -> torch.Tensor:
    """Compute a[0, j] c_j, (B, N - 1), from logits (B, H, N, N)."""
    return (logits.softmax(dim=-1).mean(dim=1)[:, 0] * logits.mean(dim=1)[:, :, 0].softmax(dim=1))[:, 1:]


def rollout(logits: torch.Tensor) -> torch.Tensor:
    """Average the attention over heads, add the identity, and divide each row by its sum, (B, N, N)."""
    attention = logits.softmax(dim=-1).mean(dim=1)
    mixed = attention + torch.eye(attention.shape[1], dtype=attention.dtype)
    return mixed / mixed.sum(dim=-1, keepdim=True)


# Stages, further options, and for each stage whether the layer before has the same tokens.
SITUATIONS: dict[str, tuple[list[int], dict[str, Any], list[bool]]] = {
    "the first layer has none before": ([0, 3], {}, [False, True]),
    "a stage dropped tokens": ([1, 2], {}, [True, False]),
    "a stage fused tokens": ([1, 2], {"fuse": True}, [True, False]),
    "a stage kept all": ([1, 2], {"keep_rate": [1.0, 0.5]}, [True, True]),
    "three stages": ([0, 1, 2], {"keep_rate": [1.0, 1.0, 0.5]}, [False, True, True]),
    "tokens were retrieved": ([2, 4], CACHE, [True, False]),
    "tokens were retrieved two layers before": ([1, 3], CACHE, [True, True]),
    "nothing was there to retrieve": ([0, 1], CACHE | {"keep_rate": [1.0, 0.5]}, [False, True]),
    "no CLS": ([1, 3], {"use_class_token": False, "pooling": "mean"}, [True, True]),
    "norms of queries and keys": ([1, 3], {"use_qk_norm": True}, [True, True]),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("method", BY_ATTENTION)
def test_scores_are_those_of_whole_maps(method: str, situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers are used only if the same tokens enter both (F28, F29). Token 0 replaces CLS, also if it is
    a patch."""
    layers, options, two_layers = SITUATIONS[situation]
    options = dict(options)
    if options.pop("fuse", False) and method != "nfedar":
        options["reduction_kwargs"] = {"fuse_rest": True}
    model = make(method, reduction_layers=layers, **options)
    record = Record(monkeypatch)
    with torch.no_grad():
        output = model(images())
    assert output.token_counts == tuple(token_schedule(model.config).before)
    assert len(record.weights) == len(layers)
    for layer, weights, two in zip(layers, record.weights, two_layers, strict=True):
        assert torch.allclose(weights, record.scores(method, layer, two), rtol=1e-9, atol=0), f"layer {layer}"


@pytest.mark.parametrize("method", BY_ATTENTION)
def test_scores_are_taken_before_dropout(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(method, reduction_layers=[1, 3], attention_probs_dropout_prob=0.5).train()
    record = Record(monkeypatch)
    with torch.no_grad():
        model(images())
    for layer, weights in zip((1, 3), record.weights, strict=True):
        assert torch.allclose(weights, record.scores(method, layer, True), rtol=1e-9, atol=0)


def test_first_layer_of_edar_keeps_what_top_k_keeps() -> None:
    """It fuses the others with half of EViT's weights (F28)."""
    options = {"reduction_layers": [0], "keep_rate": 0.5}
    edar = make("edar", reduction_kwargs={"fuse_rest": True}, **options)(images(), output_assignments=True)
    evit = make("evit", **options)(images(), output_assignments=True)
    ours, theirs = edar.assignments[0], evit.assignments[0]
    assert torch.equal(ours[:, :-1], theirs[:, :-1])
    assert torch.allclose(ours[:, -1], theirs[:, -1] / 2)


def test_nfedar_is_edar_without_fusion() -> None:
    assert torch.equal(make("nfedar", **CACHE)(images()).logits, make("edar", **CACHE)(images()).logits)


@pytest.mark.parametrize("rate", [0.99, 1.0])
@every_later
def test_nothing_happens_where_all_are_kept(method: str, rate: float) -> None:
    """ceil(0.99 * 16) is 16 (F27): the model equals a plain ViT, and no token is fused."""
    model = make(method, keep_rate=rate)
    plain = make(None, keep_rate=1.0)
    plain.load_state_dict(model.state_dict())
    output = model(images(), output_assignments=True)
    assert output.token_counts == (17,) * 6
    assert (output.logits - plain(images()).logits).abs().max() <= 1e-10
    assert all((assignment == torch.eye(17)).all() for assignment in output.assignments)


@every_later
def test_one_candidate(method: str) -> None:
    """An image of a single patch leaves no choice."""
    model = make(method, **FUSED.get(method, {}))
    assert model(images(2, 8, 8), interpolate_pos_encoding=True).token_counts == (2,) * 6


# GLSF.


def record_stages(model: CLCAViTForImageClassification) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Record the tokens before and after each stage of a model whose stages act before the MLP."""
    seen = []
    for layer in model.vit.layers:
        if layer.reduction is not None:
            before_mlp = layer.reduction.before_mlp

            def noted(tokens, state, context, before_mlp=before_mlp):
                output = before_mlp(tokens, state, context)
                seen.append((tokens, output[0]))
                return output

            layer.reduction.before_mlp = noted
    return seen


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 17),
        ({"num_register_tokens": 8}, 25),  # a square number, at which the original looks at the mean
        ({"use_class_token": False, "pooling": "mean"}, 16),
        ({"use_class_token": False, "pooling": "mean", "num_register_tokens": 2}, 18),
    ],
    ids=["CLS", "CLS, square", "no CLS, square", "no CLS"],
)
def test_glsf_compares_with_cls_or_the_mean(options: dict[str, Any], count: int) -> None:
    """Candidates are tokens 1 .. N - 1 for any N (F30). The fused token is the sum of the dropped tokens weighted by
    their cosines; the assignment contains shares computed from these weights."""
    model = make("glsf", **options)
    stages = record_stages(model)
    with torch.no_grad():
        assignments = model(images(), output_assignments=True).assignments
    assert stages[0][0].shape[1] == count
    for (tokens, new_tokens), assignment in zip(stages, assignments, strict=True):
        whole = tokens[:, 0] if model.config.use_class_token else tokens.mean(dim=1)
        products = (tokens[:, 1:] @ whole.unsqueeze(2)).squeeze(2)
        cosines = products / (tokens[:, 1:].norm(dim=2) * whole.norm(dim=1, keepdim=True))
        order = cosines.argsort(dim=1, descending=True)
        kept = new_tokens.shape[1] - 2
        indices = torch.cat([torch.zeros(3, 1, dtype=torch.long), order[:, :kept] + 1], dim=1)
        assert torch.equal(assignment[:, :-1].argmax(dim=2), indices)
        weights = cosines.scatter(1, order[:, :kept], 0.0)
        assert torch.allclose(new_tokens[:, -1], (weights.unsqueeze(1) @ tokens[:, 1:]).squeeze(1))
        shares = weights.abs() / weights.abs().sum(dim=1, keepdim=True).clamp(min=1)
        assert torch.allclose(assignment[:, -1, 1:], shares) and (assignment[:, -1, 0] == 0).all()


# Fused tokens.


def test_normalized_weights() -> None:
    """They range from 0 to 1 over all tokens including kept ones, and are 0 if all scores are equal (F32)."""
    stage = make("edar", **FUSED["edar-normalized"]).vit.layers[1].reduction
    weights = stage.fusion_weights(torch.tensor([[0.2, 0.6, 0.4], [0.3, 0.3, 0.3]]))
    assert torch.allclose(weights, torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("name", sorted(FUSED.keys() - {"glsf"}))
def test_fused_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused token is made with the weights. The assignment contains the weights if their sum is at most one, else
    shares."""
    model = make(**{"method": None} | FUSED[name])
    record = Record(monkeypatch)
    stage = model.vit.layers[1].reduction
    seen = []
    keep_best = stage.keep_best
    stage.keep_best = lambda *args: seen.append(keep_best(*args)) or seen[-1]
    with torch.no_grad():
        assignment = model(images(), output_assignments=True).assignments[0]
    raw = record.weights[0]
    weights = raw
    if name.endswith("normalized"):
        least, most = raw.amin(dim=1, keepdim=True), raw.amax(dim=1, keepdim=True)
        weights = (raw - least) / (most - least)
    dropped = assignment[:, :-1].sum(dim=1)[:, 1:] == 0
    weights = weights * dropped
    reported = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
    assert torch.allclose(assignment[:, -1, 1:], reported)
    values = torch.randn(3, 17, 4, dtype=torch.float64)
    assert torch.allclose(seen[0][0](values)[:, -1], (weights.unsqueeze(1) @ values[:, 1:]).squeeze(1))


@every_fused
@pytest.mark.parametrize("cache", [{}, CACHE | {"head": "cla"}, {"head": "vqt"}, {"head": "h2t"}], ids=str)
def test_fused_with_and_without_shortcuts(options: dict[str, Any], cache: dict[str, Any]) -> None:
    """Logits and gradients are equal, counts follow the schedule, images do not affect each other, and checkpointing
    changes nothing."""
    model = make(**{"method": None} | options | cache)
    results = []
    for skip, recompute in ((True, False), (False, False), (True, True)):
        trained = copy.deepcopy(model).train()
        trained.vit.skip_unread_rows = skip
        if recompute:
            checkpoint_activations(trained, {"use_reentrant": False})
        torch.manual_seed(0)
        loss = trained(images(), labels=labels()).loss
        loss.backward()
        results.append(
            {"loss": loss.detach()} | {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
        )
    assert results[0].keys() == results[1].keys() == results[2].keys()
    for name, expected in results[0].items():
        for result in results[1:]:
            assert (result[name] - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max())), name
    with torch.no_grad():
        output = model(images())
        assert output.token_counts == tuple(token_schedule(model.config).before)
        assert (output.logits[:1] - model(images()[:1]).logits).abs().max() <= 1e-9


@every_fused
def test_scores_of_fused_tokens_have_gradients(options: dict[str, Any]) -> None:
    """Gradients reach the queries of the stage's layer and, for methods of two layers, those of the layer before."""
    model = make(**{"method": None} | options, reduction_layers=[4], pooling="mean")
    last = [layer.attention for layer in model.vit.layers[3:]]
    for attention in last:  # so that gradients can only go through the scores
        attention.o_proj.weight.data.zero_()
    model(images()).logits[:, 0].sum().backward()
    reached = [bool(attention.q_proj.weight.grad.abs().max() > 0) for attention in last]
    assert reached == {"maws": [False, True], "glsf": [False, False]}.get(options["reduction"], [True, True])


# Precision.


def test_sharp_attention_does_not_make_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 most products of four softmaxes then underflow, so tokens are chosen by the logarithms."""
    options = {"image_size": 96, "reduction_layers": [1], "reduction_kwargs": {"fuse_rest": True}}
    model = make("dmaws", **options)
    with torch.no_grad():
        for layer in model.vit.layers[:2]:
            layer.attention.q_proj.weight.mul_(12)
    record = Record(monkeypatch)
    with torch.no_grad():
        exact = model(images(3, 96, 96), output_assignments=True).assignments[0]
        single = model.float()(images(3, 96, 96).float(), output_assignments=True)
    assert record.logits(1).std() > 10
    assert (record.weights[1] == 0).float().mean() > 0.05
    assert single.logits.isfinite().all()
    same = (exact[:, :-1].sum(dim=1) == single.assignments[0][:, :-1].sum(dim=1)).float().mean()
    assert same > 0.98  # but for those at the boundary that float32 swaps


@every_fused
def test_half_precision(options: dict[str, Any]) -> None:
    model = make(**{"method": None} | options | CACHE | {"head": "cla"}).bfloat16()
    assert model(images()).logits.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(images().float()).logits.isfinite().all()


# Options.


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("maws", {"normalize_weights": True}, "no option `normalize_weights`"),
        ("dmaws", {"normalize_weights": True}, "`normalize_weights` must be False without `fuse_rest`"),
        ("edar", {"fuse_rest": False, "normalize_weights": True}, "`normalize_weights`"),
        ("edar", {"fuse_rest": 1}, "`fuse_rest` must be bool"),
        ("nfedar", {"fuse_rest": True}, "no option `fuse_rest`. Its options: none"),
        ("glsf", {"fuse_rest": False}, "no option `fuse_rest`"),
        ("maws", {"score_by": "cls"}, "no option `score_by`"),
    ],
)
def test_options_are_checked(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(reduction=method, reduction_kwargs=options, keep_rate=0.5)


@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize("has_cls", [False, True])
@every_later
def test_options_of_the_original(method: str, has_cls: bool, fuses: bool) -> None:
    """Options that have no effect in the original are dropped silently, without a warning about CLS."""
    options = {"reduction_loc": [1, 3], "keep_rate": [0.5], "dropped_token_fusion": fuses, "fusion_crit_norm": True}
    dims = {"depth": 6, "class_token": has_cls, "global_pool": "token" if has_cls else "avg"}
    config = original_config({"method": method, "options": options, "dims": dims, "num_labels": 3})
    expected = {"maws": {"fuse_rest": True}, "dmaws": FUSED["dmaws-normalized"]["reduction_kwargs"]}
    expected["edar"] = expected["dmaws"]
    assert config.reduction_kwargs == (expected.get(method) if fuses else None)


@every_later
def test_lists_of_the_original_are_rates_of_stages(method: str) -> None:
    options = {"reduction_loc": [1, 3], "keep_rate": [0.6, 0.3]}
    config = original_config({"method": method, "options": options, "dims": {"depth": 6}, "num_labels": 3})
    assert (config.keep_rate, config.keep_tokens) == ([0.6, 0.3], None)


# Cost.


class Shapes(TorchDispatchMode):
    """Record the shapes of all computed tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)}
        return output


@every_later
def test_no_map_is_made(method: str) -> None:
    """No method computes (B, H, N, N). Only rollout computes (B, N, N), averaged over heads."""
    model = make(method, image_size=128, **FUSED.get(method, {})).float()  # 257 tokens
    with torch.no_grad(), Shapes() as shapes:
        model(images(3, 128, 128).float())
    maps = {shape for shape in shapes.seen if shape[-2:] == (257, 257)}
    assert maps <= ({(3, 257, 257)} if "edar" in method else set())


@pytest.mark.parametrize(("options", "projected"), [({}, [1, 9]), ({"use_qk_norm": True}, [1, 17, 9])], ids=str)
def test_maws_computes_no_queries_for_what_is_dropped(
    options: dict[str, Any], projected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only CLS needs a query: the column of logits is computed from weights. With a query norm, or with hooks, queries
    are used."""
    model, seen = make("maws", **options), []
    attention = model.vit.layers[1].attention
    project = attention.project_query
    monkeypatch.setattr(attention, "project_query", lambda tokens: seen.append(tokens.shape[1]) or project(tokens))
    logits = model(images()).logits
    assert seen == projected
    seen.clear()
    hook = attention.q_proj.register_forward_hook(lambda *_: None)
    assert (model(images()).logits - logits).abs().max() <= 1e-10
    assert seen == [1, 17, 9]
    hook.remove()
    with set_fast_paths(False):
        assert (model(images()).logits - logits).abs().max() <= 1e-10


def test_maws_costs_a_column_more_than_top_k() -> None:
    """The additional operations are W^T k, its products with the tokens, and the bias, in two stages of 17 and 9
    tokens."""
    maws, topk = (count_macs(make(method), as_executed=True) for method in ("maws", "topk"))
    assert maws - topk == sum(16 * 16 + count * 16 + 16 for count in (17, 9))


def test_rollout_brings_the_output_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference the layer before a stage computes its attention once. In training a kernel computes the output
    separately."""
    model, kernels = make("edar", reduction_layers=[1, 3]), []
    sdpa = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args, **kw: kernels.append(1) or sdpa(*args, **kw)
    )
    with torch.no_grad():
        logits = model(images()).logits
    assert len(kernels) == 5 - 2
    kernels.clear()
    assert (model(images()).logits - logits).abs().max() <= 1e-10
    assert len(kernels) == 5
