"""Properties of the model for every method, cache and kind of token, and a few special cases."""

import copy
import re
from typing import Any

import pytest
import torch

from clca import REDUCTIONS, CLCAViTForImageClassification, CLCAViTModel, TokenReduction, token_schedule
from clca.heads_clca import heads_reading
from clca.reduction_base import ScoredPruning
from tests.clca.helpers import (
    COUNT_IS_A_BOUND,
    NO_EFFECT,
    check_activation_checkpointing,
    loss_and_gradients,
)
from tests.helpers import (
    CASES,
    FIRST_OF_FAMILIES,
    METHODS,
    TOKENS,
    Case,
    checkpoint_activations,
    images,
    labels,
    slow_unless,
    table,
    tiny_config,
    tiny_model,
)


every_case = pytest.mark.parametrize("case", table(CASES), ids=str)
# For what does not depend on the kind of tokens.
MAIN_CASES = [c for c in CASES if c.tokens == "cls" and c.cache in ("plain", "clca")]
main_case = pytest.mark.parametrize("case", MAIN_CASES, ids=str)
# Methods that remove no tokens.
KEEPS_ITS_ROWS = {"heuristic": "it masks patches instead"}
# Methods that change the tokens at a keep rate of one.
ACTS_AT_RATE_ONE = {
    "ats": "quantiles that fall on the same token take it once",
    "dpcknn": "a merged token is divided by its weight + 1e-6",
    "patchmerger": "its tokens are new ones, of normalized tokens",
    "sinkhorn": "its tokens are new ones, of tokens of unit length",
    "sit": "its tokens are new ones",
}
# Methods that do nothing at rate one only in a plain ViT with CLS and patches.
ACTS_AT_RATE_ONE_BESIDE_PATCHES = {
    "dyvit": "with a cache a stage keeps int(rate * (N - 2)) of N tokens, as published",
    "kmedoids": "its share is one of the patches, while registers, CLR and retrieved tokens are clustered with them",
}
RATE_ONE_OPTIONS = {"heuristic": {"contiguous": False}}  # else it shrinks whatever the keep rate says


# The table.


@every_case
def test_token_counts_follow_the_schedule(case: Case) -> None:
    """Reported counts, recorded lengths and `token_schedule` agree."""
    model = case.model()
    schedule = token_schedule(model.config)
    output = model(images(), output_hidden_states=True)
    seen_after = [h.shape[1] for h in output.hidden_states[1:]]
    if case.method in COUNT_IS_A_BOUND:
        assert all(a <= b for a, b in zip(output.token_counts, schedule.before, strict=True))
        assert all(a <= b for a, b in zip(seen_after, schedule.after, strict=True))
    else:
        assert list(output.token_counts) == schedule.before
        assert seen_after == schedule.after
    first = model.config.num_prefix_tokens + 16 + model.config.num_clr_tokens
    assert output.token_counts[0] == output.hidden_states[0].shape[1] == first
    for layer in model.config.reduction_layers if case.method else []:
        removed = output.token_counts[layer] - seen_after[layer]
        assert removed == 0 if case.method in KEEPS_ITS_ROWS else removed > 0, f"layer {layer}"


@every_case
def test_an_image_does_not_depend_on_its_batch(case: Case) -> None:
    model = case.model(initializer_range=0.5)
    pixels = images(4)
    with torch.no_grad():
        together = model(pixels).logits
        alone = torch.cat([model(pixel[None]).logits for pixel in pixels])
    assert (together - alone).abs().max() <= 1e-9
    assert (together[0] - together[1]).abs().max() > 1e-3  # the images do differ


