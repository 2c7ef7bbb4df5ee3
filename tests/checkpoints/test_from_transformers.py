"""Converted models of transformers, compared with the original classes with tiny random weights."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import (
    CLIPVisionModel,
)
from transformers.models.ijepa.modeling_ijepa import IJepaModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModel

from clca import CLCAViTForImageClassification
from clca.resample_clca import resample_position_embeddings
from tests.checkpoints.transformers_sources import FIRST, MLP, SIZES, SOURCES, make_source, save
from tests.helpers import images
from ufgir.checkpoints.from_transformers import FAMILIES, load_transformers


CLCA = {"reduction": "evit", "keep_rate": 0.5, "reduction_layers": [1], "cross_layer_cache": True}
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-9}


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """Return the vision part of a source."""
    for name in ("vision_model", model.base_model_prefix):
        if hasattr(model, name):
            return getattr(model, name)
    return model


@torch.no_grad()
def run_source(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the last hidden state, all of it after the final norm, and the counterpart of our pooled output."""
    vision = backbone(model)
    if isinstance(vision, ViTMAEModel):  # shuffles its patches by this noise
        output = vision(pixels, noise=torch.arange(16.0).expand(pixels.shape[0], -1))
        return output.last_hidden_state, output.last_hidden_state[:, 0]
    output = vision(pixels)
    if isinstance(vision, CLIPVisionModel):
        return vision.post_layernorm(output.last_hidden_state), output.pooler_output
    if isinstance(vision, SiglipVisionModel):
        return output.last_hidden_state, output.pooler_output
    if isinstance(vision, IJepaModel):
        return output.last_hidden_state, None
    return output.last_hidden_state, output.last_hidden_state[:, 0]


def random_images(model: CLCAViTForImageClassification, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return images(2, height, width).to(dtype)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def test_every_family_is_tested():
    assert set(FIRST) == set(FAMILIES)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", SOURCES)
def test_without_reduction_it_equals_its_source(name, dtype, record_property):
    source = make_source(name, dtype)
    pooling = {"pooling": "map"} if name.startswith("siglip-") else {}  # the classifier reads another one
    model = load_transformers(source, **pooling)
    pixels = random_images(model, dtype)
    with torch.no_grad():
        output = model.vit(pixels)
    hidden, pooled = run_source(source, pixels)
    assert output.last_hidden_state.dtype == dtype and not model.training
    largest = float((output.last_hidden_state - hidden).abs().max())
    if pooled is not None:
        largest = max(largest, float((output.pooler_output - pooled).abs().max()))
    record_property("largest_difference", largest)
    assert hidden.std() > 0.1 and largest <= TOLERANCES[dtype]


@pytest.mark.parametrize("name", SOURCES)
def test_a_saved_folder_gives_what_the_live_model_gives(name, tmp_path):
    source = make_source(name, torch.float32)
    torch.manual_seed(3)
    live = load_transformers(source)
    torch.manual_seed(3)
    loaded = load_transformers(save(source, tmp_path))
    assert {n for n, _ in loaded.named_parameters()} == {n for n, _ in live.named_parameters()}
    for name_, tensor in live.state_dict().items():
        if not name_.startswith("classifier."):  # may be random
            assert torch.equal(tensor, loaded.state_dict()[name_]), name_
    ours, theirs = live.config.to_dict(), loaded.config.to_dict()
    assert {k: v for k, v in ours.items() if ours[k] != theirs[k]} == {}


@pytest.mark.parametrize("name", ["vit-classifier", "deit-classifier", "ijepa-classifier", "siglip-classifier"])
def test_logits_and_class_names_of_a_classifier_stay(name):
    source = make_source(name)
    source.config.id2label = {i: f"leaf {i}" for i in range(5)}
    source.config.problem_type = "multi_label_classification"
    model = load_transformers(source)
    pixels = random_images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, source(pixels).logits, atol=1e-9, rtol=0)
    assert model.config.id2label[4] == "leaf 4" and model.config.problem_type == "multi_label_classification"
    same = load_transformers(source, num_labels=5, reduction="topk", keep_rate=0.5, reduction_layers=[1])
    assert same_weights(same, model) and same.config.id2label == model.config.id2label


@pytest.mark.parametrize("changes", [{"num_labels": 3}, {"head": "cla", "reduction_layers": [1]}, {"pooling": "mean"}])
def test_another_number_of_classes_or_head_starts_anew(changes):
    source = make_source("vit-classifier")
    model = load_transformers(source, **changes)
    assert model.config.num_labels == changes.get("num_labels", 5)
    assert model(random_images(model)).logits.shape == (2, model.config.num_labels)
    assert same_weights(model.vit, load_transformers(source).vit)
    assert not any(torch.equal(parameter, source.classifier.weight) for parameter in model.classifier.parameters())


def test_deit_with_a_teacher_keeps_the_classifier_on_cls(caplog):
    source = make_source("deit-teacher")
    with caplog.at_level(logging.WARNING, logger="ufgir"):
        model = load_transformers(source)
    assert "two classifiers" in caplog.text
    pixels = random_images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, source(pixels).cls_logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "name",
    [name for name in SOURCES if name.endswith("classifier") and not name.startswith(("vit-", "deit-", "ijepa-"))],
)
def test_a_classifier_of_other_features_is_left_behind_with_a_warning(name, caplog):
    pooling = {"pooling": "map"} if name.startswith("siglip-") else {}
    with caplog.at_level(logging.WARNING, logger="ufgir"):
        model = load_transformers(make_source(name), **pooling)
    assert "uses other features" in caplog.text
    assert model.config.num_labels == 5 and model.classifier.weight.shape == (5, 16)


