"""What several subcommands share: groups of options, loading a configuration, a table of text."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor

from clca import REDUCTIONS, CLCAViTConfig
from clca.configuration_clca import HEADS, as_pair

from ..arguments import one_sentence, shortened
from ..loading import OF_REDUCTION, checkpoint_config
from ..transforms import open_picture


# What `--clca` stands for.
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
PROCESSOR = "preprocessor_config.json"
FIELDS = {*CLCAViTConfig.__dataclass_fields__, "num_labels"}


def add_reduction_options(parser: argparse.ArgumentParser) -> None:
    """Options of the token reduction, unset unless given."""
    group = parser.add_argument_group("reduction (unset: as the checkpoint says)")
    group.add_argument("--reduction", help=f"none, {', '.join(sorted(REDUCTIONS))}")
    group.add_argument("--reduction-layers", type=int, nargs="+", metavar="LAYER", help="counted from 0 [3 6 9]")
    group.add_argument("--keep-rate", type=float, nargs="+", metavar="RATE", help="in (0, 1]: one, or one a stage [1]")
    group.add_argument("--keep-tokens", type=int, nargs="+", metavar="COUNT", help="one a stage, instead of rates")
    group.add_argument("--reduction-kwargs", type=json_object, metavar="JSON", help="the method's own options")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Options of the network, unset unless given."""
    group = parser.add_argument_group("network (unset: as the checkpoint says, or ViT-B/16)")
    group.add_argument("--clca", action="store_true", help="cross-layer cache with one CLR, and the CLA head")
    group.add_argument("--cross-layer-cache", action=argparse.BooleanOptionalAction, default=None)
    group.add_argument("--num-clr-tokens", type=int, metavar="N")
    group.add_argument("--head", help=", ".join(HEADS))
    for name in (
        "image-size",
        "patch-size",
        "hidden-size",
        "num-hidden-layers",
        "num-attention-heads",
        "intermediate-size",
        "num-register-tokens",
        "num-labels",
    ):
        group.add_argument(f"--{name}", type=int, metavar="N")


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def check_fields(changes: Mapping[str, Any], what: str) -> None:
    """Refuse names that are no fields of a configuration: transformers would keep them, and nothing would read them.

    Args:
        changes: fields to change.
        what: where they come from, for the message.

    Raises:
        ValueError: naming the first, and what may be meant.
    """
    for name in changes:
        if name not in FIELDS:
            close = get_close_matches(name, FIELDS, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " See the fields of CLCAViTConfig."
            raise ValueError(f"{what}: a configuration has no field `{name}`.{hint}")


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that were set on the command line."""
    values = dict(CLCA) if getattr(args, "clca", False) else {}
    values |= {k: v for k, v in vars(args).items() if v is not None and k in FIELDS}
    if values.get("reduction") == "none":
        values = {"reduction_kwargs": None} | values | {"reduction": None}
    return values


def load_config(model: str | None, values: dict[str, Any]) -> CLCAViTConfig:
    """The configuration of a checkpoint, or of ViT-B/16, with `values` in place of its own; checked.

    Raises:
        ValueError: there is no such checkpoint, or a value that is out of range or means nothing to it.
    """
    config = read_config(model, values)
    check_meaning(values, [config])
    return config


def read_config(model: str | None, values: dict[str, Any]) -> CLCAViTConfig:
    """As `load_config`, but values may mean nothing: of several configurations they may mean something to others."""
    if model is None:
        width = values.get("hidden_size", 768)
        defaults = {"layer_norm_eps": 1e-6, "intermediate_size": 4 * width, "num_labels": 1000}
        return CLCAViTConfig(**defaults | values)
    if not Path(model).is_dir() and Path(model).exists():
        raise ValueError(f"`MODEL` must be a folder or a Hub repository, got the file {model}.")
    if Path(model).is_dir() and not Path(model, "config.json").is_file():  # transformers would take its defaults
        raise ValueError(f"there is no checkpoint in the folder {model}: it has no config.json.")
    try:
        return checkpoint_config(model, values)
    except OSError as error:
        if Path(model).is_dir():
            raise ValueError(f"the config.json of {model} cannot be read: {one_sentence(error)}") from error
        raise ValueError(
            f"there is no checkpoint {model}: neither a folder with config.json nor on the Hub."
        ) from error


# What gives a field its meaning -> whether a configuration has that, and the fields.
_MEANING: dict[str, tuple[Callable[[CLCAViTConfig], bool], tuple[str, ...]]] = {
    "a `reduction`": (lambda config: config.reduction is not None, OF_REDUCTION),
    "a `reduction`, a cross-layer cache or another head than the linear one": (
        lambda config: config.uses_reduction_layers,
        ("reduction_layers",),
    ),
    "a cross-layer cache": (
        lambda config: config.cross_layer_cache,
        ("cache_gap", "cache_pool_cls", "cache_pool_clr", "cache_recover_at_last"),
    ),
}


def check_meaning(values: Mapping[str, Any], configs: Sequence[CLCAViTConfig]) -> None:
    """Refuse what was typed in vain.

    Args:
        values: fields of a configuration; None is as if it were not there.
        configs: that came of them.

    Raises:
        ValueError: a field that means nothing to any of them, such as a keep rate where nothing is reduced.
    """
    for needed, (has, names) in _MEANING.items():
        for name in names:
            value = values.get(name)
            if value is not None and not any(map(has, configs)):
                told = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                raise ValueError(
                    f"`{name}` {told} means nothing to a model without {needed}: leave it out, or choose one."
                )


def check_rates(rates: Sequence[float] | None, option: str) -> None:
    """Refuse keep rates out of (0, 1], naming the option that holds several of them.

    Raises:
        ValueError: for the first of them.
    """
    for rate in rates or ():
        if not 0 < rate <= 1:
            raise ValueError(f"`{option}` must be in (0, 1], got {rate}.")


def require(*packages: str, extra: str = "analysis") -> None:
    """Say before a long pass that a package is missing, not after it.

    Args:
        packages: names to import.
        extra: of this project, that installs them.

    Raises:
        ValueError: one of these importable names is not installed.
    """
    if missing := [name for name in packages if not _is_there(name)]:
        raise ValueError(f"{', '.join(missing)} must be installed for this: pip install 'clca-vit[{extra}]'.")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # it was imported in vain before
        return False


def load_image_processor(model: str, config: CLCAViTConfig) -> BaseImageProcessor:
    """The image processor that was saved with a model.

    Args:
        model: folder or Hub repository.
        config: of the model.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    try:
        return AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever stands in the file
        if not Path(model).is_dir() or Path(model, PROCESSOR).is_file():
            raise ValueError(f"the {PROCESSOR} of {model} cannot be read: {shortened(one_sentence(error))}") from error
        raise ValueError(
            f"{model} has no {PROCESSOR}, which says how pictures become pixels: copy it from the folder that the model was "
            "trained in, or, for the mean and deviation of ImageNet, call "
            f"ufgir.transforms.make_image_processor({as_pair(config.image_size)[0]}).save_pretrained({str(model)!r})."
        ) from error


def align(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def open_image(file: str) -> Image.Image:
    """A picture, read completely, upright and RGB; ValueError if it is none."""
    try:
        return open_picture(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no picture {file}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} is not opened: {one_sentence(error)}") from error
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        raise ValueError(f"{file} is not a picture that can be read: {one_sentence(error)}") from error
