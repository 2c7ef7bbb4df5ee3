"""`ufgir visualize`: pictures of what a model looks at."""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoImageProcessor

from clca import CLCAViTForImageClassification

from ..visualization import kept_patches_image
from .common import add_reduction_options, config_values, load_config, open_image


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument("--output", default="kept_patches.png", metavar="FILE", help="picture to write [%(default)s]")
    parser.add_argument("--side", type=int, default=224, help="pixels of one picture in the grid [%(default)s]")
    add_reduction_options(parser)


def run(args: argparse.Namespace) -> str:
    """Writes the picture."""
    output = Path(args.output)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"`--output` must end in .png, .jpg or another picture format, got {output}.")
    if args.side < 1:
        raise ValueError(f"`--side` must be at least 1, got {args.side}.")
    images = [open_image(file) for file in args.images]
    config = load_config(args.model, config_values(args))
    if config.reduction is None:
        raise ValueError(
            f"{args.model} reduces no tokens: there is nothing to draw. Choose a method with --reduction."
        )
    image_processor = AutoImageProcessor.from_pretrained(args.model)
    try:
        model = CLCAViTForImageClassification.from_pretrained(args.model, config=config)
    except RuntimeError as error:  # transformers' word for shapes that differ
        raise ValueError(f"the weights of {args.model} do not fit its configuration: {error}") from error
    picture = kept_patches_image(model, image_processor, images, [Path(f).name for f in args.images], args.side)
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    return f"wrote {output}"
