"""Load checkpoint files of the original CLCA code.

A file is a dictionary saved by `torch.save`: the weights in `model`, and the options of the run in `args` (an `argparse.Namespace`)
or `config` (a dict). The model is determined from shapes and names of its weights, and otherwise from the options. A plain
dictionary of weights requires the original file name, `<dataset>_<model>[_<keep rate>][_cla|_ifa][_clc][_<CLR>][_fz]_<serial>.pth`.
"""

import argparse
import ast
import logging
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import listed_layers
from clca.heads_clca import HEADS, heads_reading
from clca.reduction_base import LearnedSlots
from clca.reductions_clca import get_reduction
from clca.resample_clca import resample_weights

from ..transforms.preprocessing import make_image_processor
from ..utils.text import shortened
from .original_keys import _PROBING_METHODS, convert_original_state, mlp_layer_of, original_config
from .state_dicts import Weights, common_dtype, fill_model
from .timm_architectures import Architecture, find_architecture


logger = logging.getLogger(__name__)

METHODS = ("topk", "evit", "dyvit", "ats", "dpcknn", "tome", "sit", "patchmerger", "heuristic", "kmedoids", "sinkhorn")
METHODS += ("maws", "dmaws", "edar", "nfedar", "glsf")  # methods of the later CLCA code
METHODS_LEFT_OUT = (
    "amaws",
    "multiselect",
    "mcrit",
    "asea",
)  # unsupported methods of the later code, without a published run
LEARNED_SLOTS = {"sit": "weight.3.bias", "patchmerger": "queries", "sinkhorn": "v"}  # tensor with one row per slot

_FILE_NAME = re.compile(
    r"(?P<dataset_name>[^_]+)_(?P<model>(?:[a-z0-9]+_|h2t|vqt)?(?:vit|deit3?|flexivit)_.+?)(?:_(?P<keep_rate>[01]\.\d+))?"
    r"(?:_(?P<head>cla|ifa))?(?P<clc>_clc)?(?:_(?P<num_clr>\d{1,2}))?(?:_fz)?_(?P<serial>\d+)"
)
# Names of weights that only one method has.
_PARTS = (
    (r"score_predictor\.", "dyvit"),
    (r"cluster_layers\.\d+\.score\.", "dpcknn"),
    (r"cluster_layers\.\d+\.(scale|weight)", "sit"),
    (r"cluster_layers\.\d+\.(queries|norm)", "patchmerger"),
    (r"cluster_layers\.\d+\.v", "sinkhorn"),
    (r"query_prompt_embeddings", "vqt"),
)
_DEFAULT_LAYERS = {
    3: [3, 6, 9],
    6: [2, 3, 5, 6, 8, 9],
}  # of 12 layers; six stages for ToMe at 25 %, as it can at most halve
_INTEGERS = ("num_clr", "ifa_dws_conv_groups", "num_query_tokens", "k_neighbors", "cluster_iters", "input_size")
_INTEGERS += ("num_classes", "num_heads", "resize_size", "test_resize_size")
_REPORTED = ("accuracy", "max_accuracy", "epoch")


class OriginalFile(NamedTuple):
    """Contents of a file."""

    path: Path
    state: dict[str, torch.Tensor]  # under the original's names
    options: dict[str, Any]  # those of the run, under the original's names; unset ones left out
    model_name: str  # `<method>_<architecture>[.<pretraining>]`
    method: str  # "vit" for no reduction
    architecture: Architecture
    reported: dict[str, float]  # accuracy and epoch, as the file has them
    averaged: bool = False  # the weights are those of `model_ema`, which the file says were the best


def load_original_file(path: str | os.PathLike, **overrides: Any) -> CLCAViTForImageClassification:
    """Load a checkpoint file of the original code, in evaluation mode.

    The file is read without executing code in its pickle: only tensors, plain values and `argparse.Namespace` are created.

    Args:
        path: the file.
        overrides: fields of `CLCAViTConfig` that override or complete those of the file, such as `num_attention_heads` for a
            width that no timm model has. Weights are resampled for another `image_size` or `patch_size`.

    Raises:
        ValueError: if the file is not such a checkpoint, contains other classes or functions, has an unsupported model or method,
            or contradicts itself or the overrides.
        FileNotFoundError: if there is no such file.
    """
    return build(read_original_file(path), overrides)


