"""Vision Transformers of transformers, turned into `CLCAViTForImageClassification`.

Families: ViT (https://huggingface.co/papers/2010.11929), DeiT (2012.12877), DINOv2 (2304.07193) and with registers
(2309.16588), CLIP (2103.00020), SigLIP (2303.15343), the encoder of ViT-MAE (2111.06377) and I-JEPA (2301.08243).

What a family is stands in one table, `FAMILIES`: a function from its configuration to ours, and the names of its weights
beside ours. With the reduction off, the converted model's last hidden state is the source's. That of CLIP is taken after
the final norm, which transformers' CLIP applies to CLS alone.
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

# Regular expression of a name of theirs, without the prefix of the backbone -> our name. `{q|k|v}` in ours: equal parts of the
# rows of their tensor go to one name each.
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
    # as transformers below 5.18 names them
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

# Weights that serve other tasks and have no place in a classifier: they are left behind.
_OTHER_TASKS = (r"pooler\.dense\..*", r"embeddings\.mask_token", r"decoder\..*")
_TEXT = (r"text_model\..*", r"(?:text|visual)_projection\..*", r"logit_(?:scale|bias)", r"embeddings\.position_ids")


class Family(NamedTuple):
    """How the models of one `model_type` become ours.

    Args:
        config: their configuration -> arguments of `CLCAViTConfig`, without the classes.
        rules: their names -> ours.
        classes: names of their classes, the one that a file without a known class is read as first.
        prefix: of the backbone's weights in a class with a head.
        left_behind: regular expressions of weights that have no place in a classifier.
        merge_class_position: their CLS token has a position embedding and their registers have none.
        classifier_reads: the `pooling` whose features their classifier is linear on; None if we have no such features: then it
            is left behind.
    """

    config: Callable[[PreTrainedConfig], dict[str, Any]]
    rules: Rules
    classes: tuple[str, ...]
    prefix: str
    left_behind: tuple[str, ...] = _OTHER_TASKS
    merge_class_position: bool = False
    classifier_reads: str | None = None


def _common(config: PreTrainedConfig) -> dict[str, Any]:
    names = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
    options = {name: getattr(config, name) for name in (*names, "hidden_act", "layer_norm_eps")}
    # Theirs drop the pixels beyond the last whole patch, as those of 384 pixels in patches of 14 do; ours has no such sizes.
    sides = zip(as_pair(config.image_size), as_pair(config.patch_size), strict=True)
    whole = tuple(side // patch * patch for side, patch in sides)
    if min(whole) > 0 and whole != as_pair(config.image_size):
        logger.warning("`image_size` %s is not a multiple of the patch: it becomes %s.", config.image_size, whole)
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
    if config.use_swiglu_ffn:  # has three projections where the MLP has two
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    num_registers = getattr(config, "num_register_tokens", 0)
    return _common(config) | {
        "intermediate_size": inner,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "layerscale_value": config.layerscale_value or 1.0,  # an initial value; 0 would mean none to our configuration
        "drop_path_rate": config.drop_path_rate,
        "num_register_tokens": num_registers,
        "prefix_position_embeddings": num_registers == 0,
    }


def _clip_config(config: PreTrainedConfig) -> dict[str, Any]:
    dropout = {"attention_probs_dropout_prob": config.attention_dropout or 0.0}
    return _vit_config(config) | dropout | {"pre_norm": True}


def _siglip_config(config: PreTrainedConfig) -> dict[str, Any]:
    pooling = "map" if getattr(config, "vision_use_head", True) else "mean"  # older transformers has no such field
    dropout = {"attention_probs_dropout_prob": config.attention_dropout or 0.0}
    return _vit_config(config) | dropout | {"use_class_token": False, "pooling": pooling}


def _two_towers(towers: Family, *classes: str) -> Family:
    """The vision part of a model of pictures and texts."""
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
    """A CLCA model with the weights of a Vision Transformer of transformers, in evaluation mode.

    What is new to the source starts as our model starts it: CLR tokens (as copies of CLS) and their positions, parameters
    of the reduction, and the classifier, unless a ViT's, DeiT's or I-JEPA's fits. Of a `DeiTForImageClassificationWithTeacher`, the
    classifier on CLS is taken. SigLIP's reads the mean of the normed tokens: `pooling` is "normed_mean" for it by default, and with
    another it is left behind. DINOv2 and CLIP classify other features than our heads read, so a classifier of theirs is left behind
    with a warning. ViT-MAE's fixed position embeddings become parameters as others are.

    Args:
        source: folder or Hub repository of the model, or a live model, which is not changed. Of a model of pictures and
            texts, the vision part is taken.
        revision: of the Hub repository.
        dtype: of the weights; by default the source's.
        **config: arguments of `CLCAViTConfig` in place of what the source's configuration says, e.g. `reduction`,
            `keep_rate`, `num_labels`, `head`. With another `image_size` or `patch_size` (an integer or height and width),
            weights are resampled, see `resample_weights`. (The `image_size` in published DINOv2 configurations is 518,
            their processors make pictures of 224.)

    Raises:
        ValueError: no such model, a `model_type` that is not in `FAMILIES`, weights that are missing, unexpected or of
            another shape, the first dozen by name, or what `CLCAViTConfig` refuses.
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
    """A model of transformers before its weights are read: its configuration, its family, and the name of its class."""

    theirs: PreTrainedConfig
    family: Family
    class_name: str

    @property
    def classifies(self) -> bool:
        """Whether it has a classifier."""
        return "ForImageClassification" in self.class_name

    def config(self) -> CLCAViTConfig:
        """Our configuration of the model as it is, with the pooling that its classifier reads and its classes."""
        options = self.family.config(self.theirs)
        if self.classifies:
            if self.family.classifier_reads is not None:
                options["pooling"] = self.family.classifier_reads
            options |= {"id2label": self.theirs.id2label, "label2id": self.theirs.label2id}
            if self.theirs.problem_type is not None:
                options["problem_type"] = self.theirs.problem_type
        return CLCAViTConfig(**options)

    def read(self, source: str | Path, revision: str | None, use_safetensors: bool | None = None) -> State:
        """The weights of a folder or Hub repository under the names of the live class: transformers knows what its files have been
        through."""
        return _read_weights(source, revision, self, use_safetensors)

    def convert(self, state_dict: Mapping[str, torch.Tensor], name: str) -> Weights:
        """Weights under the names of the live class as those of our model."""
        state = convert_state(state_dict, self.family, name)
        if self.family.merge_class_position:
            state = _merge_class_position(state)
        return Weights(state, self.config())

    def warn_of_classifiers(self, weights: Weights, wanted: CLCAViTConfig) -> None:
        """Warn where a classifier that the caller may count on is not taken, or is one of two."""
        same = wanted.pooling == weights.config.pooling and self.family.classifier_reads is not None
        if self.classifies and not same and wanted.num_labels == self.theirs.num_labels:
            logger.warning(
                "The classifier of %s reads other features than ours: a new one is to be trained.", self.class_name
            )
        elif "WithTeacher" in self.class_name and wanted.num_labels == self.theirs.num_labels:
            logger.warning(
                "Of the two classifiers of %s, whose logits it averages, the one on CLS is taken.", self.class_name
            )


