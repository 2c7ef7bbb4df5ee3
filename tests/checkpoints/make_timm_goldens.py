"""Makes tests/goldens_timm/: what timm's VisionTransformer computes with random weights, for `test_from_timm.py`.

Not run by the tests. It needs timm 1.0.31 and torchvision 0.28.0 beside torch 2.13.0, best in an environment of its own:

python -m venv /tmp/timm && /tmp/timm/bin/pip install torch==2.13.0 safetensors huggingface_hub pyyaml
/tmp/timm/bin/pip install --no-deps timm==1.0.31 torchvision==0.28.0
/tmp/timm/bin/python tests/checkpoints/make_timm_goldens.py

Each file is a network of timm's own making, with its entrypoint's arguments but a few narrow layers. It holds `state.*`
(float32), `pixel_values`, and in float64 `features` (of `forward_features`) and `logits`. Its metadata hold a JSON `config`:
the name of the architecture, and the arguments of `load_timm` that give the same network.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


# A CPU build of torch lacks two operators that torchvision wants to exist.
LIBRARY = torch.library.Library("torchvision", "DEF")
LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from timm.models.vision_transformer import checkpoint_filter_fn  # noqa: E402


FOLDER = Path(__file__).parents[1] / "goldens_timm"

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
OURS = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}

# File -> architecture, classes.
PLAIN = {
    "vit": ("vit_base_patch16_224.augreg_in21k_ft_in1k", 3),
    "vit_no_head": ("vit_base_patch16_224.orig_in21k", 0),
    "vit_tiny": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 3),
    "vit_giant": ("vit_giant_patch14_224", 3),
    "miil": ("vit_base_patch16_224_miil.in21k", 3),
    "dino": ("vit_base_patch16_224.dino", 0),
    "mae": ("vit_base_patch16_224.mae", 0),
    "deit": ("deit_tiny_patch16_224.fb_in1k", 3),
    "deit_distilled": ("deit_tiny_distilled_patch16_224.fb_in1k", 3),
    "deit3": ("deit3_base_patch16_224.fb_in1k", 3),
    "flexivit": ("flexivit_base.1200ep_in1k", 3),
    "eva": ("eva_large_patch14_196.in22k_ft_in1k", 3),
    "clip": ("vit_base_patch16_clip_224.laion2b", 3),
    "clip_quickgelu": ("vit_base_patch16_clip_quickgelu_224.openai", 3),
    "dinov2": ("vit_small_patch14_dinov2.lvd142m", 0),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2.lvd142m", 0),
    "dinov2_giant": ("vit_giant_patch14_dinov2.lvd142m", 0),
    "dinov2_registers_giant": ("vit_giant_patch14_reg4_dinov2.lvd142m", 0),
    "tips": ("vit_base_patch14_reg1_tipsv2.webli", 0),
    "siglip": ("vit_base_patch16_siglip_224.webli", 0),
    "siglip_head": ("vit_so400m_patch14_siglip_378.webli_ft_in1k", 3),
    "siglip_mean": ("vit_base_patch16_siglip_gap_224.webli", 3),
    "siglip_tanh": ("vit_so400m_patch16_siglip_256.v2_webli", 0),
    "siglip_tanh_mean": ("vit_so400m_patch16_siglip_gap_256.v2_webli", 3),
    "ijepa": ("vit_huge_patch14_gap_224.in1k_ijepa", 3),
    "timm_medium": ("vit_medium_patch16_gap_256.sw_in12k_ft_in1k", 3),
    "timm_register": ("vit_medium_patch16_reg1_gap_256.sbb_in1k", 3),
    "timm_registers": ("vit_betwixt_patch16_reg4_gap_256.sbb_in1k", 3),
    "timm_so150m": ("vit_so150m_patch16_reg4_gap_256.sbb_e250_in12k", 3),
    "timm_so150m2": ("vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k", 3),
}
# The same of timm 0.9.12, which the original code ran with; timm has dropped these names since. Made by naming them:
# `make_timm_goldens.py timm_base_reg8_gap timm_medium_reg4`.
OLD = {
    "timm_base_reg8_gap": ("vit_base_patch16_reg8_gap_256", 3),
    "timm_medium_reg4": ("vit_medium_patch16_reg4_256", 3),
}
# File -> arguments of timm 0.9.12's `VisionTransformer` beside those of TINY, for `load_original`. Made by naming them: `make_timm_goldens.py original/map`.
ORIGINAL: dict[str, dict[str, Any]] = {
    "original/map_then_norm": {"class_token": False, "global_pool": "map", "fc_norm": True},
    "original/map": {"class_token": False, "global_pool": "map"},
    "original/cls_fc_norm": {"fc_norm": True},
    "original/gated_mlp": {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    "original/cut_off": {"img_size": 18},
    "original/no_cls_cla": {"class_token": False, "global_pool": "avg", "depth": 5},
}
# File -> architecture, image size and patch size that its weights, for images of 16 and patches of 4 pixels, are loaded at.
RESAMPLED = {
    "resample_larger": ("vit_base_patch16_224.augreg_in21k_ft_in1k", (32, 32), (4, 4)),
    "resample_not_square": ("vit_small_patch14_reg4_dinov2.lvd142m", (12, 24), (4, 4)),
    "resample_no_class_position": ("deit3_base_patch16_224.fb_in1k", (24, 24), (4, 4)),
    "resample_no_class": ("vit_base_patch16_siglip_gap_224.webli", (8, 20), (4, 4)),
    "resample_distilled": ("deit_tiny_distilled_patch16_224.fb_in1k", (24, 16), (4, 4)),
    "resample_patch": ("flexivit_base.1200ep_in1k", (24, 24), (6, 6)),
    "resample_patch_and_image": ("vit_base_patch16_224.augreg_in21k_ft_in1k", (18, 9), (3, 3)),
}


def make(architecture: str, num_classes: int, **args: Any) -> torch.nn.Module:
    """Return a tiny network of this architecture in float64, in evaluation mode, with random weights that are exact in float32."""
    model = timm.create_model(architecture, pretrained=False, num_classes=num_classes, **TINY | args).double().eval()
    randomise(model.state_dict())
    return model


def randomise(state: Mapping[str, torch.Tensor]) -> None:
    """Fill the model with random weights that are large enough to affect the result."""
    for key, tensor in state.items():
        centre = 1.0 if ("norm" in key and key.endswith("weight")) or key.endswith("gamma") else 0.0
        tensor.copy_((centre + 0.2 * torch.randn(tensor.shape)).double())


@torch.no_grad()
def run(model: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the outputs of the model for images."""
    features = model.forward_features(pixels.double())
    # of a distilled DeiT the class token's head alone: the mean of the two heads reads two tokens
    logits = model.head(features[:, 0]) if hasattr(model, "head_dist") else model.forward_head(features)
    return {"pixel_values": pixels, "features": features, "logits": logits}


