"""Properties of the model, for every method, cache and kind of token: one table, and the odd cases by hand."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel, TokenReduction, token_schedule
from clca.cache_clca import mean_rows
from clca.heads_clca import HEADS, heads_reading
from clca.modeling_clca import eager_attention_forward
from clca.reduction_base import ScoredPruning, gather_rows
from tests.helpers import CASES, METHODS, TINY, TOKENS, Case, images, labels, table, tiny_config, tiny_model


every_case = pytest.mark.parametrize("case", table(CASES), ids=str)
# For what does not depend on the kind of tokens.
main_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.tokens == "cls" and c.cache in ("plain", "clca")], ids=str
)
reducing_case = pytest.mark.parametrize("case", table(c for c in CASES if c.method is not None), ids=str)

# Methods for which the schedule is an upper bound.
COUNT_IS_A_BOUND = {"ats": "quantiles that fall on the same token take it once"}
# Methods that remove no rows.
KEEPS_ITS_ROWS = {"heuristic": "it masks patches instead"}
# Methods that change the tokens at a keep rate of one.
ACTS_AT_RATE_ONE = {
    "ats": "quantiles that fall on the same token take it once",
    "dpcknn": "a merged token is divided by its weight + 1e-6",
    "patchmerger": "its tokens are new ones, of normalised rows",
    "sinkhorn": "its tokens are new ones, of rows of unit length",
    "sit": "its tokens are new ones",
}
# Methods that do nothing at rate one only in a plain ViT with CLS and patches.
ACTS_AT_RATE_ONE_BESIDE_PATCHES = {
    "dyvit": "with a cache a stage keeps int(rate * (N - 2)) of N rows, as published",
    "kmedoids": "its share is one of the patches, while registers, CLR and recalled rows are clustered with them",
}
RATE_ONE_OPTIONS = {"heuristic": {"contiguous": False}}  # else it shrinks whatever the keep rate says
# Methods whose new rows are not sums of the rows that come in.
TRANSFORMS_ITS_ROWS = {
    "patchmerger": "sums of normalised rows",
    "sinkhorn": "sums of rows of unit length",
    "tofu": "sums of rows, made as long as the longest of them",
}
# Parameters whose gradient is zero by calculation, to be asked only for being there and finite.
NO_EFFECT = {
    r"attention\.k_proj\.bias": "adds the same to all logits of a query, which softmax does not see",
    r"classifier\.(norm_in|aggregate)\.bias": "a constant per channel, which the next BatchNorm takes away in training",
    r"slot_logits\.3\.bias": "sit: adds the same to all tokens of a slot, which its softmax over tokens does not see",
}


def loss_and_gradients(
    model: CLCAViTForImageClassification, count: int = 4
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Loss and gradients of one training step, always with the same random draws."""
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    output = model(images(count), labels=labels(count))
    output.loss.backward()
    return output.loss.detach(), {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


# The table.


@every_case
def test_token_counts_follow_the_schedule(case: Case) -> None:
    """What a forward reports, what it records and what `token_schedule` foretells are one."""
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
def test_few_rows_are_pooled_like_many(prefix: dict[str, Any], pooling: str) -> None:
    """ATS may keep fewer rows than the prefix had: then neither pads nor recalled rows are passed over in its place."""
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
    """Masks and quantiles, which are in no file, come with the weights."""
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
    """Where images of a batch keep different numbers of rows: pads are not attended to, averaged, pooled or kept."""
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
    """No draws in evaluation, whatever the state of the global generator."""
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
    """Finite everywhere, and not zero but where the mathematics makes it so. Only the norm that an aggregating head
    leaves unused is frozen."""
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
    """Every term is reported, detached; evaluation has the loss of the classes alone."""
    model = case.model()
    output = model(images(), labels=labels())
    assert output.loss_terms.keys() == {"classification"}
    assert torch.equal(output.loss, output.loss_terms["classification"])
    model.train()
    output = model(images(), labels=labels())
    assert (output.loss - sum(output.loss_terms.values())).abs() <= 1e-12
    assert not any(term.requires_grad for term in output.loss_terms.values())


@main_case
def test_one_batch_can_be_learnt(case: Case) -> None:
    """Forty steps bring the loss of four images to a tenth."""
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
    """In evaluation and in training; the dtype of the pixels is brought to that of the weights."""
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
    """Mixed precision on float32 weights, near what float32 gives, and gradients in float32."""
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
    """At rates that leave one token or none: finite in evaluation and training, counts as foretold, images apart. Where
    the cache has nothing to average it takes row 0."""
    fewer_than_clr = {"num_clr_tokens": 4} if case.config().num_clr_tokens else {}  # rows, then: row 0 stands in
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
    """Equal loss and gradients, recomputed or not."""
    check_activation_checkpointing(case.model(), reentrant)


def check_activation_checkpointing(model: CLCAViTForImageClassification, reentrant: bool) -> None:
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert all(layer.gradient_checkpointing for layer in model.vit.layers)
    loss, gradients = loss_and_gradients(model)
    assert (loss - expected_loss).abs() <= 1e-12
    for name, gradient in expected.items():
        assert gradients[name] is not None, name
        assert (gradients[name] - gradient).abs().max() <= 1e-9 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("reduction", name) for name, method in REDUCTIONS.items() if method.differentiable_tracks],
        *[("head", head) for head in heads_reading("probes")],
    ],
)
def test_reentrant_checkpointing_is_refused_where_it_loses_gradients(option: str, value: str) -> None:
    """It sees the hidden states only: not a method's tracks, nor what a head takes out of the layers."""
    model = tiny_model(**{option: value})
    for part in (model, model.vit):
        with pytest.raises(ValueError, match="`use_reentrant`"):
            part.activation_checkpointing_enable({"use_reentrant": True})
    assert not any(layer.gradient_checkpointing for layer in model.vit.layers)