@pytest.mark.parametrize("pooling", ["mean", "normed_mean", "map"])
@pytest.mark.parametrize("prefix", [{"num_register_tokens": 4}, {"num_register_tokens": 3, "use_class_token": False}])
def test_few_tokens_are_pooled_like_many(prefix: dict[str, Any], pooling: str) -> None:
    """ATS may keep fewer tokens than the prefix has. Then neither padding nor retrieved tokens are skipped instead of
    it."""
    options = {"initializer_range": 0.5, "image_size": 64, "reduction_layers": [2, 4], "num_hidden_layers": 6}
    model = tiny_model(reduction="ats", keep_rate=0.28, pooling=pooling, cross_layer_cache=True, **prefix, **options)
    pixels = images(8, 64, 64)
    with torch.no_grad():
        together = model(pixels)
        alone = [model(pixel[None]) for pixel in pixels]
    assert len({output.token_counts[-2] for output in alone}) > 1  # some have pads in the batch
    assert (together.logits - torch.cat([output.logits for output in alone])).abs().max() <= 1e-9


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_weights_for_a_model_on_the_meta_device(method: str | None, assign: bool) -> None:
    """Masks and quantiles, which are not saved, are created when the weights are loaded."""
    model = Case(method, "clca", "cls").model()
    with torch.device("meta"):
        empty = CLCAViTForImageClassification(model.config).double().eval()
    empty = empty if assign else empty.to_empty(device="cpu")
    for buffer in [] if assign else empty.buffers():
        buffer.fill_(1)  # what memory holds by chance
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(empty(images()).logits, model(images()).logits)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (case, options)
        for case in CASES
        if case.method in COUNT_IS_A_BOUND
        for options in ({}, {"pooling": "mean"}, {"pooling": "map"})
        if not (case.cache == "clca" and options)  # the CLA head does not read what is pooled
    ],
    ids=str,
)
def test_padded_images_do_not_depend_on_their_batch(case: Case, options: dict[str, Any]) -> None:
    """If images of a batch keep different numbers of tokens, padding is never attended to, averaged, pooled
    or kept."""
    sharp = {"initializer_range": 0.5, "keep_rate": 0.9, "image_size": 64, "reduction_layers": [1, 2, 3]}
    model = case.model(**sharp | TOKENS[case.tokens] | options)
    pixels = images(4, 64, 64)
    with torch.no_grad():
        together = model(pixels, output_assignments=True)
        alone = [model(pixel[None], output_assignments=True) for pixel in pixels]
    pads = torch.stack([(assignment.sum(dim=-1) == 0).sum(dim=-1) for assignment in together.assignments])
    assert ((pads > 0).sum(dim=1) >= 1).all()  # in every stage some image has pads
    assert (pads == 0).any(dim=1).all()  # and the longest has none
    assert (together.logits - torch.cat([output.logits for output in alone])).abs().max() <= 1e-9
    for image, output in enumerate(alone):
        for together_stage, alone_stage in zip(together.assignments, output.assignments, strict=True):
            kept = together_stage[image].sum(dim=-1) > 0
            assert int(kept.sum()) == alone_stage.shape[1]


@every_case
def test_evaluation_repeats(case: Case) -> None:
    """Evaluation uses no random numbers."""
    model = case.model()
    with torch.no_grad():
        first = model(images()).logits
        torch.manual_seed(1234)
        assert torch.equal(model(images()).logits, first)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.method is not None
        and c.method not in ACTS_AT_RATE_ONE
        and not (c.method in ACTS_AT_RATE_ONE_BESIDE_PATCHES and (c.cache, c.tokens) != ("plain", "cls"))
    ],
    ids=str,
)
def test_rate_one_is_no_reduction(case: Case) -> None:
    model = case.model(keep_rate=1.0, reduction_kwargs=RATE_ONE_OPTIONS.get(case.method))
    plain = Case(None, case.cache, case.tokens).model()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        output, expected = model(images()), plain(images())
    assert output.token_counts == expected.token_counts
    assert (output.logits - expected.logits).abs().max() <= 1e-9


@every_case
def test_gradients_reach_every_parameter(case: Case) -> None:
    """Gradients are finite, and zero only where this follows from the mathematics. Only the norm that an aggregating
    head does not use is frozen."""
    model = case.model()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == ({"vit.layernorm.weight", "vit.layernorm.bias"} if model.config.head == "cla" else set())
    _, gradients = loss_and_gradients(model)
    missing = [name for name, g in gradients.items() if g is None]
    assert not missing
    assert not [name for name, g in gradients.items() if not g.isfinite().all()]
    unmoved = [name for name, g in gradients.items() if not g.any()]
    assert not [name for name in unmoved if not any(re.search(pattern, name) for pattern in NO_EFFECT)]


@main_case
def test_the_loss_is_the_sum_of_its_terms(case: Case) -> None:
    """Every term is reported, detached. In evaluation there is only the classification loss."""
    model = case.model()
    output = model(images(), labels=labels())
    assert output.loss_terms.keys() == {"classification"}
    assert torch.equal(output.loss, output.loss_terms["classification"])
    model.train()
    output = model(images(), labels=labels())
    assert (output.loss - sum(output.loss_terms.values())).abs() <= 1e-12
    assert not any(term.requires_grad for term in output.loss_terms.values())


