"""Kinds of sources of models: how to recognize a source, and how to load its configuration, weights and image processor.

Each kind is a record in `KINDS`, which `ufgir.checkpoints.loading` uses. To support another kind, add a record.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from clca import CLCAImageProcessor, CLCAViTConfig
from clca.configuration_clca import as_pair

from ..transforms.preprocessing import make_image_processor, read_image_processor, sizes_of
from ..utils.text import one_sentence
from .checks import check_contents, in_one_sentence
from .config_options import changed_config
from .from_clca import MODEL_TYPES, clca_config, load_clca
from .from_original import kept_slots, open_original, original_image_processor, read_original_file
from .from_timm import open_timm, read_architecture, timm_image_processor
from .from_transformers import FAMILIES, load_transformers_processor, open_transformers
from .state_dicts import Found, fit_model
from .timm_architectures import ARCHITECTURES, Architecture, find_architecture


CONFIG = "config.json"
WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")  # suffixes of weights files


class Source(NamedTuple):
    """Source of a model.

    Attributes:
        path: folder, file or Hub repository.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, for weights without a config.json.
        contents: contents of config.json; empty if there is none.
    """

    path: str
    revision: str | None = None
    architecture: str | None = None
    contents: Mapping[str, Any] = {}

    @property
    def is_file(self) -> bool:
        """Whether the source is a file of weights."""
        return Path(self.path).is_file()


class Kind(NamedTuple):
    """Kind of source.

    Attributes:
        name: name of the kind.
        recognizes: return whether a source is of this kind. The first matching kind of `KINDS` is used.
        config: return the configuration of our model, with overridden fields.
        load: return a model of a configuration, in float32, with the weights of the source; options are `attn_implementation`
            and `use_safetensors` of `from_pretrained`.
        image_processor: return the image processor for an image size (None: the source's own); None if the source has none.
    """

    name: str
    recognizes: Callable[[Source], bool]
    config: Callable[[Source, Mapping[str, Any]], CLCAViTConfig]
    load: Callable[..., Found]
    image_processor: Callable[[Source, int | tuple[int, int] | None], Any]


# CLCA, ViT, DeiT


def _clca_config(source: Source, values: Mapping[str, Any]) -> CLCAViTConfig:
    return clca_config(source.path, values, source.revision)


def _load_clca(source: Source, config: CLCAViTConfig, **options: Any) -> Found:
    return load_clca(source.path, config, source.revision, **options)


def _clca_processor(source: Source, image_size: int | tuple[int, int] | None) -> Any:
    saved = read_image_processor(source.path, source.revision)
    before, after = sizes_of(saved)
    if image_size is None or (before != after and after == as_pair(image_size)):
        return saved
    return make_image_processor(as_pair(image_size)[0], image_mean=saved.image_mean, image_std=saved.image_std)


# Other models of transformers


def _transformers_config(source: Source, values: Mapping[str, Any]) -> CLCAViTConfig:
    return changed_config(open_transformers(source.path, source.revision).config(), values)


def _load_transformers(
    source: Source, config: CLCAViTConfig, use_safetensors: bool | None = None, **options: Any
) -> Found:
    opened = open_transformers(source.path, source.revision)
    weights = opened.convert(opened.read(source.path, source.revision, use_safetensors), source.path)
    opened.warn_of_classifiers(weights, config)
    return fit_model(weights, config, f"weights of {source.path}", **options)


def _transformers_processor(source: Source, image_size: int | tuple[int, int] | None) -> Any:
    """Load the source's image processor; resize to a square, as in the rest of this project, even if the source keeps the aspect ratio."""
    found = load_transformers_processor(source.path, image_size, revision=source.revision)
    edge = dict(found.size).get("shortest_edge")
    if edge is None:
        return found
    square = {"size": {"height": edge, "width": edge}, "crop_size": None, "do_center_crop": None}
    return CLCAImageProcessor.from_dict(found.to_dict() | square)


# timm


def _timm_config(source: Source, values: Mapping[str, Any]) -> CLCAViTConfig:
    return changed_config(
        open_timm(source.path, source.architecture, source.revision, shapes_only=True).config, values
    )


def _load_timm(source: Source, config: CLCAViTConfig, use_safetensors: bool | None = None, **options: Any) -> Found:
    weights = open_timm(source.path, source.architecture, source.revision)
    return fit_model(weights, config, f"weights of {source.path}", **options)


def timm_architecture(source: Source) -> Architecture:
    """Return the architecture of a timm source."""
    if source.architecture is not None:
        return find_architecture(source.architecture)
    return read_architecture(source.path, source.revision)


def _timm_processor(source: Source, image_size: int | tuple[int, int] | None) -> Any:
    return timm_image_processor(timm_architecture(source), image_size if image_size is None else as_pair(image_size))


# Files of the original code


def _original_config(source: Source, values: Mapping[str, Any]) -> CLCAViTConfig:
    own = open_original(read_original_file(source.path), values).config
    return changed_config(own, kept_slots(own, values) | dict(values))


def _load_original(
    source: Source, config: CLCAViTConfig, use_safetensors: bool | None = None, **options: Any
) -> Found:
    known = {name: getattr(config, name) for name in ("num_attention_heads", "reduction_layers", "keep_rate")}
    weights = open_original(read_original_file(source.path), known)
    return fit_model(weights, config, f"weights of {source.path}", **options)


def _original_processor(source: Source, image_size: int | tuple[int, int] | None) -> Any:
    file = read_original_file(source.path)
    size = image_size or open_original(file).config.image_size
    return original_image_processor(file, as_pair(size)[0])


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "timm",
            lambda source: source.architecture is not None or "architecture" in source.contents,
            _timm_config,
            _load_timm,
            _timm_processor,
        ),
        Kind("original", lambda source: source.is_file, _original_config, _load_original, _original_processor),
        Kind(
            "clca",
            lambda source: source.contents.get("model_type") in (*MODEL_TYPES, "", None),
            _clca_config,
            _load_clca,
            _clca_processor,
        ),
        Kind(
            "transformers",
            lambda source: source.contents.get("model_type") in FAMILIES,
            _transformers_config,
            _load_transformers,
            _transformers_processor,
        ),
    )
}


