"""Map the weight names of timm's VisionTransformer, also used by the original CLCA code, to ours."""

import re
from collections.abc import Iterable

import torch


# timm's key (regular expression) -> ours. `convert_timm_tensor` also splits fused projections. The caller converts `pos_embed`
# and the classifier, which depend on the model.
TIMM_KEYS = (
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"reg_token", "vit.embeddings.register_tokens"),
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
# In a gated MLP, `fc1` contains the gate and then the gated projection (timm's SwiGLUPacked).
_SWIGLU_KEYS = ((r"blocks\.(\d+)\.mlp\.fc2\.(weight|bias)", r"vit.layers.\1.mlp.down_proj.\2"),)


def convert_timm_tensor(key: str, tensor: torch.Tensor, swiglu: bool = False) -> dict[str, torch.Tensor] | None:
    """Convert a tensor of timm to ours: one tensor, or the parts of a fused projection; None for an unknown name.

    Args:
        key: timm's name.
        tensor: a weight, or the gradient of one.
        swiglu: whether the MLPs are gated.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
        return split_rows(tensor, f"vit.layers.{match[1]}.attention.{{}}_proj.{match[2]}", "qkv")
    if match := re.fullmatch(r"attn_pool\.kv\.(weight|bias)", key):
        return split_rows(tensor, f"vit.attention_pooling.{{}}_proj.{match[1]}", "kv")
    if swiglu and (match := re.fullmatch(r"blocks\.(\d+)\.mlp\.fc1\.(weight|bias)", key)):
        return split_rows(tensor, f"vit.layers.{match[1]}.mlp.{{}}_proj.{match[2]}", ("gate", "up"))
    ours = translate(key, (*_SWIGLU_KEYS, *TIMM_KEYS) if swiglu else TIMM_KEYS)
    return None if ours is None else {ours: tensor}


def translate(key: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """Return the name given by the first rule that matches all of `key`; None if there is none."""
    return next((match.expand(ours) for pattern, ours in rules if (match := re.fullmatch(pattern, key))), None)


def split_rows(tensor: torch.Tensor, name: str, parts: Iterable[str]) -> dict[str, torch.Tensor]:
    """Split the rows of a fused projection (len(parts) * D, ...) into one tensor per part."""
    parts = tuple(parts)
    chunks = tensor.chunk(len(parts), dim=0)
    return {name.format(part): chunk.clone() for part, chunk in zip(parts, chunks, strict=True)}