@every_case
def test_recorded_tuples_are_honest(case: Case) -> None:
    """Under sdpa, too: one hidden state per layer and the embeddings, one attention map per layer, with the lengths the
    layers really had and rows that sum to one; recording changes no logits."""
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
    chooses_rows = case.reduction.choose_rows is not TokenReduction.choose_rows
    for index, weights in enumerate(output.attentions):
        before, after = output.token_counts[index], output.hidden_states[index + 1].shape[1]
        keys = after if acts_before else before
        queries = after if chooses_rows else keys
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
    """Two draws differ in training; evaluation is that of the model without."""
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
    """A branch is dropped for an image or scaled so that its mean stays; the rate grows linearly from zero."""
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


# Backbones.


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"layerscale_value": 0.5}, ["layer_scale1.lambda1", "layer_scale2.lambda1"]),
        ({"pre_norm": True}, ["embeddings.layernorm.weight"]),
        ({"num_register_tokens": 3}, ["embeddings.register_tokens"]),
        ({"use_qk_norm": True}, ["attention.q_norm.weight", "attention.k_norm.weight"]),
        ({"use_swiglu_ffn": True}, ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]),
        ({"prefix_position_embeddings": False, "num_clr_tokens": 2}, ["embeddings.clr_tokens"]),
        ({"qkv_bias": False}, []),
        ({"pooling": "mean"}, []),
        ({"pooling": "map"}, ["attention_pooling.query"]),
    ],
    ids=str,
)
def test_backbone_options(changes: dict[str, Any], parameters: list[str]) -> None:
    """Each has its parameters, which train, and an effect."""
    plain, model = tiny_model(), tiny_model(**changes)
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.endswith(p) for name in names) for p in parameters)
    assert not any(name.endswith(p) for name, _ in plain.named_parameters() for p in parameters)
    with torch.no_grad():
        for parameter in plain.parameters():  # biases begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    own = model.state_dict()
    shared = {k: v for k, v in plain.state_dict().items() if k in own and own[k].shape == v.shape}
    model.load_state_dict(shared, strict=False)
    assert (model(images()).logits - plain(images()).logits).abs().max() > 1e-4
    _, gradients = loss_and_gradients(model)
    unmoved = [name for name, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()]
    assert not [name for name in unmoved if not any(re.search(pattern, name) for pattern in NO_EFFECT)]


def test_layer_scale_starts_at_its_value() -> None:
    model = tiny_model(layerscale_value=0.125)
    assert all((layer.layer_scale1.lambda1 == 0.125).all() for layer in model.vit.layers)
    assert all((layer.layer_scale2.lambda1 == 0.125).all() for layer in model.vit.layers)


def test_swiglu_by_hand() -> None:
    """silu(W1 x) * (W2 x), projected back."""
    mlp = tiny_model(use_swiglu_ffn=True).vit.layers[0].mlp
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    expected = (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T + mlp.up_proj.bias)) @ mlp.down_proj.weight.T
    assert (mlp(x) - expected - mlp.down_proj.bias).abs().max() <= 1e-9