def find_source(
    path: str | Path, revision: str | None = None, architecture: str | Architecture | None = None
) -> tuple[Kind, Source]:
    """Determine the kind of a source, without reading its weights.

    Args:
        path: folder or Hub repository with a config.json of ours, transformers or timm; file of weights; or timm's name of a
            pretrained model, for its Hub repository.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, for weights without a config.json.

    Raises:
        OSError: if there is no such source, or the Hub cannot be reached.
        ValueError: if its config.json cannot be read, or no kind of `KINDS` matches.
    """
    path, name = str(path), architecture.name if isinstance(architecture, Architecture) else architecture
    if name is not None:
        find_architecture(name)
        return KINDS["timm"], Source(path, revision, name)
    if Path(path).is_file():
        if Path(path).suffix not in WEIGHT_FILES:
            raise ValueError(
                f"a model must be a folder, a Hub repository or a file of weights ({', '.join(WEIGHT_FILES)}), got the file {path}."
            )
        if Path(path).suffix == ".safetensors":
            raise ValueError(f"`architecture` is required for {path}: it cannot be determined from weights alone.")
        return KINDS["original"], Source(path)
    if not Path(path).exists() and (path in ARCHITECTURES or path in _NETWORKS):
        path = f"timm/{find_architecture(path).name}"
    source = Source(path, revision, None, _contents(path, revision))
    check_contents(source.contents, f"the {CONFIG} of {path}")
    for kind in KINDS.values():
        if kind.recognizes(source):
            return kind, source
    raise ValueError(
        f"{path} has the `model_type` {source.contents.get('model_type')!r}, which is not supported. Supported are "
        f"{', '.join(sorted({*MODEL_TYPES, *FAMILIES}))} and timm's ViTs."
    )


_NETWORKS = {name.partition(".")[0] for name in ARCHITECTURES}


def _contents(path: str, revision: str | None) -> dict[str, Any]:
    """Read config.json."""
    if not Path(path).is_dir():
        with in_one_sentence(f"the {CONFIG} of {path}"):
            return PreTrainedConfig.get_config_dict(path, revision=revision)[0]
    file = Path(path, CONFIG)
    if not file.is_file():  # transformers would use its defaults
        raise ValueError(f"there is no checkpoint in the folder {path}: {CONFIG} is missing.")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the {CONFIG} of {path} cannot be read: {one_sentence(error)}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"the {CONFIG} of {path} must contain a JSON object, got {type(contents).__name__}.")
    return contents