@pytest.mark.parametrize(
    "case", slow_unless(lambda c: c.method in FIRST_OF_FAMILIES or c.cache == "clca", MAIN_CASES), ids=str
)
def test_one_batch_can_be_learned(case: Case) -> None:
    """Forty steps reduce the loss of four images to a tenth."""
    model = case.model(initializer_range=0.05).float().train()
    pixels, targets = images(4).float(), labels(4)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        output = model(pixels, labels=targets)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss_terms["classification"]))
    assert losses[0] > 0.5
    assert losses[-1] < 0.1 * losses[0]


@every_case
def test_eager_equals_sdpa(case: Case) -> None:
    model = case.model()
    logits = {}
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(images()).logits
    assert (logits["sdpa"] - logits["eager"]).abs().max() <= 1e-9


@main_case
def test_bfloat16_is_finite(case: Case) -> None:
    """In evaluation and training. Pixels are converted to the dtype of the weights."""
    model = case.model().bfloat16()
    logits = model(images().float()).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    model.train()
    loss = model(images().float(), labels=labels()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@main_case
def test_autocast_is_finite(case: Case) -> None:
    """With mixed precision, results are close to float32, and gradients are float32."""
    model = case.model().float()
    pixels = images().float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(pixels).logits.isfinite().all()
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pixels, labels=labels()).loss
    loss.backward()
    assert loss.isfinite()
    assert all(
        p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("case", table(c for c in CASES if c.method and c.tokens != "registers"), ids=str)
def test_hardly_anything_is_kept(case: Case) -> None:
    """At rates that leave one token or none, results are finite, counts follow the schedule, and images do not affect
    each other. If the cache has no token to average, it uses token 0."""
    fewer_than_clr = {"num_clr_tokens": 4} if case.config().num_clr_tokens else {}  # then copies of token 0 are cached
    model = case.model(keep_rate=0.05, reduction_layers=[0, 1, 2], **fewer_than_clr)
    with torch.no_grad():
        output = model(images())
        alone = model(images()[:1]).logits
    assert output.logits.isfinite().all()
    assert (output.logits[:1] - alone).abs().max() <= 1e-9
    schedule = token_schedule(model.config)
    if case.method in COUNT_IS_A_BOUND:
        assert all(a <= b for a, b in zip(output.token_counts, schedule.before, strict=True))
    else:
        assert list(output.token_counts) == schedule.before
    loss, gradients = loss_and_gradients(model)
    assert loss.isfinite()
    assert all(g is None or g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(
    ("case", "reentrant"),
    [
        (case, reentrant)
        for case in CASES
        if case.tokens == "cls" and case.cache in ("plain", "clca")
        for reentrant in (False, True)
        if not (reentrant and case.reduction.differentiable_tracks)  # refused, see below
    ],
    ids=str,
)
def test_activation_checkpointing_changes_nothing(case: Case, reentrant: bool) -> None:
    """Loss and gradients are equal with and without recomputation."""
    check_activation_checkpointing(case.model(), reentrant)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("reduction", name) for name, method in REDUCTIONS.items() if method.differentiable_tracks],
        *[("head", head) for head in heads_reading("probes")],
    ],
)
def test_reentrant_checkpointing_is_refused_where_it_loses_gradients(option: str, value: str) -> None:
    """It only tracks the hidden states, not the tracks of a method or the features that a head reads from layers."""
    model = tiny_model(**{option: value})
    for part in (model, model.vit):
        with pytest.raises(ValueError, match="`use_reentrant`"):
            checkpoint_activations(part, {"use_reentrant": True})
    assert not any(layer.gradient_checkpointing for layer in model.vit.layers)


@every_case
def test_recorded_tuples_are_honest(case: Case) -> None:
    """With sdpa as well, there is one hidden state per layer plus the embeddings, and one attention map per layer,
    with the actual lengths and rows that sum to one. Recording does not change the logits."""
    model = case.model()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        output = model(images(), output_hidden_states=True, output_attentions=True)
        logits = model(images()).logits
    assert (output.logits - logits).abs().max() <= 1e-9
    depth = model.config.num_hidden_layers
    assert len(output.hidden_states) == depth + 1
    assert len(output.attentions) == depth
    acts_before = case.reduction.before_layer is not TokenReduction.before_layer
    chooses_tokens = case.reduction.choose_tokens is not TokenReduction.choose_tokens
    for index, weights in enumerate(output.attentions):
        before, after = output.token_counts[index], output.hidden_states[index + 1].shape[1]
        keys = after if acts_before else before
        queries = after if chooses_tokens else keys
        assert weights.shape == (3, 2, queries, keys), f"layer {index}"
        assert (weights.sum(dim=-1) - 1).abs().max() <= 1e-9
        assert weights.min() >= 0


