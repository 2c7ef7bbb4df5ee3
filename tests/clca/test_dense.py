"""`CLCAViTBackbone`: feature maps over the patches, how they are filled, configuration, and use in models of
transformers.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTModel,
)
from transformers.backbone_utils import BackboneType

from clca import CLCAViTBackbone, CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel
from clca.dense_clca import nearest_held
from tests.helpers import CASES, METHODS, TINY, Case, images, table, tiny_config, tiny_model
from ufgir.interpret.tracing import trace_patches, unmerge


DOCS = Path(__file__).parents[2] / "docs"


def backbone(config: CLCAViTConfig) -> CLCAViTBackbone:
    """Return a float64 backbone in evaluation mode."""
    torch.manual_seed(0)
    return CLCAViTBackbone(config).double().eval()


# Feature maps.


@pytest.mark.parametrize("case", table([case for case in CASES if case.cache != "clca"]), ids=str)
def test_maps_are_what_the_tokens_hold(case: Case) -> None:
    """Each patch has the value of the tokens that hold it, or its value in the last layer in which a token held it.
    This is tested on images of another size, in training as well, and gradients reach all parameters that are not
    frozen."""
    model = backbone(case.config(out_indices=[0, 1, 2, 3, 5]))
    pixels = images(2, 24, 40)
    output = model(pixels, output_hidden_states=True)
    found = [feature_map.flatten(2).transpose(1, 2) for feature_map in output.feature_maps]
    assert all(feature_map.shape == (2, 16, 3, 5) for feature_map in output.feature_maps)

    prefix = model.config.num_prefix_tokens
    normed = [model.layernorm(tokens) for tokens in output.hidden_states]
    expected = [tokens[:, prefix : prefix + 15] for tokens in normed]
    if case.method is not None:
        plain = CLCAViTModel.forward(model, pixels, True, output_assignments=True)
        shares = trace_patches(plain.assignments, model.config, 15, retrieve=False).left
        for index in (2, 3, 4, 5):
            held = shares[index - 1].sum(dim=1).unsqueeze(-1) > 0
            # Stages are in layers 1 and 2: what the first loses entered it as hidden state 1, the second as hidden state 2.
            before = expected[min(index - 1, 2)]
            expected[index] = torch.where(held, unmerge(normed[index], shares[index - 1]), before)
    for index, feature_map in zip([0, 1, 2, 3, 5], found, strict=True):
        assert torch.allclose(feature_map, expected[index], atol=1e-9)

    model.train()
    sum(feature_map.square().sum() for feature_map in model(pixels).feature_maps).backward()
    assert all((p.grad is not None and p.grad.isfinite().all()) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["topk", "ats", "heuristic", "dyvit"])
def test_fills(method: str) -> None:
    """Patches that no token holds are zero, or have the value of the nearest held patch. The others do not depend on
    the fill."""
    maps = {}
    for fill in ("last", "zero", "nearest"):
        model = backbone(tiny_config(reduction=method, keep_rate=0.5, feature_fill=fill))
        (feature_map,) = model(images(2, 24, 40)).feature_maps
        maps[fill] = feature_map
    held = maps["zero"].any(dim=1)  # (2, 3, 5)
    assert held.any(dim=(1, 2)).all() and not held.all()
    where = held.unsqueeze(1).expand_as(maps["zero"])
    for fill in ("last", "nearest"):
        assert torch.equal(maps[fill][where], maps["zero"][where])
        assert maps[fill].any(dim=1).all()
    for image, row, column in (~held).nonzero().tolist():
        places = held[image].nonzero()
        distances = (places - torch.tensor([row, column])).square().sum(dim=1)
        nearest = places[distances == distances.min()].tolist()
        value = maps["nearest"][image, :, row, column]
        assert any(torch.equal(value, maps["zero"][image, :, r, c]) for r, c in nearest)


def test_the_nearest_of_none_is_anything_of_that_image() -> None:
    assert nearest_held(torch.tensor([[False, False, True, False]] * 2), (2, 2)).tolist() == [[2] * 4] * 2
    assert nearest_held(torch.zeros(1, 6, dtype=torch.bool), (2, 3)).shape == (1, 6)
    assert nearest_held(torch.tensor([[True, False, True]]), (1, 3)).tolist() == [[0, 0, 2]]  # of several the first


def test_dynamic_vit_fills_what_it_decided_against() -> None:
    """In training no token is dropped, but masked patches are filled as they would be in evaluation."""
    model = backbone(tiny_config(reduction="dyvit", keep_rate=0.5, feature_fill="zero")).train()
    output = model(images())
    assert 0 < output.feature_maps[0].any(dim=1).double().mean() < 1
    assert output.auxiliary_loss.requires_grad and model.eval()(images()).auxiliary_loss is None


@pytest.mark.parametrize("reduction", [None, "topk"])
@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_without_a_reduction_maps_are_those_of_a_vit(reduction: str | None, apply_layernorm: bool) -> None:
    """Without a reduction, and at keep rate 1, the maps are the hidden states of transformers' ViT with the same
    weights."""
    shared = {k: v for k, v in TINY.items() if k != "reduction_layers"}
    torch.manual_seed(0)
    stock = ViTModel(ViTConfig(**shared), add_pooling_layer=False).eval()
    options = {} if reduction is None else {"reduction": reduction, "reduction_layers": [1, 2], "keep_rate": 1.0}
    config = CLCAViTConfig(
        **shared, **options, out_features=["stem", "stage3", "stage5"], apply_layernorm=apply_layernorm
    )
    model = CLCAViTBackbone(config).eval()
    model.load_state_dict(stock.state_dict())
    pixels = images(2, 40, 24).float()
    with torch.no_grad():
        hidden_states = stock(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        for index, feature_map in zip([0, 3, 5], model(pixels).feature_maps, strict=True):
            tokens = stock.layernorm(hidden_states[index]) if apply_layernorm else hidden_states[index]
            expected = tokens[:, 1:].reshape(2, 5, 3, -1).permute(0, 3, 1, 2)
            assert (feature_map - expected).abs().max() <= 1e-5


def test_a_keep_rate_of_its_own_forward() -> None:
    model = backbone(tiny_config(reduction="topk", keep_rate=0.5))
    assert model(images(), keep_rate=1.0).token_counts == (17,) * 6
    assert model(images()).token_counts != (17,) * 6


def test_outputs() -> None:
    model = backbone(tiny_config(reduction="evit", keep_rate=0.5))
    output = model(images())
    assert [name for name, value in output.items() if value is not None] == ["feature_maps"]
    recorded = model(images(), output_hidden_states=True, output_attentions=True)
    assert len(recorded.hidden_states) == 6 and len(recorded.attentions) == 5
    (maps,) = model(images(), return_dict=False)
    assert torch.equal(maps[0], output.feature_maps[0])
    with pytest.raises(ValueError, match="`pixel_values`"):
        model()


# The configuration.


def test_stages_may_be_named_or_counted() -> None:
    config = tiny_config(out_indices=(1, -1))
    assert config.out_features == ["stage1", "stage5"] and config.out_indices == [1, -1]
    config.out_features = ["stem", "stage2"]
    assert config.out_indices == [0, 2]
    model = CLCAViTBackbone(config)
    assert model.backbone_type is BackboneType.TRANSFORMERS
    assert (model.channels, model.out_features, model.out_indices) == ([16, 16], ["stem", "stage2"], [0, 2])
    model.out_indices = None
    assert config.out_features == ["stage5"]
    for wrong in ({"out_features": ["stage6"]}, {"out_indices": [6]}, {"out_features": ["stem"], "out_indices": [1]}):
        with pytest.raises(ValueError, match=r"out_(features|indices)"):
            tiny_config(**wrong)
    with pytest.raises(ValueError, match="`feature_fill` must be one of last, nearest, zero, got 'mean'"):
        tiny_config(feature_fill="mean")


def test_only_files_of_backbones_hold_the_fields(tmp_path: Path) -> None:
    """Other files do not contain the fields. The default is the last stage at any depth."""
    fields = {
        "out_features",
        "out_indices",
        "_out_features",
        "_out_indices",
        "feature_fill",
        "apply_layernorm",
        "stage_names",
    }
    assert not fields & set(tiny_config().to_dict())
    config = tiny_config(out_indices=[2, 5], feature_fill="zero", apply_layernorm=False)
    config.save_pretrained(tmp_path)
    loaded = CLCAViTConfig.from_pretrained(tmp_path)
    assert (loaded.out_features, loaded.out_indices) == (["stage2", "stage5"], [2, 5])
    assert (loaded.feature_fill, loaded.apply_layernorm) == ("zero", False)
    assert loaded.to_dict() == config.to_dict()
    tiny_config().save_pretrained(tmp_path)
    assert CLCAViTConfig.from_pretrained(tmp_path, num_hidden_layers=4).out_features == ["stage4"]
    assert CLCAViTConfig.from_pretrained(tmp_path, out_features=["stage1"]).out_indices == [1]


def test_what_no_map_depends_on_is_frozen() -> None:
    model = CLCAViTBackbone(tiny_config(out_indices=[1, 3], apply_layernorm=False, head="vqt", reduction_layers=[1]))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    later = {name for name, _ in model.named_parameters() if name.startswith(("layers.3", "layers.4", "layernorm"))}
    assert frozen == later | {name for name, _ in model.named_parameters() if ".probe." in name}
    model.requires_grad_(True)
    assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


# Loading, saving, and models that hold a backbone.


@pytest.mark.parametrize("source", ["classifier", "backbone", "stock"])
def test_a_backbone_loads_weights_of(source: str, tmp_path: Path) -> None:
    config = tiny_config(reduction="evit", keep_rate=0.5, cross_layer_cache=True, num_clr_tokens=1, head="cla")
    if source == "stock":
        saved = ViTModel(ViTConfig(**{k: v for k, v in TINY.items() if k != "reduction_layers"}))
        weights = saved.state_dict()
    else:
        saved = CLCAViTForImageClassification(config) if source == "classifier" else CLCAViTBackbone(config)
        weights = saved.base_model.state_dict()
    saved.save_pretrained(tmp_path)
    model, report = CLCAViTBackbone.from_pretrained(tmp_path, out_indices=[3, 5], output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(model(images().float()).feature_maps) == 2
    model.save_pretrained(tmp_path / "again")
    again = CLCAViTBackbone.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(images().float()).feature_maps[1], model.eval()(images().float()).feature_maps[1])
    assert type(AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path / "again"))) is CLCAViTBackbone


def upernet(**changes: Any) -> UperNetForSemanticSegmentation:
    """Return UperNet on a tiny backbone with four stages."""
    torch.manual_seed(0)
    features = {"out_features": ["stage2", "stage3", "stage4", "stage5"]}
    config = UperNetConfig(
        backbone_config=tiny_config(**(features | changes)), hidden_size=8, auxiliary_channels=8, num_labels=3
    )
    return UperNetForSemanticSegmentation(config)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("evit", "ats", "dyvit") else pytest.mark.slow) for m in METHODS]
)
def test_upernet_learns(method: str | None, tmp_path: Path) -> None:
    """Three training steps change every part of the backbone and lower the loss. Saving and loading preserves the
    model."""
    options = (
        {}
        if method is None
        else {"reduction": method, "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1}
    )
    model = upernet(**options).train()
    pixels, masks = (
        images(2, 48, 32).float(),
        torch.randint(3, (2, 48, 32), generator=torch.Generator().manual_seed(0)),
    )
    before = {name: value.clone() for name, value in model.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(pixels, labels=masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not [n for n, p in model.backbone.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    saved, again = (held.config.backbone_config.to_dict() | {"dtype": None} for held in (model, loaded))
    assert saved == again
    with torch.no_grad():
        assert torch.allclose(loaded(pixels).logits, model(pixels).logits, atol=1e-6)


def test_auto_classes_know_every_task(tmp_path: Path) -> None:
    """A folder saved for one task also lists the classes for the others."""
    tiny_model().float().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).auto_map["AutoBackbone"] == "modeling_clca.CLCAViTBackbone"
    assert (tmp_path / "dense_clca.py").is_file()
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is CLCAViTForImageClassification


@pytest.mark.parametrize("task", ["detr", "maskformer"])
def test_other_heads_take_a_backbone(task: str) -> None:
    """Models for detection and segmentation accept the backbone, and their gradients reach all its trainable
    parameters."""
    backbone_config = tiny_config(reduction="evit", keep_rate=0.5, cross_layer_cache=True, out_indices=[2, 3, 4, 5])
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    counts = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    if task == "detr":
        detr = DetrConfig(backbone_config=backbone_config, num_queries=4, num_labels=3, **sizes, **counts)
        model: Any = DetrForObjectDetection(detr)
        scores = model(images(2, 64, 48).float()).logits
    else:
        decoder = DetrConfig(num_queries=4, **sizes, **counts)
        options = {"fpn_feature_size": 32, "mask_feature_size": 32, "num_labels": 3}
        model = MaskFormerForInstanceSegmentation(
            MaskFormerConfig(backbone_config=backbone_config, decoder_config=decoder, **options)
        )
        scores = model(images(2, 64, 48).float()).class_queries_logits
    assert scores.shape == (2, 4, 4)
    scores.square().sum().backward()
    (held,) = [module for module in model.modules() if isinstance(module, CLCAViTBackbone)]
    assert not [name for name, p in held.named_parameters() if p.requires_grad and p.grad is None]


def test_the_code_of_the_guide() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "dense-features.md").read_text(encoding="utf-8"), re.M | re.S
    )
    assert blocks
    exec("\n".join(blocks), {})