@pytest.mark.parametrize("prefix_positions", [True, False])
def test_what_has_positions(prefix_positions: bool) -> None:
    """`[CLS | registers | patches | CLR]`: patches have positions, the others where the option says so."""
    model = tiny_model(num_register_tokens=2, num_clr_tokens=1, prefix_position_embeddings=prefix_positions)
    embeddings = model.vit.embeddings
    with torch.no_grad():
        tokens = embeddings(images(1))[0]
        patches = embeddings.patch_embeddings(images(1))[0]
        positions = embeddings.position_embeddings[0]
        prefix = torch.cat([embeddings.cls_token[0], embeddings.register_tokens[0]])
        clr = embeddings.clr_tokens[0]
    assert positions.shape[0] == 16 + 3 * prefix_positions
    if prefix_positions:
        expected = torch.cat([torch.cat([prefix, patches]) + positions, clr + embeddings.clr_position_embeddings[0]])
    else:
        assert embeddings.clr_position_embeddings is None
        expected = torch.cat([prefix, patches + positions, clr])
    assert (tokens - expected).abs().max() <= 1e-9


def test_clr_start_as_cls() -> None:
    embeddings = tiny_model(num_clr_tokens=3).vit.embeddings
    assert torch.equal(embeddings.clr_tokens, embeddings.cls_token.expand(-1, 3, -1))
    assert embeddings.cls_token.any()


# Assignments.


