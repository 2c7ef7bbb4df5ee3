"""Requirements of reduction methods beyond the common table: full-size counts, tracing, export, their own options."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clca import (
    REDUCTIONS,
    CLCAViTConfig,
    CLCAViTForImageClassification,
    reductions_clca,
    token_schedule,
)
from clca.reduction_ats import num_quantiles, quantiles
from clca.reduction_base import TokenState
from tests.helpers import (
    CACHES,
    FIRST_OF_FAMILIES,
    OPTIONS,
    TINY,
    images,
    labels,
    slow_unless,
    tiny_config,
    tiny_model,
)
from ufgir.interpret.tracing import trace_patches, unmerge


CLCA = CACHES["clca"]


SCALE = json.loads((Path(__file__).parents[1] / "goldens_misc" / "paper_scale.json").read_text())["cases"]


@pytest.mark.parametrize("case", SCALE)
def test_full_size_counts(case: str) -> None:
    """ViT-B/16 at 224 and 448 px has the token counts of the original; for ATS they are upper bounds."""
    size, method, kind, rate = case.replace("px/", " px/").split(" ", 1)[0], *case.split(" ")[1:]
    config = CLCAViTConfig(
        image_size=int(size),
        reduction=method,
        keep_rate=float(rate.removeprefix("kr=")),
        **(CLCA if kind == "clca" else {}),
    )
    before, after = token_schedule(config)
    counts = [*after, before[-1]]
    expected = SCALE[case][1]
    if method == "ats":
        assert all(count >= n for count, n in zip(counts, expected, strict=True))
    else:
        assert counts == expected


@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_nothing_is_nan(method: str, size: int) -> None:
    """Keep rate 0.1 in three stages at full resolution, where some methods keep only CLS."""
    config = CLCAViTConfig(
        **TINY | {"image_size": size, "patch_size": 16, "num_hidden_layers": 8, "reduction_layers": [2, 4, 6]},
        **CLCA,
        reduction=method,
        keep_rate=0.1,
    )
    model = CLCAViTForImageClassification(config)
    pixels = images(2, size, size).float()
    with torch.no_grad():
        assert model.eval()(pixels).logits.isfinite().all()
    loss = model.train()(pixels, labels=labels(2)).loss
    loss.backward()
    assert loss.isfinite()
    # Every trainable parameter has a gradient, also of a stage that keeps nothing: distributed training waits for it.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# What CUDA refuses to compute where deterministic algorithms are asked for (transformers' `full_determinism`).
ONLY_IN_ANY_ORDER = (
    "cumsum",
    "cumprod",
    "histc",
    "kthvalue",
    "median",
    "put_",
    "bincount",
    "upsample",
    "grid_sampler",
    "pool",
)


class FloatingPointOperators(TorchDispatchMode):
    """Record the names of operators that receive floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args)):
            self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [None, *sorted(REDUCTIONS)], ids=str)
def test_deterministic_algorithms(method: str | None) -> None:
    """They do not change the logits, and a training step uses no operator that is nondeterministic on CUDA."""
    model = tiny_model(**({"reduction": method, "keep_rate": 0.5} if method else {}), **CLCA)
    expected = model(images(4)).logits
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(model(images(4)).logits, expected)
        with FloatingPointOperators() as used:
            model.train()(images(4), labels=labels(4)).loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "mm" in used.names
    assert [name for name in used.names if name.startswith(ONLY_IN_ANY_ORDER)] == []


# ATS keeps as many tokens as the image asks for; padded to its bound its shapes are static, too.
EXPORT_OPTIONS = OPTIONS | {"ats": {"pad_to_bound": True}}
# The others are exported to files in tests/export, and all of them in test_outputs.py.
EXPORTED_HERE = FIRST_OF_FAMILIES - {"ats", "dpcknn", "evit", "kmedoids", "tome"}


