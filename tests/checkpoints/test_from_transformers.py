"""Models of transformers, converted: the real classes, tiny and random, are what ours is compared with."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.deit.configuration_deit import DeiTConfig
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.deit.modeling_deit import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2_with_registers.configuration_dinov2_with_registers import Dinov2WithRegistersConfig
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from transformers.models.ijepa.configuration_ijepa import IJepaConfig
from transformers.models.ijepa.modeling_ijepa import IJepaForImageClassification, IJepaModel
from transformers.models.siglip.configuration_siglip import SiglipConfig, SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip.modeling_siglip import SiglipForImageClassification, SiglipModel, SiglipVisionModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers.models.vit_mae.configuration_vit_mae import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel

from clca import CLCAViTForImageClassification
from tests.helpers import images
from ufgir.checkpoints.from_transformers import FAMILIES, load_transformers, load_transformers_processor
from ufgir.checkpoints.resample import resample_position_embeddings


SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,  # 16 patches
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
MLP = {"intermediate_size": 24}
DINO = {"mlp_ratio": 2}
NARROW = SIZES | MLP | {"num_hidden_layers": 1}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 8,
    "max_position_embeddings": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MAE = {
    "mask_ratio": 0.0,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 16,
}
FIVE = {"num_labels": 5}

# Name -> class, its configuration. Beside each family's first model, the variants of its parts and the classes with a head.
SOURCES: dict[str, tuple[type[PreTrainedModel], Callable[[], Any]]] = {
    "vit": (ViTModel, lambda: ViTConfig(**SIZES, **MLP)),
    "vit-plain": (ViTModel, lambda: ViTConfig(**SIZES, **MLP, qkv_bias=False, hidden_act="relu", layer_norm_eps=1e-3)),
    "vit-classifier": (ViTForImageClassification, lambda: ViTConfig(**SIZES, **MLP, **FIVE)),
    "vit-masked": (ViTForMaskedImageModeling, lambda: ViTConfig(**SIZES, **MLP, encoder_stride=8)),
    "deit": (DeiTModel, lambda: DeiTConfig(**SIZES, **MLP)),
    "deit-classifier": (DeiTForImageClassification, lambda: DeiTConfig(**SIZES, **MLP, **FIVE)),
    "deit-teacher": (DeiTForImageClassificationWithTeacher, lambda: DeiTConfig(**SIZES, **MLP, **FIVE)),
    "dinov2": (Dinov2Model, lambda: Dinov2Config(**SIZES, **DINO)),
    "dinov2-swiglu": (Dinov2Model, lambda: Dinov2Config(**SIZES, **DINO, use_swiglu_ffn=True, use_mask_token=False)),
    "dinov2-classifier": (Dinov2ForImageClassification, lambda: Dinov2Config(**SIZES, **DINO, **FIVE)),
    "dinov2_with_registers": (Dinov2WithRegistersModel, lambda: Dinov2WithRegistersConfig(**SIZES, **DINO)),
    "dinov2_with_registers-swiglu": (
        Dinov2WithRegistersModel,
        lambda: Dinov2WithRegistersConfig(**SIZES, **DINO, use_swiglu_ffn=True, num_register_tokens=2),
    ),
    "dinov2_with_registers-classifier": (
        Dinov2WithRegistersForImageClassification,
        lambda: Dinov2WithRegistersConfig(**SIZES, **DINO, **FIVE),
    ),
    "clip_vision_model": (CLIPVisionModel, lambda: CLIPVisionConfig(**SIZES, **MLP)),
    "clip_vision_model-gelu": (CLIPVisionModel, lambda: CLIPVisionConfig(**SIZES, **MLP, hidden_act="gelu")),
    "clip_vision_model-projection": (CLIPVisionModelWithProjection, lambda: CLIPVisionConfig(**SIZES, **MLP)),
    "clip": (CLIPModel, lambda: CLIPConfig(vision_config=SIZES | MLP, text_config=TEXT)),
    "clip-classifier": (
        CLIPForImageClassification,
        lambda: CLIPConfig(vision_config=SIZES | MLP, text_config=TEXT, **FIVE),
    ),
    "siglip_vision_model": (SiglipVisionModel, lambda: SiglipVisionConfig(**SIZES, **MLP)),
    "siglip_vision_model-headless": (
        SiglipVisionModel,
        lambda: SiglipVisionConfig(**SIZES, **MLP, vision_use_head=False),
    ),
    "siglip_vision_model-odd": (SiglipVisionModel, lambda: SiglipVisionConfig(**SIZES | MLP | {"image_size": 38})),
    "siglip": (SiglipModel, lambda: SiglipConfig(vision_config=SIZES | MLP, text_config=TEXT)),
    "siglip-classifier": (
        SiglipForImageClassification,
        lambda: SiglipConfig(vision_config=SIZES | MLP, text_config=TEXT, **FIVE),
    ),
    "vit_mae": (ViTMAEModel, lambda: ViTMAEConfig(**SIZES, **MLP, **MAE)),
    "vit_mae-pretraining": (ViTMAEForPreTraining, lambda: ViTMAEConfig(**SIZES, **MLP, **MAE)),
    "ijepa": (IJepaModel, lambda: IJepaConfig(**SIZES, **MLP)),
    "ijepa-classifier": (IJepaForImageClassification, lambda: IJepaConfig(**SIZES, **MLP, **FIVE)),
}
FIRST = [name for name in SOURCES if "-" not in name]
CLCA = {"reduction": "evit", "keep_rate": 0.5, "reduction_layers": [1], "cross_layer_cache": True}
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-9}


def make_source(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The model, every parameter random: those that start at zero or one would hide a mistake."""
    cls, config = SOURCES[name]
    model = cls._from_config(config(), attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.to(dtype).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a source that sees pixels."""
    for name in ("vision_model", model.base_model_prefix):
        if hasattr(model, name):
            return getattr(model, name)
    return model


@torch.no_grad()
def run_source(model: PreTrainedModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Last hidden state, all of it after the final norm, and what of the source is a counterpart of our pooled output."""
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
    model = load_transformers(source)
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


@pytest.mark.parametrize("name", ["vit-classifier", "deit-classifier", "ijepa-classifier"])
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
    assert "the one on CLS is taken" in caplog.text
    pixels = random_images(model)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, source(pixels).cls_logits, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "name",
    [name for name in SOURCES if name.endswith("classifier") and not name.startswith(("vit-", "deit-", "ijepa-"))],
)
def test_a_classifier_of_other_features_is_left_behind_with_a_warning(name, caplog):
    with caplog.at_level(logging.WARNING, logger="ufgir"):
        model = load_transformers(make_source(name))
    assert "reads other features" in caplog.text
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