def watch(reduction: TokenReduction) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Record (rows in, rows out, assignment) of a stage, wherever in the layer it acts."""
    seen = []

    def watch_hook(name: str) -> None:
        original: Callable[..., Any] = getattr(reduction, name)

        def watched(first: Any, state: Any, *rest: Any) -> Any:
            result, new_state = original(first, state, *rest)
            if "assignment" in new_state.report and "assignment" not in state.report:
                if name == "choose_rows":  # the attention context, and indices
                    rows_in = first.hidden_states
                    rows_out = rows_in if result is None else gather_rows(rows_in, result)
                else:
                    rows_in, rows_out = first, result
                seen.append((rows_in, rows_out, new_state.report["assignment"]))
            return result, new_state

        setattr(reduction, name, watched)

    for name in ("before_layer", "choose_rows", "before_mlp"):
        watch_hook(name)
    return seen


@reducing_case
def test_assignments_say_which_rows_made_which(case: Case) -> None:
    """One (B, M, N) per stage, not negative; times the rows that came in it is the rows that went out."""
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
        ((rows_in, rows_out, reported),) = record
        assert torch.equal(reported, assignment)
        if case.method not in TRANSFORMS_ITS_ROWS:
            real = assignment.sum(dim=-1, keepdim=True) > 0  # rows of zeros: pads, rows no longer attended to
            assert real.float().mean() > 0.2
            assert ((assignment @ rows_in - rows_out) * real).abs().max() <= 1e-9


@pytest.mark.parametrize("case", [c for c in CASES if issubclass(c.reduction, ScoredPruning)], ids=str)
def test_pruning_assigns_one_hot_rows(case: Case) -> None:
    """Kept rows are different rows as they were; a fused row holds the weights of all the others, less than one in sum."""
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
            assert (fused.sum(dim=-1) < 1).all()


@pytest.mark.parametrize("method", ["topk", "evit"])
def test_pruning_keeps_what_cls_attends_to(method: str) -> None:
    """The kept rows, and the weights of the fused one, are those of the CLS row of the eager attention map."""
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


# The cache.


def counts(**changes: Any) -> list[int]:
    """Token counts of a forward that also gave finite logits and gradients to all that should train."""
    model = tiny_model(**changes)
    output = model(images(), labels=labels())
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert list(output.token_counts) == token_schedule(model.config).before
    return list(output.token_counts)


TOPK_CACHE = {"reduction": "topk", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reduction_layers": [0]}, [18, 10, 10, 10, 16, 16]),
        ({"reduction_layers": [0, 2]}, [18, 10, 10, 10, 12, 12]),
        ({"reduction_layers": [4]}, [18, 18, 18, 18, 24, 15]),
        ({"reduction_layers": [1, 4]}, [18, 18, 12, 12, 16, 11]),
        ({"reduction_layers": [3]}, [18, 18, 18, 18, 16, 16]),
        ({"reduction_layers": [0], "cache_recover_at_last": False}, [18, 10, 10, 10, 10, 10]),
        ({"reduction_layers": [4], "cache_recover_at_last": False}, [18, 18, 18, 18, 18, 18]),
    ],
    ids=str,
)
def test_cache_where_nothing_was_cached_yet(changes: dict[str, Any], expected: list[int]) -> None:
    """A stage in layer 0 recalls nothing, one in the last layer comes after the recall before it, which the layers between
    still write for. 18 rows: CLS, 16 patches, CLR; a stage keeps 1 + ceil((rows - 1) / 2), an entry has 2 rows."""
    assert counts(**TOPK_CACHE | changes) == expected


@pytest.mark.parametrize("head", ["cla", "ifa"])
@pytest.mark.parametrize("layers", [[4], [1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_heads_with_a_stage_in_the_last_layer(head: str, layers: list[int]) -> None:
    """CLS of the last layer is read once, also where it holds a stage."""
    counts(**TOPK_CACHE | {"reduction_layers": layers, "head": head})
    model = tiny_model(**TOPK_CACHE | {"reduction_layers": layers, "head": head})
    output = model.vit(images(), output_hidden_states=True)
    assert model.config.aggregation_layers == layers
    expected = torch.stack([output.hidden_states[i + 1][:, 0] for i in layers], dim=1)
    assert torch.equal(output.cls_tokens, expected)


@pytest.mark.parametrize("head", ["linear", "cla", "ifa"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6, 12])
def test_cache_and_heads_without_reduction(depth: int, head: str) -> None:
    """At any depth: two cached rows per layer come back after layer 0 (nothing yet) and the last but one."""
    changes = {"cross_layer_cache": True, "num_clr_tokens": 1, "reduction_layers": [0], "head": head}
    expected = [18] * (depth - 1) + [18 + 2 * (depth - 2)] * 2
    assert counts(num_hidden_layers=depth, **changes) == expected


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("head", ["linear", "cla", "ifa"])
def test_a_single_layer(method: str | None, head: str) -> None:
    model = tiny_model(
        num_hidden_layers=1,
        reduction_layers=[0],
        reduction=method,
        keep_rate=0.5,
        cross_layer_cache=True,
        num_clr_tokens=1,
        head=head,
    )
    output = model(images(), labels=labels())
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert output.token_counts[0] == 18
    assert output.token_counts[1] <= 18


def cache_entry(model: CLCAViTForImageClassification, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """What a layer before the first recall caches, by the definition, as single rows (B, D)."""
    config = model.config
    gap_rows = hidden_states if config.cache_pool_cls else hidden_states[:, 1:]
    if config.num_clr_tokens and not config.cache_pool_clr:
        gap_rows = gap_rows[:, : -config.num_clr_tokens]
    entry = [gap_rows.mean(dim=1)] if config.cache_gap else []
    if config.num_clr_tokens:
        entry += list(hidden_states[:, -config.num_clr_tokens :].unbind(dim=1))
    return entry


@pytest.mark.parametrize("pool_cls", [False, True])
@pytest.mark.parametrize("pool_clr", [False, True])
@pytest.mark.parametrize(("gap", "clr"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 3)])
def test_what_is_cached_and_recalled(gap: bool, clr: int, pool_cls: bool, pool_clr: bool) -> None:
    """The rows recalled after layer 2 are the GAP and CLR of the layers 0 and 1, oldest first."""
    model = tiny_model(
        cross_layer_cache=True,
        cache_gap=gap,
        num_clr_tokens=clr,
        cache_pool_cls=pool_cls,
        cache_pool_clr=pool_clr,
        num_register_tokens=1,
        reduction_layers=[2],
        cache_recover_at_last=False,
    )
    entered = {}
    model.vit.layers[3].register_forward_pre_hook(lambda _, args: entered.update(hidden=args[0]))
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
    after = output.hidden_states[1:]
    recalled = torch.stack([row for i in (0, 1) for row in cache_entry(model, after[i])], dim=1)
    assert recalled.shape[1] == 2 * (gap + clr)
    assert (entered["hidden"] - torch.cat([after[2], recalled], dim=1)).abs().max() <= 1e-9
    assert output.token_counts[-1] == output.token_counts[0] + recalled.shape[1]  # no second recall


def test_the_second_recall_pools_all_but_the_newest_rows() -> None:
    """As published: after a recall the GAP takes in CLR and older recalled rows, not the newest, and the CLR that is cached
    is the last recalled row."""
    model = tiny_model(cross_layer_cache=True, num_clr_tokens=1, reduction_layers=[1])  # and after layer 3
    entered = {}
    model.vit.layers[4].register_forward_pre_hook(lambda _, args: entered.update(hidden=args[0]))
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
    after = output.hidden_states[1:]
    first = torch.stack(cache_entry(model, after[0]), dim=1)  # recalled after layer 1
    layer_1 = torch.cat([after[1], first], dim=1)
    expected = [layer_1[:, 1:18].mean(dim=1), layer_1[:, -1], after[2][:, 1:18].mean(dim=1), after[2][:, -1]]
    assert (entered["hidden"][:, -4:] - torch.stack(expected, dim=1)).abs().max() <= 1e-9


def test_cache_options_change_the_result() -> None:
    """No option is without effect."""
    base = {"cross_layer_cache": True, "num_clr_tokens": 1, "reduction_layers": [2]}
    changes: list[dict[str, Any]] = [
        {},
        {"cross_layer_cache": False},
        {"cache_gap": False},
        {"cache_pool_cls": True},
        {"cache_pool_clr": True},
        {"cache_recover_at_last": False},
    ]
    logits = [tiny_model(**base | change)(images()).logits for change in changes]
    for i, one in enumerate(logits):
        for j in range(i):
            assert (one - logits[j]).abs().max() > 1e-6, (changes[i], changes[j])


# Inputs.


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 56), (16, 16)])
@pytest.mark.parametrize("case", [Case("evit", "clca", "registers"), Case(None, "plain", "cls")], ids=str)
def test_other_image_sizes(case: Case, height: int, width: int) -> None:
    """Counts follow the real number of patches, images of a batch stay apart."""
    model = case.model()
    pixels = images(2, height, width)
    with torch.no_grad():
        output = model(pixels, interpolate_pos_encoding=True)
        alone = model(pixels[1:], interpolate_pos_encoding=True).logits
    assert list(output.token_counts) == token_schedule(model.config, (height // 8) * (width // 8)).before
    assert (output.logits[1:] - alone).abs().max() <= 1e-9


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_takes_a_non_square_image(method: str | None) -> None:
    model = tiny_model(reduction=method, keep_rate=0.5, **({} if method is None else {"cross_layer_cache": True}))
    with torch.no_grad():
        output = model(images(2, 24, 56), interpolate_pos_encoding=True)
    assert output.logits.isfinite().all()
    expected = token_schedule(model.config, 21).before
    if method in COUNT_IS_A_BOUND:
        assert all(a <= b for a, b in zip(output.token_counts, expected, strict=True))
    else:
        assert list(output.token_counts) == expected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 48), (24, 56)])
def test_interpolated_positions_are_those_of_the_stock_vit(height: int, width: int) -> None:
    """With weights of a stock ViT: the same logits for another size, and no change for the model's own."""
    stock, model = stock_and_ours()
    pixels = images(2, height, width).float()
    with torch.no_grad():
        expected = stock(pixels, interpolate_pos_encoding=True).logits
        assert (model(pixels, interpolate_pos_encoding=True).logits - expected).abs().max() <= 1e-5
        if (height, width) == (32, 32):
            assert torch.equal(model(pixels, interpolate_pos_encoding=True).logits, model(pixels).logits)


