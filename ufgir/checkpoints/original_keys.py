"""Map the options and weight names of the original CLCA code to ours."""

import logging
import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair
from clca.heads_clca import HEADS

from ..utils.text import listed
from .timm_keys import convert_timm_tensor, translate


logger = logging.getLogger(__name__)

# Layers of the reduction that the original sets for a plain ViT, regardless of its options.
_LAYERS_OF_PLAIN_VIT = (3, 6, 9)

# Constructor arguments of the original's ViT (timm's names) that affect the computation.
_DIMS = frozenset(
    [
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
        "qk_norm",
        "init_values",
        "class_token",
        "no_embed_class",
        "reg_tokens",
        "pre_norm",
        "global_pool",
        "fc_norm",
        "layer_norm_eps",
        "mlp_layer",
    ]
)
GATED_MLP = "SwiGLUPacked"  # timm's name for the `mlp_layer` of the DINOv2 giants

# Options of the original's command line that affect the model.
_OPTIONS = frozenset(
    [
        "reduction_loc",
        "keep_rate",
        "clc",
        "clc_include_gap",
        "clc_pool_cls",
        "clc_pool_clr",
        "clc_recover_at_last",
        "num_clr",
        "ifa_head",
        "ifa_dws_conv_groups",
        "num_query_tokens",
        "lasso_loss_weight",
        "lasso_inner_dim",
        "cls_weight",
        "ratio_weight",
        "cls_distill_weight",
        "token_distill_weight",
        "k_neighbors",
        "equal_weight",
        "cluster_iters",
        "sinkhorn_eps",
        "heuristic_pattern",
        "min_radius",
        "not_contiguous",
        "dyvit_distill",
        "dropped_token_fusion",
        "fusion_crit_norm",
        "debugging",
    ]
)

# Methods whose list of keep rates has one rate per stage.
_METHODS_BY_STAGE_RATES = ("topk", "evit", "maws", "dmaws", "edar", "nfedar", "glsf")

_PROBING_METHODS = ("h2t", "vqt")  # variants of the original's code with another head