def read_original_file(path: str | os.PathLike) -> OriginalFile:
    """Read a checkpoint file with safe unpickling; see `load_original_file` for the errors."""
    path = Path(path)
    payload = _unpickle(path)
    if not isinstance(payload, Mapping):
        raise ValueError(f"`{path}` holds {type(payload).__name__}, not a dictionary with `model`.")
    from_name = _options_of_file_name(path)
    averaged = False
    if "model" in payload:
        options = {k: v for source in ("config", "args") for k, v in _options(payload, source, path).items()}
        if not any(source in payload for source in ("config", "args")):
            options = from_name
        options.setdefault("model", options.get("model_name", from_name.get("model")))
        averaged = _averaged_were_best(payload, options, path)
        state = payload["model_ema" if averaged else "model"]
    else:
        state, options, payload = payload, from_name, {}
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(
            f"`{path}` has no weights: neither `{'model_ema' if averaged else 'model'}` in it nor the file itself is a "
            "dictionary of tensors."
        )
    if not isinstance(options.get("model"), str):
        raise ValueError(
            f"`{path}` does not name its model: `args` and `config` have no `model`, and the file name is not "
            "<dataset>_<model>_..._<serial>."
        )
    method, architecture = split_model_name(options["model"])
    return OriginalFile(
        path=path,
        state={_without_wrapper(key): tensor for key, tensor in state.items()},
        options=_checked({k: plain for k, v in options.items() if (plain := _from_text(v)) is not None}),
        model_name=options["model"],
        method=method,
        architecture=architecture,
        reported={k: float(payload[k]) for k in _REPORTED if _is_number(payload.get(k))},
        averaged=averaged,
    )


def _averaged_were_best(payload: Mapping[str, Any], options: Mapping[str, Any], path: Path) -> bool:
    """Return whether the averaged weights had the best score and are in the file; log which weights are loaded."""
    if not _from_text(payload.get("ema_best", options.get("ema_best"))):
        return False
    if "model_ema" in payload:
        logger.warning("%s: `ema_best` is set, loading the averaged weights in `model_ema` instead of `model`", path)
        return True
    logger.warning(
        "%s: `ema_best` is set, but the file has no averaged weights in `model_ema`; loading those in `model`",
        path,
    )
    return False


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    is_archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK" and not is_archive:
            raise ValueError(f"`{path}` is not complete: its end is missing.")
    with _only_safe_globals(argparse.Namespace):
        try:
            # with memory mapping, the state of the optimizer is never read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        except Exception as error:  # damaged files fail in many ways
            if foreign := _foreign_globals(path, error):
                raise ValueError(
                    f"`{path}` contains {', '.join(foreign)}, which is not executed: only tensors, plain values and "
                    "argparse.Namespace are read, because anything else in a pickle can run code. If you trust the file, load it "
                    "with `torch.load(..., weights_only=False)` yourself and save a dictionary of its `model` and, as `args`, "
                    "the plain values of its options."
                ) from error
            raise ValueError(
                f"`{path}` is not a complete torch checkpoint ({type(error).__name__}: {_first_line(error)})."
            ) from error


@contextmanager
def _only_safe_globals(*allowed: type) -> Iterator[None]:
    """Let torch build `allowed` and none of what other packages have allowed in this process."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(list(allowed)):
            yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(others)


def _foreign_globals(path: Path, error: Exception) -> list[str]:
    """Return the names of classes and functions that a file needs and that are not allowed, without importing them."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch's function supports only the newer of its two formats
        return sorted(set(re.findall(r"GLOBAL ([\w.]+)", str(error))))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return shortened(lines[0]).rstrip(":").removesuffix(".")


