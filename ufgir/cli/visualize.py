"""`ufgir visualize`: pictures of what a model looks at, keeps and merges."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..checkpoints.loading import EVERYTHING, HEAD, check_meaning, load_model, read_config, some_of
from ..visualization.kinds import COLOURINGS, KINDS, NEED_STAGES, comparison, draw
from ..visualization.sheet import save_picture
from .common import add_reduction_options, check_rates, config_values, load_image_processor, open_image
from .outputs import check_file


# The options that only some kinds of pictures have.
OPTIONS = {
    "kept": (),
    "merge": ("colours",),
    "trace": ("token", "patch"),
    "attention": ("layers", "heads"),
    "rollout": ("ranges",),
    "similarity": ("layers", "to"),
}
GRID_OPTIONS = ("of", "models", "methods", "keep_rates")
LARGEST_SIDE = 4096


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files, one row each")
    parser.add_argument(
        "--what",
        default="kept",
        choices=[*KINDS, "grid"],
        help="kept: patches that each stage keeps. merge: groups of patches that share a token. trace: what one token is made "
        "of. attention: of CLS. rollout: attention through layers. similarity: of features to CLS and to the mean. grid: one "
        "of these for several models, methods or keep rates side by side [%(default)s]",
    )
    parser.add_argument("--output", metavar="FILE", help="picture to write [kept_patches.png, else WHAT.png]")
    parser.add_argument("--side", type=int, default=224, help="pixels of a picture's longer side [%(default)s]")
    parser.add_argument(
        "--interpolate-pos-encoding", action="store_true", help="accept images of another size than the model's [no]"
    )
    group = parser.add_argument_group("what to draw, each for some kinds only")
    group.add_argument("--colours", choices=COLOURINGS, help="merge: a group's mean colour, or distinct ones [mean]")
    group.add_argument("--token", type=int, metavar="N", help="trace: index among the last tokens, CLS is 0 [none]")
    group.add_argument(
        "--patch", type=int, nargs=2, metavar=("ROW", "COLUMN"), help="trace: the token with this patch, from 0 [none]"
    )
    group.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="attention, similarity: counted from 0 [attention: all, similarity: after the final norm]",
    )
    group.add_argument("--heads", nargs="+", metavar="HEAD", help="attention: mean, all, or heads from 0 [mean]")
    group.add_argument(
        "--ranges",
        type=_range,
        nargs="+",
        metavar="FROM:TO",
        help="rollout: layers from 0, TO not among them [each encoder group, then all layers]",
    )
    group.add_argument(
        "--to", nargs="+", choices=("mean", "cls"), help="similarity: to what [both, without CLS the mean]"
    )
    group = parser.add_argument_group("grid: what to put side by side")
    group.add_argument("--of", choices=KINDS, help="kind of picture; the last column of it is shown [kept]")
    group.add_argument("--models", nargs="+", metavar="MODEL", help="checkpoints beside MODEL [none]")
    group.add_argument("--methods", nargs="+", metavar="METHOD", help="names as of --reduction [the checkpoint's]")
    group.add_argument("--keep-rates", type=float, nargs="+", metavar="RATE", help="in (0, 1] [the checkpoint's]")
    add_reduction_options(parser)


def _range(text: str) -> tuple[int, int]:
    try:
        start, stop = map(int, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be two numbers of layers such as 0:4, got {text}") from error
    return start, stop


def run(args: argparse.Namespace) -> str:
    """Writes the picture."""
    output = Path(args.output or ("kept_patches.png" if args.what == "kept" else f"{args.what}.png"))
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--output` must end in .png, .jpg or another picture format, got {output}.")
    if not 1 <= args.side <= LARGEST_SIDE:
        raise ValueError(f"`--side` must be between 1 and {LARGEST_SIDE}, got {args.side}.")
    check_rates(args.keep_rates, "--keep-rates")
    check_file(output)
    kind = partial(KINDS[_kind(args)], **_kind_options(args))
    images = [open_image(file) for file in args.images]
    values, notes = config_values(args), []
    shared = {
        "images": images,
        "titles": _titles(args.images),
        "side": args.side,
        "interpolate_pos_encoding": args.interpolate_pos_encoding,
    }
    if args.what == "grid":
        variants, rows, columns = _variants(args, values)
        # all checked before any is loaded
        configs = [(path, _config(path, changes, args)) for path, changes in variants]
        check_meaning(variants[0][1] | values, [config for _, config in configs])
        picture = comparison(kind, _load_all(configs, notes), columns, rows=rows, **shared)
    else:
        config = _config(args.model, values, args)
        check_meaning(values, [config])
        picture = draw(kind, *next(_load_all([(args.model, config)], notes)), **shared)
    return "\n".join([f"wrote {save_picture(picture, output)}", *notes])


def _titles(files: list[str]) -> list[str]:
    """The files' names, with their folders where names repeat."""
    names = [Path(file).name for file in files]
    return names if len({*names}) == len(names) else [str(Path(*Path(file).parts[-2:])) for file in files]