def save(
    name: str, architecture: str, state: Mapping[str, torch.Tensor], outputs: dict[str, torch.Tensor], **config: Any
) -> None:
    """Write a file."""
    tensors = {f"state.{key}": tensor.float().contiguous() for key, tensor in state.items()}
    tensors |= {key: tensor.contiguous().clone() for key, tensor in outputs.items()}
    values = OURS | config
    if "giant" in name and "dinov2" in name:
        values |= {"intermediate_size": 8}  # half of timm's: there, the gate counts
    metadata = {"config": json.dumps({"architecture": architecture, "config": values, "timm": timm.__version__})}
    save_file(tensors, FOLDER / f"{name}.safetensors", metadata=metadata)


def make_layout(name: str, architecture: str, num_classes: int, theirs: Callable[[dict], dict], **args: Any) -> None:
    """Write a file with weights under other names than timm's, and the outputs of timm for them."""
    model = make(architecture, num_classes, **args)
    state = theirs({key: tensor.clone() for key, tensor in model.state_dict().items()})
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    save(name, architecture, state, run(model, torch.randn(2, 3, 16, 16)))


def openai_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return random weights in the layout of OpenAI's CLIP, with a part of its text tower."""
    swaps = (
        ("cls_token", "class_embedding"),
        ("pos_embed", "positional_embedding"),
        ("head.weight", "proj"),
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("norm.", "ln_post."),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("blocks.", "transformer.resblocks."),
    )
    converted = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(4)}
    for key, tensor in state.items():
        name = key
        for timms, openais in swaps:
            name = name.replace(timms, openais)
        if key in ("cls_token", "pos_embed"):
            tensor = tensor.squeeze()
        converted[f"visual.{name}"] = tensor.T if key == "head.weight" else tensor
    del converted["visual.head.bias"]  # it has none
    return converted