def _options(payload: Mapping[str, Any], source: str, path: Path) -> dict[str, Any]:
    value = payload.get(source, {})
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    if not isinstance(value, Mapping):
        raise ValueError(f"`{source}` in `{path}` must be a Namespace or a dictionary, got {type(value).__name__}.")
    return dict(value)


def _options_of_file_name(path: Path) -> dict[str, Any]:
    """Parse options from a file name, under the original's names; empty if the name has another scheme."""
    match = _FILE_NAME.fullmatch(path.stem)
    if match is None:
        return {}
    options = {"dataset_name": match["dataset_name"], "model": match["model"], "clc": bool(match["clc"])}
    options |= {"ifa_head": bool(match["head"]), "num_clr": int(match["num_clr"] or 0)}
    if match["keep_rate"]:
        options["keep_rate"] = [float(match["keep_rate"])]
    return options


def _from_text(value: Any) -> Any:
    """Parse a list, boolean or None that a file stores as text, such as "[3, 6, 9]" or "True"; return other values unchanged."""
    if isinstance(value, str) and (value.startswith("[") or value in ("True", "False", "None")):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value  # `_checked` reports it
    return value


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """Check the types of options, and convert `keep_rate` and `reduction_loc` to lists.

    Raises:
        ValueError: for a value of the wrong type.
    """
    for name, kind, kind_name in (("keep_rate", Real, "numbers"), ("reduction_loc", int, "integers")):
        if name in options:
            value = options[name]
            options[name] = list(value) if isinstance(value, list | tuple) else [value]
            if not all(isinstance(v, kind) and not isinstance(v, bool) for v in options[name]):
                raise ValueError(f"`{name}` of the checkpoint must be {kind_name}, got {value!r}.")
    for name in _INTEGERS:
        if name in options and (not isinstance(options[name], int) or isinstance(options[name], bool)):
            raise ValueError(f"`{name}` of the checkpoint must be an integer, got {options[name]!r}.")
    return options


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _without_wrapper(key: str) -> str:
    """Remove the prefix that DistributedDataParallel adds to a weight's name."""
    return str(key).removeprefix("module.")


def split_model_name(name: str) -> tuple[str, Architecture]:
    """Split `evit_deit3_base_patch16_224.fb_in1k` into "evit" and the architecture; the method is "vit" if the name has none.

    Raises:
        ValueError: if the method or architecture is not supported.
    """
    match = re.fullmatch(
        rf"(?:({'|'.join((*METHODS, *METHODS_LEFT_OUT))})_|({'|'.join(heads_reading('probes'))})_?)?(.+)", name
    )
    if match is None:
        raise ValueError("`model` of the checkpoint is empty.")
    method = match[1] or match[2] or "vit"
    if method in METHODS_LEFT_OUT:
        raise ValueError(
            f"`model` is {name}: {method} of the later CLCA code is not supported. No trained model of it is known."
        )
    try:
        return method, find_architecture(match[3])
    except ValueError as error:
        network = match[3].partition(".")[0]  # the network may be known, even if this pretraining is not
        try:
            return method, find_architecture(network)
        except ValueError:
            raise ValueError(f"`model` is {name}: {error}") from error


def build(file: OriginalFile, overrides: Mapping[str, Any] | None = None) -> CLCAViTForImageClassification:
    """Build the model of a file; see `load_original_file` for the overrides and errors."""
    overrides = dict(overrides or {})
    known = {f.name for f in fields(CLCAViTConfig)} | {"num_labels"}
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"CLCAViTConfig has no argument {', '.join(f'`{name}`' for name in unknown)}.")
    source = open_original(file, overrides).config
    config = CLCAViTConfig.from_dict(source.to_dict() | _changes(source, overrides))
    weights = resample_weights(convert_original_state(file.state, config), source, config)
    model = CLCAViTForImageClassification(config).eval()
    # The original has no final norm if the head uses CLS before it; ours has one, unused.
    optional = [r"vit\.layernorm\..*"] if HEADS[config.head].before_norm else []
    fill_model(model.to(common_dtype(weights)), weights, optional, source=f"weights of `{file.path}`")
    return model