def test_a_non_square_model() -> None:
    model = tiny_model(image_size=[24, 40], patch_size=[8, 4], reduction="evit", keep_rate=0.5)
    assert model(images(2, 24, 40)).token_counts[0] == 1 + 3 * 10
    with pytest.raises(ValueError, match="`pixel_values`"):
        model(images(2, 40, 24))


@pytest.mark.parametrize(
    ("pixels", "options"),
    [
        (torch.zeros(2, 3, 40, 32), {}),
        (torch.zeros(2, 3, 32, 40), {}),
        (torch.zeros(2, 1, 32, 32), {}),
        (torch.zeros(2, 1, 32, 32), {"interpolate_pos_encoding": True}),
        (torch.zeros(3, 32, 32), {}),
        (torch.zeros(2, 3, 4, 32), {"interpolate_pos_encoding": True}),
        (None, {}),
    ],
    ids=["height", "width", "channels", "channels_any_size", "no_batch", "smaller_than_a_patch", "none"],
)
def test_wrong_pixels_are_refused(pixels: torch.Tensor | None, options: dict[str, bool]) -> None:
    with pytest.raises(ValueError, match="`pixel_values`"):
        tiny_model()(pixels, **options)


def test_an_unknown_argument_is_refused() -> None:
    """It would vanish among the options of the attention kernel otherwise."""
    with pytest.raises(ValueError, match="Did you mean `output_assignments`"):
        tiny_model()(images(), output_assigments=True)