@pytest.mark.parametrize("method", slow_unless(EXPORTED_HERE.__contains__, sorted(REDUCTIONS)))
def test_export(method: str) -> None:
    """torch.export with a dynamic batch size, including cache and CLA head, gives the same logits at another batch
    size."""
    model = tiny_model(reduction=method, keep_rate=0.5, reduction_kwargs=EXPORT_OPTIONS.get(method), **CLCA)
    dynamic = {"pixel_values": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=dynamic, strict=False)
    pixels = images(5, seed=2)
    exported = program.module()(pixel_values=pixels).logits
    assert (exported - model(pixels).logits).abs().max() <= 1e-9


@pytest.mark.parametrize("cache", [{}, CLCA], ids=["plain", "clca"])
@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_traces_lead_back_to_patches(method: str, cache: dict) -> None:
    """Shares are non-negative, their sum is at most one per token and exactly one for a kept patch, and they are not
    all zero."""
    model = tiny_model(reduction=method, keep_rate=0.5, **cache)
    output = model(images(), output_assignments=True)
    trace = trace_patches(output.assignments, model.config)
    assert trace.final.shape == (3, output.token_counts[-1], 16)
    for shares in (*trace.stages, trace.final):
        assert (shares >= 0).all()
        assert (shares.sum(dim=-1) <= 1 + 1e-6).all()
        assert shares.sum() > 0
    patches = torch.randn(3, 16, 4, dtype=torch.float64)
    spread = unmerge(trace.final @ patches, trace.final)
    assert spread.shape == patches.shape
    held = (trace.final > 1 - 1e-9).any(dim=1) & ((trace.final > 0).sum(dim=1) == 1)  # in one token, alone in it
    assert torch.allclose(spread[held], patches[held])


def test_unmerge_by_hand() -> None:
    """Two patches are in one token, one patch in two tokens, one in none."""
    shares = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.0]]])
    tokens = torch.tensor([[[1.0], [4.0], [1.0]]])
    assert torch.allclose(unmerge(tokens, shares), torch.tensor([[[1.0], [1.0], [3.0], [0.0]]]))
    with pytest.raises(ValueError, match="`shares`"):
        unmerge(tokens[:, :2], shares)


def test_trace_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="`assignments`"):
        trace_patches((), tiny_config())
    with pytest.raises(ValueError, match="`assignments`"):
        trace_patches((torch.eye(17)[None],), tiny_config(reduction="topk", keep_rate=0.5))


def test_ats_quantiles() -> None:
    """Their number is K - 1, or K if floating-point arithmetic rounds up. It is computed without a tensor."""
    for samples in range(1, 400):
        assert len(quantiles(samples)) == num_quantiles(samples)
    assert [k for k in range(1, 49) if num_quantiles(k) == k] == [3, 7, 12, 14, 19, 27, 34, 35, 36, 39, 42, 47, 48]


def test_pads_of_ats_never_enter_the_tail() -> None:
    """A stage in layer 0 finds an empty cache, so the last real tokens are cached as CLR."""
    model = tiny_model(reduction="ats", keep_rate=0.9, reduction_layers=[0, 2], **CLCA | {"num_clr_tokens": 2})
    pixels = images(6)
    pixels[0] *= 20  # an image of few different samples, which the batch pads
    output = model(pixels, output_assignments=True)
    pads = (output.assignments[0].sum(dim=-1) == 0).sum(dim=1)
    assert pads.min() == 0 < pads.max()
    alone = torch.cat([model(image[None]).logits for image in pixels])
    assert (output.logits - alone).abs().max() <= 1e-9


def test_ats_computes_queries_for_sampled_tokens_only() -> None:
    model = tiny_model(reduction="ats", keep_rate=0.25)
    seen = []
    layer = model.vit.layers[1]
    layer.attention.q_proj.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    layer.mlp.fc1.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    counts = model(images()).token_counts
    assert seen == [1, counts[2], counts[2]]  # CLS to choose, then the chosen
    assert counts[2] < counts[1]