def open_original(file: OriginalFile, overrides: Mapping[str, Any] | None = None) -> Weights:
    """Return the weights of a file under our names, with the configuration that they match.

    Args:
        file: result of `read_original_file`.
        overrides: fields of `CLCAViTConfig` that the file does not determine.

    Raises:
        ValueError: as `load_original_file`.
    """
    try:
        config = _config_of_weights(file, overrides or {})
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"`{file.path}` does not contain the weights of a ViT: {type(error).__name__}: {_first_line(error)}."
        ) from error
    return Weights(convert_original_state(file.state, config), config)


def original_image_processor(file: OriginalFile, image_size: int) -> Any:
    """Return the image processor of the original evaluation: resize to a square, then center crop."""
    # mean and std of 0.5, or ImageNet's
    statistics = [0.5] * 3 if file.options.get("custom_mean_std") else None
    if statistics and file.options.get("dataset_name") == "cifar10":
        logger.warning(
            "%s was trained with the mean and std of its data, which it does not contain; using 0.5", file.path
        )
    input_size, resize_size = file.options.get("input_size"), None
    patch_size = file.state["patch_embed.proj.weight"].shape[-1]
    if input_size is not None and input_size - input_size % patch_size == image_size:
        # The later code has separate options for the size in evaluation.
        resize_size = file.options.get("test_resize_size", file.options.get("resize_size"))
        if resize_size is None:
            resize_size = int(
                input_size / 0.875
            )  # from the full input size, including pixels after the last complete patch
    return make_image_processor(image_size, resize_size, image_mean=statistics, image_std=statistics)


def _config_of_weights(file: OriginalFile, overrides: Mapping[str, Any]) -> CLCAViTConfig:
    """Return the configuration of the model in a file; `overrides` gives what the file does not determine, such as the heads."""
    options, dims = dict(file.options), _dims(file, overrides)
    _read_head(file, options, dims)
    _read_stages(file, options, dims, overrides)
    num_labels = _num_labels(file.state)
    _agree(file, "num_classes", options.get("num_classes"), num_labels, "the weights of the head")
    spec = {"method": file.method, "options": options, "dims": dims, "num_labels": num_labels}
    exact = {"intermediate_size": file.state["blocks.0.mlp.fc2.weight"].shape[1]}
    if "quickgelu" in file.architecture.name:
        exact["hidden_act"] = "quick_gelu"
    slots = _slots(file)
    if slots and not file.options.get("keep_rate"):
        exact |= {"keep_rate": [1.0], "keep_tokens": slots}
    config = CLCAViTConfig.from_dict(original_config(spec).to_dict() | exact)
    expected = _learned_slots(config, len(slots))
    if expected != slots:
        raise ValueError(
            f"`keep_rate` of `{file.path}` is {options['keep_rate']}, which gives {expected} tokens, but the weights have "
            f"{slots}."
        )
    return config


def _learned_slots(config: CLCAViTConfig, stages: int) -> list[int]:
    method = get_reduction(config.reduction)
    if not stages:
        return []
    assert issubclass(method, LearnedSlots)
    return [method.num_slots(config, stage) for stage in range(stages)]


