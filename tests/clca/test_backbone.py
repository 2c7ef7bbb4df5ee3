"""Backbone: its options, image sizes, refused arguments, and equality with a ViT if no option is set."""

import re
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from clca import CLCAViTConfig, CLCAViTForImageClassification, TokenReduction, token_schedule
from clca.modeling_clca import eager_attention_forward
from tests.clca.helpers import COUNT_IS_A_BOUND, NO_EFFECT, loss_and_gradients
from tests.helpers import CASES, METHODS, TINY, Case, images, labels, tiny_model


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
    """Each option adds parameters that train and changes the result."""
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
    """The result is W3(silu(W1 x) * (W2 x))."""
    mlp = tiny_model(use_swiglu_ffn=True).vit.layers[0].mlp
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    gate = x @ mlp.gate_proj.weight.T + mlp.gate_proj.bias
    expected = (gate * gate.sigmoid() * (x @ mlp.up_proj.weight.T + mlp.up_proj.bias)) @ mlp.down_proj.weight.T
    assert (mlp(x) - expected - mlp.down_proj.bias).abs().max() <= 1e-9


@pytest.mark.parametrize("prefix_positions", [True, False])
def test_what_has_positions(prefix_positions: bool) -> None:
    """In `[CLS | registers | patches | CLR]`, patches always have position embeddings, the others if the option is
    set."""
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


# Inputs.


@pytest.mark.parametrize(("height", "width"), [(48, 48), (24, 56), (16, 16)])
@pytest.mark.parametrize("case", [Case("evit", "clca", "registers"), Case(None, "plain", "cls")], ids=str)
def test_other_image_sizes(case: Case, height: int, width: int) -> None:
    """Token counts follow the actual number of patches, and images of a batch do not affect each other."""
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
    """With weights of a stock ViT, logits at another image size are equal, and at the model's own size nothing
    changes."""
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
    """Otherwise it would be passed to the attention kernel and ignored there."""
    with pytest.raises(ValueError, match="Did you mean `output_assignments`"):
        tiny_model()(images(), output_assigments=True)


def test_a_head_mask_may_be_none() -> None:
    """Older scripts pass `head_mask=None`. A real mask would have no effect, so it is refused."""
    model = tiny_model()
    for part, field in ((model, "logits"), (model.vit, "last_hidden_state")):
        expected = part(images())[field]
        assert torch.equal(part(images(), head_mask=None)[field], expected)
        with pytest.raises(ValueError, match=r"`head_mask` .*pass None"):
            part(images(), head_mask=torch.ones(5, 2))


def test_an_attention_mask_is_refused() -> None:
    """A mask over positions cannot follow tokens that move."""
    with pytest.raises(ValueError, match="`attention_mask`"):
        tiny_model()(images(), attention_mask=torch.ones(3, 17))


# The drop-in.


def stock_and_ours(**changes: Any) -> tuple[ViTForImageClassification, CLCAViTForImageClassification]:
    """Return a stock ViT with random weights, and our model with the same weights."""
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
    """Logits, loss, hidden states and attention maps equal those of the stock model with the same weights."""
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
    """It returns the last hidden state after the final norm, and pools CLS of it."""
    stock, model = stock_and_ours()
    with torch.no_grad():
        expected = stock.vit(images().float()).last_hidden_state
        output = model.vit(images().float())
    assert (output.last_hidden_state - expected).abs().max() <= 1e-5
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


# Attention kernels. flash_attention_2 needs a GPU and its own package: not run here.


def test_flex_attention() -> None:
    """Only the forward pass is tested, because flex attention has no backward pass on a CPU."""
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
    """Attention function that counts its calls and records the masks."""

    def __init__(self) -> None:
        self.masks: list[torch.Tensor | None] = []

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.masks.append(attention_mask)
        output, _ = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None


@pytest.mark.parametrize("case", [c for c in CASES if c.tokens == "cls" and c.cache != "plain"], ids=str)
@pytest.mark.parametrize("name", ["kernel_of_a_test", "flash_of_a_test"])
def test_any_registered_kernel_is_used(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers use transformers' attention interface, but a flash kernel never receives a mask."""
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
        for hook in ("attention_mask", "key_mask")
    )
    if name.startswith("flash"):
        assert all(mask is None for mask in kernel.masks)
        assert len(kernel.masks) < 5 if masked_method else len(kernel.masks) == 5
    else:
        assert len(kernel.masks) == 5
        assert any(mask is not None for mask in kernel.masks) == masked_method
