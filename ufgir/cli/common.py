"""Helpers shared by several subcommands: option groups, configurations and images."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin

import torch
from PIL import Image
from transformers import BaseImageProcessor

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair

from ..checkpoints import loading
from ..checkpoints.config_options import config_options, fields_of
from ..transforms.images import open_image as read_image
from ..utils.extras import install_command
from ..utils.text import one_sentence, shortened


# The configuration fields that `--clca` sets.
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}
FREE = "training-free"  # in place of method names: all methods without parameters
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


def add_reduction_options(parser: argparse.ArgumentParser, with_defaults: bool = False) -> None:
    """Add the options of the token reduction; their default is None.

    Args:
        parser: parser of a command.
        with_defaults: whether the help shows the defaults of `CLCAViTConfig`, for commands that need no checkpoint.
    """
    shown = ", or as shown" if with_defaults else ""
    group = parser.add_argument_group(f"reduction (default: the checkpoint's{shown})")
    add_config_options(group, REDUCTION, with_defaults)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the network; their default is None."""
    group = parser.add_argument_group("network (default: the checkpoint's, or ViT-B/16)")
    group.add_argument(
        "--clca", action="store_true", help="use the cross-layer cache with one CLR token, and the CLA head"
    )
    add_config_options(group, NETWORK)
    group.add_argument("--num-labels", type=int, metavar="N", help="number of classes [1000]")


def add_config_options(group: argparse._ArgumentGroup, names: Sequence[str], with_defaults: bool = True) -> None:
    """Add options for configuration fields, as `ufgir.checkpoints.config_options` describes them; their default is None.

    Without `with_defaults`, their help does not end with the default of `CLCAViTConfig` in brackets."""
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
        text = option.help if with_defaults else option.help.removesuffix(f" [{option.default}]")
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **how)


def json_object(text: str) -> dict[str, Any]:
    """Parse the value of an option that takes a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}")
    return found


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration fields that were set on the command line."""
    values = dict(CLCA) if getattr(args, "clca", False) else {}
    values |= fields_of(vars(args))
    if values.get("reduction") == "none":
        values = {"reduction_kwargs": None} | values | {"reduction": None}
    return values


def check_rates(rates: Sequence[float] | None, option: str) -> None:
    """Check that keep rates lie in (0, 1].

    Raises:
        ValueError: if a rate is out of range; the message contains `option`.
    """
    for rate in rates or ():
        if not 0 < rate <= 1:
            raise ValueError(f"`{option}` must be in (0, 1], got {rate}.")


def require(*packages: str, extra: str = "analysis") -> None:
    """Check that packages are installed, before a long computation.

    Args:
        packages: import names.
        extra: extra of this project that installs them.

    Raises:
        ValueError: if a package is not installed.
    """
    if missing := [name for name in packages if not is_installed(name)]:
        raise ValueError(f"{', '.join(missing)} must be installed: {install_command(extra)}")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    try:
        return find_spec(package) is not None
    except ValueError:  # an earlier import failed
        return False


def load_image_processor(model: str, config: CLCAViTConfig) -> BaseImageProcessor:
    """Load the image processor that was saved with a model.

    Args:
        model: source, see `ufgir.checkpoints.load`.
        config: configuration of the model.

    Raises:
        ValueError: if there is no image processor, or it cannot be read.
    """
    try:
        return loading.load_image_processor(model)
    except OSError as error:
        if not Path(model).is_dir() or Path(model, PROCESSOR).is_file():
            raise ValueError(f"the {PROCESSOR} of {model} cannot be read: {shortened(one_sentence(error))}") from error
        raise ValueError(
            f"{model} has no {PROCESSOR}. Copy it from the training folder of the model, or create one with the mean and std of "
            "ImageNet: "
            f"ufgir.transforms.make_image_processor({as_pair(config.image_size)[0]}).save_pretrained({str(model)!r})."
        ) from error


def some_images(paths: Sequence[str], count: int, seed: int = 0, option: str = "--count") -> Any:
    """Load images and folders of images as a data set with the columns `image` and `path`.

    Args:
        paths: images and folders.
        count: number of images at most; random ones if there are more.
        seed: seed of their choice.
        option: name of the option with the count, for the message.

    Raises:
        ValueError: if there are no images, or some cannot be read.
    """
    from ..data.load import load_images  # here, as it takes seconds
    from ..data.splits import random_subset

    return random_subset(load_images(list(paths)), count, seed, option)


def image_batches(
    images: Any, model: str, config: CLCAViTConfig, batch_size: int = 16
) -> Callable[[int], Iterator[torch.Tensor]]:
    """Return a function that yields batches of images, preprocessed for a model.

    Args:
        images: data set with the column `image`.
        model: source of the image processor.
        config: configuration of the model.
        batch_size: images per batch at most.

    Returns:
        A function: side of the images in pixels -> batches (B, C, side, side).

    Raises:
        ValueError: if there is no image processor.
    """
    from ..transforms.preprocessing import EvalTransform, make_image_processor

    processor = load_image_processor(model, config)

    def batches(size: int) -> Iterator[torch.Tensor]:
        transform = EvalTransform(processor)
        if transform.crop_size != size:
            transform = EvalTransform(make_image_processor(size, saved=processor))
        for start in range(0, len(images), batch_size):
            rows = range(start, min(start + batch_size, len(images)))
            yield torch.stack([transform(images[row]["image"]) for row in rows])

    return batches


def classes_of(files: Sequence[str], label2id: Mapping[str, int]) -> list[int] | None:
    """Return the class of each image file, whose folder is named after it; None if a folder is not named after a class."""
    names = [Path(file).absolute().parent.name for file in files]
    return [int(label2id[name]) for name in names] if set(names) <= set(label2id) else None


def open_image(file: str) -> Image.Image:
    """Read an image file completely, turn it upright and convert it to RGB.

    Raises:
        ValueError: if the file does not exist or is not an image.
    """
    try:
        return read_image(file)
    except FileNotFoundError as error:
        raise ValueError(f"there is no image file {file}.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{file} cannot be opened: {one_sentence(error)}") from error
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        raise ValueError(f"{file} cannot be read as an image: {one_sentence(error)}") from error