def dinov2_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return random weights in the layout of DINOv2 with registers and SwiGLU."""
    converted = {"mask_token": torch.zeros(1, 8)}
    for key, tensor in state.items():
        renamed = (
            key.replace("reg_token", "register_tokens").replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        )
        converted[renamed] = tensor
    first = 0.2 * torch.randn(1, 1, 8).double()
    converted["pos_embed"] = torch.cat([first.float().double(), state["pos_embed"]], dim=1)
    return converted


def make_original(name: str, args: dict[str, Any]) -> None:
    """Write a file with a network of the original code: its weights and `dims`, for `load_original`."""
    model = timm.models.vision_transformer.VisionTransformer(**TINY | args, num_classes=3).double().eval()
    head = None
    if name.endswith("cla"):  # as the original code has it, on the first token after layers 3 and 4
        head = torch.nn.Sequential(
            torch.nn.BatchNorm1d(8),
            torch.nn.Conv1d(8, 16, 2, stride=2, groups=8),
            torch.nn.BatchNorm1d(16),
            torch.nn.GELU(),
            torch.nn.Conv1d(16, 3, 1),
        )
        model.ifa_head = torch.nn.Sequential(head.double().eval())
    randomise({key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")})
    if head is not None:
        for norm in (head[0], head[2]):
            norm.running_var.abs_()
    size = args.get("img_size", 16)
    pixels, first = torch.randn(2, 3, size, size), []
    for layer in (3, 4) if head is not None else ():
        model.blocks[layer].register_forward_hook(lambda module, inputs, output: first.append(output[:, 0]))
    outputs = run(model, pixels)
    if head is not None:
        with torch.no_grad():
            outputs["logits"] = head(torch.stack(first, dim=2)).squeeze(-1)
    dims = TINY | {key: value for key, value in args.items() if key not in ("mlp_layer", "act_layer")}
    tensors = {f"state.{key}": tensor.contiguous().clone() for key, tensor in model.state_dict().items()}
    tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    tensors |= {key: tensor.contiguous().clone() for key, tensor in outputs.items()}
    save_file(
        tensors,
        FOLDER / f"{name}.safetensors",
        metadata={"config": json.dumps({"dims": dims, "timm": timm.__version__})},
    )


def main() -> None:
    """Write all files, or those whose names are given."""
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    if old := sys.argv[1:]:
        for name in old:
            if name in ORIGINAL:
                make_original(name, ORIGINAL[name])
                continue
            model = make(*OLD[name])
            save(name, OLD[name][0], model.state_dict(), run(model, torch.randn(2, 3, 16, 16)))
        return
    for name, (architecture, num_classes) in PLAIN.items():
        model = make(architecture, num_classes)
        save(name, architecture, model.state_dict(), run(model, torch.randn(2, 3, 16, 16)))
    make_layout("layout_openai", "vit_base_patch16_clip_quickgelu_224.openai", 3, openai_layout)
    make_layout("layout_dinov2_registers_giant", "vit_giant_patch14_reg4_dinov2.lvd142m", 0, dinov2_layout)
    for name, (architecture, image_size, patch_size) in RESAMPLED.items():
        source = make(architecture, 3)
        model = make(architecture, 3, img_size=image_size, patch_size=patch_size)
        # in float32, as published weights are
        model.load_state_dict(checkpoint_filter_fn({k: v.float() for k, v in source.state_dict().items()}, model))
        config = {"image_size": list(image_size), "patch_size": list(patch_size)}
        save(name, architecture, source.state_dict(), run(model, torch.randn(2, 3, *image_size)), **config)


if __name__ == "__main__":
    main()
