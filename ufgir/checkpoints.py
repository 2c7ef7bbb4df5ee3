"""Weights of the original CLCA code, turned into `CLCAViTForImageClassification`."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification


# Where the original puts the reduction in a plain ViT, whatever its options say.
_LAYERS_OF_PLAIN_VIT = (3, 6, 9)

# Original key -> ours, by regular expression. `qkv` and `pos_embed` are split on the way, see `convert_original_state`.
_KEYS = (
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"reg_token", "vit.embeddings.register_tokens"),
    (r"clr", "vit.embeddings.clr_tokens"),
    (r"patch_embed\.proj\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"norm_pre\.(weight|bias)", r"vit.embeddings.layernorm.\1"),
    (r"blocks\.(\d+)\.norm1\.(weight|bias)", r"vit.layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(weight|bias)", r"vit.layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"vit.layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.attn\.([qk])_norm\.(weight|bias)", r"vit.layers.\1.attention.\2_norm.\3"),
    (r"blocks\.(\d+)\.ls([12])\.gamma", r"vit.layers.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"vit.layers.\1.mlp.\2.\3"),
    (r"(?:fc_)?norm\.(weight|bias)", r"vit.layernorm.\1"),
    (r"attn_pool\.latent", "vit.attention_pooling.query"),
    (r"attn_pool\.q\.(weight|bias)", r"vit.attention_pooling.q_proj.\1"),
    (r"attn_pool\.proj\.(weight|bias)", r"vit.attention_pooling.o_proj.\1"),
    (r"attn_pool\.norm\.(weight|bias)", r"vit.attention_pooling.layernorm.\1"),
    (r"attn_pool\.mlp\.(fc[12])\.(weight|bias)", r"vit.attention_pooling.mlp.\1.\2"),
)
_HEAD_KEYS = {
    "linear": ((r"head\.(weight|bias)", r"classifier.\1"),),
    "cla": (
        (r"ifa_head\.0\.0\.(\w+)", r"classifier.norm_in.\1"),
        (r"ifa_head\.0\.1\.(weight|bias)", r"classifier.aggregate.\1"),
        (r"ifa_head\.0\.2\.(\w+)", r"classifier.norm_out.\1"),
        (r"ifa_head\.0\.4\.(weight|bias)", r"classifier.out_proj.\1"),
    ),
    "ifa": (
        (r"ifa_head\.0\.0\.(weight|bias)", r"classifier.aggregate.\1"),
        (r"ifa_head\.0\.3\.(weight|bias)", r"classifier.layernorm.\1"),
        (r"ifa_head\.0\.4\.(weight|bias)", r"classifier.out_proj.\1"),
    ),
}


def original_config(spec: Mapping[str, Any]) -> CLCAViTConfig:
    """The configuration of a model of the original code.

    Args:
        spec: `method`; `options`, under the original's names; `dims`, the constructor arguments of its ViT; `num_labels`.

    Raises:
        ValueError: a method, or an option's value, that this version cannot represent.
    """
    method, options, dims = spec["method"], spec["options"], spec["dims"]
    depth, width = dims.get("depth", 12), dims.get("embed_dim", 768)
    reduction = None if method == "vit" else method
    if reduction is None:
        layers = [i for i in _LAYERS_OF_PLAIN_VIT if i < depth]
    else:
        layers = list(options["reduction_loc"])
    head = "linear"
    if options.get("ifa_head"):
        head = "cla" if options.get("ifa_dws_conv_groups", 2) > 0 else "ifa"
    has_cls = dims.get("class_token", True)
    reduction_kwargs = None
    if reduction in ("topk", "evit") and not has_cls:
        reduction_kwargs = {"score_by": "cls"}  # there, the first patch acts as CLS
    return CLCAViTConfig(
        image_size=dims.get("img_size", 224),
        patch_size=dims.get("patch_size", 16),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=dims.get("num_heads", 12),
        intermediate_size=int(width * dims.get("mlp_ratio", 4.0)),
        layer_norm_eps=dims.get("layer_norm_eps", 1e-6),
        qkv_bias=dims.get("qkv_bias", True),
        num_labels=spec["num_labels"],
        reduction=reduction,
        reduction_layers=layers,
        keep_rate=list(options["keep_rate"]) if reduction else 1.0,
        reduction_kwargs=reduction_kwargs,
        cross_layer_cache=bool(options.get("clc")),
        num_clr_tokens=options.get("num_clr", 0),
        cache_gap=options.get("clc_include_gap", True),
        cache_pool_cls=options.get("clc_pool_cls", False),
        cache_pool_clr=options.get("clc_pool_clr", False),
        cache_recover_at_last=options.get("clc_recover_at_last", True),
        head=head,
        cla_multiplier=max(options.get("ifa_dws_conv_groups", 2), 1),
        layerscale_value=dims.get("init_values"),
        pre_norm=dims.get("pre_norm", False),
        num_register_tokens=dims.get("reg_tokens", 0),
        prefix_position_embeddings=not dims.get("no_embed_class", False),
        use_class_token=has_cls,
        pooling={"token": "cls", "avg": "mean", "map": "map"}[dims.get("global_pool", "token")],
        use_qk_norm=dims.get("qk_norm", False),
    )


def convert_original_state(state_dict: Mapping[str, torch.Tensor], config: CLCAViTConfig) -> dict[str, torch.Tensor]:
    """Tensors under the original's keys, or gradients of such, under ours.

    The original keeps a stale 1000-way `head` beside an aggregation head; it is left out.

    Raises:
        ValueError: keys that are neither known nor stale, all of them named.
    """
    rules = [(re.compile(pattern), ours) for pattern, ours in (*_KEYS, *_HEAD_KEYS[config.head])]
    converted, unexpected = {}, []
    for key, tensor in state_dict.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
            converted |= _split(tensor, f"vit.layers.{match[1]}.attention.{{}}_proj.{match[2]}", "qkv")
        elif match := re.fullmatch(r"attn_pool\.kv\.(weight|bias)", key):
            converted |= _split(tensor, f"vit.attention_pooling.{{}}_proj.{match[1]}", "kv")
        elif key == "pos_embed":
            num_clr = config.num_clr_tokens * config.prefix_position_embeddings
            table, clr = tensor.split([tensor.shape[1] - num_clr, num_clr], dim=1)
            converted["vit.embeddings.position_embeddings"] = table
            if num_clr:
                converted["vit.embeddings.clr_position_embeddings"] = clr
        elif config.head != "linear" and re.fullmatch(r"head\.(weight|bias)", key):
            continue
        else:
            names = [match.expand(ours) for pattern, ours in rules if (match := pattern.fullmatch(key))]
            if names:
                converted[names[0]] = tensor
            else:
                unexpected.append(key)
    if unexpected:
        raise ValueError(f"`state_dict` holds keys with no place in this model: {', '.join(unexpected)}.")
    return converted


def load_original(state_dict: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> CLCAViTForImageClassification:
    """A model with the weights of the original code, in evaluation mode, in the dtype of the weights.

    Args:
        state_dict: tensors under the original's keys (timm's, and `clr`, `ifa_head.*` and those of the methods).
        spec: what the model is, see `original_config`.

    Raises:
        ValueError: keys that do not belong, are missing, or have another shape than the configuration says.
    """
    config = original_config(spec)
    model = CLCAViTForImageClassification(config).eval()
    converted = convert_original_state(state_dict, config)
    # The original drops the final norm where the head reads CLS before it; ours stays, unused.
    optional = {"vit.layernorm.weight", "vit.layernorm.bias"} if config.head in ("cla", "ifa") else set()
    _load_exactly(model, converted, optional)
    return model


def _load_exactly(
    model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor], optional: Iterable[str] = ()
) -> None:
    own = model.state_dict()
    problems = [f"{key} is missing" for key in own if key not in state_dict and key not in optional]
    for key, tensor in state_dict.items():
        if key not in own:
            problems.append(f"{key} is unexpected")
        elif tensor.shape != own[key].shape:
            problems.append(f"{key} has the shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
    if problems:
        raise ValueError(f"`state_dict` does not fit the model: {'; '.join(problems)}.")
    floating = {tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())
    model.load_state_dict(state_dict, strict=False)


def _split(tensor: torch.Tensor, name: str, parts: str) -> dict[str, torch.Tensor]:
    """Rows of a fused projection (len(parts) * D, ...) under one name per part."""
    chunks = tensor.chunk(len(parts), dim=0)
    return {name.format(part): chunk.clone() for part, chunk in zip(parts, chunks, strict=True)}
