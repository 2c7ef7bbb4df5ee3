"""Load models of any source: CLCA checkpoints, ViTs of transformers and timm, files of the original code.

`load` returns a model and `load_image_processor` its image processor. Commands and `run_ufgir.py` load in two steps, to check or
change the configuration before weights are read: `checkpoint_config` or `load_config`, then `load_model` for a trained model, or
`load_pretrained` for training. `ufgir.checkpoints.sources` describes the kinds of sources.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.budget_clca import as_pair

from ..transforms.preprocessing import make_image_processor, sizes_of
from ..utils.checksums import check_weights
from ..utils.options import Requirement, check_options
from ..utils.text import listed, one_sentence
from .checks import ALWAYS_RESIZED, LARGEST_RESIZE, WEIGHTS, check_header, in_one_sentence, read_header
from .sources import Source, find_source
from .state_dicts import NEW_PARTS


logger = logging.getLogger(__name__)

EVERYTHING = ("",)  # prefix of every name, for `load_model(unused=...)`
HEAD = ("classifier.",)  # not needed to inspect tokens
_NAMED = 3  # weights listed in a message


class Loaded(NamedTuple):
    """A model, and the names of its weights that the checkpoint does not contain, which are random."""

    model: CLCAViTForImageClassification
    untrained: list[str]


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    architecture: str | None = None,
    attn_implementation: str | None = None,
    **config: Any,
) -> CLCAViTForImageClassification:
    """Load a model from any source, in evaluation mode, in float32. A warning lists weights that the source does not contain.

    Position embeddings and patch projection are resampled for another `image_size` or `patch_size`. CLR tokens are copies of CLS.
    A classifier with another number of classes than `num_labels` is re-initialized.

    Args:
        source: folder or Hub repository of CLCA, transformers (ViT, DeiT, DINOv2, DINOv2 with registers, CLIP, SigLIP, ViT-MAE,
            I-JEPA) or timm; timm's name of a pretrained model; or a .pth file of the original code.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, for a file or folder of weights without timm's config.json.
        attn_implementation: as in `from_pretrained`.
        config: fields of `CLCAViTConfig` that override the source's, such as `image_size`, `num_labels`, `reduction`, `head`.

    Raises:
        OSError: if there is no such source, or the Hub cannot be reached.
        ValueError: if the kind of source is unknown, weights cannot be read, are missing or do not fit, or a value is out of range.

    Example:

    ```python
    model = load("facebook/dinov2-small", image_size=448, num_labels=80, reduction="evit", keep_rate=0.1)
    ```
    """
    wanted = checkpoint_config(source, config, revision, architecture)
    model, untrained = load_with_report(
        source,
        wanted,
        revision,
        architecture,
        ignore_mismatched_sizes=bool({"num_labels", "id2label"} & set(config)),
        attn_implementation=attn_implementation,
    )
    check_new(source, untrained)
    if untrained:
        logger.warning(
            "%s does not contain %s. They are initialized: train the model first.", source, first_few(untrained)
        )
    return model.eval()


def load_image_processor(
    source: str | Path,
    image_size: int | None = None,
    resize_size: int | None = None,
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    revision: str | None = None,
    architecture: str | None = None,
) -> Any:
    """Load the image processor of a model of any source.

    Args:
        source: see `load`.
        image_size: side of the model's input, pixels; by default the source's.
        resize_size: side of the square before the center crop, pixels; by default in the source's proportion to `image_size`.
        image_mean, image_std: three numbers each, instead of the source's.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, see `load`.

    Raises:
        OSError: if there is no such source, or a CLCA model has no image processor.
        ValueError: if the kind of source is unknown, or a size is out of range.
    """
    kind, found = find_source(source, revision, architecture)
    with in_one_sentence(f"the image processor of {source}"):
        saved = kind.image_processor(found, image_size)
        _check_size(saved, image_size or kind.config(found, {}).image_size, source)
    if resize_size is image_mean is image_std is None:
        return saved
    side = image_size or sizes_of(saved)[1][0]
    return make_image_processor(side, resize_size, image_mean or saved.image_mean, image_std or saved.image_std)


def _check_size(image_processor: Any, image_size: Any, source: str | Path) -> None:
    before, _ = sizes_of(image_processor)
    sides = before or [side for side in dict(image_processor.size).values() if side is not None]
    most = max(LARGEST_RESIZE * max(as_pair(image_size)), ALWAYS_RESIZED)
    if max(sides) > most:
        raise ValueError(
            f"`size` of the image processor of {source} must be at most {most} pixels for a model whose `image_size` is "
            f"{image_size}, got {sides}."
        )


def check_new(source: str | Path, untrained: Sequence[str]) -> None:
    """Check that a source contains the weights of the backbone.

    Raises:
        ValueError: if some are missing; the message lists them.
    """
    if lacking := [name for name in untrained if not any(re.fullmatch(part, name) for part in NEW_PARTS)]:
        raise ValueError(f"weights of {source} do not fit the model: {listed([f'{n} is missing' for n in lacking])}.")


def checkpoint_config(
    checkpoint: str | Path, values: Mapping[str, Any], revision: str | None = None, architecture: str | None = None
) -> CLCAViTConfig:
    """Return the checked configuration of a source's model, overridden by `values`.

    Args:
        checkpoint: source, see `load`.
        values: configuration fields.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, see `load`.

    Raises:
        OSError: if there is no such source, or its configuration cannot be read.
        ValueError: if a value is out of range.
    """
    kind, source = find_source(checkpoint, revision, architecture)
    _check_weights(source)
    with in_one_sentence(f"the configuration of {checkpoint}"):
        return kind.config(source, values)


def load_model(
    checkpoint: str | Path,
    config: CLCAViTConfig,
    revision: str | None = None,
    unused: Sequence[str] = (),
    **options: Any,
) -> Loaded:
    """Load a trained model in evaluation mode, in float32. Weights that may be missing are drawn with a fixed seed.

    Args:
        checkpoint: source, see `load`.
        config: configuration of the model.
        revision: branch, tag or commit of the Hub repository.
        unused: prefixes of the names of weights that may be missing because they are not used.
        options: `attn_implementation` and `use_safetensors` of `from_pretrained`.

    Raises:
        ValueError: if weights are missing, cannot be read, or have other shapes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, untrained = load_with_report(checkpoint, config, revision, **options)
    check_trained(checkpoint, config, [name for name in untrained if not name.startswith(tuple(unused))])
    return Loaded(model.eval(), untrained)