class Dangerous:
    """Makes a file when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestErrors:
    def test_unknown_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "swin"}')
        with pytest.raises(ValueError, match=r"'swin'.*supported are clip, clip_vision_model, deit"):
            load_transformers(tmp_path)

    def test_no_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')
        with pytest.raises(ValueError, match="model_type None"):
            load_transformers(tmp_path)

    def test_a_clca_model(self):
        model = load_transformers(make_source("vit"))
        with pytest.raises(ValueError, match="is a CLCA model already"):
            load_transformers(model)

    def test_no_config(self, tmp_path):
        with pytest.raises(ValueError, match=r"folder without a config\.json"):
            load_transformers(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no-such/repository", r"has no readable config\.json"),
            ("/no/such/folder", "is not a folder"),
            (__file__, "is not a folder"),
            (3, "must be a folder or a Hub repository, got an object of int"),
        ],
    )
    def test_no_such_source(self, name, message):
        with pytest.raises(ValueError, match=f"^`source` .*{message}"):
            load_transformers(name)

    @pytest.mark.parametrize(
        ("contents", "message"),
        [("{", "no readable config"), ('{"model_type": "vit", "hidden_size": "wide"}', "invalid config.*got str")],
    )
    def test_bad_config(self, tmp_path, contents, message):
        (tmp_path / "config.json").write_text(contents)
        with pytest.raises(ValueError, match=message):
            load_transformers(tmp_path)

    def test_width_and_heads(self):
        source = ViTModel(ViTConfig(**NARROW | {"num_attention_heads": 3, "hidden_size": 18}))
        source.config.num_attention_heads = 4
        with pytest.raises(ValueError, match="`hidden_size` must be a multiple of `num_attention_heads`"):
            load_transformers(source)

    def test_no_weights(self, tmp_path):
        ViTConfig(**NARROW).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be read as ViTModel"):
            load_transformers(tmp_path)

    def test_a_pickle_with_code_is_not_run(self, tmp_path):
        ViTConfig(**NARROW).save_pretrained(tmp_path)
        torch.save({"layernorm.weight": Dangerous(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="which is not run") as caught:
            load_transformers(tmp_path)
        assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)

    @pytest.mark.parametrize("left", [-100, 5])
    def test_truncated_weights(self, tmp_path, left):
        file = save(ViTModel(ViTConfig(**NARROW)), tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(ValueError, match="cannot be read as ViTModel") as caught:
            load_transformers(tmp_path)
        assert "\n" not in str(caught.value)

    def test_configuration_and_weights_that_disagree(self, tmp_path):
        save(ViTModel(ViTConfig(**NARROW)), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for changes, message in (
            ({"num_hidden_layers": 2}, r"config\.json: layers\.1\..* is missing; .*; and 4 more\.$"),
            ({"num_hidden_layers": 0}, r"config\.json: layers\.0\..* is unexpected"),
            ({"intermediate_size": 20}, r"layers\.0\.mlp\.fc1\.weight has the shape \(24, 16\), not \(20, 16\)"),
            ({"hidden_act": "sin"}, "cannot be read as ViTModel: KeyError 'sin'"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config | changes))
            with pytest.raises(ValueError, match=message):
                load_transformers(tmp_path)

    def test_unexpected_weights_are_named(self):
        source = make_source("vit")
        source.adapter = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"no place in this model: adapter\.weight; adapter\.bias"):
            load_transformers(source)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_register_tokens": 2}, "register_tokens is missing"),
            ({"hidden_size": 32}, r"has the shape \(1, 1, 16\), not \(1, 1, 32\)"),
            ({"keep_rat": 0.5}, "did you mean `keep_rate`"),
            ({"image_size": 30}, "`image_size` must be a multiple of `patch_size`"),
            ({"reduction": "evit", "reduction_layers": [9]}, "`reduction_layers` must lie in"),
        ],
    )
    def test_overrides_that_do_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            load_transformers(make_source("vit"), **changes)


PROCESSORS = {
    "vit": (ViTConfig, ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)),
    "deit": (
        DeiTConfig,
        DeiTImageProcessorPil(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}),
    ),
    "clip_vision_model": (
        CLIPVisionConfig,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
    "siglip_vision_model": (SiglipVisionConfig, SiglipImageProcessorPil(size={"height": 32, "width": 32})),
}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(60, 45, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
class TestProcessor:
    @pytest.fixture
    def source(self, name, tmp_path) -> Path:
        config, processor = PROCESSORS[name]
        config(**SIZES, **MLP).save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return tmp_path

    def test_it_equals_the_source(self, name, source, tmp_path):
        processor = load_transformers_processor(source)
        assert isinstance(processor, ViTImageProcessorPil)
        ours, theirs = (p(picture(), return_tensors="pt")["pixel_values"] for p in (processor, PROCESSORS[name][1]))
        assert ours.shape == (1, 3, 32, 32)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        processor.save_pretrained(tmp_path / "ours")
        again = ViTImageProcessorPil.from_pretrained(tmp_path / "ours")
        assert torch.equal(again(picture(), return_tensors="pt")["pixel_values"], ours)

    @pytest.mark.parametrize("image_size", [64, (48, 64)], ids=str)
    def test_another_size(self, name, source, image_size):
        processor = load_transformers_processor(source, image_size)
        pixels = processor(picture(), return_tensors="pt")["pixel_values"]
        assert pixels.shape[-2:] == ((64, 64) if image_size == 64 else image_size)
        expected = {"height": 64, "width": 64} if image_size == 64 else {"height": 48, "width": 64}
        if name == "deit":
            expected = {side: pixels * 9 // 8 for side, pixels in expected.items()}
        elif name == "clip_vision_model" and image_size == 64:
            expected = {"shortest_edge": 64}
        assert dict(processor.size) == expected

    def test_without_a_processor(self, name, source, caplog):
        (source / "preprocessor_config.json").unlink()
        with caplog.at_level(logging.WARNING, logger="ufgir"):
            processor = load_transformers_processor(source, (32, 48))
        assert "no image processor" in caplog.text
        assert processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 48)

    def test_a_file_of_an_old_class(self, name, source):
        file = source / "preprocessor_config.json"
        contents = json.loads(file.read_text())
        expected = load_transformers_processor(source)
        file.write_text(json.dumps(contents | {"image_processor_type": "ViTFeatureExtractor"}))
        assert load_transformers_processor(source).to_dict() == expected.to_dict()

    def test_errors(self, name, source):
        for image_size in (0, (32,)):
            with pytest.raises(ValueError, match="`image_size` must be a positive integer"):
                load_transformers_processor(source, image_size)
        with pytest.raises(ValueError, match="is not a folder"):
            load_transformers_processor(source / "preprocessor_config.json")


@pytest.mark.parametrize("name", ["deit", "deit-classifier", "deit-teacher"])
def test_from_pretrained_reads_a_stock_deit(name: str, tmp_path: Path) -> None:
    """Nothing missing but a classifier where the checkpoint has none; saved and loaded again, still the same."""
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
    """Their weights would not fit, and transformers would only warn."""
    folder = save(make_source("dinov2"), tmp_path)
    with pytest.raises(ValueError, match="load_transformers"):
        CLCAViTForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("contents", ["{", "3", '{"image_mean": "x"}', '{"image_mean": [0.5], "image_std": [0.5]}'])
def test_a_damaged_image_processor_is_no_absent_one(contents: str, tmp_path: Path) -> None:
    """ImageNet's statistics in its place would be wrong without a word."""
    folder = save(make_source("clip_vision_model" if "clip_vision_model" in SOURCES else FIRST[0]), tmp_path)
    load_transformers_processor(folder)
    (folder / "preprocessor_config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_transformers_processor(folder)


@pytest.mark.parametrize("contents", ["3", "[1]", "null", '{"model_type": ["a"]}', '{"model_type": 5}'])
def test_a_config_that_is_none(contents: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_transformers(tmp_path)