def open_transformers(source: str | Path, revision: str | None = None) -> Opened:
    """The configuration of a folder or Hub repository, without running code that it may bring along.

    Raises:
        ValueError: no such model, or a `model_type` that is not in `FAMILIES`.
    """
    theirs, family = _read_config(source, revision)
    named = (name for name in theirs.architectures or () if name in family.classes)
    return Opened(theirs, family, next(named, family.classes[0]))


def convert_state(state_dict: Mapping[str, torch.Tensor], family: Family, name: str = "the source") -> State:
    """Tensors under the names of a family's live models, under ours.

    Raises:
        ValueError: names that belong neither to the family nor to the parts it leaves behind; the first dozen are named.
    """
    linear = family.classifier_reads is not None
    rules = (*family.rules, *_CLASSIFIER) if linear else family.rules
    left_behind = family.left_behind if linear else (*family.left_behind, _CLASSIFIER[0][0])
    state, unexpected, left = {}, [], []
    for key, tensor in state_dict.items():
        theirs = key.removeprefix(family.prefix)
        ours = next((match.expand(to) for rule, to in rules if (match := re.fullmatch(rule, theirs))), None)
        if ours is None:
            (left if _matches(theirs, left_behind) else unexpected).append(key)
        elif "{" in ours:
            before, parts, after = re.split(r"[{}]", ours)
            names = [f"{before}{part}{after}" for part in parts.split("|")]
            state |= dict(zip(names, tensor.chunk(len(names), dim=0), strict=True))
        elif ours.startswith("vit.embeddings.") and ours.endswith(("cls_token", "position_embeddings")):
            state[ours] = tensor.reshape(1, -1, tensor.shape[-1])  # CLIP's and SigLIP's lack leading dimensions
        else:
            state[ours] = tensor
    if unexpected:
        raise ValueError(f"`source` {name} holds weights with no place in this model: {listed(unexpected)}.")
    if left:
        logger.info("Weights of %s for other tasks are left behind: %s.", name, ", ".join(left))
    return state