@pytest.mark.parametrize("name", FIRST)
def test_with_reduction_it_runs_saves_and_reloads(name, tmp_path):
    source = make_source(name, torch.float32)
    options = CLCA | {"num_labels": 3}
    if FAMILIES[name].config(source.config).get("use_class_token", True):
        options |= {"head": "cla", "num_clr_tokens": 1}
    model = load_transformers(source, **options)
    embeddings = model.vit.embeddings
    if embeddings.clr_tokens is not None:
        assert torch.equal(embeddings.clr_tokens, embeddings.cls_token)
    pixels = random_images(model, torch.float32)
    with torch.no_grad():
        output = model(pixels, labels=torch.tensor([0, 2]))
    assert (
        output.logits.shape == (2, 3) and output.loss.isfinite() and output.token_counts[-1] < output.token_counts[0]
    )
    model.save_pretrained(tmp_path)
    again, report = CLCAViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and same_weights(model, again)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).logits, output.logits)


@pytest.mark.parametrize("image_size", [48, (24, 40)], ids=str)
@pytest.mark.parametrize("name", FIRST)
def test_another_image_size(name, image_size):
    source = make_source(name)
    model = load_transformers(source, image_size=image_size, num_labels=3)
    original = load_transformers(source, num_labels=3)
    positions, table = (m.vit.embeddings.position_embeddings for m in (model, original))
    num_prefix = table.shape[1] - 16
    expected = resample_position_embeddings(table, num_prefix, (4, 4), model.config.image_grid)
    assert torch.equal(positions, expected) and torch.equal(positions[:, :num_prefix], table[:, :num_prefix])
    others = dict(model.vit.named_parameters())
    changed = {n for n, tensor in original.vit.named_parameters() if not torch.equal(tensor, others[n])}
    assert changed == {"embeddings.position_embeddings"}
    with torch.no_grad():
        output = model(random_images(model))
    assert output.logits.isfinite().all()
    assert output.token_counts[0] == np.prod(model.config.image_grid) + model.config.num_prefix_tokens


def test_another_patch_size():
    source = make_source("vit")
    model = load_transformers(source, image_size=64, patch_size=16)  # the same grid
    assert torch.equal(model.vit.embeddings.position_embeddings, source.embeddings.position_embeddings)
    assert model.vit.embeddings.patch_embeddings.projection.weight.shape == (16, 3, 16, 16)
    assert model(random_images(model)).logits.isfinite().all()


def test_a_source_that_is_not_square():
    cls, _ = SOURCES["vit"]
    source = cls(ViTConfig(**SIZES | MLP | {"image_size": [16, 32]})).double().eval()
    model = load_transformers(source)
    pixels = images(2, 16, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.vit(pixels).last_hidden_state, source(pixels).last_hidden_state, atol=1e-9, rtol=0
        )


def test_pixels_beyond_the_last_patch_are_cut_off():
    source = make_source("siglip_vision_model-odd")
    model = load_transformers(source)
    assert model.config.image_size == 32
    pixels = images(2, 38, 38)
    with torch.no_grad():
        hidden, theirs = model.vit(pixels[..., :32, :32]).last_hidden_state, source(pixels).last_hidden_state
    torch.testing.assert_close(hidden, theirs, atol=1e-9, rtol=0)


def test_the_source_is_not_changed_and_shares_nothing():
    source = make_source("dinov2_with_registers")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    model = load_transformers(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_dtype(tmp_path):
    save(make_source("vit", torch.bfloat16), tmp_path)
    assert load_transformers(tmp_path).dtype == torch.bfloat16
    assert load_transformers(str(tmp_path), dtype=torch.float32).dtype == torch.float32


def test_a_model_without_pooling_may_be_given_attention_pooling():
    model = load_transformers(make_source("ijepa"), pooling="map", num_labels=3)
    assert model(random_images(model)).logits.isfinite().all()
    model = load_transformers(make_source("siglip_vision_model"), pooling="mean", num_labels=3)
    assert model.vit.attention_pooling is None


@pytest.mark.parametrize("name", ["deit", "deit-classifier", "deit-teacher"])
def test_from_pretrained_reads_a_stock_deit(name: str, tmp_path: Path) -> None:
    """Only the classifier may be missing; the result is the same after saving and loading."""
    source = make_source(name, torch.float32)
    folder = save(source, tmp_path / "stock")
    model, info = CLCAViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    new = {"classifier.weight", "classifier.bias"} if name == "deit" else set()
    assert set(info["missing_keys"]) == new
    assert not info["unexpected_keys"]
    pixels = random_images(model, torch.float32)
    expected = load_transformers(folder).vit(pixels).last_hidden_state
    assert torch.equal(model.vit(pixels).last_hidden_state, expected)
    model.save_pretrained(tmp_path / "ours")
    again = CLCAViTForImageClassification.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_from_pretrained_sends_other_families_to_the_converter(tmp_path: Path) -> None:
    """Their weights do not match, and transformers would only warn."""
    folder = save(make_source("dinov2"), tmp_path)
    with pytest.raises(ValueError, match="load_transformers"):
        CLCAViTForImageClassification.from_pretrained(folder)
