"""Convert Vision Transformers of transformers to `CLCAViTForImageClassification`.

Families: ViT (https://huggingface.co/papers/2010.11929), DeiT (2012.12877), DINOv2 (2304.07193) and with registers
(2309.16588), CLIP (2103.00020), SigLIP (2303.15343), the encoder of ViT-MAE (2111.06377) and I-JEPA (2301.08243).

The table `FAMILIES` describes each family: a function from its configuration to ours, and a mapping of weight names. Without
reduction, the converted model has the same last hidden state as the source. For CLIP it is taken after the final norm, which
CLIP of transformers applies to CLS only.
"""

import logging
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from clca import CLCAImageProcessor, CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair

from ..transforms.preprocessing import make_image_processor, read_image_processor, sizes_of
from ..utils.text import listed
from .config_options import changed_config
from .state_dicts import Weights, common_dtype, fit_model


logger = logging.getLogger(__name__)

Rules = tuple[tuple[str, str], ...]
State = dict[str, torch.Tensor]

# Regular expression of a source name, without the prefix of the backbone -> our name. `{q|k|v}` in our name splits the rows of
# the tensor into equal parts, one per name.
_CLASSIFIER: Rules = ((r"classifier\.(weight|bias)", r"classifier.\1"),)
_VIT: Rules = (
    (r"embeddings\.(cls_token|position_embeddings)", r"vit.embeddings.\1"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (
        r"layers\.(\d+)\.(layernorm_before|layernorm_after|attention\.[qkvo]_proj|mlp\.fc[12])\.(weight|bias)",
        r"vit.layers.\1.\2.\3",
    ),
    (r"layernorm\.(weight|bias)", r"vit.layernorm.\1"),
)
_DEIT: Rules = (
    *_VIT,
    (r"embeddings\.distillation_token", "vit.embeddings.register_tokens"),
    (r"cls_classifier\.(weight|bias)", r"classifier.\1"),
)
_DINOV2: Rules = (
    (r"embeddings\.(cls_token|register_tokens|position_embeddings)", r"vit.embeddings.\1"),
    (r"embeddings\.patch_embeddings\.projection\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"encoder\.layer\.(\d+)\.norm1\.(weight|bias)", r"vit.layers.\1.layernorm_before.\2"),
    (r"encoder\.layer\.(\d+)\.norm2\.(weight|bias)", r"vit.layers.\1.layernorm_after.\2"),
    (
        r"encoder\.layer\.(\d+)\.(attention\.[qkvo]_proj|mlp\.fc[12]|mlp\.(?:gate|up|down)_proj)\.(weight|bias)",
        r"vit.layers.\1.\2.\3",
    ),
    # names before transformers 5.18
    *(
        (
            rf"encoder\.layer\.(\d+)\.attention\.attention\.{theirs}\.(weight|bias)",
            rf"vit.layers.\1.attention.{ours}_proj.\2",
        )
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v"))
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(weight|bias)", r"vit.layers.\1.attention.o_proj.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_in\.(weight|bias)", r"vit.layers.\1.mlp.{gate|up}_proj.\2"),
    (r"encoder\.layer\.(\d+)\.mlp\.weights_out\.(weight|bias)", r"vit.layers.\1.mlp.down_proj.\2"),
    (r"encoder\.layer\.(\d+)\.(layer_scale[12]\.lambda1)", r"vit.layers.\1.\2"),
    (r"layernorm\.(weight|bias)", r"vit.layernorm.\1"),
)
_CLIP: Rules = (
    (r"embeddings\.class_embedding", "vit.embeddings.cls_token"),
    (r"embeddings\.position_embedding\.weight", "vit.embeddings.position_embeddings"),
    (r"embeddings\.patch_embedding\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"pre_layrnorm\.(weight|bias)", r"vit.embeddings.layernorm.\1"),
    (r"encoder\.layers\.(\d+)\.layer_norm1\.(weight|bias)", r"vit.layers.\1.layernorm_before.\2"),
    (r"encoder\.layers\.(\d+)\.layer_norm2\.(weight|bias)", r"vit.layers.\1.layernorm_after.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", r"vit.layers.\1.attention.\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"vit.layers.\1.attention.o_proj.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"vit.layers.\1.mlp.\2.\3"),
    (r"post_layernorm\.(weight|bias)", r"vit.layernorm.\1"),
)
_SIGLIP: Rules = (
    *_CLIP,
    (r"head\.probe", "vit.attention_pooling.query"),
    (r"head\.attention\.in_proj_(weight|bias)", r"vit.attention_pooling.{q|k|v}_proj.\1"),
    (r"head\.attention\.out_proj\.(weight|bias)", r"vit.attention_pooling.o_proj.\1"),
    (r"head\.layernorm\.(weight|bias)", r"vit.attention_pooling.layernorm.\1"),
    (r"head\.mlp\.(fc[12])\.(weight|bias)", r"vit.attention_pooling.mlp.\1.\2"),
)

# Weights for other tasks, which a classifier does not use: they are skipped.
_OTHER_TASKS = (r"pooler\.dense\..*", r"embeddings\.mask_token", r"decoder\..*")
_TEXT = (r"text_model\..*", r"(?:text|visual)_projection\..*", r"logit_(?:scale|bias)", r"embeddings\.position_ids")


class Family(NamedTuple):
    """Conversion of the models of one `model_type`.

    Args:
        config: function from the source configuration to arguments of `CLCAViTConfig`, without the classes.
        rules: source names -> our names.
        classes: class names of the source; the first one reads files that do not name a known class.
        prefix: prefix of the backbone's weights in a class with a head.
        skipped: regular expressions of weights that a classifier does not use.
        merge_class_position: the CLS token has a position embedding and the register tokens have none.
        classifier_reads: the `pooling` whose features the source classifier uses; None if our model has no such features, and
            the classifier is skipped.
    """

    config: Callable[[PreTrainedConfig], dict[str, Any]]
    rules: Rules
    classes: tuple[str, ...]
    prefix: str
    skipped: tuple[str, ...] = _OTHER_TASKS
    merge_class_position: bool = False
    classifier_reads: str | None = None


def _common(config: PreTrainedConfig) -> dict[str, Any]:
    names = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
    options = {name: getattr(config, name) for name in (*names, "hidden_act", "layer_norm_eps")}
    # transformers drops the pixels after the last complete patch (384 pixels in patches of 14); our models require a multiple.
    sides = zip(as_pair(config.image_size), as_pair(config.patch_size), strict=True)
    whole = tuple(side // patch * patch for side, patch in sides)
    if min(whole) > 0 and whole != as_pair(config.image_size):
        logger.warning("`image_size` %s is not a multiple of `patch_size`; using %s.", config.image_size, whole)
        options["image_size"] = whole[0] if whole[0] == whole[1] else whole
    optional = ("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob", "qkv_bias")
    return options | {name: getattr(config, name) for name in optional if hasattr(config, name)}


def _vit_config(config: PreTrainedConfig) -> dict[str, Any]:
    return _common(config) | {"intermediate_size": config.intermediate_size}


def _deit_config(config: PreTrainedConfig) -> dict[str, Any]:
    return _vit_config(config) | {"num_register_tokens": 1}  # the distillation token


def _ijepa_config(config: PreTrainedConfig) -> dict[str, Any]:
    return _vit_config(config) | {"use_class_token": False, "pooling": "normed_mean"}


def _dinov2_config(config: PreTrainedConfig) -> dict[str, Any]:
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:  # three projections instead of two
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    num_registers = getattr(config, "num_register_tokens", 0)
    return _common(config) | {
        "intermediate_size": inner,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "layerscale_value": config.layerscale_value
        or 1.0,  # an initial value; 0 disables LayerScale in our configuration
        "drop_path_rate": config.drop_path_rate,
        "num_register_tokens": num_registers,
        "prefix_position_embeddings": num_registers == 0,
    }


def _clip_config(config: PreTrainedConfig) -> dict[str, Any]:
    dropout = {"attention_probs_dropout_prob": config.attention_dropout or 0.0}
    return _vit_config(config) | dropout | {"pre_norm": True}


def _siglip_config(config: PreTrainedConfig) -> dict[str, Any]:
    pooling = "map" if getattr(config, "vision_use_head", True) else "mean"  # missing in older transformers
    dropout = {"attention_probs_dropout_prob": config.attention_dropout or 0.0}
    return _vit_config(config) | dropout | {"use_class_token": False, "pooling": pooling}


def _two_towers(towers: Family, *classes: str) -> Family:
    """Return the family of the vision part of an image-text model."""
    return towers._replace(config=lambda config: towers.config(config.vision_config), classes=classes)


_CLIP_VISION = Family(
    _clip_config, _CLIP, ("CLIPVisionModel", "CLIPVisionModelWithProjection"), "vision_model.", _TEXT
)
_SIGLIP_VISION = Family(
    _siglip_config, _SIGLIP, ("SiglipVisionModel",), "vision_model.", _TEXT, classifier_reads="normed_mean"
)

FAMILIES: dict[str, Family] = {
    "vit": Family(
        _vit_config,
        _VIT,
        ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"),
        "vit.",
        classifier_reads="cls",
    ),
    "deit": Family(
        _deit_config,
        _DEIT,
        (
            "DeiTModel",
            "DeiTForImageClassification",
            "DeiTForImageClassificationWithTeacher",
            "DeiTForMaskedImageModeling",
        ),
        "deit.",
        (*_OTHER_TASKS, r"distillation_classifier\..*"),
        classifier_reads="cls",
    ),
    "dinov2": Family(_dinov2_config, _DINOV2, ("Dinov2Model", "Dinov2ForImageClassification"), "dinov2."),
    "dinov2_with_registers": Family(
        _dinov2_config,
        _DINOV2,
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
        "dinov2_with_registers.",
        merge_class_position=True,
    ),
    "clip": _two_towers(_CLIP_VISION, "CLIPModel", "CLIPForImageClassification"),
    "clip_vision_model": _CLIP_VISION,
    "siglip": _two_towers(_SIGLIP_VISION, "SiglipModel", "SiglipForImageClassification"),
    "siglip_vision_model": _SIGLIP_VISION,
    "vit_mae": Family(_vit_config, _VIT, ("ViTMAEModel", "ViTMAEForPreTraining"), "vit."),
    "ijepa": Family(
        _ijepa_config, _VIT, ("IJepaModel", "IJepaForImageClassification"), "ijepa.", classifier_reads="normed_mean"
    ),
}


def load_transformers(
    source: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> CLCAViTForImageClassification:
    """Load a Vision Transformer of transformers as a CLCA model, in evaluation mode.

    Weights that the source does not contain are initialized: CLR tokens (as copies of CLS) and their positions, parameters of the
    reduction, and the classifier. The classifier of ViT, DeiT, I-JEPA and SigLIP is kept if it fits; SigLIP's uses the mean of the
    normalized tokens, so `pooling` is "normed_mean" by default and another value skips it. For
    `DeiTForImageClassificationWithTeacher`, the classifier on CLS is loaded. Classifiers of DINOv2 and CLIP use features that our
    heads do not have, so they are skipped with a warning. The fixed position embeddings of ViT-MAE become parameters.

    Args:
        source: folder or Hub repository of the model, or a model object, which is not changed. Only the vision part of an
            image-text model is loaded.
        revision: branch, tag or commit of the Hub repository.
        dtype: dtype of the weights; by default the source's.
        **config: arguments of `CLCAViTConfig` that override the source's configuration, e.g. `reduction`, `keep_rate`,
            `num_labels`, `head`. Weights are resampled for another `image_size` or `patch_size` (an integer, or height and
            width), see `resample_weights`. (Published DINOv2 configurations have an `image_size` of 518, while their
            processors produce images of 224 pixels.)

    Raises:
        ValueError: if there is no such model, its `model_type` is not in `FAMILIES`, weights are missing, unexpected or of
            another shape (the first dozen are listed), or `CLCAViTConfig` rejects a value.
    """
    if isinstance(source, PreTrainedModel):
        theirs, family = source.config, _family(source.config.model_type, type(source).__name__)
        opened = Opened(theirs, family, type(source).__name__)
        state_dict, name = source.state_dict(), type(source).__name__
    else:
        opened = open_transformers(source, revision)
        state_dict, name = opened.read(source, revision), str(source)
    weights = opened.convert(state_dict, name)
    wanted = changed_config(weights.config, config)
    opened.warn_of_classifiers(weights, wanted)
    return fit_model(weights, wanted, dtype=dtype or common_dtype(weights.state)).model


class Opened(NamedTuple):
    """A transformers model before its weights are read: configuration, family and class name."""

    theirs: PreTrainedConfig
    family: Family
    class_name: str

    @property
    def classifies(self) -> bool:
        """Whether the model has a classifier."""
        return "ForImageClassification" in self.class_name

    def config(self) -> CLCAViTConfig:
        """Return our configuration of the unchanged model, with its classes and the pooling that its classifier uses."""
        options = self.family.config(self.theirs)
        if self.classifies:
            if self.family.classifier_reads is not None:
                options["pooling"] = self.family.classifier_reads
            options |= {"id2label": self.theirs.id2label, "label2id": self.theirs.label2id}
            if self.theirs.problem_type is not None:
                options["problem_type"] = self.theirs.problem_type
        return CLCAViTConfig(**options)

    def read(self, source: str | Path, revision: str | None, use_safetensors: bool | None = None) -> State:
        """Read the weights of a folder or Hub repository under the names of the model class. transformers handles renamed weights of
        older files."""
        return _read_weights(source, revision, self, use_safetensors)

    def convert(self, state_dict: Mapping[str, torch.Tensor], name: str) -> Weights:
        """Convert weights with the names of the model class to those of our model."""
        state = convert_state(state_dict, self.family, name)
        if self.family.merge_class_position:
            state = _merge_class_position(state)
        return Weights(state, self.config())

    def warn_of_classifiers(self, weights: Weights, wanted: CLCAViTConfig) -> None:
        """Warn if the source classifier is not loaded, or only one of two is."""
        same = wanted.pooling == weights.config.pooling and self.family.classifier_reads is not None
        if self.classifies and not same and wanted.num_labels == self.theirs.num_labels:
            logger.warning(
                "The classifier of %s uses other features than ours, so it is not loaded. Train a new one.",
                self.class_name,
            )
        elif "WithTeacher" in self.class_name and wanted.num_labels == self.theirs.num_labels:
            logger.warning(
                "%s averages the logits of two classifiers; only the one on CLS is loaded.", self.class_name
            )


def open_transformers(source: str | Path, revision: str | None = None) -> Opened:
    """Read the configuration of a folder or Hub repository, without running its code.

    Raises:
        ValueError: if there is no such model, or its `model_type` is not in `FAMILIES`.
    """
    theirs, family = _read_config(source, revision)
    named = (name for name in theirs.architectures or () if name in family.classes)
    return Opened(theirs, family, next(named, family.classes[0]))


def convert_state(state_dict: Mapping[str, torch.Tensor], family: Family, name: str = "the source") -> State:
    """Rename the tensors of a family's models to our names.

    Raises:
        ValueError: if names belong neither to the family nor to its skipped parts; the first dozen are listed.
    """
    linear = family.classifier_reads is not None
    rules = (*family.rules, *_CLASSIFIER) if linear else family.rules
    skipped = family.skipped if linear else (*family.skipped, _CLASSIFIER[0][0])
    state, unexpected, left = {}, [], []
    for key, tensor in state_dict.items():
        theirs = key.removeprefix(family.prefix)
        ours = next((match.expand(to) for rule, to in rules if (match := re.fullmatch(rule, theirs))), None)
        if ours is None:
            (left if _matches(theirs, skipped) else unexpected).append(key)
        elif "{" in ours:
            before, parts, after = re.split(r"[{}]", ours)
            names = [f"{before}{part}{after}" for part in parts.split("|")]
            state |= dict(zip(names, tensor.chunk(len(names), dim=0), strict=True))
        elif ours.startswith("vit.embeddings.") and ours.endswith(("cls_token", "position_embeddings")):
            state[ours] = tensor.reshape(1, -1, tensor.shape[-1])  # CLIP's and SigLIP's lack leading dimensions
        else:
            state[ours] = tensor
    if unexpected:
        raise ValueError(f"`source` {name} contains weights that do not belong to this model: {listed(unexpected)}.")
    if left:
        logger.info("Skipping weights of %s for other tasks: %s.", name, ", ".join(left))
    return state


def load_transformers_processor(
    source: str | Path, image_size: int | tuple[int, int] | None = None, *, revision: str | None = None
) -> CLCAImageProcessor:
    """Load the image processor of a transformers model, to save with the converted model.

    Resampling, mean, std and the handling of the aspect ratio are the source's. If its image size differs from `image_size`,
    resize and crop are scaled together. A source without an image processor gets that of `make_image_processor`, with a warning.

    Args:
        source: folder or Hub repository.
        image_size: size of the model's input, one number or height and width; by default that of the source's configuration.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        ValueError: if there is no such model, its `model_type` is not in `FAMILIES`, or a size is not positive, or is not
            given by height and width or the shortest edge in the source's processor.
    """
    theirs, family = _read_config(source, revision)
    sides = as_pair(family.config(theirs)["image_size"] if image_size is None else image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"`image_size` must be a positive integer or two of them, got {image_size}.")
    height, width = sides
    try:
        saved = read_image_processor(source, revision)
    except OSError:
        logger.warning("%s has no image processor; using the mean and std of ImageNet", source)
        saved = make_image_processor(max(height, width))
    resized, target = sizes_of(saved)
    edge, crops = dict(saved.size).get("shortest_edge"), resized != target
    if edge:
        edge = round(edge / (getattr(saved, "crop_pct", None) or 1))
        resized = (edge, edge)
        target = target or resized
    elif resized is None or target is None:
        raise ValueError(
            f"`size` of the image processor of {source} must give height and width, or the shortest edge, got {saved.size}."
        )
    if edge and target != (height, width) and (height != width or target[0] != target[1]):
        edge = None  # the shortest edge does not determine both sides of an image that is not square
    scaled = [round(r * new / old) for r, new, old in zip(resized, (height, width), target, strict=True)]
    return CLCAImageProcessor(
        do_convert_rgb=True,
        do_resize=saved.do_resize,
        size={"shortest_edge": scaled[0]} if edge else {"height": scaled[0], "width": scaled[1]},
        resample=saved.resample,
        do_center_crop=crops or edge is not None,
        crop_size={"height": height, "width": width},
        do_rescale=saved.do_rescale,
        rescale_factor=saved.rescale_factor,
        do_normalize=saved.do_normalize,
        image_mean=list(saved.image_mean),
        image_std=list(saved.image_std),
    )


def _family(model_type: str | None, name: str | Path) -> Family:
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type == CLCAViTConfig.model_type:
        raise ValueError(
            f"`source` {name} is already a CLCA model: load it with CLCAViTForImageClassification.from_pretrained."
        )
    raise ValueError(
        f"`source` {name} has the model_type {model_type!r}, which cannot be converted; supported are "
        f"{', '.join(sorted(FAMILIES))}."
    )


def _read_config(source: str | Path, revision: str | None) -> tuple[PreTrainedConfig, Family]:
    """Read the source's configuration, without running its code."""
    if not isinstance(source, str | Path):
        raise ValueError(f"`source` must be a folder or a Hub repository, got {type(source).__name__}.")
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"`source` {source} is a folder without a config.json.")
    elif path.exists() or path.is_absolute():
        raise ValueError(f"`source` {source} is not a folder.")
    try:
        contents, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"`source` {source} has no readable config.json: {_one_line(error)}") from error
    if not isinstance(contents, dict) or not isinstance(contents.get("model_type"), str | None):
        raise ValueError(f"`source` {source} has an invalid config.json: `model_type` is missing.")
    family = _family(contents.get("model_type"), source)
    try:
        return CONFIG_MAPPING[contents["model_type"]].from_dict(contents), family
    except Exception as error:  # the validators of transformers raise their own classes
        raise ValueError(f"`source` {source} has an invalid config.json: {_one_line(error)}") from error


def _read_weights(source: str | Path, revision: str | None, opened: Opened, use_safetensors: bool | None) -> State:
    config, family, class_name = opened
    try:
        model, report = getattr(transformers, class_name).from_pretrained(
            source,
            config=config,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=use_safetensors,
        )
    except pickle.UnpicklingError as error:  # torch's message suggests running the code in the file
        raise ValueError(
            f"`source` {source} cannot be read as {class_name}: the file is damaged, or a pickle that contains code. "
            "Use weights in the safetensors format."
        ) from error
    except Exception as error:  # file readers raise many kinds of errors
        raise ValueError(f"`source` {source} cannot be read as {class_name}: {_one_line(error)}") from error
    problems = []
    for kind in ("missing", "unexpected"):
        keys = [key for key in report[f"{kind}_keys"] if not _matches(key, family.skipped, family.prefix)]
        problems += [f"{key} is {kind}" for key in sorted(keys)]
    for key, shape, expected in sorted(report["mismatched_keys"]):
        problems.append(f"{key} has the shape {tuple(shape)}, not {tuple(expected)}")
    if problems:
        raise ValueError(f"weights of the `source` {source} do not fit its config.json: {listed(problems)}.")
    return model.state_dict()


def _merge_class_position(state: State) -> State:
    """Add its position embedding to CLS, because our prefix tokens either all have positions or none."""
    positions = state["vit.embeddings.position_embeddings"]
    cls_token = state["vit.embeddings.cls_token"] + positions[:, :1]
    return state | {"vit.embeddings.cls_token": cls_token, "vit.embeddings.position_embeddings": positions[:, 1:]}


def _matches(key: str, patterns: Iterable[str], prefix: str = "") -> bool:
    return any(re.fullmatch(pattern, key.removeprefix(prefix)) for pattern in patterns)


def _one_line(error: Exception) -> str:
    """Return the first line of an error message, with the class name if it is a single word."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first if " " in first else f"{type(error).__name__} {first}".strip()