def test_dynamic_vit_survives_dropping_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw that keeps no token in any stage is handled (F24: a mean over no token was 0 / 0)."""
    noise = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    monkeypatch.setattr(REDUCTIONS["dyvit"], "draw_gumbel", staticmethod(lambda scores: noise.expand_as(scores)))
    model = tiny_model(reduction="dyvit", keep_rate=0.5, **CLCA).train()
    output = model(images(), labels=labels())
    output.loss.backward()
    assert all(decision.sum() == 0 for decision in output.reports["decision"][:1])
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_dynamic_vit_in_training_reports_what_it_decided_against() -> None:
    """No token is removed, and dropped tokens hold nothing in the assignment."""
    model = tiny_model(reduction="dyvit", keep_rate=0.5).train()
    output = model(images(), output_assignments=True)
    assert len(output.assignments) == 2
    for assignment, decision in zip(output.assignments, output.reports["decision"], strict=True):
        kept = torch.nn.functional.pad(decision, (1, 0), value=1.0)
        assert 0 < decision.mean() < 1
        assert torch.equal(assignment, torch.diag_embed(kept))


def test_sinkhorn_prototypes_stay_at_unit_length() -> None:
    """They are normalized in place in training. In evaluation the parameter does not change."""
    model = tiny_model(reduction="sinkhorn", keep_rate=0.5)
    prototypes = model.vit.layers[1].reduction.prototypes
    before = prototypes.detach().clone()
    model(images())
    assert torch.equal(prototypes, before)
    model.train()(images())
    assert torch.allclose(prototypes.norm(dim=-1), torch.ones(len(prototypes), dtype=torch.float64))


def test_kmedoids_in_the_first_layer_and_with_equal_weights() -> None:
    """There is no attention before layer 0, so all tokens have the same weight."""
    for options in ({"reduction_layers": [0, 2]}, {"reduction_kwargs": {"equal_weight": True}}):
        model = tiny_model(reduction="kmedoids", keep_rate=0.5, **options)
        output = model(images(), output_assignments=True)
        assert output.token_counts[-1] == token_schedule(model.config).before[-1]
        kept = output.assignments[0].argmax(dim=-1)
        assert all(len(tokens.unique()) == len(tokens) for tokens in kept)  # different medoids


@pytest.mark.parametrize("method", ["topk", "evit"])
def test_without_cls_tokens_are_scored_by_what_they_receive(method: str) -> None:
    options = {"use_class_token": False, "pooling": "mean", "reduction": method, "keep_rate": 0.5}
    model = tiny_model(**options)
    original = tiny_model(**options, reduction_kwargs={"score_by": "cls"})
    assert model.vit.layers[1].reduction.score_by == "received"
    original.load_state_dict(model.state_dict())
    assert not torch.equal(model(images()).logits, original(images()).logits)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpcknn", {"k_neighbors": 0}, "`k_neighbors`"),
        ("kmedoids", {"cluster_iters": -1}, "`cluster_iters`"),
        ("sinkhorn", {"sinkhorn_eps": 0.0}, "`sinkhorn_eps`"),
        ("sinkhorn", {"cluster_iters": 0}, "`cluster_iters`"),
        ("heuristic", {"pattern": "l3"}, "`pattern`"),
        ("topk", {"score_by": "luck"}, "`score_by`"),
        ("dyvit", {"ratio_weight": -1.0}, "`ratio_weight`"),
        ("dyvit", {"ratio_targets": [0.5]}, "`ratio_targets`"),
        ("dyvit", {"token_distill": "l1"}, "`token_distill`"),
        ("tome", {"r": 8}, "no option `r`"),
        ("atc", {"linkage": "ward"}, "`linkage` must be"),
        ("pitome", {"matching": "random"}, "`matching` must be"),
        ("pitome", {"margin": float("nan")}, "`margin` must be float"),
        ("mctf", {"tau_size": -1.0}, "`tau_size` must be 0 or more"),
        ("mctf", {"pooling": "max"}, "`pooling` must be"),
        ("tofu", {"merge_from": -1}, "`merge_from` must be the index of a layer"),
        ("heuristic", {"contiguous": "no"}, "`contiguous` must be bool"),
        ("heuristic", {"min_radius": "a"}, "`min_radius` must be float"),
        ("heuristic", {"contiguous": True}, "`keep_rate` and `keep_tokens` .*`contiguous`"),
        ("dpcknn", {"k_neighbors": True}, "`k_neighbors` must be int"),
        ("dyvit", {"ratio_weight": float("inf")}, "`ratio_weight` must be float"),
        ("dyvit", {"ratio_targets": 0.5}, "`ratio_targets` must be"),
    ],
)
def test_options_are_checked(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(reduction=method, reduction_kwargs=options, keep_rate=0.5)


@pytest.mark.parametrize("method", ["atc", "dpcknn", "kmedoids", "pitome", "tome"])
def test_autocast_does_not_change_what_is_chosen(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances and similarities of the same tokens are compared in full precision under autocast."""
    tokens = torch.randn(2, 49, 16)
    stage = tiny_model(reduction=method).vit.layers[1].reduction
    choose = {
        "dpcknn": lambda: stage.label(tokens, 12),
        "kmedoids": lambda: stage.label(tokens, 12, None),
    }.get(method, lambda: (stage.match(tokens, 20),))
    plain = choose()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = choose()
    assert all(torch.equal(a, b) for a, b in zip(plain, under_autocast, strict=True))


