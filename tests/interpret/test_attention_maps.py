"""CLS attention, attention rollout and feature similarity on the patches of an image, compared with the original, with eager attention
maps, and with reductions of every kind.
"""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clca import REDUCTIONS, CLCAViTConfig, TokenReduction
from clca.modeling_clca import CLCAViTAttention
from tests.helpers import CASES, METHODS, TOKENS, Case, images, tiny_config, tiny_model
from tests.interpret.helpers import table
from ufgir.interpret.attention_maps import (
    attention_rollout,
    best_patches,
    cls_attention_of_patches,
    default_ranges,
    encoder_groups,
    mutual_attention,
    on_grid,
    rollout_of_patches,
)
from ufgir.interpret.feature_maps import feature_similarity
from ufgir.interpret.tracing import trace_patches


GOLDEN = Path(__file__).parents[1] / "goldens_misc" / "attention_rollout.safetensors"
LAYERS = 5
# Heads and pooling change nothing here.
MODELS = [case for case in CASES if case.cache != "clca" and case.tokens != "cls_mean"]


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def stages(config) -> dict[int, int]:
    """Return the layer of each stage and its number."""
    layers = REDUCTIONS[config.reduction].layers(config) if config.reduction else []
    return {layer: stage for stage, layer in enumerate(layers)}