def load_transformers_processor(
    source: str | Path, image_size: int | tuple[int, int] | None = None, *, revision: str | None = None
) -> CLCAImageProcessor:
    """The image processor that belongs to a model of transformers, to be saved with the converted model.

    Resampling, mean, deviation and whether the aspect ratio is kept are the source's. Where its pictures have another
    size than asked for, resize and crop grow or shrink together. A source without an image processor gets
    `make_image_processor`'s, with a warning.

    Args:
        source: folder or Hub repository.
        image_size: of the model's input, one number or height and width; by default that of the source's configuration.
        revision: of the Hub repository.

    Raises:
        ValueError: no such model, a `model_type` that is not in `FAMILIES`, or a size that is not positive or, in the
            source's processor, not given by height and width or the shortest edge.
    """
    theirs, family = _read_config(source, revision)
    sides = as_pair(family.config(theirs)["image_size"] if image_size is None else image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"`image_size` must be a positive integer or two of them, got {image_size}.")
    height, width = sides
    try:
        saved = read_image_processor(source, revision)
    except OSError:
        logger.warning("%s has no image processor: ImageNet's mean and deviation are used", source)
        saved = make_image_processor(max(height, width))
    resized, target = sizes_of(saved)
    edge, crops = dict(saved.size).get("shortest_edge"), resized != target
    if edge:
        edge = round(edge / (getattr(saved, "crop_pct", None) or 1))
        resized = (edge, edge)
        target = target or resized
    elif resized is None or target is None:
        raise ValueError(
            f"`size` of the image processor of {source} must be two sides or the shortest edge, got {saved.size}."
        )
    if edge and target != (height, width) and (height != width or target[0] != target[1]):
        edge = None  # an edge says nothing about both sides of a picture that is not square
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
            f"`source` {name} is a CLCA model already: load it with CLCAViTForImageClassification.from_pretrained."
        )
    raise ValueError(
        f"`source` {name} has the model_type {model_type!r}, which cannot be converted; supported are "
        f"{', '.join(sorted(FAMILIES))}."
    )


def _read_config(source: str | Path, revision: str | None) -> tuple[PreTrainedConfig, Family]:
    """The source's configuration, without running code that it may bring along."""
    if not isinstance(source, str | Path):
        raise ValueError(f"`source` must be a folder or a Hub repository, got an object of {type(source).__name__}.")
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
        raise ValueError(f"`source` {source} has an invalid config.json: it names no `model_type`.")
    family = _family(contents.get("model_type"), source)
    try:
        return CONFIG_MAPPING[contents["model_type"]].from_dict(contents), family
    except Exception as error:  # transformers' validators raise classes of their own
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
    except pickle.UnpicklingError as error:  # torch's own message proposes to run what the file holds
        raise ValueError(
            f"`source` {source} cannot be read as {class_name}: its weights are no tensors, or a pickle with code beside "
            "them, which is not run."
        ) from error
    except Exception as error:  # the readers of files raise what they like
        raise ValueError(f"`source` {source} cannot be read as {class_name}: {_one_line(error)}") from error
    problems = []
    for kind in ("missing", "unexpected"):
        keys = [key for key in report[f"{kind}_keys"] if not _matches(key, family.left_behind, family.prefix)]
        problems += [f"{key} is {kind}" for key in sorted(keys)]
    for key, shape, expected in sorted(report["mismatched_keys"]):
        problems.append(f"{key} has the shape {tuple(shape)}, not {tuple(expected)}")
    if problems:
        raise ValueError(f"weights of the `source` {source} do not fit its config.json: {listed(problems)}.")
    return model.state_dict()


def _merge_class_position(state: State) -> State:
    """CLS takes its position embedding in, since our prefix has positions all together or not at all."""
    positions = state["vit.embeddings.position_embeddings"]
    cls_token = state["vit.embeddings.cls_token"] + positions[:, :1]
    return state | {"vit.embeddings.cls_token": cls_token, "vit.embeddings.position_embeddings": positions[:, 1:]}


def _matches(key: str, patterns: Iterable[str], prefix: str = "") -> bool:
    return any(re.fullmatch(pattern, key.removeprefix(prefix)) for pattern in patterns)


def _one_line(error: Exception) -> str:
    """What an error says first; its name, too, if it is no sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return first if " " in first else f"{type(error).__name__} {first}".strip()
