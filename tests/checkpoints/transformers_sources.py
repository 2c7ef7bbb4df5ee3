"""Tiny random models of every family of transformers that is converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.deit.configuration_deit import DeiTConfig
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
from transformers.models.siglip.modeling_siglip import SiglipForImageClassification, SiglipModel, SiglipVisionModel
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel
from transformers.models.vit_mae.configuration_vit_mae import ViTMAEConfig
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTraining, ViTMAEModel


SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,  # 16 patches
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
MLP = {"intermediate_size": 24}
DINO = {"mlp_ratio": 2}
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


def make_source(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Create the model with random parameters only, because those that start at zero or one would hide errors."""
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