def test_recording_can_be_set_in_the_configuration() -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5, output_hidden_states=True, attn_implementation="eager")
    model.config.output_attentions = True
    output = model(images())
    assert [h.shape[1] for h in output.hidden_states] == [17, 17, 10, 7, 7, 7]
    assert [a.shape[-1] for a in output.attentions] == [17, 17, 10, 7, 7]
    logits, hidden_states, attentions = model(images(), return_dict=False)[:3]
    assert torch.equal(logits, output.logits)
    assert len(hidden_states) != len(attentions)


@pytest.mark.parametrize(
    ("case", "rate"),
    [
        (case, {rate: 0.5})
        for case in CASES
        if case.tokens == "cls" and case.cache in ("plain", "clca")
        for rate in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
        # dyvit's own softmax of training has no dropout, as published
        if not (case.method == "dyvit" and rate == "attention_probs_dropout_prob")
    ],
    ids=str,
)
def test_dropout_acts_in_training_only(case: Case, rate: dict[str, float]) -> None:
    """Two draws differ in training. Evaluation equals that of a model without dropout."""
    model, plain = case.model(**rate), case.model()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images()).logits, plain(images()).logits)
        draws = []
        for trained in (plain, model, model):
            trained.train()
            for module in trained.modules():  # its statistics would move from draw to draw
                if isinstance(module, torch.nn.BatchNorm1d):
                    module.eval()
            torch.manual_seed(len(draws))
            draws.append(trained(images()).logits)
    assert not torch.allclose(draws[1], draws[2])
    assert not torch.allclose(draws[0], draws[1])


def test_drop_path_drops_whole_images() -> None:
    """A branch is dropped for an entire image or scaled so that its mean is preserved. The rate increases linearly
    from zero."""
    model = tiny_model(drop_path_rate=0.4)
    rates = [layer.drop_path.rate for layer in model.vit.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop_path = model.vit.layers[-1].drop_path.train()
    ones = torch.ones(1000, 5, 4)
    dropped = drop_path(ones)
    per_image = dropped[:, 0, 0]
    assert torch.equal(dropped, per_image[:, None, None].expand_as(ones))
    kept = per_image > 0
    assert torch.allclose(per_image[kept], torch.tensor(1 / 0.6))
    assert 0.5 < kept.float().mean() < 0.7


def test_training_and_evaluation_share_no_state() -> None:
    """An evaluation after a training step on other images equals that of a copy without the step."""
    for method in METHODS:
        if method == "sinkhorn":
            continue  # brings its prototypes to unit length in training, as published
        model = Case(method, "cache", "cls").model()
        twin = copy.deepcopy(model)
        model.train()
        model(images(2, seed=5), labels=labels(2)).loss.backward()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(images()).logits, twin(images()).logits), method


def test_the_backbone_alone() -> None:
    """`CLCAViTModel` has no classifier, and returns CLS of several layers only if a head needs it."""
    torch.manual_seed(0)
    model = CLCAViTModel(tiny_config(reduction="evit", keep_rate=0.5)).eval()
    output = model(images().float())
    assert output.last_hidden_state.shape == (3, output.token_counts[-1], 16)
    assert output.cls_tokens is None
    assert not hasattr(model, "classifier")


def test_a_method_of_ones_own() -> None:
    """`register_reduction` registers a class by name. Names are validated and cannot be registered twice."""
    from clca import register_reduction

    class KeepFirst(ScoredPruning):
        name = "keep_first_of_a_test"

        def before_mlp(self, hidden_states, state, context):
            scores = torch.arange(hidden_states.shape[1] - 1, 0, -1.0, dtype=hidden_states.dtype)
            return self.prune(hidden_states, state, scores.expand(hidden_states.shape[0], -1))

    with pytest.raises(ValueError, match="`reduction`"):
        tiny_config(reduction=KeepFirst.name)
    register_reduction(KeepFirst)
    try:
        assert register_reduction(KeepFirst) is KeepFirst  # again: the same class is no conflict
        output = tiny_model(reduction=KeepFirst.name, keep_rate=0.5)(images(), output_assignments=True)
        assert output.token_counts == (17, 17, 9, 5, 5, 5)
        assert torch.equal(output.assignments[0][0], torch.eye(9, 17, dtype=torch.float64))
        for name in (KeepFirst.name, "Evit", "not a name", None):
            with pytest.raises(ValueError, match="`name`"):
                register_reduction(type("Other", (ScoredPruning,), {"name": name}))
        with pytest.raises(ValueError, match="`cls`"):
            register_reduction(dict)
    finally:
        del REDUCTIONS[KeepFirst.name]