def unit_sum(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def before_attention(config) -> bool:
    """Return whether the stages of a method reduce tokens before the attention."""
    return (
        config.reduction is not None and REDUCTIONS[config.reduction].before_layer is not TokenReduction.before_layer
    )


# Functions of attention maps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_numbers_of_the_original(golden, dtype) -> None:
    """The original supports only float32."""
    maps, logits = ([golden[f"{kind}.{layer}"].to(dtype) for layer in range(4)] for kind in ("attn", "pre"))
    features = golden["feats"].to(dtype)
    maws = [mutual_attention(*pair) for pair in zip(maps, logits, strict=True)]

    def patches(start, stop):
        return attention_rollout(maps, start, stop)[:, 0, 1:]

    def square(start, stop):
        return on_grid(patches(start, stop), (3, 3)).unsqueeze(1)

    ours = {
        "rollout": attention_rollout(maps),
        "dual": attention_rollout(maps, 0, 2)[:, :1],
        "maws": maws[0],
        "cum_dual": patches(1, 3),
        "cum_full": patches(0, 3),
        "cum_maws": maws[1] * maws[2],
        "map_single": on_grid(maps[0].mean(dim=1)[:, :1, 1:], (3, 3)),  # one layer: without the residual connection
        "map_dual": square(0, 2),
        "map_full": square(0, None),
        "top_cls": best_patches(features, maps[1].mean(dim=1)[:, 0, 1:], 4),
        "top_maws": best_patches(features, maws[1], 4),
    }
    assert set(ours) == {name for name in golden if name != "feats" and "." not in name}
    for name, value in ours.items():
        assert value.dtype == dtype and value.shape == golden[name].shape, name
        assert (value - golden[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(golden, dtype) -> None:
    maps = [golden[f"attn.{layer}"].to(dtype) for layer in range(4)]
    rollout = attention_rollout(maps)
    assert rollout.dtype == torch.float32
    assert torch.allclose(rollout.sum(dim=-1), torch.ones(2, 10), atol=1e-6)
    assert (rollout - golden["rollout"]).abs().max() < 0.01
    assert mutual_attention(maps[0], golden["pre.0"].to(dtype)).dtype == torch.float32


def test_a_rollout_by_hand() -> None:
    """Two tokens: in the first layer each attends only to the other, in the second the first one only to itself."""
    swap, first = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    maps = [m.expand(1, 3, 2, 2) for m in (swap, first)]
    assert attention_rollout(maps, 0, 1).tolist() == [[[0.5, 0.5], [0.5, 0.5]]]
    assert attention_rollout(maps, 1).tolist() == [[[1.0, 0.0], [0.5, 0.5]]]
    assert attention_rollout(maps).tolist() == [[[0.5, 0.5], [0.5, 0.5]]]


def test_invalid_attention_maps() -> None:
    square, smaller = torch.full((1, 2, 5, 5), 0.2), torch.full((1, 2, 3, 3), 1 / 3)
    with pytest.raises(ValueError, match=r"one size.*\(5, 5\), \(3, 3\)"):
        attention_rollout([square, smaller])
    for start, stop in ((1, 1), (2, None), (-1, 1), (0, 3)):
        with pytest.raises(ValueError, match="must lie in 0:2"):
            attention_rollout([square, square], start, stop)
    with pytest.raises(ValueError, match=r"`values` .* 3 x 5 .* got 12"):
        on_grid(torch.zeros(2, 12), (3, 5))
    with pytest.raises(ValueError, match=r"`scores` must .*\(1, 4\)"):
        best_patches(torch.zeros(1, 4, 2), torch.zeros(1, 5), 1)
    for count in (0, 5):
        with pytest.raises(ValueError, match="`count` must be between 1 and 4"):
            best_patches(torch.zeros(1, 4, 2), torch.zeros(1, 4), count)


def test_encoder_groups() -> None:
    """They end in the layers whose CLS is used by CLA."""
    config = CLCAViTConfig()
    assert encoder_groups(config) == [(0, 4), (4, 7), (7, 10), (10, 12)]
    assert default_ranges(config) == [*encoder_groups(config), (0, 12)]
    assert encoder_groups(tiny_config(reduction_layers=[2, 4])) == [(0, 3), (3, 5)]
    assert default_ranges(tiny_config(reduction_layers=[4])) == [(0, 5)]  # a single group is all layers


# Functions of models


@pytest.mark.parametrize("case", table(case for case in MODELS if case.tokens != "no_cls"), ids=str)
def test_cls_attention_is_that_of_the_eager_maps(case) -> None:
    """Equal per patch before the first stage. After it, the attention on tokens is distributed over patches: without a cache, only the
    attention on CLS and registers is missing."""
    model = case.model()
    config, pixels = model.config, images()
    maps = cls_attention_of_patches(model, pixels)
    eager = model(pixels, output_attentions=True).attentions
    assert maps.shape == (3, LAYERS, config.num_attention_heads, 16)
    patches = slice(config.num_prefix_tokens, config.num_prefix_tokens + 16)
    assert (maps[:, 0] - eager[0][:, :, 0, patches]).abs().max() <= 1e-9
    assert (maps >= 0).all()
    if config.num_prefix_tokens == 1 and not config.cross_layer_cache:
        for layer in range(LAYERS):
            lost = eager[layer][:, :, 0, 0]
            assert (maps[:, layer].sum(dim=-1) + lost - 1).abs().max() <= 1e-6
    assert (maps.sum(dim=-1) <= 1 + 1e-6).all()
    chosen = cls_attention_of_patches(model, pixels, layers=[3, 0])
    assert torch.equal(chosen, maps[:, [3, 0]])


def test_attention_of_merged_tokens_is_spread_by_their_shares() -> None:
    """With ToMe in layer 2, each patch gets its share of the attention on its token in layer 3."""
    model = tiny_model(reduction="tome", keep_rate=0.5, reduction_layers=[2])
    output = model(images(), output_attentions=True, output_assignments=True)
    shares = trace_patches(output.assignments, model.config).entered[3]  # (B, N, P)
    assert (shares.sum(dim=-1)[:, 1:] - 1).abs().max() < 1e-6  # every token but CLS is made of patches
    expected = output.attentions[3][:, :, 0] @ shares
    assert (cls_attention_of_patches(model, images(), [3])[:, 0] - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("tokens", TOKENS)
def test_rollout_of_a_dense_model_is_that_of_its_maps(tokens) -> None:
    model = Case(None, "plain", tokens).model()
    config, pixels = model.config, images()
    maps = model(pixels, output_attentions=True).attentions
    ranges = [(0, 5), (0, 2), (1, 4), (4, 5)]
    patches = slice(config.num_prefix_tokens, None)
    for (start, stop), ours in zip(ranges, rollout_of_patches(model, pixels, ranges).unbind(1), strict=True):
        rollout = attention_rollout(maps, start, stop)[..., patches]
        expected = rollout[:, 0] if config.use_class_token else rollout.mean(dim=1)
        assert (ours - expected).abs().max() <= 1e-9


@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_rollout_through_stages(method) -> None:
    """Computed from eager maps and assignments: attention and residual connection, and the stage before or after them."""
    model = tiny_model(reduction=method, keep_rate=0.5)
    pixels, config = images(), model.config
    output = model(pixels, output_attentions=True, output_assignments=True)
    for start, stop in [(0, 5), (0, 2), (1, 3), (2, 5)]:
        rows = torch.eye(17, dtype=torch.float64).expand(3, -1, -1)
        for layer in range(stop):
            attention = output.attentions[layer].mean(dim=1)
            stage = output.assignments[stages(config)[layer]] if layer in stages(config) else None
            if stage is not None and before_attention(config):
                rows = unit_sum(stage @ rows)
            residual = rows
            if method == "ats" and stage is not None:  # the sampled rows are the only queries
                residual = stage @ rows
            if layer >= start:
                rows = attention @ rows + residual
            elif method == "ats":
                rows = residual
            if method == "ats" and stage is not None:
                rows = rows * (stage.sum(dim=-1, keepdim=True) > 0)  # padding
            elif stage is not None and not before_attention(config):
                rows = stage @ rows
            rows = unit_sum(rows)
        ours = rollout_of_patches(model, pixels, [(start, stop)])[:, 0]
        assert (ours - rows[:, 0, 1:]).abs().max() <= 1e-9


@pytest.mark.parametrize("case", table(MODELS), ids=str)
def test_rollout_of_every_model(case) -> None:
    """The result consists of shares, and does not depend on other images in the batch."""
    model, pixels = case.model(), images()
    maps = rollout_of_patches(model, pixels)
    assert maps.shape == (3, len(default_ranges(model.config)), 16)
    assert (maps >= 0).all() and (maps.sum(dim=-1) <= 1 + 1e-6).all() and (maps.sum(dim=-1) > 0.05).all()
    alone = torch.cat([rollout_of_patches(model, image[None]) for image in pixels])
    assert (maps - alone).abs().max() <= 1e-9


@pytest.mark.parametrize("method", ["topk", "evit", "tome"])  # the others mix, sample or norm tokens even then
def test_a_rate_of_one_changes_nothing(method) -> None:
    dense, reduced = tiny_model(), tiny_model(reduction=method, keep_rate=1.0)
    reduced.load_state_dict(dense.state_dict())
    for function in (cls_attention_of_patches, rollout_of_patches, feature_similarity):
        assert (function(dense, images()) - function(reduced, images())).abs().max() <= 1e-9


@pytest.mark.parametrize("case", table(MODELS), ids=str)
def test_similarity_of_every_model(case) -> None:
    """The result consists of cosines; for patches with their own token, it is the cosine of this token and CLS."""
    model, pixels = case.model(), images()
    config = model.config
    similarity = feature_similarity(model, pixels, layers=[0, 2, 4])
    final = feature_similarity(model, pixels)
    assert similarity.shape == (3, 3, 16) and final.shape == (3, 1, 16)
    for values in (similarity, final):
        known = values[~values.isnan()]
        assert len(known) and (known.abs() <= 1 + 1e-6).all()
    assert not similarity[:, 0].isnan().any() or config.reduction == "heuristic"  # no stage yet
    if not config.use_class_token:
        return
    output = model.vit(pixels, output_hidden_states=True, output_assignments=True)
    if config.reduction is None:
        rows = torch.arange(16).expand(3, -1) + config.num_prefix_tokens
    else:
        own = trace_patches(output.assignments, config, retrieve=False).left[2]
        alone = (own == 1) & ((own > 0).sum(dim=2, keepdim=True) == 1) & ((own > 0).sum(dim=1, keepdim=True) == 1)
        rows = torch.where(alone.any(dim=1), own.argmax(dim=1), -1)
    to_cls = feature_similarity(model, pixels, "cls", [2])[:, 0]
    for image, patch in (rows >= 0).nonzero().tolist():
        tokens = output.hidden_states[3][image]
        expected = nn.functional.cosine_similarity(tokens[rows[image, patch]], tokens[0], dim=0)
        assert to_cls[image, patch] == pytest.approx(expected.item(), abs=1e-9)


def test_similarity_to_the_mean_of_a_dense_model() -> None:
    model = tiny_model(num_register_tokens=2)
    tokens = model.vit(images()).last_hidden_state[:, 3:]
    expected = nn.functional.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=-1)
    assert (feature_similarity(model, images()).squeeze(1) - expected).abs().max() <= 1e-9


def test_dropped_patches_have_no_similarity() -> None:
    model = tiny_model(reduction="topk", keep_rate=0.25, reduction_layers=[1])
    assert (~feature_similarity(model, images()).isnan()).sum(dim=-1).tolist() == [[4]] * 3


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_attention_kernels_are_not_replaced(method, monkeypatch) -> None:
    """Only queries and chunks of queries are computed, without eager attention or maps of all heads."""

    def refuse(*args, **kwargs):
        raise AssertionError("eager attention")

    monkeypatch.setattr(sys.modules[CLCAViTAttention.__module__], "eager_attention_forward", refuse)
    model = tiny_model(reduction=method, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(AssertionError, match="eager"):
        model(images(), output_attentions=True)
    for function in (cls_attention_of_patches, rollout_of_patches, feature_similarity):
        function(model, images())


def test_chunks_of_queries_give_the_whole_map(monkeypatch) -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5)
    whole = rollout_of_patches(model, images())
    monkeypatch.setattr("ufgir.interpret.attention_maps._CHUNK", 3)
    assert (rollout_of_patches(model, images()) - whole).abs().max() <= 1e-12


def test_the_model_is_as_before() -> None:
    """Also for a model in training with a part in evaluation mode; no hooks or gradients remain."""
    model = tiny_model(reduction="dyvit", keep_rate=0.5).train()
    model.vit.layers[0].eval()
    modes = [module.training for module in model.modules()]
    maps = cls_attention_of_patches(model, images())
    assert not maps.requires_grad
    assert (maps - cls_attention_of_patches(model.eval(), images())).abs().max() == 0
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    with pytest.raises(ValueError, match="pixel_values"):
        rollout_of_patches(model, images(2, 40, 40))
    assert [module.training for module in model.modules()] == modes
    assert not any(layer.attention._forward_hooks for layer in model.vit.layers)


def test_half_precision_models() -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5, cross_layer_cache=True).bfloat16()
    for function in (cls_attention_of_patches, rollout_of_patches, feature_similarity):
        values = function(model, images())
        assert values.dtype == torch.float32 and values.isfinite().all()


def test_other_image_sizes() -> None:
    """A grid of 3 x 5 patches, from images whose sides are not multiples of the patch size."""
    model = tiny_model(reduction="evit", keep_rate=0.5, cross_layer_cache=True, num_clr_tokens=1)
    pixels = images(2, 30, 45)
    for function in (cls_attention_of_patches, rollout_of_patches, feature_similarity):
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            function(model, pixels)
        assert function(model, pixels, interpolate_pos_encoding=True).shape[-1] == 15


# Mistakes


class _Silent(TokenReduction):
    """A method that drops tokens and reports no assignments."""

    name = "silent"

    def before_mlp(self, hidden_states, state, context):
        return hidden_states[:, :9], state


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setitem(REDUCTIONS, "silent", _Silent)
    return tiny_model(reduction="silent", keep_rate=0.5)


@pytest.mark.parametrize("function", [cls_attention_of_patches, rollout_of_patches, feature_similarity])
def test_a_method_without_assignments(silent, function) -> None:
    with pytest.raises(
        ValueError, match=r"`assignments` must hold one matrix per stage, 2 for `reduction`='silent', got 0"
    ):
        function(silent, images())


def test_invalid_models() -> None:
    model, no_cls = tiny_model(), tiny_model(use_class_token=False, pooling="mean")
    for layers in ([], [5], [-1]):
        with pytest.raises(ValueError, match=r"`layers` must name at least one layer of 0 \.\. 4"):
            cls_attention_of_patches(model, images(), layers)
        with pytest.raises(ValueError, match="`layers` must name"):
            feature_similarity(model, images(), layers=layers)
    with pytest.raises(ValueError, match="must lie in 0:5"):
        rollout_of_patches(model, images(), [(0, 6)])
    with pytest.raises(ValueError, match="`to` must be 'cls' or 'mean'"):
        feature_similarity(model, images(), "CLS")
    with pytest.raises(ValueError, match="CLS attention needs a CLS token"):
        cls_attention_of_patches(no_cls, images())
    with pytest.raises(ValueError, match="similarity to CLS needs a CLS token"):
        feature_similarity(no_cls, images(), "cls")
    slicing = tiny_model(head="vqt", vqt_original_slicing=True)
    for function in (cls_attention_of_patches, rollout_of_patches, feature_similarity):
        with pytest.raises(ValueError, match="`vqt_original_slicing`"):
            function(slicing, images())