def check_trained(checkpoint: str | Path, config: CLCAViTConfig, untrained: Sequence[str]) -> None:
    """Check that no weights are random.

    Raises:
        ValueError: if `untrained` is not empty.
    """
    if untrained:
        of = f" of {config.reduction}" if any(".reduction." in name for name in untrained) else ""
        raise ValueError(
            f"{checkpoint} does not contain {first_few(untrained)}{of}. They would be random: train the model first."
        )


def first_few(names: Sequence[str]) -> str:
    """Format the first few names and the number of the others."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def load_pretrained(
    checkpoint: str | Path, config: CLCAViTConfig, revision: str | None = None, **kwargs: Any
) -> CLCAViTForImageClassification:
    """Load the weights of a source for training, see `load_with_report`. Missing weights are initialized.

    Raises:
        ValueError: if weights cannot be read, or have other shapes and `ignore_mismatched_sizes` is not set.
    """
    return load_with_report(
        checkpoint,
        config,
        revision,
        advice="perhaps the number of classes differs: set `ignore_mismatched_sizes` to re-initialize them",
        **kwargs,
    ).model


def load_with_report(
    checkpoint: str | Path,
    config: CLCAViTConfig,
    revision: str | None = None,
    architecture: str | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    advice: str = "use the options that it was trained with",
    **options: Any,
) -> Loaded:
    """Load the weights of a source into a model of `config`, in float32.

    Position embeddings and patch projection are resampled for another size, as in `from_pretrained`; new tokens are initialized.

    Args:
        checkpoint: source, see `load`.
        config: configuration of the model, from `checkpoint_config`.
        revision: branch, tag or commit of the Hub repository.
        architecture: timm's architecture name, see `load`.
        ignore_mismatched_sizes: re-initialize weights of other shapes.
        advice: what to do about such weights, for the message.
        options: `attn_implementation` and `use_safetensors` of `from_pretrained`.

    Raises:
        ValueError: if weights cannot be read, differ from their saved checksum, or have other shapes and
            `ignore_mismatched_sizes` is not set.
    """
    check_weights(checkpoint)
    kind, source = find_source(checkpoint, revision, architecture)
    _check_weights(source)
    with in_one_sentence(f"the weights of {checkpoint}"):
        model, missing, mismatched = kind.load(source, config, **{n: v for n, v in options.items() if v is not None})
    if mismatched and not ignore_mismatched_sizes:
        name, there, here = mismatched[0]
        saved = kind.config(source, {})
        resized = (saved.image_grid, saved.patch_size) != (config.image_grid, config.patch_size)
        if resized and all(".reduction." in name for name, *_ in mismatched):
            advice = "because `image_size` or `patch_size` differs"
        raise ValueError(
            f"weights of {checkpoint} do not fit the model, {advice}: {name} has the shape {there}, not {here}"
            + (f", and {len(mismatched) - 1} more." if len(mismatched) > 1 else ".")
        )
    return Loaded(model, sorted({*missing, *(name for name, *_ in mismatched)}))


def _check_weights(source: Source) -> None:
    """Compare config.json with the headers of the weights, if both are on this machine."""
    if not source.contents or "architecture" in source.contents:
        return  # timm's sizes are taken from the weights
    folder = source.path
    if not Path(folder).is_dir():
        cached = try_to_load_from_cache(source.path, WEIGHTS, revision=source.revision)
        if not isinstance(cached, str):
            return
        folder = str(Path(cached).parent)
    header = read_header(folder)
    if header is not None:
        check_header(source.contents, header, source.path)


def new_config(values: Mapping[str, Any]) -> CLCAViTConfig:
    """Return the configuration of a new model: `values`, and by default those of ViT-B/16."""
    width = values.get("hidden_size", CLCAViTConfig.hidden_size)
    return CLCAViTConfig(**{"layer_norm_eps": 1e-6, "intermediate_size": 4 * width, **values})


def load_config(model: str | None, values: dict[str, Any], revision: str | None = None) -> CLCAViTConfig:
    """Return the checked configuration of a source, or of ViT-B/16, overridden by `values`. Warn about values without effect.

    Raises:
        ValueError: if there is no such checkpoint, or a value is out of range.
    """
    config = read_config(model, values, revision)
    warn_fields_without_effect(values, [config])
    return config


def read_config(model: str | None, values: dict[str, Any], revision: str | None = None) -> CLCAViTConfig:
    """Return the configuration as `load_config`, without the warning, for callers that compare several configurations."""
    if model is None:
        return new_config({"num_labels": 1000, **values})
    try:
        return checkpoint_config(model, values, revision)
    except OSError as error:
        if Path(model).is_dir():
            raise ValueError(f"the config.json of {model} cannot be read: {one_sentence(error)}") from error
        raise ValueError(
            f"there is no checkpoint {model}: found neither a folder with config.json nor a Hub repository."
        ) from error


REQUIREMENTS = (  # conditions under which configuration fields have an effect
    Requirement(
        ("keep_rate", "keep_tokens", "reduction_kwargs"), "a `reduction`", lambda config: config.reduction is not None
    ),
    Requirement(
        ("reduction_layers",),
        "a `reduction`, a `cross_layer_cache` or another `head` than linear",
        lambda config: config.uses_reduction_layers,
    ),
    Requirement(
        ("cache_gap", "cache_pool_cls", "cache_pool_clr", "cache_recover_at_last"),
        "a `cross_layer_cache`",
        lambda config: config.cross_layer_cache,
    ),
)


def warn_fields_without_effect(values: Mapping[str, Any], configs: Sequence[CLCAViTConfig]) -> None:
    """Warn about fields without effect on all given configurations, such as a keep rate without a reduction.

    Args:
        values: configuration fields; None counts as not given.
        configs: configurations made with these fields.
    """
    given = [name for name, value in values.items() if value is not None]
    of_any = [r._replace(holds=lambda configs, holds=r.holds: any(map(holds, configs))) for r in REQUIREMENTS]
    check_options(configs, given, of_any)