def test_heuristic_follows_the_keep_rate() -> None:
    """By default the share of patches inside the circle is close to the keep rate."""
    for rate, patches in ((0.25, 4), (1.0, 16)):
        model = tiny_model(reduction="heuristic", keep_rate=rate, reduction_layers=[1])
        attended = model(images(), output_assignments=True).assignments[0].diagonal(dim1=1, dim2=2)[:, 1:].sum(dim=1)
        assert attended.tolist() == [patches] * 3


def test_dpcknn_breaks_ties_by_position() -> None:
    """Two equal tokens form one cluster: only the first of them is far from denser tokens."""
    tokens = torch.tensor([[[0.0, 0], [0, 0], [10, 0], [10.5, 0], [0, 7], [0, 8]]])
    model = tiny_model(reduction="dpcknn", reduction_kwargs={"k_neighbors": 2})
    centres, labels = model.vit.layers[1].reduction.label(tokens, 3)
    assert not {0, 1} <= set(centres[0].tolist())
    assert labels[0, 0] == labels[0, 1]


def test_scores_are_compared_in_full_precision() -> None:
    """This also holds in a bfloat16 model, where rounded scores would tie."""
    model = tiny_model(reduction="topk", keep_rate=0.5, image_size=128).bfloat16()
    seen = []
    layer = model.vit.layers[1]
    keep_best = layer.reduction.keep_best
    layer.reduction.keep_best = lambda *args: seen.append(args[1]) or keep_best(*args)
    model(images(2, 128, 128))
    assert seen[0].dtype == torch.float32
    assert len(seen[0][0].unique()) > 0.95 * seen[0].shape[1]


def test_traces_of_a_half_precision_model() -> None:
    """Stages that merge and stages that do nothing report assignments in different dtypes."""
    model = tiny_model(reduction="tome", keep_rate=[0.5, 1.0]).bfloat16()
    output = model(images(), output_assignments=True)
    trace = trace_patches(output.assignments, model.config)
    assert trace.final.sum(dim=-1)[:, 1:].mean() == pytest.approx(1.0, abs=0.01)


def test_tome_never_removes_more_than_was_asked() -> None:
    """A target above the number of patches of a small image is ignored."""
    model = tiny_model(reduction="tome", keep_tokens=[12, 8])
    assert model(images(2, 16, 16), interpolate_pos_encoding=True).token_counts[-1] == 5


