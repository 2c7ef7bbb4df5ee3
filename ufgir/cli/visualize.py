"""`ufgir visualize`: draw what a model attends to, keeps and merges."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import BaseImageProcessor

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..checkpoints.loading import EVERYTHING, HEAD, first_few, load_model, read_config, warn_fields_without_effect
from ..utils.options import Requirement, called, check_options
from ..visualization.kinds import KINDS, comparison, draw
from ..visualization.records import Kind, Option
from ..visualization.sheet import save_image
from .common import add_reduction_options, check_rates, config_values, load_image_processor, open_image
from .outputs import check_file


GRID = "grid"  # the value of --what for several figures side by side
# The options of a grid.
GRID_OPTIONS = {
    "of": Option("kind of figure, of which the last column is shown", "kept", choices=KINDS),
    "models": Option("further checkpoints", nargs="+", metavar="MODEL"),
    "methods": Option("methods, as for --reduction", "the checkpoint's", nargs="+", metavar="METHOD"),
    "keep_rates": Option("keep rates in (0, 1]", "the checkpoint's", type=float, nargs="+", metavar="RATE"),
}
LARGEST_SIDE = 4096


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, one row per image")
    parser.add_argument(
        "--what",
        default="kept",
        choices=[*KINDS, GRID],
        help=" ".join(f"{name}: {kind.help}." for name, kind in KINDS.items())
        + f" {GRID}: one of these for several models, methods or keep rates side by side [%(default)s]",
    )
    parser.add_argument("--output", metavar="FILE", help="figure to write [kept_patches.png, or WHAT.png]")
    parser.add_argument("--side", type=int, default=224, help="longer side of a figure, pixels [%(default)s]")
    parser.add_argument(
        "--interpolate-pos-encoding", action="store_true", help="accept other image sizes than the model's [no]"
    )
    group = parser.add_argument_group("options of some kinds of figures")
    for name, option in _options_of_kinds().items():
        _add(group, name, option)
    group = parser.add_argument_group("grid: what to put side by side")
    for name, option in GRID_OPTIONS.items():
        _add(group, name, option)
    add_reduction_options(parser)


def _kinds_with(option: str) -> list[str]:
    """Return the kinds that take an option."""
    return [name for name, kind in KINDS.items() if option in kind.options]


def _options_of_kinds() -> dict[str, Option]:
    """Return the options of all kinds. The help lists the kinds, and their defaults if these differ."""
    options = {}
    for name in dict.fromkeys(name for kind in KINDS.values() for name in kind.options):
        takers = {kind: KINDS[kind].options[name] for kind in _kinds_with(name)}
        first, *others = takers.values()
        default = first.default
        if any(other.default != default for other in others):
            default = ", ".join(f"{kind}: {option.default}" for kind, option in takers.items())
        options[name] = first._replace(help=f"{', '.join(takers)}: {first.help}", default=default)
    return options


def _add(group: argparse._ArgumentGroup, name: str, option: Option) -> None:
    """Add the argument of an option; its default is None."""
    group.add_argument(
        _flag(name),
        type=option.type,
        choices=option.choices,
        nargs=option.nargs,
        metavar=option.metavar,
        help=f"{option.help} [{option.default}]",
    )
    if option.alias is not None:
        arguments = {"type": option.type, "choices": option.choices, "nargs": option.nargs}
        group.add_argument(_flag(option.alias), dest=name, help=argparse.SUPPRESS, **arguments)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace) -> str:
    """Write the figure."""
    output = Path(args.output or ("kept_patches.png" if args.what == "kept" else f"{args.what}.png"))
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"`--output` must end in .png, .jpg or another image format, got {output}.")
    if not 1 <= args.side <= LARGEST_SIDE:
        raise ValueError(f"`--side` must be between 1 and {LARGEST_SIDE}, got {args.side}.")
    check_rates(args.keep_rates, "--keep-rates")
    check_file(output)
    _warn_of_options(args)
    kind = partial(_kind(args), **_given(args))
    images = [open_image(file) for file in args.images]
    values, notes = config_values(args), []
    shared = {
        "images": images,
        "titles": _titles(args.images),
        "side": args.side,
        "interpolate_pos_encoding": args.interpolate_pos_encoding,
    }
    if args.what == GRID:
        variants, rows, columns = _variants(args, values)
        # check all before loading any
        configs = [(path, _config(path, changes, args)) for path, changes in variants]
        warn_fields_without_effect(variants[0][1] | values, [config for _, config in configs])
        figure = comparison(kind, _load_all(configs, notes), columns, rows=rows, **shared)
    else:
        config = _config(args.model, values, args)
        warn_fields_without_effect(values, [config])
        figure = draw(kind, *next(_load_all([(args.model, config)], notes)), **shared)
    return "\n".join([f"wrote {save_image(figure, output)}", *notes])


def _titles(files: list[str]) -> list[str]:
    """Return the file names, with their folders if names repeat."""
    names = [Path(file).name for file in files]
    return names if len({*names}) == len(names) else [str(Path(*Path(file).parts[-2:])) for file in files]


def _name(args: argparse.Namespace) -> str:
    """Return the kind of figure, also for a grid."""
    return (args.of or "kept") if args.what == GRID else args.what


def _kind(args: argparse.Namespace) -> Kind:
    return KINDS[_name(args)]


def _warn_of_options(args: argparse.Namespace) -> None:
    """Warn once about given options that the kind of figure does not take."""
    taken = {*_kind(args).options, *(GRID_OPTIONS if args.what == GRID else ())}
    given = [name for name in (*_options_of_kinds(), *GRID_OPTIONS) if getattr(args, name) is not None]
    requirements = [
        Requirement(
            (name,), f"`--what` {' or '.join(_kinds_with(name) or [GRID])}", lambda taken, name=name: name in taken
        )
        for name in given
    ]
    with called({name: _flag(name) for name in given}):
        check_options(taken, given, requirements)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of the kind of figure, as arguments of its function."""
    options = _kind(args).options
    return {n: option.convert(getattr(args, n)) for n, option in options.items() if getattr(args, n) is not None}