def _changes(source: CLCAViTConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides and the fields that must change with them.

    Raises:
        ValueError: if an override contradicts the weights.
    """
    fixed = ("num_labels", "hidden_size", "num_hidden_layers", "intermediate_size", "num_channels", "num_clr_tokens")
    for name in (*fixed, "num_register_tokens", "head"):
        if name in overrides and overrides[name] != getattr(source, name):
            raise ValueError(
                f"`{name}`={overrides[name]!r} contradicts the weights, which have {getattr(source, name)}."
            )
    changes = {name: value for name, value in overrides.items() if name != "num_labels"}
    if "keep_tokens" in changes:
        changes = {"keep_rate": [1.0]} | changes
    elif "keep_rate" in changes:
        changes = {"keep_tokens": None} | changes
    else:
        changes |= kept_slots(source, changes)
    if changes.get("reduction", source.reduction) != source.reduction:
        changes = {"reduction_kwargs": None} | changes
    return changes


def kept_slots(source: CLCAViTConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that must change with `image_size` or `patch_size` for a method with learned slots, so that the number of slots
    remains that of the weights."""
    resized = {"image_size", "patch_size"} & changes.keys()
    if (
        source.reduction not in LEARNED_SLOTS
        or not resized
        or {"keep_rate", "keep_tokens", "reduction"} & changes.keys()
    ):
        return {}
    return {"keep_rate": [1.0], "keep_tokens": _learned_slots(source, len(source.reduction_layers))}


def _dims(file: OriginalFile, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor arguments of the original's ViT."""
    state = file.state
    blocks = (f"blocks.0.{name}.weight" for name in ("attn.proj", "mlp.fc1", "mlp.fc2"))
    for key in ("patch_embed.proj.weight", "pos_embed", *blocks):
        if key not in state:
            raise ValueError(f"`{file.path}` does not contain the weights of a ViT: `{key}` is missing.")
    width, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    has_cls = "cls_token" in state
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    grid, no_embed_class = _grid(file, has_cls + registers)
    image_size = file.options.get("input_size", grid * patch_size)
    if image_size // patch_size != grid:
        _agree(file, "input_size", image_size, grid * patch_size, "the position embeddings")
    depth = 1 + max(int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key)))
    has_scale = "blocks.0.ls1.gamma" in state  # the initial value affects only new models
    pool = "map" if "attn_pool.latent" in state else "token" if has_cls and "fc_norm.weight" not in state else "avg"
    return {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": _num_heads(file, width, overrides),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "mlp_layer": mlp_layer_of(state),
        "layer_norm_eps": file.architecture.fields["layer_norm_eps"],
        "class_token": has_cls,
        "global_pool": pool,
        "fc_norm": "norm.weight" not in state,  # whether the norm follows the mean
        "reg_tokens": registers,
        "no_embed_class": no_embed_class,
        "pre_norm": "norm_pre.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": file.architecture.fields.get("layerscale_value", 1e-5) if has_scale else None,
    }


def _grid(file: OriginalFile, prefix: int) -> tuple[int, bool]:
    """Return the patches per side of the image, and whether only patches have position embeddings."""
    rows = file.state["pos_embed"].shape[1]
    others = prefix + (file.state["clr"].shape[1] if "clr" in file.state else 0)
    # decides in the rare case that both counts are squares
    named = not file.architecture.fields.get("prefix_position_embeddings", True)
    for no_embed_class in (named, not named):
        patches = rows if no_embed_class else rows - others
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return math.isqrt(patches), no_embed_class
    raise ValueError(
        f"`pos_embed` in `{file.path}` has {rows} positions: neither with nor without the {others} of CLS, registers and CLR "
        "is this a square number of patches."
    )


def _num_heads(file: OriginalFile, width: int, overrides: Mapping[str, Any]) -> int:
    said = [overrides.get("num_attention_heads"), file.options.get("num_heads")]
    if (heads := next((n for n in said if n is not None), None)) is not None:
        return heads
    fields = file.architecture.fields
    if width != fields["hidden_size"]:
        raise ValueError(
            f"`num_attention_heads` of `{file.path}` is unknown: {file.architecture.name} has the width "
            f"{fields['hidden_size']}, but the weights have {width}. Set `num_attention_heads`."
        )
    return fields["num_attention_heads"]