def test_an_attention_mask_is_refused() -> None:
    """Tokens move, a mask over positions cannot follow them."""
    with pytest.raises(ValueError, match="`attention_mask`"):
        tiny_model()(images(), attention_mask=torch.ones(3, 17))


# The drop-in.


def stock_and_ours(**changes: Any) -> tuple[ViTForImageClassification, CLCAViTForImageClassification]:
    """A stock ViT with lively random weights, and ours with the same."""
    shared = {k: v for k, v in TINY.items() if k != "reduction_layers"} | {"layer_norm_eps": 1e-12} | changes
    torch.manual_seed(0)
    stock = ViTForImageClassification(ViTConfig(**shared)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = CLCAViTForImageClassification(CLCAViTConfig(**shared)).eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    return stock, model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False}, {"hidden_act": "gelu_new"}, {"image_size": [24, 40]}], ids=str
)
def test_without_options_it_is_a_vit(changes: dict[str, Any], attention: str) -> None:
    """The stock model's logits, loss, hidden states and attention maps, with its weights."""
    stock, model = stock_and_ours(**changes)
    stock.set_attn_implementation(attention)
    model.set_attn_implementation(attention)
    height, width = model.vit.embeddings.patch_embeddings.image_size
    pixels = images(3, height, width).float()
    record = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        output = model(pixels, labels=labels(), **record)
        expected = stock(pixels, labels=labels(), **record)
    assert (output.logits - expected.logits).abs().max() <= 1e-5
    assert (output.loss - expected.loss).abs() <= 1e-5
    for kind in ("hidden_states", "attentions") if attention == "eager" else ("hidden_states",):
        ours, theirs = getattr(output, kind), getattr(expected, kind)
        assert len(ours) == len(theirs)
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ours, theirs, strict=True))


def test_the_backbone_is_a_vit_model() -> None:
    """Last hidden state after the final norm, and CLS of it as what is pooled."""
    stock, model = stock_and_ours()
    with torch.no_grad():
        expected = stock.vit(images().float()).last_hidden_state
        output = model.vit(images().float())
    assert (output.last_hidden_state - expected).abs().max() <= 1e-5
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


# Attention kernels. flash_attention_2 needs a GPU and its own package: not run here.


def test_flex_attention() -> None:
    """Forward only: flex attention has no backward on the CPU."""
    model = Case("evit", "clca", "cls").model().float()
    pixels = images().float()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling it takes half a minute
        expected = model(pixels).logits
        model.set_attn_implementation("flex_attention")
        try:
            logits = model(pixels).logits
        except NotImplementedError as error:
            pytest.skip(f"flex attention does not run on this CPU: {error}")
    assert (logits - expected).abs().max() <= 1e-5


class Kernel:
    """An attention function that counts its calls and the masks it was given."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.masks.append(attention_mask)
        output, _ = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens == "cls" and c.cache != "plain"], ids=str)
@pytest.mark.parametrize("name", ["kernel_of_a_test", "flash_of_a_test"])
def test_any_registered_kernel_is_used(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers go through transformers' interface, save that a flash kernel is not handed a mask."""
    kernel = Kernel()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, kernel)
    model = case.model()
    with torch.no_grad():
        expected = model(images()).logits
        model.config._attn_implementation_internal = name
        logits = model(images()).logits
    assert (logits - expected).abs().max() <= 1e-9
    masked_method = any(
        getattr(case.reduction, hook).__func__ is not getattr(TokenReduction, hook).__func__
        for hook in ("attention_mask", "visible")
    )
    if name.startswith("flash"):
        assert all(mask is None for mask in kernel.masks)
        assert len(kernel.masks) < 5 if masked_method else len(kernel.masks) == 5
    else:
        assert len(kernel.masks) == 5
        assert any(mask is not None for mask in kernel.masks) == masked_method