def test_ratio_target_of_counts_follows_the_image() -> None:
    """`keep_tokens` is compared with the 36 patches of the image, not with the 16 of the configuration."""
    model = tiny_model(reduction="dyvit", keep_tokens=[9, 9]).train()
    torch.manual_seed(3)
    output = model(images(3, 48, 48), labels=labels(), interpolate_pos_encoding=True)
    shares = torch.stack([decision.mean(dim=1) for decision in output.reports["decision"]])
    assert output.loss_terms["keep_ratio"].item() == pytest.approx(2 * (shares - 9 / 36).square().mean().item())


def test_queries_of_vqt_do_not_see_what_dynamic_vit_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    """If every token is dropped in training, the queries only attend to CLS."""
    noise = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    monkeypatch.setattr(REDUCTIONS["dyvit"], "draw_gumbel", staticmethod(lambda scores: noise.expand_as(scores)))
    model = tiny_model(reduction="dyvit", keep_rate=0.5, head="vqt", reduction_layers=[1]).train()
    layer, weights = model.vit.layers[1], []
    attend = model.vit.method.attend

    def note(*args):
        weights.append(attend(*args)[1])
        return attend(*args)

    monkeypatch.setattr(model.vit.method, "attend", staticmethod(note))
    model(images())
    queries = [w for w in weights if w.shape[2] == layer.probe.queries.shape[1]]
    assert queries and all((w[..., 0] > 0.99).all() for w in queries)


@pytest.mark.parametrize(
    ("saved", "override"),
    [
        ({"reduction": "topk", "keep_rate": 0.5}, {"keep_tokens": [8, 3]}),
        ({"reduction": "topk", "keep_tokens": [8, 3]}, {"keep_rate": 0.5}),
        ({"reduction": "dpcknn", "reduction_kwargs": {"k_neighbors": 3}}, {"reduction": "topk"}),
    ],
)
def test_overrides_take_the_place_of_what_was_saved(saved: dict, override: dict, tmp_path: Path) -> None:
    tiny_model(**saved).save_pretrained(tmp_path)
    model = CLCAViTForImageClassification.from_pretrained(tmp_path, **override)
    expected = tiny_config(**({"reduction": "topk"} | override))
    assert token_schedule(model.config) == token_schedule(expected)


def test_dynamic_vit_with_a_frozen_backbone() -> None:
    """The backbone is in evaluation mode while the head trains: no decisions are drawn, and there is no ratio loss."""
    model = tiny_model(reduction="dyvit", keep_rate=0.5).train()
    model.vit.eval()
    assert set(model(images(), labels=labels()).loss_terms) == {"classification"}


def test_one_image_cannot_train_a_batch_norm() -> None:
    model = tiny_model(head="cla").train()
    with pytest.raises(ValueError, match="at least two images"):
        model(images(1), labels=labels(1))
    assert model.eval()(images(1)).logits.shape == (1, 3)


def test_dyvit_sorts_where_it_keeps_all() -> None:
    """As in the original, tokens are sorted by score. This matters for mean pooling, which skips the registers by
    position."""
    model = tiny_model(reduction="dyvit", keep_rate=1.0, num_register_tokens=2, pooling="mean")
    with torch.no_grad():
        output = model(images(), output_assignments=True)
        tokens = output.assignments[0].argmax(dim=2)
        stage = model.vit.layers[1].reduction
        hidden = model.vit.layers[0](*first_layer_input(model))[0]
        scores = stage.predict(hidden[:, 1:], torch.ones(3, hidden.shape[1] - 1))[..., 0]
    assert torch.equal(tokens[:, 1:] - 1, scores.argsort(dim=1, descending=True))
    assert (tokens[:, 0] == 0).all()


def first_layer_input(model: CLCAViTForImageClassification) -> tuple[torch.Tensor, TokenState]:
    hidden = model.vit.embeddings(images())
    state = reductions_clca.initial_state(model.config, model.config.image_grid)
    return hidden, model.vit.method.start(hidden, state, training=False)