def _read_head(file: OriginalFile, options: dict[str, Any], dims: Mapping[str, Any]) -> None:
    """Add options of the head and CLR that follow from the weights.

    Raises:
        ValueError: if options and weights contradict each other.
    """
    state, width = file.state, dims["embed_dim"]
    clr = state["clr"].shape[1] if "clr" in state else 0
    _agree(file, "num_clr", options.get("num_clr"), clr, "the weights")
    has_ifa = "ifa_head.0.4.weight" in state
    _agree(file, "ifa_head", _as_bool(options.get("ifa_head")), has_ifa, "whether the weights have one")
    options |= {"num_clr": clr, "ifa_head": has_ifa}
    if has_ifa:
        is_cla = state["ifa_head.0.4.weight"].dim() == 3
        groups = state["ifa_head.0.1.weight"].shape[0] // width if is_cla else 0
        # the file name has `_cla` or `_ifa`, the options have the number of channels
        _agree(file, "ifa_dws_conv_groups", options.get("ifa_dws_conv_groups"), groups, "the weights of the head")
        options["ifa_dws_conv_groups"] = groups
    if "query_prompt_embeddings" in state:
        queries = state["query_prompt_embeddings"].shape[1]
        _agree(file, "num_query_tokens", options.get("num_query_tokens"), queries, "the weights")
        options["num_query_tokens"] = queries


