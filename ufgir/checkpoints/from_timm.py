"""Convert weights of timm's VisionTransformer to `CLCAViTForImageClassification`, without timm.

`ufgir.checkpoints.timm_architectures` lists the supported architectures. Without reduction, the model computes the same as timm's.
"""

import json
import logging
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from clca import CLCAImageProcessor, CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair

from ..utils.text import listed
from .config_options import changed_config
from .state_dicts import Weights, common_dtype, fit_model, tensor_shapes
from .timm_architectures import Architecture, find_architecture
from .timm_keys import convert_timm_tensor, translate


logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Keys under which files store the weights, and prefixes of their names.
_WRAPPERS = ("state_dict", "model", "encoder", "teacher")
_PREFIXES = ("module.", "backbone.", "base_encoder.", "visual.trunk.")

# Parts of checkpoints outside the encoder, and why they are skipped.
_LEFT_OUT = (
    (r"mask_token|decoder[._].*", "is only used in pretraining"),
    (r"head\.\d+\..*", "is a projection head of the pretraining"),
    (r"head_dist\..*", "uses the distillation token; only the classifier on CLS is loaded"),
)

# Parts next to an encoder with a prefix: the text tower of CLIP, the second network of MoCo and DINO, heads of pretraining.
_OTHER_PARTS = (
    r"(text|token_embedding|positional_embedding|text_projection|ln_final|transformer\.|logit_(scale|bias)|attn_mask|visual\."
    r"|momentum_encoder|predictor|queue|decoder|mask_token|head|fc\.|projector|teacher|student|center|dino_|ibot_)"
)

