"""The console command `ufgir`.

ufgir profile --reduction evit --keep-rate 0.1 --image-size 448 --clca
ufgir profile outputs/demo
ufgir profile --paper
ufgir visualize outputs/demo leaf.png --output kept_patches.png
ufgir convert soygene_evit_vit_base_patch16_224.orig_in21k_0.1_cla_clc_1_10.pth --output outputs/soygene
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from PIL import Image, UnidentifiedImageError
from transformers import AutoImageProcessor

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, token_schedule
from clca.cache_clca import recovery_layers
from clca.configuration_clca import HEADS, check_config

from .arguments import one_sentence
from .original_files import REPORT, convert_file, convert_folder, read_class_names
from .pretrained import convert_pretrained
from .profiling import count_macs, dense_config
from .timm_architectures import select_architectures
from .visualization import kept_patches_image


# A model without any of the options of the paper: what a cost is compared with.
CLCA = {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"}

# GMACs of ViT-B/16 with EViT from the authors' log of their runs on SoyGene, which its accuracy-over-FLOPs figure shows.
# (image size, keep rate) -> without CLCA, with CLCA
PAPER_LABELS = 1110
PAPER_GMACS = {
    (224, 0.1): (5.64, 5.96),
    (224, 0.25): (6.53, 6.97),  # the three base points at 224 px and 0.25, 0.5, 0.7: as the log has them for another
    (224, 0.5): (
        8.82,
        9.32,
    ),  # backbone of this shape. It has 6.45, 8.72 and 11.49 for the backbone of the figure, which
    (224, 0.7): (11.61, 12.18),  # the original code, counted again, does not give.
    (224, 1.0): (17.57, 18.38),
    (448, 0.1): (24.80, 25.18),
    (448, 0.25): (28.57, 29.00),
    (448, 0.5): (38.22, 38.78),
    (448, 0.7): (50.18, 50.87),
    (448, 1.0): (78.53, 79.52),
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; each sets `run`, a function of the parsed arguments that returns a text, or
    a text and an exit status."""
    parser = _Parser(prog="ufgir", description="Tools around CLCA ViTs.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    text = "tokens in each layer, parameters and multiply-adds of a model, beside those of the dense one"
    profile = commands.add_parser("profile", help=text, description=text.capitalize() + ".", allow_abbrev=False)
    profile.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint: folder or Hub repository [ViT-B/16]")
    profile.add_argument("--paper", action="store_true", help="all models of the paper's accuracy-over-FLOPs figure")
    _add_reduction_options(profile)
    _add_network_options(profile)
    profile.set_defaults(run=run_profile, command=profile)

    text = "draw which patches a model keeps at each stage"
    visualize = commands.add_parser("visualize", help=text, description=text.capitalize() + ".", allow_abbrev=False)
    visualize.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    visualize.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    visualize.add_argument(
        "--output", default="kept_patches.png", metavar="FILE", help="picture to write [%(default)s]"
    )
    visualize.add_argument("--side", type=int, default=224, help="pixels of one picture in the grid [%(default)s]")
    _add_reduction_options(visualize)
    visualize.set_defaults(run=run_visualize, command=visualize)

    text = "pretrainings of timm that can be loaded, and what they become"
    pretrained = commands.add_parser("pretrained", help=text, description=text.capitalize() + ".", allow_abbrev=False)
    pretrained.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a glob [all]")
    pretrained.add_argument("--json", action="store_true", help="a list of objects, with the whole configuration")
    pretrained.set_defaults(run=run_pretrained, command=pretrained)

    text = "turn a pretrained ViT, or checkpoint files of the original code, into model folders"
    convert = commands.add_parser("convert", help=text, description=text.capitalize() + ".", allow_abbrev=False)
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="model of transformers or timm: folder or Hub repository, or with --architecture a file of weights; "
        "of the original code: a .pth file, or a folder that is searched for them",
    )
    convert.add_argument("--architecture", metavar="NAME", help="timm's name, see `ufgir pretrained`")
    convert.add_argument("--output", required=True, metavar="DIR", help="model folder, or folder for such folders")
    convert.add_argument(
        "--class-names", metavar="FILE", help="CSV of class_id,class_name, or one name a line; or a folder"
    )
    convert.add_argument("--overwrite", action="store_true", help="replace folders that an earlier conversion made")
    _add_reduction_options(convert)
    _add_network_options(convert)
    convert.set_defaults(run=run_convert, command=convert)
    return parser


def _add_reduction_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reduction (unset: as the checkpoint says)")
    group.add_argument("--reduction", help=f"none, {', '.join(sorted(REDUCTIONS))}")
    group.add_argument("--reduction-layers", type=int, nargs="+", metavar="LAYER", help="counted from 0 [3 6 9]")
    group.add_argument("--keep-rate", type=float, nargs="+", metavar="RATE", help="in (0, 1]: one, or one a stage [1]")
    group.add_argument("--keep-tokens", type=int, nargs="+", metavar="COUNT", help="one a stage, instead of rates")
    group.add_argument("--reduction-kwargs", type=_json_object, metavar="JSON", help="the method's own options")