def _read_stages(
    file: OriginalFile, options: dict[str, Any], dims: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Add the options method, layers and keep rate.

    Raises:
        ValueError: if options and weights contradict each other.
    """
    for pattern, method in _PARTS:
        if method != file.method and (key := next((k for k in file.state if re.match(pattern, k)), None)):
            raise ValueError(
                f"`model` of `{file.path}` is {file.model_name}, but the weights contain `{key}`, a part of {method}."
            )
    if file.method == "dpcknn":
        equal = not any(key.startswith("cluster_layers.") for key in file.state)
        _agree(file, "equal_weight", _as_bool(options.get("equal_weight")), equal, "whether the weights lack a score")
        options["equal_weight"] = equal
    if overrides.get("reduction_layers") is not None:
        options["reduction_loc"] = list(listed_layers(overrides["reduction_layers"], dims["depth"]))
    if file.method == "edar" and "dropped_token_fusion" not in options and overrides.get("reduction_kwargs") is None:
        # Inferred from the logged costs of the published runs; the weights are the same either way.
        logger.warning(
            "%s does not contain `dropped_token_fusion`: assuming that tokens are fused, as in the published runs of edar at "
            "224 px. Set `reduction_kwargs` to {'fuse_rest': False} for a model that drops them",
            file.path,
        )
        options["dropped_token_fusion"] = True
    depth, probes = dims["depth"], file.method in heads_reading("probes")
    counts = _num_stages(file, dims)
    if file.method == "vit":
        options["reduction_loc"] = [
            layer for layer in _DEFAULT_LAYERS[3] if layer < depth
        ]  # regardless of the options
    elif "reduction_loc" not in options:
        count = max(counts.values(), default=3)
        layers = list(range(depth)) if probes and count == depth else _DEFAULT_LAYERS.get(count)
        if layers is None or layers[-1] >= depth:
            raise ValueError(f"`reduction_layers` of `{file.path}` are unknown: set `reduction_layers`.")
        logger.warning("%s does not contain its layers of reduction; assuming %s", file.path, layers)
        options["reduction_loc"] = layers
    layers = options["reduction_loc"] or (list(range(depth)) if probes else [])
    for key, count in counts.items():
        # an aggregation head always uses the last layer
        if count != len(set(layers) - ({depth - 1} if key.startswith("ifa_head") else set())):
            raise ValueError(
                f"`reduction_loc` of `{file.path}` is {options['reduction_loc']}, but `{key}` has the shape for {count} such "
                "layers."
            )
    if file.method not in ("vit", *heads_reading("probes")) and not options.get("keep_rate"):
        if not _slots(file) and not {"keep_rate", "keep_tokens"} & overrides.keys():
            raise ValueError(f"`keep_rate` of `{file.path}` is unknown: set `keep_rate`.")
        options["keep_rate"] = [1.0]  # replaced by the slots or overrides


def _num_stages(file: OriginalFile, dims: Mapping[str, Any]) -> dict[str, int]:
    """Return name of a weight -> number of layers that reduce tokens or are probed, for each weight whose shape determines it."""
    state, width, counts = file.state, dims["embed_dim"], {}
    if "ifa_head.0.4.weight" in state:
        key = "ifa_head.0.1.weight" if state["ifa_head.0.4.weight"].dim() == 3 else "ifa_head.0.0.weight"
        counts[key] = state[key].shape[-1] - 1
    if "query_prompt_embeddings" in state:
        counts["query_prompt_embeddings"] = state["query_prompt_embeddings"].shape[0]
    if file.method == "h2t" and "head.weight" in state:
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
        counts["head.weight"] = (state["head.weight"].shape[1] - 2 * width) // (3 * width + hidden)
    for part in ("score_predictor", "cluster_layers"):
        if stages := {m[1] for key in state if (m := re.match(rf"{part}\.(\d+)\.", key))}:
            counts[part] = len(stages)
    return counts


def _slots(file: OriginalFile) -> list[int]:
    """Return the number of learned slots per stage; empty for other methods."""
    pattern = rf"cluster_layers\.(\d+)\.{re.escape(LEARNED_SLOTS.get(file.method, '-'))}"
    slots = {int(m[1]): len(tensor) for key, tensor in file.state.items() if (m := re.fullmatch(pattern, key))}
    return [slots[stage] for stage in sorted(slots)]


def _num_labels(state: Mapping[str, torch.Tensor]) -> int:
    """Return the number of classes. If there is an aggregation head, `head` is unused."""
    key = "ifa_head.0.4.weight" if "ifa_head.0.4.weight" in state else "head.weight"
    if key not in state:
        raise ValueError("`model` has no classifier: `head.weight` is missing.")
    return state[key].shape[0]


def _as_bool(value: Any) -> bool | None:
    return None if value is None else bool(value)


def _agree(file: OriginalFile, name: str, said: Any, shown: Any, where: str) -> None:
    if said is not None and said != shown:
        raise ValueError(f"`{name}` of `{file.path}` is {said}, which contradicts {where}: {shown}.")


def load_original(state_dict: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> CLCAViTForImageClassification:
    """Load weights of the original code, in evaluation mode, in the dtype of the weights.

    Args:
        state_dict: tensors under the original's keys (timm's, and `clr`, `ifa_head.*` and those of the methods).
        spec: description of the model, see `original_config`. `num_labels` and the `mlp_layer` of `dims` are optional: they
            follow from the weights.

    Raises:
        ValueError: if keys are unexpected, missing, or have another shape than in the configuration.
    """
    if "num_labels" not in spec:
        spec = {**spec, "num_labels": _labels_of_spec(state_dict, spec)}
    if "mlp_layer" not in spec["dims"]:
        spec = {**spec, "dims": {**spec["dims"], "mlp_layer": mlp_layer_of(state_dict)}}
    config = original_config(spec)
    model = CLCAViTForImageClassification(config).eval()
    converted = convert_original_state(state_dict, config)
    # The original has no final norm if the head uses CLS before it; ours has one, unused.
    optional = [r"vit\.layernorm\..*"] if HEADS[config.head].before_norm else []
    fill_model(model.to(common_dtype(converted)), converted, optional, source="tensors of the `state_dict`")
    return model


def _labels_of_spec(state_dict: Mapping[str, torch.Tensor], spec: Mapping[str, Any]) -> int:
    """Return the number of classes of the head that is used: the last layer of an aggregation head, else `head`."""
    aggregates = spec["options"].get("ifa_head") and spec["method"] not in _PROBING_METHODS
    prefix = "ifa_head." if aggregates else "head."
    biases = [key for key in state_dict if key.startswith(prefix) and key.endswith("bias")]
    if not biases:
        raise ValueError(f"`num_labels` is required: `state_dict` has no {prefix}* with the number of classes.")
    return state_dict[max(biases)].shape[0]
