"""What several subcommands share: groups of options, loading a configuration, a table of text."""

import argparse
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

from PIL import Image
from transformers import BaseImageProcessor

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair

from ..checkpoints import loading
from ..checkpoints.config_options import config_options, fields_of
from ..transforms.images import open_image as read_image
from ..utils.text import one_sentence, shortened


# What `--clca` stands for.
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
FREE = "training-free"  # in place of names of methods: all that need no parameters of their own
PROCESSOR = "preprocessor_config.json"


REDUCTION = ("reduction", "reduction_layers", "keep_rate", "keep_tokens", "reduction_kwargs")
NETWORK = (
    "cross_layer_cache",
    "num_clr_tokens",
    "head",
    "image_size",
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
)
NETWORK += ("num_attention_heads", "intermediate_size", "num_register_tokens")


def add_reduction_options(parser: argparse.ArgumentParser) -> None:
    """Options of the token reduction, unset unless given."""
    add_config_options(parser.add_argument_group("reduction (unset: as the checkpoint says)"), REDUCTION)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Options of the network, unset unless given."""
    group = parser.add_argument_group("network (unset: as the checkpoint says, or ViT-B/16)")
    group.add_argument("--clca", action="store_true", help="cross-layer cache with one CLR, and the CLA head")
    add_config_options(group, NETWORK)
    group.add_argument("--num-labels", type=int, metavar="N", help="number of classes [1000]")


def add_config_options(group: argparse._ArgumentGroup, names: Sequence[str]) -> None:
    """Options for fields of a configuration, as `ufgir.checkpoints.config_options` describes them, unset unless given."""
    for name in names:
        option, kind = config_options()[name], config_options()[name].type
        how: dict[str, Any] = {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction, "default": None}
        elif kind is dict:
            how = {"type": json_object, "metavar": "JSON"}
        elif get_origin(kind) is list:
            how = {"type": get_args(kind)[0], "nargs": "+", "metavar": "N"}
        elif kind is not str:
            how["metavar"] = "N"
        group.add_argument(f"--{name.replace('_', '-')}", help=option.help, **how)


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that is a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that were set on the command line."""
    values = dict(CLCA) if getattr(args, "clca", False) else {}
    values |= fields_of(vars(args))
    if values.get("reduction") == "none":
        values = {"reduction_kwargs": None} | values | {"reduction": None}
    return values


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
        model: source, see `ufgir.checkpoints.load`.
        config: of the model.

    Raises:
        ValueError: it has none, or one that cannot be read.
    """
    try:
        return loading.load_image_processor(model)
    except OSError as error:
        if not Path(model).is_dir() or Path(model, PROCESSOR).is_file():
            raise ValueError(f"the {PROCESSOR} of {model} cannot be read: {shortened(one_sentence(error))}") from error
        raise ValueError(
            f"{model} has no {PROCESSOR}, which says how pictures become pixels: copy it from the folder that the model was "
            "trained in, or, for the mean and deviation of ImageNet, call "
            f"ufgir.transforms.make_image_processor({as_pair(config.image_size)[0]}).save_pretrained({str(model)!r})."
        ) from error


def open_image(file: str) -> Image.Image:
    """A picture, read completely, upright and RGB; ValueError if it is none."""
    try:
        return read_image(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no picture {file}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} is not opened: {one_sentence(error)}") from error
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        raise ValueError(f"{file} is not a picture that can be read: {one_sentence(error)}") from error