# The original's key (regular expression) -> ours, in addition to timm's (`timm_keys.TIMM_KEYS`).
_KEYS = ((r"clr", "vit.embeddings.clr_tokens"),)
# The first number in these keys is the stage, not the layer.
_STAGE_KEYS = (
    (r"score_predictor\.(\d+)\.in_conv\.(\d)\.(weight|bias)", r"in_proj.\2.\3"),
    (r"score_predictor\.(\d+)\.out_conv\.(\d)\.(weight|bias)", r"out_proj.\2.\3"),
    (r"cluster_layers\.(\d+)\.score\.(weight|bias)", r"score.\2"),
    (r"cluster_layers\.(\d+)\.weight\.(\d)\.(weight|bias)", r"slot_logits.\2.\3"),
    (r"cluster_layers\.(\d+)\.(scale|queries)", r"\2"),
    (r"cluster_layers\.(\d+)\.norm\.(weight|bias)", r"norm.\2"),
    (r"cluster_layers\.(\d+)\.v", r"prototypes"),
)
_LINEAR_KEYS = ((r"head\.(weight|bias)", r"classifier.\1"),)
_HEAD_KEYS = {
    "linear": _LINEAR_KEYS,
    "h2t": _LINEAR_KEYS,
    "vqt": _LINEAR_KEYS,
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
    """Return the configuration of a model of the original code.

    Args:
        spec: `method`; `options`, under the original's names; `dims`, the constructor arguments of its ViT; `num_labels`.

    Raises:
        ValueError: if the method, or the value of an option, is not supported.
    """
    method, options, dims = spec["method"], spec["options"], spec["dims"]
    _check_spec(method, options, dims)
    depth, width = dims.get("depth", 12), dims.get("embed_dim", 768)
    reduction = None if method in ("vit", *_PROBING_METHODS) else method.removesuffix("_old")
    layers = (
        [i for i in _LAYERS_OF_PLAIN_VIT if i < depth] if method == "vit" else list(options.get("reduction_loc", []))
    )
    head = method if method in _PROBING_METHODS else "linear"
    if options.get("ifa_head") and head == "linear":
        head = "cla" if options.get("ifa_dws_conv_groups", 2) > 0 else "ifa"
    has_cls = dims.get("class_token", True)
    gated = dims.get("mlp_layer") == GATED_MLP
    if method in _PROBING_METHODS and (ignored := [name for name in ("clc", "ifa_head") if options.get(name)]):
        logger.warning("%s of %s: ignored, as in the original code.", " and ".join(ignored), method)
    return CLCAViTConfig(
        image_size=_image_size(dims),
        patch_size=dims.get("patch_size", 16),
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=dims.get("num_heads", 12),
        intermediate_size=int(width * dims.get("mlp_ratio", 4.0)) // (2 if gated else 1),
        layer_norm_eps=dims.get("layer_norm_eps", 1e-6),
        qkv_bias=dims.get("qkv_bias", True),
        num_labels=spec["num_labels"],
        num_channels=dims.get("in_chans", 3),
        reduction=reduction,
        reduction_layers=layers,
        reduction_kwargs=_reduction_kwargs(reduction, options, has_cls),
        **_budget(reduction, options, dims),
        cross_layer_cache=bool(options.get("clc")) and method not in _PROBING_METHODS,
        num_clr_tokens=options.get("num_clr", 0),
        cache_gap=options.get("clc_include_gap", True),
        cache_pool_cls=options.get("clc_pool_cls", False),
        cache_pool_clr=options.get("clc_pool_clr", False),
        cache_recover_at_last=options.get("clc_recover_at_last", True),
        head=head,
        cla_multiplier=max(options.get("ifa_dws_conv_groups", 2), 1),
        num_query_tokens=options.get("num_query_tokens", 5),
        group_lasso_weight=options.get("lasso_loss_weight", 0.0),
        vqt_original_slicing=head == "vqt",
        first_patch_as_cls=HEADS[head].before_norm and not has_cls,
        layerscale_value=dims.get("init_values") or None,  # zero disables LayerScale in the original
        pre_norm=dims.get("pre_norm", False),
        num_register_tokens=dims.get("reg_tokens", 0),
        prefix_position_embeddings=not dims.get("no_embed_class", False),
        use_class_token=has_cls,
        pooling=_pooling(dims, method),
        use_qk_norm=dims.get("qk_norm", False),
        use_swiglu_ffn=gated,
    )


def _check_spec(method: str, options: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
    unknown = sorted(set(dims) - _DIMS)
    if unknown:
        raise ValueError(
            f"`dims` contains unknown arguments: {', '.join(unknown)}. Known are {', '.join(sorted(_DIMS))}."
        )
    for name in options:
        close = [] if name in _OPTIONS else get_close_matches(name, _OPTIONS, n=1, cutoff=0.85)
        if close:  # other unknown options are options of the training, which do not affect the model
            raise ValueError(
                f"`options` contains {name!r}, which is not an option of a model: did you mean {close[0]!r}?"
            )
    if dims.get("mlp_layer") not in (None, "Mlp", GATED_MLP):
        raise ValueError(f"`mlp_layer` must be Mlp or {GATED_MLP}, got {dims['mlp_layer']!r}.")
    required = {"reduction_loc", "keep_rate"} if method not in ("vit", *_PROBING_METHODS) else set()
    missing = sorted(name for name in required if name not in options)
    if missing:
        raise ValueError(f"`options` of {method} must contain {' and '.join(missing)}.")
    for name, only in (("lasso_inner_dim", 0), ("cls_weight", 1.0)):
        if options.get(name, only) != only:
            raise ValueError(f"`{name}`={options[name]} of the original is not supported: it must be {only}.")


def _image_size(dims: Mapping[str, Any]) -> int | list[int]:
    """Convert `img_size` to our `image_size`: the area covered by complete patches. The original accepts any size, and its patch
    projection ignores the remaining pixels."""
    size, patch = as_pair(dims.get("img_size", 224)), as_pair(dims.get("patch_size", 16))
    height, width = (side - side % step for side, step in zip(size, patch, strict=True))
    if (height, width) != tuple(size):
        logger.warning(
            "`img_size` %s is not a multiple of `patch_size` %s: the original ignores the last rows and columns of pixels, so "
            "`image_size` is %s x %s. Crop images to this size, or pass `interpolate_pos_encoding=True` to the model, which "
            "then accepts images of the full size.",
            dims.get("img_size", 224),
            dims.get("patch_size", 16),
            height,
            width,
        )
    return height if height == width else [height, width]


def mlp_layer_of(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Return the `mlp_layer` of weights under the original's keys, from their shapes: `GATED_MLP`, or None for an ungated MLP."""
    inner, outer = (state_dict.get(f"blocks.0.mlp.{name}.weight") for name in ("fc1", "fc2"))
    if inner is None or outer is None or inner.dim() != 2 or outer.dim() != 2:
        return None  # `fill_model` reports the problem
    return GATED_MLP if inner.shape[0] == 2 * outer.shape[1] else None


def _pooling(dims: Mapping[str, Any], method: str) -> str:
    """Convert `global_pool` and `fc_norm` to our `pooling`. With `fc_norm`, the default for a mean, the norm follows the pooling."""
    pooling = dims.get("global_pool", "token")
    if pooling not in ("token", "avg", "map"):
        raise ValueError(f"`global_pool` must be token, avg or map, got {pooling!r}.")
    fc_norm = dims.get("fc_norm")
    norm_is_last = pooling == "avg" if fc_norm is None else bool(fc_norm)
    if method in _PROBING_METHODS and not norm_is_last:
        return "cls"  # these methods do not pool
    if pooling == "token":
        return "cls"
    if pooling == "avg":
        return "mean" if norm_is_last else "normed_mean"
    return "map_then_norm" if norm_is_last else "map"


def _budget(reduction: str | None, options: Mapping[str, Any], dims: Mapping[str, Any]) -> dict[str, list]:
    """Convert the original's `keep_rate` to our `keep_rate` or `keep_tokens`. A list contains, depending on the method, a rate per stage,
    cumulative rates, or token counts."""
    rates = list(options.get("keep_rate", []))
    if reduction is None:
        return {}
    if reduction == "heuristic" and not options.get("not_contiguous", False):
        return {}  # removes the same number of tokens in each stage, regardless of its rate
    if len(rates) == 1 or reduction in _METHODS_BY_STAGE_RATES:
        return {"keep_rate": rates}
    if reduction == "dyvit":
        if options.get("clc"):  # the original uses the first entry for every stage
            return {"keep_rate": [rates[0]] * len(rates)}
        side = [
            size // patch
            for size, patch in zip(
                as_pair(dims.get("img_size", 224)), as_pair(dims.get("patch_size", 16)), strict=True
            )
        ]
        others = dims.get("class_token", True) + dims.get("reg_tokens", 0) + options.get("num_clr", 0)
        return {"keep_rate": _own_rates(rates, math.prod(side) + others - 1)}
    return {"keep_tokens": [int(count) for count in rates]}


def _own_rates(shares: list[float], num_tokens: int) -> list[float]:
    """Convert cumulative rates of `num_tokens` to rates per stage, adjusted until the rounded token counts are equal."""
    rates: list[float] = []
    for share in shares:
        rate, count = min(share / math.prod(rates), 1.0), int(num_tokens * share)
        while rate < 1.0 and int(num_tokens * math.prod([*rates, rate])) < count:
            rate = math.nextafter(rate, 1.0)
        while int(num_tokens * math.prod([*rates, rate])) > count:
            rate = math.nextafter(rate, 0.0)
        rates.append(rate)
    return rates


def _reduction_kwargs(reduction: str | None, options: Mapping[str, Any], has_cls: bool) -> dict[str, Any] | None:
    """Return the options of the method, under our names."""
    if reduction in ("topk", "evit"):
        return None if has_cls else {"score_by": "cls"}  # the original uses the first patch as CLS
    if reduction in ("maws", "dmaws", "edar"):
        # In the original, `fusion_crit_norm` has no effect without fusion, nor with maws.
        fuses = bool(options.get("dropped_token_fusion"))
        normalizes = fuses and reduction != "maws" and bool(options.get("fusion_crit_norm"))
        return ({"fuse_rest": True} if fuses else {}) | ({"normalize_weights": True} if normalizes else {}) or None
    names = {
        "dpcknn": {"k_neighbors": "k_neighbors", "equal_weight": "equal_weight"},
        "kmedoids": {"cluster_iters": "cluster_iters", "equal_weight": "equal_weight"},
        "sinkhorn": {"cluster_iters": "cluster_iters", "sinkhorn_eps": "sinkhorn_eps"},
        "heuristic": {"heuristic_pattern": "pattern", "min_radius": "min_radius"},
        "dyvit": {name: name for name in ("ratio_weight", "cls_distill_weight", "token_distill_weight")},
    }.get(reduction, {})
    kwargs = {ours: options[theirs] for theirs, ours in names.items() if theirs in options}
    if reduction == "kmedoids" and options.get("equal_weight"):
        kwargs["spread"] = "original"
    if reduction == "heuristic":
        kwargs["contiguous"] = not options.get("not_contiguous", False)
    if reduction == "dyvit" and len(options["keep_rate"]) > 1:
        kwargs["ratio_targets"] = list(options["keep_rate"])
    return kwargs or None


def convert_original_state(state_dict: Mapping[str, torch.Tensor], config: CLCAViTConfig) -> dict[str, torch.Tensor]:
    """Convert tensors (weights or their gradients) from the original's keys to ours.

    The original keeps an unused 1000-way `head` next to an aggregation head; it is skipped.

    Raises:
        ValueError: if there are unknown keys; the message lists them.
    """
    converted, unexpected = {}, []
    for key, tensor in state_dict.items():
        if (tensors := convert_timm_tensor(key, tensor, config.use_swiglu_ffn)) is not None:
            converted |= tensors
        elif key == "pos_embed":
            num_clr = config.num_clr_tokens * config.prefix_position_embeddings
            table, clr = tensor.split([tensor.shape[1] - num_clr, num_clr], dim=1)
            converted["vit.embeddings.position_embeddings"] = table
            if num_clr:
                converted["vit.embeddings.clr_position_embeddings"] = clr
        elif key == "query_prompt_embeddings":
            for layer, queries in zip(config.probe_layers, tensor.split(1), strict=True):
                converted[f"vit.layers.{layer}.probe.queries"] = queries
        elif HEADS[config.head].reads == "cls_tokens" and re.fullmatch(r"head\.(weight|bias)", key):
            continue
        elif (ours := translate(key, (*_KEYS, *_HEAD_KEYS.get(config.head, ())))) is not None:
            converted[ours] = tensor
        elif (ours := translate(key, _STAGE_KEYS)) is not None and (stage := int(re.search(r"\d+", key)[0])) < len(
            config.reduction_layers
        ):
            converted[f"vit.layers.{config.reduction_layers[stage]}.reduction.{ours}"] = tensor
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"`state_dict` contains keys that do not belong to this model: {listed(unexpected)}.")
    return converted