def _kind(args: argparse.Namespace) -> str:
    return (args.of or "kept") if args.what == "grid" else args.what


def _kind_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the kind of picture that were given; ValueError for one of another kind."""
    kind = _kind(args)
    allowed = (*OPTIONS[kind], *(GRID_OPTIONS if args.what == "grid" else ()))
    for name in dict.fromkeys([*(name for names in OPTIONS.values() for name in names), *GRID_OPTIONS]):
        if getattr(args, name) is not None and name not in allowed:
            kinds = [k for k, names in OPTIONS.items() if name in names] or ["grid"]
            raise ValueError(f"`--{name.replace('_', '-')}` belongs to --what {' or '.join(kinds)}, not to {kind}.")
    options = {name: getattr(args, name) for name in OPTIONS[kind] if getattr(args, name) is not None}
    if "patch" in options:
        options["patch"] = tuple(options["patch"])
    if "heads" in options:
        options["heads"] = _heads(options["heads"])
    return options


def _heads(words: list[str]) -> str | list[int]:
    if words in (["mean"], ["all"]):
        return words[0]
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"`--heads` must be mean, all or numbers of heads, got {' '.join(words)}.") from error


def _variants(
    args: argparse.Namespace, values: dict[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], list[str], list[str]]:
    """Checkpoints and changes to their configurations, row by row, and the names of rows and columns."""
    if not (args.models or args.methods or args.keep_rates):
        raise ValueError("`--what grid` needs something to put side by side: --models, --methods or --keep-rates.")
    for several, one in (("methods", "reduction"), ("keep_rates", "keep_rate"), ("keep_rates", "keep_tokens")):
        if getattr(args, several) and getattr(args, one) is not None:
            raise ValueError(
                f"`--{several.replace('_', '-')}` takes the place of `--{one.replace('_', '-')}`: give one."
            )
    models = [args.model, *(args.models or [])]
    names, variants = [], []
    for model in models:
        for method in args.methods or [None]:
            changes = dict(values)
            if method is not None:
                changes["reduction"] = None if method == "none" else method
            variants.append((model, changes))
            names.append(", ".join([Path(model).name] * (len(models) > 1) + [method] * (method is not None)))
    if not args.keep_rates:
        return variants, [""], names
    rates = [f"keep rate {rate:g}" for rate in args.keep_rates]
    places = [(model, changes | {"keep_rate": [rate]}) for model, changes in variants for rate in args.keep_rates]
    if len(rates) == 1:
        return places, rates, names if any(names) else rates
    return places, names, rates


def _config(model: str, values: dict[str, Any], args: argparse.Namespace) -> CLCAViTConfig:
    config = read_config(model, values)
    if config.reduction is None and _kind(args) in NEED_STAGES:
        raise ValueError(f"{model} reduces no tokens: there is nothing to draw. Choose a method with --reduction.")
    return config


def _load_all(
    configs: list[tuple[str, CLCAViTConfig]], notes: list[str]
) -> Iterator[tuple[CLCAViTForImageClassification, BaseImageProcessor]]:
    """Models and image processors, each when it is asked for; what is not trained is noted."""
    for path, config in configs:
        image_processor = load_image_processor(path, config)
        model, untrained = load_model(path, config, spare=EVERYTHING)
        new = [name for name in untrained if ".reduction." in name]
        # no picture needs the head
        others = [name for name in untrained if name not in new and not name.startswith(HEAD)]
        for names, what in (
            (new, f"weights of {config.reduction}: its {len(new)} are"),
            (others, some_of(others) + ": they are"),
        ):
            note = f"{path} holds no {what} random (seed 0), not trained."
            if names and note not in notes:
                notes.append(note)
        yield model, image_processor
