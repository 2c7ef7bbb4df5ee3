"""Table of the pretrained models of timm's VisionTransformer that `ufgir.checkpoints.from_timm` can load.

Each entry is a family: how its networks differ from a plain ViT, the normalization of its images, and its members (timm's names
and tags). Width, depth and heads follow from the size in a name, patch and image size from its numbers: `vit_base_patch16_224`
is `SIZES["base"]` with patches of 16 pixels in images of 224 (the default).

The values are those of timm 1.0.31 (Apache-2.0), whose code is not needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

from clca import CLCAViTConfig


class Size(NamedTuple):
    """Size of a network: width, layers, heads, width of the MLP."""

    width: int
    depth: int
    heads: int
    mlp: int


SIZES = {
    "tiny": Size(192, 12, 3, 768),
    "xsmall": Size(256, 10, 4, 1024),
    "wee": Size(256, 14, 4, 1280),
    "little": Size(320, 14, 5, 1792),
    "small": Size(384, 12, 6, 1536),
    "medium": Size(512, 12, 8, 2048),
    "mediumd": Size(512, 20, 8, 2048),
    "betwixt": Size(640, 12, 10, 2560),
    "base": Size(768, 12, 12, 3072),
    "so150m": Size(896, 18, 14, 2304),
    "so150m2": Size(832, 21, 13, 2176),
    "large": Size(1024, 24, 16, 4096),
    "so400m": Size(1152, 27, 16, 4304),
    "huge": Size(1280, 32, 16, 5120),
    "giant": Size(1408, 40, 16, 6144),
    "giantopt": Size(1536, 40, 16, 6144),
    "gigantic": Size(1664, 48, 16, 8192),
}

# Mean and standard deviation of red, green and blue in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# Licence of the weights by the beginning of a tag; Apache-2.0 otherwise, as timm's model cards have it. That of MoCo v3,
# which timm does not have, is its repository's (from memory, not looked up again).
LICENCES = {
    "mae": "cc-by-nc-4.0",
    "in1k_ijepa": "cc-by-nc-4.0",
    "in22k_ijepa": "cc-by-nc-4.0",
    "in1k_mocov3": "cc-by-nc-4.0",
    "metaclip": "cc-by-nc-4.0",
    "dfn": "apple-ascl",
    "apple_mclip2": "apple-amlr",
    "in22k_ft": "mit",
    "laion400m": "mit",
    "tinyclip": "mit",
    "bamboo": "unknown",
}

# Fields of `CLCAViTConfig` that several families share.
NO_CLS = {"use_class_token": False}
CLIP_NETWORK = {"pre_norm": True, "layer_norm_eps": 1e-5}
REGISTERS = {"num_register_tokens": 4, "prefix_position_embeddings": False}
DINOV2 = {"image_size": 518, "patch_size": 14, "layerscale_value": 1e-5}
TIPS = REGISTERS | {"image_size": 448, "patch_size": 14, "num_register_tokens": 1, "layerscale_value": 1.0}
SWIGLU_GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "intermediate_size": 4096, "use_swiglu_ffn": True}


@dataclass(frozen=True)
class Family:
    """Pretrained models that differ only in size, data or resolution.

    Args:
        title: name of the family.
        members: timm's network name -> its tags, each with `@` and a `crop_pct` if it differs from the family's; "" for a
            network without published weights.
        fields: fields of `CLCAViTConfig` that differ from a plain ViT.
        mean_std: mean and std of the pixels.
        crop_pct: side of the center crop divided by the side of the resized image.
        resample: "bicubic" or "bilinear".
        paper: number at https://huggingface.co/papers.
    """

    title: str
    members: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = HALF
    crop_pct: float = 0.9
    resample: str = "bicubic"
    paper: str | None = None


FAMILIES = (
    Family(
        "ViT, supervised",
        paper="2010.11929",
        crop_pct=0.9,
        members={
            "vit_base_patch16_224": "orig_in21k orig_in21k_ft_in1k",
            "vit_base_patch16_384": "orig_in21k_ft_in1k@1.0",
            "vit_base_patch32_224": "orig_in21k",
            "vit_huge_patch14_224": "orig_in21k",
            "vit_large_patch16_224": "orig_in21k",
            "vit_large_patch32_224": "orig_in21k",
            "vit_large_patch32_384": "orig_in21k_ft_in1k@1.0",
            "vit_giant_patch14_224": "",
            "vit_gigantic_patch14_224": "",
            "vit_large_patch14_224": "",
        },
    ),
    Family(
        "ViT, AugReg",
        paper="2106.10270",
        crop_pct=0.9,
        members={
            "vit_base_patch16_224": "augreg2_in21k_ft_in1k augreg_in1k augreg_in21k augreg_in21k_ft_in1k",
            "vit_base_patch16_384": "augreg_in1k@1.0 augreg_in21k_ft_in1k@1.0",
            "vit_base_patch32_224": "augreg_in1k augreg_in21k augreg_in21k_ft_in1k",
            "vit_base_patch32_384": "augreg_in1k@1.0 augreg_in21k_ft_in1k@1.0",
            "vit_base_patch8_224": "augreg2_in21k_ft_in1k augreg_in21k augreg_in21k_ft_in1k",
            "vit_large_patch16_224": "augreg_in21k augreg_in21k_ft_in1k",
            "vit_large_patch16_384": "augreg_in21k_ft_in1k@1.0",
            "vit_small_patch16_224": "augreg_in1k augreg_in21k augreg_in21k_ft_in1k",
            "vit_small_patch16_384": "augreg_in1k@1.0 augreg_in21k_ft_in1k@1.0",
            "vit_small_patch32_224": "augreg_in21k augreg_in21k_ft_in1k",
            "vit_small_patch32_384": "augreg_in21k_ft_in1k@1.0",
            "vit_tiny_patch16_224": "augreg_in21k augreg_in21k_ft_in1k",
            "vit_tiny_patch16_384": "augreg_in21k_ft_in1k@1.0",
        },
    ),
    Family(
        "ViT, trained with SAM",
        paper="2106.01548",
        crop_pct=0.9,
        members={
            "vit_base_patch16_224": "sam_in1k",
            "vit_base_patch32_224": "sam_in1k",
        },
    ),
    Family(
        "ViT, ImageNet-21K pretraining for the masses",
        paper="2104.10972",
        mean_std=RAW,
        crop_pct=0.875,
        resample="bilinear",
        fields={"qkv_bias": False},
        members={
            "vit_base_patch16_224_miil": "in21k in21k_ft_in1k",
        },
    ),
    Family(
        "ViT, Bamboo",
        paper="2203.07845",
        mean_std=CLIP,
        crop_pct=1.0,
        members={
            "vit_base_patch16_224": "bamboo",
        },
    ),
    Family(
        "DINO",
        paper="2104.14294",
        mean_std=IMAGENET,
        crop_pct=0.9,
        members={
            "vit_base_patch16_224": "dino",
            "vit_base_patch8_224": "dino",
            "vit_small_patch16_224": "dino",
            "vit_small_patch8_224": "dino",
        },
    ),
    Family(
        "MAE",
        paper="2111.06377",
        mean_std=IMAGENET,
        crop_pct=0.9,
        members={
            "vit_base_patch16_224": "mae",
            "vit_huge_patch14_224": "mae",
            "vit_large_patch16_224": "mae",
        },
    ),
    Family(
        "MoCo v3",
        paper="2104.02057",
        mean_std=IMAGENET,
        crop_pct=0.875,
        members={
            "vit_base_patch16_224": "in1k_mocov3",
        },
    ),
    Family(
        "I-JEPA",
        paper="2301.08243",
        mean_std=IMAGENET,
        crop_pct=0.9,
        fields=NO_CLS | {"pooling": "normed_mean"},
        members={
            "vit_giant_patch16_gap_224": "in22k_ijepa",
            "vit_huge_patch14_gap_224": "in1k_ijepa in22k_ijepa",
            "vit_huge_patch16_gap_448": "in1k_ijepa@1.0",
        },
    ),
    Family(
        "DeiT",
        paper="2012.12877",
        mean_std=IMAGENET,
        crop_pct=0.9,
        members={
            "deit_base_patch16_224": "fb_in1k",
            "deit_base_patch16_384": "fb_in1k@1.0",
            "deit_small_patch16_224": "fb_in1k",
            "deit_tiny_patch16_224": "fb_in1k",
        },
    ),
    Family(
        "DeiT, distilled",
        paper="2012.12877",
        mean_std=IMAGENET,
        crop_pct=0.9,
        fields={"num_register_tokens": 1},
        members={
            "deit_base_distilled_patch16_224": "fb_in1k",
            "deit_base_distilled_patch16_384": "fb_in1k@1.0",
            "deit_small_distilled_patch16_224": "fb_in1k",
            "deit_tiny_distilled_patch16_224": "fb_in1k",
        },
    ),
    Family(
        "DeiT III",
        paper="2204.07118",
        mean_std=IMAGENET,
        crop_pct=1.0,
        fields={"layerscale_value": 1e-06, "prefix_position_embeddings": False},
        members={
            "deit3_base_patch16_224": "fb_in1k@0.9 fb_in22k_ft_in1k",
            "deit3_base_patch16_384": "fb_in1k fb_in22k_ft_in1k",
            "deit3_huge_patch14_224": "fb_in1k@0.9 fb_in22k_ft_in1k",
            "deit3_large_patch16_224": "fb_in1k@0.9 fb_in22k_ft_in1k",
            "deit3_large_patch16_384": "fb_in1k fb_in22k_ft_in1k",
            "deit3_medium_patch16_224": "fb_in1k@0.9 fb_in22k_ft_in1k",
            "deit3_small_patch16_224": "fb_in1k@0.9 fb_in22k_ft_in1k",
            "deit3_small_patch16_384": "fb_in1k fb_in22k_ft_in1k",
        },
    ),
    Family(
        "FlexiViT",
        paper="2212.08013",
        crop_pct=0.95,
        fields={"image_size": 240, "prefix_position_embeddings": False},
        members={
            "flexivit_base": "1000ep_in21k 1200ep_in1k 300ep_in1k 300ep_in21k 600ep_in1k patch16_in21k patch30_in21k",
            "flexivit_large": "1200ep_in1k 300ep_in1k 600ep_in1k",
            "flexivit_small": "1200ep_in1k 300ep_in1k 600ep_in1k",
        },
    ),
    Family(
        "EVA",
        paper="2211.07636",
        mean_std=CLIP,
        crop_pct=1.0,
        fields={"pooling": "mean"},
        members={
            "eva_large_patch14_196": "in22k_ft_in1k in22k_ft_in22k_in1k",
            "eva_large_patch14_336": "in22k_ft_in1k in22k_ft_in22k_in1k",
        },
    ),
    Family(
        "CLIP",
        paper="2103.00020",
        mean_std=CLIP,
        crop_pct=1.0,
        fields=CLIP_NETWORK,
        members={
            "vit_base_patch16_clip_224": (
                "datacompxl laion2b laion2b_ft_in1k dfn2b laion2b_ft_in12k@0.9 openai@0.9 openai_ft_in12k@0.9 "
                "openai_ft_in1k@0.9 laion2b_ft_in12k_in1k@0.95 openai_ft_in12k_in1k@0.95 laion400m_e32 "
                "metaclip_2pt5b metaclip_400m"
            ),
            "vit_base_patch16_clip_384": (
                "laion2b_ft_in12k_in1k laion2b_ft_in1k openai_ft_in1k openai_ft_in12k_in1k@0.95"
            ),
            "vit_base_patch32_clip_224": (
                "datacompxl laion2b@0.9 laion2b_ft_in12k_in1k@0.9 laion2b_ft_in1k@0.9 openai@0.9 "
                "openai_ft_in1k@0.9 laion400m_e32@0.9 metaclip_2pt5b metaclip_400m"
            ),
            "vit_base_patch32_clip_256": "datacompxl",
            "vit_base_patch32_clip_384": "laion2b_ft_in12k_in1k openai_ft_in12k_in1k@0.95",
            "vit_base_patch32_clip_448": "laion2b_ft_in12k_in1k",
            "vit_betwixt_patch32_clip_224": "tinyclip_laion400m@0.9",
            "vit_giant_patch14_clip_224": "laion2b",
            "vit_gigantic_patch14_clip_224": "laion2b metaclip2_worldwide metaclip_2pt5b",
            "vit_gigantic_patch14_clip_378": "metaclip2_worldwide",
            "vit_huge_patch14_clip_224": (
                "dfn5b laion2b laion2b_ft_in12k laion2b_ft_in12k_in1k laion2b_ft_in1k metaclip2_worldwide "
                "metaclip_2pt5b metaclip_altogether"
            ),
            "vit_huge_patch14_clip_336": "laion2b_ft_in12k_in1k",
            "vit_huge_patch14_clip_378": "dfn5b metaclip2_worldwide",
            "vit_large_patch14_clip_224": (
                "apple_mclip2_dfndr2b datacompxl openai openai_ft_in12k openai_ft_in12k_in1k openai_ft_in1k dfn2b "
                "dfn2b_s39b laion400m_e32 metaclip_2pt5b metaclip_400m"
            ),
            "vit_large_patch14_clip_336": "openai openai_ft_in12k_in1k",
            "vit_medium_patch16_clip_224": "tinyclip_yfcc15m@0.9",
            "vit_medium_patch32_clip_224": "tinyclip_laion400m@0.9",
            "vit_xsmall_patch16_clip_224": "tinyclip_yfcc15m@0.9",
        },
    ),
    Family(
        "CLIP",
        paper="2212.07143",
        crop_pct=1.0,
        fields=CLIP_NETWORK,
        members={
            "vit_large_patch14_clip_224": "laion2b laion2b_ft_in12k laion2b_ft_in12k_in1k laion2b_ft_in1k",
            "vit_large_patch14_clip_336": "laion2b_ft_in12k_in1k laion2b_ft_in1k",
        },
    ),
    Family(
        "CLIP, wider",
        paper="2212.07143",
        mean_std=CLIP,
        crop_pct=1.0,
        fields=CLIP_NETWORK | {"hidden_size": 896, "num_attention_heads": 14, "intermediate_size": 3584},
        members={
            "vit_base_patch16_plus_clip_240": "laion400m_e32",
        },
    ),
    Family(
        "CLIP, quick GELU",
        paper="2103.00020",
        mean_std=CLIP,
        crop_pct=1.0,
        fields=CLIP_NETWORK | {"hidden_act": "quick_gelu"},
        members={
            "vit_base_patch16_clip_quickgelu_224": "metaclip_2pt5b metaclip_400m openai@0.9",
            "vit_base_patch32_clip_quickgelu_224": "laion400m_e32@0.9 metaclip_2pt5b metaclip_400m openai@0.9",
            "vit_gigantic_patch14_clip_quickgelu_224": "metaclip_2pt5b",
            "vit_huge_patch14_clip_quickgelu_224": "dfn5b metaclip2_worldwide metaclip_2pt5b",
            "vit_huge_patch14_clip_quickgelu_378": "dfn5b",
            "vit_large_patch14_clip_quickgelu_224": "dfn2b metaclip_2pt5b metaclip_400m openai",
            "vit_large_patch14_clip_quickgelu_336": "openai",
        },
    ),
    Family(
        "DINOv2",
        paper="2304.07193",
        mean_std=IMAGENET,
        crop_pct=1.0,
        fields=DINOV2,
        members={
            "vit_base_patch14_dinov2": "lvd142m",
            "vit_large_patch14_dinov2": "lvd142m",
            "vit_small_patch14_dinov2": "lvd142m",
        },
    ),
    Family(
        "DINOv2",
        paper="2304.07193",
        mean_std=IMAGENET,
        crop_pct=1.0,
        fields=DINOV2 | SWIGLU_GIANT,
        members={
            "vit_giant_patch14_dinov2": "lvd142m",
        },
    ),
    Family(
        "DINOv2 with registers",
        paper="2309.16588",
        mean_std=IMAGENET,
        crop_pct=1.0,
        fields=DINOV2 | REGISTERS,
        members={
            "vit_base_patch14_reg4_dinov2": "lvd142m",
            "vit_large_patch14_reg4_dinov2": "lvd142m",
            "vit_small_patch14_reg4_dinov2": "lvd142m",
        },
    ),
    Family(
        "DINOv2 with registers",
        paper="2309.16588",
        mean_std=IMAGENET,
        crop_pct=1.0,
        fields=DINOV2 | REGISTERS | SWIGLU_GIANT,
        members={
            "vit_giant_patch14_reg4_dinov2": "lvd142m",
        },
    ),
    Family(
        "TIPSv2",
        paper="2410.16512",
        mean_std=RAW,
        crop_pct=1.0,
        fields=TIPS,
        members={
            "vit_base_patch14_reg1_tipsv2": "webli",
            "vit_large_patch14_reg1_tipsv2": "webli",
            "vit_so400m_patch14_reg1_tipsv2": "webli",
        },
    ),
    Family(
        "TIPSv2",
        paper="2410.16512",
        mean_std=RAW,
        crop_pct=1.0,
        fields=TIPS | SWIGLU_GIANT,
        members={
            "vit_giant_patch14_reg1_tipsv2": "webli",
        },
    ),
    Family(
        "SigLIP",
        paper="2303.15343",
        crop_pct=0.9,
        fields=NO_CLS | {"pooling": "map"},
        members={
            "vit_base_patch16_siglip_224": "v2_webli webli",
            "vit_base_patch16_siglip_256": "v2_webli webli webli_i18n",
            "vit_base_patch16_siglip_384": "v2_webli webli",
            "vit_base_patch16_siglip_512": "v2_webli webli",
            "vit_large_patch16_siglip_256": "v2_webli webli",
            "vit_large_patch16_siglip_384": "v2_webli webli",
            "vit_so400m_patch14_siglip_224": "v2_webli webli",
            "vit_so400m_patch14_siglip_378": "v2_webli webli webli_ft_in1k@1.0",
            "vit_so400m_patch14_siglip_384": "webli",
        },
    ),
    Family(
        "SigLIP, mean pooling",
        paper="2303.15343",
        crop_pct=0.9,
        fields=NO_CLS | {"pooling": "normed_mean"},
        members={
            "vit_base_patch16_siglip_gap_224": "v2_webli webli",
            "vit_base_patch16_siglip_gap_256": "v2_webli webli webli_i18n",
            "vit_base_patch16_siglip_gap_384": "v2_webli webli",
            "vit_base_patch16_siglip_gap_512": "v2_webli webli",
            "vit_large_patch16_siglip_gap_256": "v2_webli webli",
            "vit_large_patch16_siglip_gap_384": "v2_webli webli",
            "vit_so400m_patch14_siglip_gap_224": "pali2_10b_pt pali2_3b_pt pali_mix pali_pt v2_webli webli",
            "vit_so400m_patch14_siglip_gap_378": "v2_webli webli@1.0 webli_ft_in1k@1.0",
            "vit_so400m_patch14_siglip_gap_384": "webli@1.0",
            "vit_so400m_patch14_siglip_gap_448": (
                "pali2_10b_docci@1.0 pali2_10b_pt@1.0 pali2_3b_docci@1.0 pali2_3b_pt@1.0 pali_mix@1.0 "
                "pali_ocrvqa@1.0 pali_pt@1.0 pali_refcoco_seg@1.0"
            ),
            "vit_so400m_patch14_siglip_gap_896": (
                "pali2_10b_pt@1.0 pali2_3b_pt@1.0 pali_ocrvqa@1.0 pali_pt@1.0 pali_refcoco_seg@1.0"
            ),
        },
    ),
    Family(
        "SigLIP 2",
        paper="2502.14786",
        crop_pct=0.9,
        fields=NO_CLS | {"pooling": "map", "hidden_act": "gelu_pytorch_tanh"},
        members={
            "vit_base_patch32_siglip_256": "v2_webli",
            "vit_giantopt_patch16_siglip_256": "v2_webli",
            "vit_giantopt_patch16_siglip_384": "v2_webli",
            "vit_large_patch16_siglip_512": "v2_webli",
            "vit_so400m_patch16_siglip_256": "v2_webli webli_i18n",
            "vit_so400m_patch16_siglip_384": "v2_webli",
            "vit_so400m_patch16_siglip_512": "v2_webli",
        },
    ),
    Family(
        "SigLIP 2, mean pooling",
        paper="2502.14786",
        crop_pct=0.9,
        fields=NO_CLS | {"pooling": "normed_mean", "hidden_act": "gelu_pytorch_tanh"},
        members={
            "vit_base_patch32_siglip_gap_256": "v2_webli",
            "vit_giantopt_patch16_siglip_gap_256": "v2_webli",
            "vit_giantopt_patch16_siglip_gap_384": "v2_webli",
            "vit_large_patch16_siglip_gap_512": "v2_webli",
            "vit_so400m_patch16_siglip_gap_256": "v2_webli webli_i18n",
            "vit_so400m_patch16_siglip_gap_384": "v2_webli",
            "vit_so400m_patch16_siglip_gap_512": "v2_webli",
        },
    ),
    Family(
        "ViT of timm, mean pooling",
        crop_pct=0.95,
        fields=NO_CLS | {"pooling": "normed_mean", "qkv_bias": False, "layerscale_value": 1e-6},
        members={
            "vit_medium_patch16_gap_240": "sw_in12k",
            "vit_medium_patch16_gap_256": "sw_in12k_ft_in1k",
            "vit_medium_patch16_gap_384": "sw_in12k_ft_in1k",
        },
    ),
    Family(
        "ViT of timm, mean pooling, 16 heads",
        fields=NO_CLS | {"pooling": "normed_mean", "num_attention_heads": 16},
        members={
            "vit_base_patch16_gap_224": "",
        },
    ),
    Family(
        "ViT of timm, four registers and CLS",
        fields=REGISTERS,
        members={
            "vit_medium_patch16_reg4_256": "",
        },
    ),
    Family(
        "ViT of timm, eight registers",
        fields=NO_CLS | REGISTERS | {"num_register_tokens": 8, "pooling": "mean"},
        members={
            "vit_base_patch16_reg8_gap_256": "",
        },
    ),
    Family(
        "ViT of timm, one register",
        crop_pct=0.95,
        fields=NO_CLS | REGISTERS | {"num_register_tokens": 1, "pooling": "mean", "layerscale_value": 1e-5},
        members={
            "vit_betwixt_patch16_reg1_gap_256": "sbb_in1k",
            "vit_little_patch16_reg1_gap_256": "sbb_in12k sbb_in12k_ft_in1k",
            "vit_medium_patch16_reg1_gap_256": "sbb_in1k",
            "vit_wee_patch16_reg1_gap_256": "sbb_in1k",
        },
    ),
    Family(
        "ViT of timm, four registers",
        crop_pct=0.95,
        fields=NO_CLS | REGISTERS | {"pooling": "mean", "layerscale_value": 1e-5},
        members={
            "vit_betwixt_patch16_reg4_gap_256": (
                "sbb2_e200_in12k sbb2_e200_in12k_ft_in1k sbb_in12k sbb_in12k_ft_in1k sbb_in1k"
            ),
            "vit_betwixt_patch16_reg4_gap_384": "sbb2_e200_in12k_ft_in1k@1.0",
            "vit_little_patch16_reg4_gap_256": "sbb_in1k",
            "vit_medium_patch16_reg4_gap_256": "sbb_in12k sbb_in12k_ft_in1k sbb_in1k",
            "vit_mediumd_patch16_reg4_gap_256": "sbb2_e200_in12k sbb2_e200_in12k_ft_in1k sbb_in12k sbb_in12k_ft_in1k",
            "vit_mediumd_patch16_reg4_gap_384": "sbb2_e200_in12k_ft_in1k@1.0",
        },
    ),
    Family(
        "ViT of timm, SO-150M",
        crop_pct=0.95,
        fields=NO_CLS | {"num_register_tokens": 4, "pooling": "normed_mean"},
        members={
            "vit_so150m_patch16_reg4_gap_256": "sbb_e250_in12k sbb_e250_in12k_ft_in1k",
            "vit_so150m_patch16_reg4_gap_384": "sbb_e250_in12k_ft_in1k@1.0",
        },
    ),
    Family(
        "ViT of timm, SO-150M 2",
        crop_pct=1.0,
        fields=NO_CLS | {"num_register_tokens": 1, "pooling": "mean", "qkv_bias": False, "layerscale_value": 1e-5},
        members={
            "vit_so150m2_patch16_reg1_gap_256": "sbb_e200_in12k sbb_e200_in12k_ft_in1k",
            "vit_so150m2_patch16_reg1_gap_384": "sbb_e200_in12k_ft_in1k",
            "vit_so150m2_patch16_reg1_gap_448": "sbb_e200_in12k_ft_in1k",
        },
    ),
)


@dataclass(frozen=True)
class Architecture:
    """Pretrained model: timm's `name.tag`, the network, and the preprocessing of its images.

    Args:
        name: timm's name and tag, separated by a dot.
        fields: fields of `CLCAViTConfig` that differ from its defaults, without the classes.
        mean, std: of red, green and blue in [0, 1].
        crop_pct: side of the center crop divided by the side of the resized image.
        resample: "bicubic" or "bilinear".
        licence: license of the weights.
        description: the method and its paper.
    """

    name: str
    fields: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    resample: str
    licence: str
    description: str

    @property
    def image_size(self) -> int:
        """Side of the training images, pixels."""
        return self.fields["image_size"]

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return self.fields["patch_size"]

    @property
    def own_fields(self) -> dict[str, Any]:
        """Fields that differ from a plain ViT of this size."""
        plain = {
            "image_size",
            "patch_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        }
        return {k: v for k, v in self.fields.items() if k not in plain and (k, v) != ("layer_norm_eps", 1e-6)}

    def config(self, **config: Any) -> CLCAViTConfig:
        """Return the configuration of the network, overridden by `config`.

        Raises:
            ValueError: if `CLCAViTConfig` rejects a value.
        """
        return CLCAViTConfig(**{**self.fields, **config})


def _architectures(family: Family) -> dict[str, Architecture]:
    found = {}
    for network, tags in family.members.items():
        for tag in tags.split() or [""]:
            tag, _, crop_pct = tag.partition("@")
            name = f"{network}.{tag}" if tag else network
            licence = next((terms for start, terms in LICENCES.items() if tag.startswith(start)), "apache-2.0")
            licence = licence if tag else "no weights"
            found[name] = Architecture(
                name=name,
                fields=MappingProxyType(_plain_fields(network) | dict(family.fields)),
                mean=family.mean_std[0],
                std=family.mean_std[1],
                crop_pct=float(crop_pct or family.crop_pct),
                resample=family.resample,
                licence=licence,
                description=family.title + (f", https://huggingface.co/papers/{family.paper}" if family.paper else ""),
            )
    return found


def _plain_fields(network: str) -> dict[str, Any]:
    """Parse the size, and the pixels of image and patch, from the name of a network."""
    width, depth, heads, mlp = SIZES[network.split("_")[1]]
    numbers = re.fullmatch(r".*_patch(\d+)(?:_.*)?_(\d+)(?:_miil)?", network)
    patch_size, image_size = map(int, numbers.groups()) if numbers else (16, 224)
    image_size -= image_size % patch_size  # of 384 pixels, patches of 14 cover 378, and timm drops the rest
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "layer_norm_eps": 1e-6,
    }


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {name: architecture for family in FAMILIES for name, architecture in _architectures(family).items()}
)


def select_architectures(pattern: str | None = None) -> list[Architecture]:
    """Return the architectures whose names match a glob such as `deit3*` or contain a text; all by default.

    Raises:
        ValueError: if there is none; the message lists similar names.
    """
    if pattern is None:
        return list(ARCHITECTURES.values())
    wanted = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    found = [architecture for name, architecture in ARCHITECTURES.items() if fnmatchcase(name, wanted)]
    if not found:
        find_architecture(pattern)  # raises an error with similar names
    return found


def find_architecture(name: str) -> Architecture:
    """Return the architecture of a timm `name.tag`, or of a network name, which selects its first tag.

    Raises:
        ValueError: if the name is unknown; the message lists similar names.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    networks = {}
    for known, architecture in ARCHITECTURES.items():
        networks.setdefault(known.partition(".")[0], architecture)
    if name in networks:
        return networks[name]
    network = name.partition(".")[0]
    close = [known for known in ARCHITECTURES if known.partition(".")[0] == network]
    close = get_close_matches(name, close, n=5, cutoff=0) or get_close_matches(name, [*ARCHITECTURES, *networks], n=3)
    hint = f"Did you mean {', '.join(close)}?" if close else "`ufgir pretrained` lists the supported ones."
    raise ValueError(f"unknown `architecture` {name!r}. {hint}")