def _add_network_options(parser: argparse.ArgumentParser) -> None:
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


def _json_object(text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text}") from error


def config_values(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a configuration that were set on the command line."""
    values = dict(CLCA) if getattr(args, "clca", False) else {}
    not_fields = {"model", "images", "output", "side", "paper", "clca", "run", "command"}
    not_fields |= {"source", "architecture", "class_names", "overwrite"}
    values |= {k: v for k, v in vars(args).items() if k not in not_fields and v is not None}
    if values.get("reduction") == "none":
        values |= {"reduction": None, "reduction_kwargs": None}
    return values


def load_config(model: str | None, values: dict[str, Any]) -> CLCAViTConfig:
    """The configuration of a checkpoint, or of ViT-B/16, with `values` in place of its own; checked."""
    if model is None:
        width = values.get("hidden_size", 768)
        defaults = {"layer_norm_eps": 1e-6, "intermediate_size": 4 * width, "num_labels": 1000}
        return CLCAViTConfig(**defaults | values)
    # what the checkpoint says about one of these must not contradict what the user says about the other
    if "keep_tokens" in values:
        values = {"keep_rate": [1.0]} | values
    elif "keep_rate" in values:
        values = {"keep_tokens": None} | values
    if "reduction" in values:
        values = {"reduction_kwargs": None} | values
    if not Path(model).is_dir() and Path(model).exists():
        raise ValueError(f"`MODEL` must be a folder or a Hub repository, got the file {model}.")
    try:
        config = CLCAViTConfig.from_pretrained(model, **values)
    except OSError as error:
        raise ValueError(
            f"there is no checkpoint {model}: neither a folder with config.json nor on the Hub."
        ) from error
    check_config(config)
    return config


def on_meta(config: CLCAViTConfig) -> CLCAViTForImageClassification:
    """A model of shapes without numbers: made at once, whatever its size."""
    with torch.device("meta"):
        return CLCAViTForImageClassification(config)


def run_profile(args: argparse.Namespace) -> str:
    """`ufgir profile`: two tables."""
    values = config_values(args)
    if args.paper:
        if values or args.model:
            raise ValueError("`--paper` takes no model and no other option.")
        return paper_table()
    config = load_config(args.model, values)
    dense = dense_config(config)
    rows = [["", "this model", "dense", "share"]]
    this, other = on_meta(config), on_meta(dense)
    counts = [sum(p.numel() for p in model.parameters()) for model in (this, other)]
    rows.append(["parameters", *(f"{n:,}" for n in counts), f"{counts[0] / counts[1]:.1%}"])
    dense_macs = count_macs(other)
    try:
        macs = count_macs(this)
    except RuntimeError as error:  # a number was asked of the meta device: the counts follow from the pixels
        if "meta" not in str(error):
            raise
        note = (
            "Token counts differ by image: the table shows the most there can be, and GMACs cannot be said in advance."
        )
        rows.append(["GMACs, one image", "-", f"{dense_macs / 1e9:.3f}", "-"])
    else:
        note = ""
        rows.append(["GMACs, one image", f"{macs / 1e9:.3f}", f"{dense_macs / 1e9:.3f}", f"{macs / dense_macs:.1%}"])
    return "\n\n".join(part for part in (describe(config), token_table(config), align(rows), note) if part)


def describe(config: CLCAViTConfig) -> str:
    """What the network is, in two lines."""
    first = (
        f"ViT: {config.num_hidden_layers} layers, width {config.hidden_size}, image {_by(config.image_size)} px, "
        f"patch {_by(config.patch_size)} px, {config.num_labels} classes"
    )
    parts = ["no reduction"]
    if config.reduction:
        budget = f"keep rate {_listed(config.keep_rate)}"
        if config.keep_tokens is not None:
            budget = f"{_listed(config.keep_tokens)} tokens kept"
        parts = [f"{config.reduction} in layers {_listed(config.reduction_layers)}, {budget}"]
    if config.cross_layer_cache:
        summary = ["GAP"] * config.cache_gap + [f"{config.num_clr_tokens} CLR"] * (config.num_clr_tokens > 0)
        parts.append(f"cross-layer cache of {' and '.join(summary)}")
    return f"{first}\n{'; '.join(parts)}; head {config.head}"


def _by(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def token_table(config: CLCAViTConfig) -> str:
    """Tokens that enter each layer, that leave it, and that the cache appends, CLS and all included."""
    schedule = token_schedule(config)
    recovery = recovery_layers(config)
    rows = [["layer", "tokens in", "tokens out", "recalled"]]
    for index, (before, after) in enumerate(zip(schedule.before, schedule.after, strict=False)):
        recalled = schedule.before[index + 1] - after if index in recovery else 0
        rows.append([str(index), str(before), str(after), f"+{recalled}" if recalled else ""])
    rows.append(["final norm", str(schedule.before[-1]), "", ""])
    return align(rows)


def paper_table() -> str:
    """Our counts beside the paper's, for all twenty models of its figure of accuracy over FLOPs."""
    rows = [["image", "keep rate", "EViT", "paper", "difference", "EViT + CLCA", "paper", "difference"]]
    for (size, rate), published in PAPER_GMACS.items():
        row = [f"{size} px", str(rate)]
        for options, theirs in zip(({}, CLCA), published, strict=True):
            values = {"image_size": size, "reduction": "evit", "keep_rate": rate, "num_labels": PAPER_LABELS}
            ours = count_macs(on_meta(CLCAViTConfig(**values | options))) / 1e9
            row += [f"{ours:.3f}", f"{theirs:.2f}", f"{ours / theirs - 1:+.2%}"]
        rows.append(row)
    return f"GMACs of one image, ViT-B/16, {PAPER_LABELS} classes\n\n{align(rows)}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def run_visualize(args: argparse.Namespace) -> str:
    """`ufgir visualize`: writes the picture."""
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


def run_pretrained(args: argparse.Namespace) -> str:
    """`ufgir pretrained`: a table, or JSON."""
    found = select_architectures(args.pattern)
    if args.json:
        return json.dumps([vars(a) | {"fields": dict(a.fields)} for a in found], indent=2)
    rows = [["name", "image", "patch", "layers", "width", "heads", "MLP", "mean", "std", "licence"]]
    networks = ["network, method"]
    for architecture in found:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        row = [architecture.name, architecture.image_size, architecture.patch_size]
        row += [architecture.fields[name] for name in sizes]
        row += [" ".join(f"{n:.3f}" for n in numbers) for numbers in (architecture.mean, architecture.std)]
        rows.append([str(cell) for cell in [*row, architecture.licence]])
        own = ", ".join(f"{name}={value}" for name, value in architecture.own_fields.items())
        networks.append(f"{own or 'plain'}; {architecture.description}")
    lines = align(rows).split("\n")
    return "\n".join(f"{line}  {network}" for line, network in zip(lines, networks, strict=True))


def open_image(file: str) -> Image.Image:
    """A picture, read completely; ValueError if it is none."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"there is no picture {file}.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} is not a picture that can be read.") from error


def run_convert(args: argparse.Namespace) -> tuple[str, int]:
    """`ufgir convert`: writes one model folder, or one for each file that can be converted; status 1 if one cannot."""
    source, output, values = Path(args.source), Path(args.output), config_values(args)
    weights_of_others = source.suffix in (".safetensors", ".bin") or (source / "config.json").exists()
    original = args.architecture is None and source.exists() and not weights_of_others
    if not source.exists() and args.source.startswith(("/", ".", "~")) | args.source.endswith("/"):
        raise ValueError(f"there is no file or folder {args.source}.")
    if not source.exists() and source.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise ValueError(f"there is no file or folder {source}.")
    if not original:
        if args.class_names is not None:
            raise ValueError("`--class-names` is for checkpoints of the original code.")
        convert_pretrained(args.source, output, args.architecture, args.overwrite, **values)
        return f"wrote {output}", 0
    options = {name: values.pop(name, None) for name in ("image_size", "num_attention_heads")}
    options["overwrite"] = args.overwrite
    if values:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in values)
        raise ValueError(f"{names}: a checkpoint of the original code tells this itself.")
    class_names = None if args.class_names is None else read_class_names(args.class_names)
    if source.is_dir():
        outcome = convert_folder(source, output, class_names, **options)
        return f"{outcome.summary()}\nwrote {output / REPORT}", int(bool(outcome.failed))
    if isinstance(class_names, dict):
        raise ValueError(f"`--class-names` must be a file for one checkpoint, got the folder {args.class_names}.")
    written = convert_file(source, output, class_names=class_names, **options)
    return f"wrote {output}" if written else f"{output} is already there, made of the same file", 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0, 1 if it says so, or 2 after one sentence about a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    # --keep_rate, as run_ufgir.py spells its options, is --keep-rate
    argv = [_dashes(a) if a.startswith("--") else a for a in argv]
    args = make_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = args.run(args)
    except (ValueError, OSError) as error:
        args.command.error(one_sentence(error))
    text, status = result if isinstance(result, tuple) else (result, 0)
    sys.stdout.write(text + "\n")
    return status


def _dashes(option: str) -> str:
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