def _variants(
    args: argparse.Namespace, values: dict[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], list[str], list[str]]:
    """Return checkpoints with configuration changes, row by row, and the names of rows and columns."""
    if not (args.models or args.methods or args.keep_rates):
        raise ValueError("`--what grid` requires `--models`, `--methods` or `--keep-rates`.")
    for several, one in (("methods", "reduction"), ("keep_rates", "keep_rate"), ("keep_rates", "keep_tokens")):
        if getattr(args, several) and getattr(args, one) is not None:
            raise ValueError(f"`{_flag(several)}` cannot be combined with `{_flag(one)}`: remove one of them.")
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
    need = _kind(args).unmet(config)
    if need is not None:
        raise ValueError(f"{need.refusal.format(model=model)} {need.remedy}")
    return config


def _load_all(
    configs: list[tuple[str, CLCAViTConfig]], notes: list[str]
) -> Iterator[tuple[CLCAViTForImageClassification, BaseImageProcessor]]:
    """Load models and image processors one by one; append a note about untrained weights."""
    for path, config in configs:
        image_processor = load_image_processor(path, config)
        model, untrained = load_model(path, config, unused=EVERYTHING)
        new = [name for name in untrained if ".reduction." in name]
        # no figure needs the head
        others = [name for name in untrained if name not in new and not name.startswith(HEAD)]
        for names, what in (
            (new, f"weights of {config.reduction}: its {len(new)} are"),
            (others, first_few(others) + ": they are"),
        ):
            note = f"{path} does not contain {what} random (seed 0), not trained."
            if names and note not in notes:
                notes.append(note)
        yield model, image_processor