# Heads and loss.


@pytest.mark.parametrize("num_labels", [1, 2, 5])
@pytest.mark.parametrize("head", HEADS)
def test_heads_give_one_logit_per_class(head: str, num_labels: int) -> None:
    model = tiny_model(head=head, num_labels=num_labels)
    assert model(images()).logits.shape == (3, num_labels)


HEAD_CASES = [
    (head, options)
    for head in HEADS
    for options in ({}, {"reduction": "evit", "keep_rate": 0.5}, TOPK_CACHE | {"num_register_tokens": 1})
]


@pytest.mark.parametrize(("head", "options"), HEAD_CASES, ids=str)
def test_every_head_trains(head: str, options: dict[str, Any]) -> None:
    """Alone and with reduction and cache: gradients for all that is not frozen, logits that do not depend on the batch."""
    model = tiny_model(head=head, **options)
    with torch.no_grad():
        assert (model(images()).logits[1:2] - model(images()[1:2]).logits).abs().max() <= 1e-9
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before_norm = {"vit.layernorm.weight", "vit.layernorm.bias"} if HEADS[head].before_norm else set()
    assert frozen == before_norm
    _, gradients = loss_and_gradients(model)
    unmoved = [name for name, g in gradients.items() if g is None or not g.any() or not g.isfinite().all()]
    assert not [name for name in unmoved if not any(re.search(pattern, name) for pattern in NO_EFFECT)]


@pytest.mark.parametrize(
    ("head", "options", "reentrant"),
    [
        (head, options, reentrant)
        for head, options in HEAD_CASES
        for reentrant in (False, True)
        if not (reentrant and head in heads_reading("probes"))  # refused, see above
    ],
    ids=str,
)
def test_activation_checkpointing_with_every_head(head: str, options: dict[str, Any], reentrant: bool) -> None:
    """Equal gradients, also for what a head takes out of the layers."""
    check_activation_checkpointing(tiny_model(head=head, **options), reentrant)