# OpenAI's CLIP -> timm, without the prefix `visual.`.
_OPENAI_KEYS = (
    (r"conv1\.weight", "patch_embed.proj.weight"),
    (r"class_embedding", "cls_token"),
    (r"positional_embedding", "pos_embed"),
    (r"ln_pre\.(weight|bias)", r"norm_pre.\1"),
    (r"ln_post\.(weight|bias)", r"norm.\1"),
    (r"proj", "head.weight"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)
# DINOv2 names of its authors -> timm.
_DINOV2_KEYS = (
    (r"blocks\.(\d+)\.mlp\.w12\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"blocks\.(\d+)\.mlp\.w3\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)

# Arguments of timm's VisionTransformer (`model_args` in config.json) -> fields of `CLCAViTConfig`.
_MODEL_ARGS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "num_channels",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "qkv_bias": "qkv_bias",
    "qk_norm": "use_qk_norm",
    "init_values": "layerscale_value",
    "class_token": "use_class_token",
    "reg_tokens": "num_register_tokens",
    "pre_norm": "pre_norm",
}
# Further arguments without effect on evaluation, or that follow from the weights and other entries.
_IRRELEVANT_ARGS = (
    r"num_classes|global_pool|fc_norm|(.*_)?drop(_path|out)?_rate|drop_rate|dynamic_img_size|dynamic_img_pad|"
    r"fix_init|weight_init|strict_img_size"
)


class TimmSource(NamedTuple):
    """Contents of a source.

    Attributes:
        state_dict: tensors under the names of the file.
        architecture: architecture of the network.
        label_names: names of the classes, if known.
    """

    state_dict: Mapping[str, Any]
    architecture: Architecture
    label_names: Sequence[str] | None = None


def load_timm(
    source: Mapping[str, torch.Tensor] | str | Path,
    architecture: str | Architecture | None = None,
    *,
    revision: str | None = None,
    **config: Any,
) -> CLCAViTForImageClassification:
    """Load the weights of timm's VisionTransformer, in evaluation mode, in float32 (float64 if all weights are float64).

    Position embeddings and patch projection are resampled if `image_size` or `patch_size` differ from the weights
    (`clca.resample_clca`). The following are initialized: CLR tokens (from CLS) and their positions; the classifier, if the number
    of classes, the head or the pooling differs from the source; parameters of the reduction and of the pooling. The second head
    of a distilled DeiT is skipped.

    Args:
        source: a state dict of timm (or of DINOv2, MAE, MoCo v3, I-JEPA or OpenAI's CLIP as published by their authors); a
            file that contains one; or a folder or Hub repository with timm's config.json and the weights.
        architecture: name in `ufgir.checkpoints.timm_architectures`, such as "deit3_base_patch16_224.fb_in1k"; optional if
            the source has a config.json.
        revision: branch, tag or commit of the Hub repository.
        config: fields of `CLCAViTConfig` that override the architecture's. By default, `num_labels` is that of the weights,
            or 0 (logits are the pooled features) if they have no classifier.

    Raises:
        ValueError: if the architecture is unknown, the source cannot be read, or weights are unexpected, missing, or of other
            shapes than the configuration requires; all of them are listed.

    Example:

    ```python
    model = load_timm("timm/deit3_base_patch16_224.fb_in1k", reduction="evit", keep_rate=0.5, image_size=448, num_labels=80)
    ```
    """
    found = read_source(source, architecture, revision)
    state = to_timm_names(found.state_dict)
    wanted = _wanted_config(state, found, config)
    weights = _our_weights(state, found)
    dtype = torch.float64 if common_dtype(weights.state) == torch.float64 else torch.float32
    return fit_model(weights, wanted, dtype=dtype).model


def open_timm(
    source: str | Path,
    architecture: str | Architecture | None = None,
    revision: str | None = None,
    shapes_only: bool = False,
) -> Weights:
    """Read the weights of a source, and a configuration with the image size of the weights.

    Args:
        source: file, folder or Hub repository, see `load_timm`.
        architecture: name of the architecture, if there is no config.json.
        revision: branch, tag or commit of the Hub repository.
        shapes_only: read only names and shapes; tensors are on the meta device.

    Raises:
        ValueError: as `load_timm`.
    """
    found = read_source(source, architecture, revision, shapes_only)
    return _our_weights(to_timm_names(found.state_dict), found)


def timm_image_processor(
    architecture: str | Architecture, image_size: int | Sequence[int] | None = None
) -> CLCAImageProcessor:
    """Return the image processor of a pretrained model: its mean and std, resampling, and margin around the center crop. Unlike timm,
    the resize does not keep the aspect ratio.

    Args:
        architecture: name in `ufgir.checkpoints.timm_architectures`, or the result of `read_architecture`.
        image_size: side of the model's input, or height and width, pixels; by default the architecture's.

    Raises:
        ValueError: if the architecture is unknown.
    """
    if isinstance(architecture, str):
        architecture = find_architecture(architecture)
    height, width = as_pair(architecture.image_size if image_size is None else image_size)
    return CLCAImageProcessor(
        do_convert_rgb=True,
        size={"height": height, "width": width},
        crop_pct=[side / math.floor(side / architecture.crop_pct) for side in (height, width)],  # rounded as in timm
        resample=Image.Resampling[architecture.resample.upper()],
        image_mean=list(architecture.mean),
        image_std=list(architecture.std),
    )


def read_architecture(source: str | Path, revision: str | None = None) -> Architecture:
    """Read the architecture, including pixel normalization, from the config.json of a timm folder or Hub repository.

    Raises:
        ValueError: if there is no config.json, or its architecture is not in `ufgir.checkpoints.timm_architectures`.
    """
    return _read_description(source, revision)[0]


def is_timm_source(source: str | Path) -> bool:
    """Return whether a folder or Hub repository has timm's config.json."""
    try:
        return "architecture" in _read_config(source, None)
    except (OSError, ValueError):
        return False


def read_source(
    source: Mapping[str, torch.Tensor] | str | Path,
    architecture: str | Architecture | None = None,
    revision: str | None = None,
    shapes_only: bool = False,
) -> TimmSource:
    """Read the weights (with `shapes_only`, meta tensors), architecture and class names of a source, see `load_timm`.

    Raises:
        ValueError: if the architecture is missing or unknown, or the source does not exist or cannot be read.
    """
    known = find_architecture(architecture) if isinstance(architecture, str) else architecture
    if isinstance(source, Mapping) or Path(source).is_file():
        if known is None:
            raise ValueError("`architecture` is required: it cannot be determined from weights alone.")
        return TimmSource(source if isinstance(source, Mapping) else _read_weights(Path(source), shapes_only), known)
    labels = None
    if known is None:
        known, labels = _read_description(source, revision)
    for name in WEIGHT_FILES:
        file = _find_file(source, name, revision)
        if file is not None:
            return TimmSource(_read_weights(file, shapes_only), known, labels)
    raise ValueError(f"`source` {source} has no weights: found neither {' nor '.join(WEIGHT_FILES)}.")


def _find_file(source: str | Path, name: str, revision: str | None) -> Path | None:
    """Return a file of a folder or Hub repository; None if it does not exist."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    try:
        repository = re.sub(r"^hf[-_]hub:", "", str(source))
        return Path(hf_hub_download(repository, name, revision=revision))
    except HFValidationError as error:
        raise ValueError(f"`source` {source} is neither a file, nor a folder, nor a Hub repository.") from error
    except (OSError, HfHubHTTPError) as error:
        logger.debug("could not find %s of %s: %s", name, source, error)
        return None


def _read_config(source: str | Path, revision: str | None) -> dict[str, Any]:
    file = _find_file(source, "config.json", revision)
    if file is None:
        raise ValueError(
            f"`source` {source} is not a folder or Hub repository with a config.json: check its name, or set `architecture`."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`source` {source}: its config.json cannot be read.") from error
    if not isinstance(data, dict):
        raise ValueError(f"`source` {source}: its config.json must contain a JSON object.")
    return data


def _read_description(source: str | Path, revision: str | None) -> tuple[Architecture, Sequence[str] | None]:
    data = _read_config(source, revision)
    try:
        return _described(data, source)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"`source` {source}: its config.json has a value of the wrong type: {error}.") from error


def _described(data: Mapping[str, Any], source: str | Path) -> tuple[Architecture, Sequence[str] | None]:
    """Return the architecture of timm's config.json, and its class names if any."""
    if "architecture" not in data:
        raise ValueError(f"`source` {source}: its config.json is not timm's: `architecture` is missing.")
    described = data.get("pretrained_cfg") or data  # older files have its entries at the top level
    name, tag = data["architecture"], described.get("tag")
    try:
        architecture = find_architecture(f"{name}.{tag}" if tag and "." not in name else name)
    except ValueError:
        architecture = find_architecture(name)  # an unknown tag
    own = dict(architecture.fields)
    if "input_size" in described:
        channels, height, width = described["input_size"]
        own["num_channels"] = channels
        if (height, width) != as_pair(own["image_size"]):
            patch = as_pair(own["patch_size"])
            height, width = height - height % patch[0], width - width % patch[1]
            own["image_size"] = height if height == width else [height, width]
    own |= _fields_of_model_args(data.get("model_args") or {}, own, source)
    pooling = data.get("global_pool")
    if pooling in ("token", "avg", "map") and pooling != _timm_pooling(own.get("pooling", "cls")):
        own["pooling"] = {"token": "cls", "avg": "mean", "map": "map"}[pooling]
    other = {"mean": "mean", "std": "std", "crop_pct": "crop_pct", "resample": "interpolation", "licence": "license"}
    found = {ours: described[theirs] for ours, theirs in other.items() if described.get(theirs)}
    found |= {name: tuple(found[name]) for name in ("mean", "std") if name in found}
    if found.get("resample", "bicubic").upper() not in Image.Resampling.__members__:
        del found["resample"]
    return replace(architecture, fields=own, **found), described.get("label_names") or data.get("label_names")


def _timm_pooling(pooling: str) -> str:
    return {"cls": "token", "mean": "avg", "normed_mean": "avg", "map": "map", "map_then_norm": "map"}[pooling]


def _fields_of_model_args(args: Mapping[str, Any], own: Mapping[str, Any], source: str | Path) -> dict[str, Any]:
    found = {_MODEL_ARGS[name]: value for name, value in args.items() if name in _MODEL_ARGS}
    if "no_embed_class" in args:
        found["prefix_position_embeddings"] = not args["no_embed_class"]
    if "mlp_ratio" in args:
        width = int(found.get("hidden_size", own["hidden_size"]) * args["mlp_ratio"])
        found["intermediate_size"] = width // 2 if own.get("use_swiglu_ffn") else width
    if "global_pool" in args:
        found["pooling"] = {"token": "cls", "avg": "mean", "map": "map"}.get(args["global_pool"], "cls")
    others = set(args) - set(_MODEL_ARGS) - {"no_embed_class", "mlp_ratio"}
    unknown = sorted(name for name in others if not re.fullmatch(_IRRELEVANT_ARGS, name))
    if unknown:
        raise ValueError(f"`source` {source}: its config.json has unknown `model_args`: {', '.join(unknown)}.")
    return found


def _read_weights(file: Path, shapes_only: bool = False) -> dict[str, Any]:
    """Read the tensors of a .safetensors file, or of a pickle that contains only tensors."""
    try:
        if file.suffix == ".safetensors":
            return tensor_shapes(file) if shapes_only else load_file(file)
        return torch.load(file, map_location="meta" if shapes_only else "cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{file} cannot be read: it is damaged, or a pickle that contains other objects than tensors. If you trust it, "
            "load it yourself and save its tensors with `safetensors.torch.save_file`."
        ) from error


def to_timm_names(state_dict: Mapping[str, Any]) -> State:
    """Rename the encoder's tensors to those of timm's VisionTransformer: unwrap nested state dicts, strip prefixes, convert the layouts of
    OpenAI's CLIP and DINOv2, and skip weights that are only used in pretraining.

    Raises:
        ValueError: if there are no tensors, or unknown ones.
    """
    state = state_dict
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"`state_dict` must map names to tensors, got {type(state).__name__}.")
    while inner := next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None):
        state = inner
    state = {key: tensor for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    for prefix in _PREFIXES:
        inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        if prefix == "visual.trunk." and "visual.head.proj.weight" in state:
            inside |= _without_bias(state["visual.head.proj.weight"])
        outside = [key for key in state if not key.startswith(prefix)] if inside else []
        if strange := [key for key in outside if not re.match(_OTHER_PARTS, key)]:
            raise ValueError(f"`state_dict` contains unknown weights outside of {prefix}*: {listed(strange)}.")
        state = inside or state
    if not state:
        raise ValueError("`state_dict` contains no tensors.")
    if "visual.class_embedding" in state:
        state = _from_openai(state)
    if "mask_token" in state and "pos_embed" in state:
        state = _from_dinov2(state)
    kept = {}
    for key, tensor in state.items():
        reason = next((reason for pattern, reason in _LEFT_OUT if re.fullmatch(pattern, key)), None)
        if reason is None:
            kept[key] = tensor
        else:
            logger.info("Skipping `%s`: it %s", key, reason)
    return kept


def _without_bias(weight: torch.Tensor) -> State:
    return {"head.weight": weight, "head.bias": weight.new_zeros(weight.shape[0])}


def _from_openai(state: Mapping[str, torch.Tensor]) -> State:
    """Rename the image tower of OpenAI's CLIP to timm's names; keep unknown names."""
    converted = {}
    for key, tensor in state.items():
        if not key.startswith("visual."):
            continue
        theirs = key.removeprefix("visual.")
        name = translate(theirs, _OPENAI_KEYS) or key
        if theirs == "proj":
            converted |= _without_bias(tensor.T.contiguous())
        elif theirs == "class_embedding":
            converted[name] = tensor.reshape(1, 1, -1)
        elif theirs == "positional_embedding":
            converted[name] = tensor.unsqueeze(0)
        else:
            converted[name] = tensor
    return converted


def _from_dinov2(state: Mapping[str, torch.Tensor]) -> State:
    """Rename DINOv2 to timm's names. With registers, add its position to CLS: the prefix tokens all have positions or none."""
    converted = {translate(key, _DINOV2_KEYS) or key: tensor for key, tensor in state.items()}
    if "register_tokens" in converted:
        converted["reg_token"] = converted.pop("register_tokens")
        positions = converted["pos_embed"]
        converted["cls_token"] = converted["cls_token"] + positions[:, :1]
        converted["pos_embed"] = positions[:, 1:]
    return converted


def _wanted_config(state: State, found: TimmSource, config: Mapping[str, Any]) -> CLCAViTConfig:
    """Return the configuration of the model to build."""
    own = dict(found.architecture.fields)
    if own.get("pooling") in ("mean", "normed_mean"):  # the name of the final norm shows its position
        own["pooling"] = "mean" if "fc_norm.weight" in state else "normed_mean"
    elif own.get("pooling") == "map" and "fc_norm.weight" in state:
        own["pooling"] = "map_then_norm"
    wanted = own | config
    if wanted.get("num_labels") is None and "id2label" not in wanted:
        num_labels = state["head.weight"].shape[0] if "head.weight" in state else 0
        if num_labels == 0 and wanted.get("head", "linear") != "linear":
            raise ValueError(
                f"`num_labels` is required: the weights have no classifier, and `head` is {wanted['head']}."
            )
        wanted["num_labels"] = num_labels
        if found.label_names and len(found.label_names) == num_labels:
            del wanted["num_labels"]
            wanted["id2label"] = dict(enumerate(found.label_names))
            wanted["label2id"] = {name: i for i, name in enumerate(found.label_names)}
    return CLCAViTConfig(**wanted)


def _our_weights(state: State, found: TimmSource) -> Weights:
    own = _wanted_config(state, found, {})
    weights = _to_our_names(state, own)
    return Weights(weights, _saved_config(weights, found.architecture, own))


def _to_our_names(state: State, wanted: CLCAViTConfig) -> State:
    converted, unexpected = {}, []
    for key, tensor in state.items():
        if key == "pos_embed":
            converted["vit.embeddings.position_embeddings"] = tensor
        elif key == "dist_token":
            converted["vit.embeddings.register_tokens"] = tensor
        elif match := re.fullmatch(r"head\.(weight|bias)", key):
            converted[f"classifier.{match[1]}"] = tensor
        elif (tensors := convert_timm_tensor(key, tensor, wanted.use_swiglu_ffn)) is not None:
            converted |= tensors
        else:
            unexpected.append(key)
    if unexpected:
        raise ValueError(f"`source` contains weights that do not belong to this model: {listed(unexpected)}.")
    return converted


def _saved_config(weights: State, architecture: Architecture, wanted: CLCAViTConfig) -> CLCAViTConfig:
    """Return a configuration with the image and patch size of the weights."""
    projection = weights.get("vit.embeddings.patch_embeddings.projection.weight")
    positions = weights.get("vit.embeddings.position_embeddings")
    if projection is None or projection.dim() != 4 or positions is None or positions.dim() != 3:
        return wanted  # `fill_model` reports the problem
    patch = tuple(projection.shape[-2:])
    count = positions.shape[1] - wanted.num_prefix_tokens * wanted.prefix_position_embeddings
    size, root = as_pair(architecture.image_size), math.isqrt(max(count, 0))
    for rows, columns in ((size[0] // patch[0], size[1] // patch[1]), (root, root), wanted.image_grid):
        if rows * columns == count > 0:
            sizes = {"image_size": (rows * patch[0], columns * patch[1]), "patch_size": patch}
            return changed_config(wanted, {n: size[0] if size[0] == size[1] else size for n, size in sizes.items()})
    raise ValueError(
        f"`pos_embed` of the `source` has {positions.shape[1]} positions. Without {positions.shape[1] - count} prefix tokens, they match "
        "neither the patch grid of this architecture nor a square one. Check `architecture`."
    )