def test_the_cla_head_by_hand() -> None:
    """BatchNorm, depth-wise convolution over the layers with `cla_multiplier` kernels per channel, BatchNorm, GELU, classes:
    each number from the head's weights."""
    model = tiny_model(head="cla", cla_multiplier=3)
    head, layers = model.classifier, len(model.config.aggregation_layers)
    with torch.no_grad():
        for parameter in (*head.parameters(), head.norm_in.running_mean, head.norm_out.running_mean):
            parameter.add_(0.3 * torch.randn_like(parameter))
        cls_tokens = model.vit(images()).cls_tokens
        logits = model(images()).logits
        assert head.aggregate.weight.shape == (16 * 3, 1, layers)
        norm, out = head.norm_in, head.norm_out
        x = (cls_tokens - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        kernel = head.aggregate.weight.view(16, 3, layers)
        x = torch.einsum("bmd,dkm->bdk", x, kernel).flatten(1) + head.aggregate.bias
        x = (x - out.running_mean) / (out.running_var + out.eps).sqrt() * out.weight + out.bias
        x = torch.nn.functional.gelu(x)
        expected = x @ head.out_proj.weight.squeeze(-1).T + head.out_proj.bias
    assert (logits - expected).abs().max() <= 1e-9


def test_the_ifa_head_by_hand() -> None:
    """One weight per layer, ReLU, LayerNorm, classes."""
    model = tiny_model(head="ifa")
    head = model.classifier
    with torch.no_grad():
        cls_tokens = model.vit(images()).cls_tokens
        x = torch.einsum("bmd,m->bd", cls_tokens, head.aggregate.weight[0]) + head.aggregate.bias
        x = x.clamp(min=0)
        x = (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        expected = (x * head.layernorm.weight + head.layernorm.bias) @ head.out_proj.weight.T + head.out_proj.bias
        assert (model(images()).logits - expected).abs().max() <= 1e-9


def test_mean_pooling_leaves_out_the_prefix() -> None:
    """The mean of all rows but CLS and registers, before the final norm."""
    model = tiny_model(pooling="mean", num_register_tokens=2, num_clr_tokens=1)
    with torch.no_grad():
        output = model.vit(images(), output_hidden_states=True)
        expected = model.vit.layernorm(output.hidden_states[-1][:, 3:].mean(dim=1))
    assert (output.pooler_output - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("head", ["cla", "h2t", "vqt"])
@pytest.mark.parametrize("method", [None, "topk", "tome", "ats"])
def test_layers_on_different_devices(method: str | None, head: str) -> None:
    """Cache and head join what layers on several devices have made. (The second device is one that computes no numbers.)"""
    model = tiny_model(cross_layer_cache=True, num_clr_tokens=1, head=head, reduction=method)

    def move(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return send_to_device(args, "meta"), kwargs

    for part in (*model.vit.layers[2:], model.vit.layernorm, model.classifier):
        part.to("meta").register_forward_pre_hook(move, with_kwargs=True)
    if method == "ats":
        model.vit.layers[2].reduction.pad_to_bound = True  # it cannot ask how many rows there are
    with torch.no_grad():
        assert model(images()).logits.device.type == "meta"


def test_means_over_visible_rows_do_not_overflow() -> None:
    """A sum over hundreds of rows is beyond half precision, their mean is not."""
    rows = torch.full((1, 800, 4), 100.0, dtype=torch.float16)
    visible = torch.ones(1, 800, dtype=torch.bool)
    assert mean_rows(rows, 1, 800, visible).tolist() == [[[100.0] * 4]]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_attention_pooling(method: str | None) -> None:
    model = tiny_model(pooling="map", use_class_token=False, reduction=method, keep_rate=0.5)
    _, gradients = loss_and_gradients(model)
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    model.eval()
    together = model(images(2)).logits
    assert (together[:1] - model(images(2)[:1]).logits).abs().max() <= 1e-9


def test_loss_of_class_indices() -> None:
    model = tiny_model()
    output = model(images(), labels=labels())
    expected = -output.logits.log_softmax(dim=-1)[range(3), labels()].mean()
    assert (output.loss - expected).abs() <= 1e-9
    assert set(output.loss_terms) == {"classification"}
    assert not output.loss_terms["classification"].requires_grad
    assert model(images()).loss is None


def test_loss_of_soft_labels() -> None:
    """Class probabilities, as MixUp makes them; one-hot ones give the loss of the indices."""
    model = tiny_model(problem_type="single_label_classification")
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]])
    output = model(images(), labels=soft)
    expected = -(output.logits.log_softmax(dim=-1) * soft).sum(dim=-1).mean()
    assert (output.loss - expected).abs() <= 1e-9
    one_hot = torch.nn.functional.one_hot(labels(), 3).float()
    assert (model(images(), labels=one_hot).loss - model(images(), labels=labels()).loss).abs() <= 1e-9


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_loss_of_several_labels(problem_type: str | None) -> None:
    model = tiny_model(problem_type=problem_type)
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    output = model(images(), labels=targets)
    p = output.logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()
    assert (output.loss - expected).abs() <= 1e-9


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_loss_of_a_regression(shape: tuple[int, ...]) -> None:
    model = tiny_model(num_labels=1)
    targets = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    output = model(images(), labels=targets.reshape(shape))
    assert (output.loss - (output.logits[:, 0] - targets).square().mean()).abs() <= 1e-9


def test_the_loss_leaves_the_configuration_alone() -> None:
    """Soft labels and then hard ones, with one model and no `problem_type`."""
    model = tiny_model()
    before = model.config.to_dict()
    model(images(), labels=torch.full((3, 3), 0.5, dtype=torch.float64))
    model(images(), labels=labels())
    assert model.config.to_dict() == before
    assert model.config.problem_type is None


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification"])
def test_labels_of_a_wrong_shape_are_refused(problem_type: str) -> None:
    with pytest.raises(ValueError, match="`labels`"):
        tiny_model(problem_type=problem_type)(images(), labels=torch.zeros(3, 4))


def test_training_and_evaluation_share_no_state() -> None:
    """A forward leaves nothing behind: an evaluation after a training step on other images is that of a copy without."""
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
    """`CLCAViTModel` from a configuration: no classifier, no CLS of several layers unless a head asks for them."""
    torch.manual_seed(0)
    model = CLCAViTModel(tiny_config(reduction="evit", keep_rate=0.5)).eval()
    output = model(images().float())
    assert output.last_hidden_state.shape == (3, output.token_counts[-1], 16)
    assert output.cls_tokens is None
    assert not hasattr(model, "classifier")


def test_a_method_of_ones_own() -> None:
    """`register_reduction` makes a class usable by name; names are checked and not taken twice."""
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
