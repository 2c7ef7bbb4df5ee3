"""`ufgir export`: export a model to ONNX, OpenVINO, a torch.export program or a web page."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair

from ..checkpoints.loading import load_config, load_image_processor, load_model
from ..export import PRECISIONS, Exported, budget_files, check_format, export_budgets, export_model
from ..transforms.preprocessing import sizes_of
from ..utils.text import align
from ..web.graphs import PRECISIONS as WEB_PRECISIONS
from ..web.runtime import PACKAGE, VERSION
from ..web.server import serve_folder
from ..web.site import Site, build_site
from .common import add_reduction_options, check_rates, classes_of, config_values, image_batches, some_images
from .outputs import check_file, check_folder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument(
        "--output",
        default="model.onnx",
        metavar="FILE",
        help="file to write: .onnx, .xml (OpenVINO, with its weights in a .bin file) or .pt2 (torch.export) [%(default)s]",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="float16, bfloat16: of the weights; int8: of weights and activations of the linear layers [%(default)s]",
    )
    parser.add_argument(
        "--keep-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="write one file per keep rate in (0, 1], with the rate in its name [one file at the model's rate]",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest accepted difference of logits between file and model in float32 [%(default)s]",
    )
    add_image_options(parser)
    add_web_options(parser)
    add_reduction_options(parser)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of images on which a file is calibrated and compared."""
    group = parser.add_argument_group("images (int8, and the comparison of file and model)")
    group.add_argument(
        "--calibration",
        nargs="+",
        metavar="PATH",
        help="images or folders on which int8 measures the ranges of activations [.onnx: measured in every call; .xml: required]",
    )
    group.add_argument(
        "--calibration-images", type=int, default=128, metavar="N", help="images used of --calibration [%(default)s]"
    )
    group.add_argument(
        "--check",
        nargs="+",
        metavar="PATH",
        help="images or folders on which to compare; in folders named after the classes, top-1 as well [--calibration; random]",
    )
    group.add_argument(
        "--check-images", type=int, default=500, metavar="N", help="images used of --check [%(default)s]"
    )


def add_web_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the web page."""
    group = parser.add_argument_group("web page")
    group.add_argument(
        "--web", metavar="FOLDER", help="write a static page that runs the model in the browser, instead of a file"
    )
    group.add_argument("--title", metavar="TEXT", help="title of the page [the model's name]")
    group.add_argument(
        "--webgpu", action="store_true", help="run on a GPU if available; adds 12.5 MB to the page [off]"
    )
    group.add_argument(
        "--runtime",
        metavar="PATH",
        help=f"folder or .tgz of {PACKAGE} {VERSION}, for use without network [downloaded by npm, once]",
    )
    group.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=8000,
        metavar="PORT",
        help="then serve the page on 127.0.0.1 until Ctrl-C; 0 for any free port [off; 8000 without PORT]",
    )


def run(args: argparse.Namespace) -> str:
    """Write the files and return a table of the checks."""
    for option, value in (
        ("--calibration-images", args.calibration_images),
        ("--check-images", args.check_images),
    ):
        if value < 1:
            raise ValueError(f"`{option}` must be at least 1, got {value}.")
    if args.web is not None:
        return make_page(args)
    for option, value in (("--title", args.title), ("--webgpu", args.webgpu)):
        if value:
            raise ValueError(f"`{option}` has no effect without `--web`.")
    for option, value in (("--runtime", args.runtime), ("--serve", args.serve)):
        if value is not None:
            raise ValueError(f"`{option}` has no effect without `--web`.")
    check_format(args.output, args.precision, "--output")
    if args.calibration and args.precision != "int8":
        raise ValueError("`--calibration` has no effect without `--precision int8`. `--check` compares on images.")
    if not args.calibration and args.precision == "int8" and Path(args.output).suffix == ".xml":
        raise ValueError("`--precision int8` of an .xml file needs `--calibration`: images or folders.")
    check_keep_rates(args)
    for file in budget_files(args.output, args.keep_rates).values() if args.keep_rates else [args.output]:
        check_file(file)
    config = load_config(args.model, config_values(args))
    model = load_model(args.model, config).model
    facts = {"source": args.model}
    try:
        processor = load_image_processor(args.model)
        facts |= {name: getattr(processor, name) for name in ("image_mean", "image_std")}
        facts["resize_size"] = list(sizes_of(processor)[0])
    except (OSError, ValueError, KeyError, TypeError):
        facts["image_mean"] = None  # the normalization of the pixels is unknown
    images: dict[str, Any] = {}
    for name, paths, count in (
        ("calibration", args.calibration, args.calibration_images),
        ("images", args.check, args.check_images),
    ):
        if paths:
            images[name], files = _images(args.model, paths, count, config)
            if name == "images":
                images["labels"] = classes_of(files, config.label2id)
    options = {"metadata": facts, "tolerance": args.tolerance, "precision": args.precision, **images}
    if args.keep_rates:
        exported = export_budgets(model, args.output, args.keep_rates, **options)
    else:
        exported = [export_model(model, args.output, **options)]
    return "\n".join([table(exported), *notes(exported)])


def _images(model: str, paths: list[str], count: int, config: CLCAViTConfig) -> tuple[list[torch.Tensor], list[str]]:
    """Return batches of preprocessed images, and the files of the images.

    Raises:
        ValueError: see `image_batches`, or if the images of the model are not square.
    """
    height, width = as_pair(config.image_size)
    if height != width:
        raise ValueError(f"`--calibration` and `--check` need a model with square images, got {height} x {width}.")
    images = some_images(paths, count, option="--calibration-images or --check-images")
    return list(image_batches(images, model, config)(height)), list(images["path"])


def check_keep_rates(args: argparse.Namespace) -> None:
    """Check `--keep-rates`.

    Raises:
        ValueError: if it is combined with a single keep rate, or a rate is not in (0, 1].
    """
    if args.keep_rates and (args.keep_rate or args.keep_tokens):
        raise ValueError(
            "`--keep-rates` cannot be combined with `--keep-rate` or `--keep-tokens`: remove one of them."
        )
    check_rates(args.keep_rates, "--keep-rates")


def make_page(args: argparse.Namespace) -> str:
    """Write the web page, serve it with `--serve`, and return a table of its files."""
    if args.precision not in WEB_PRECISIONS:
        raise ValueError(f"`--precision` of a page must be {', '.join(WEB_PRECISIONS)}, got {args.precision}.")
    for option, value in (("--calibration", args.calibration), ("--check", args.check)):
        if value:
            raise ValueError(f"`{option}` has no effect with `--web`.")
    check_keep_rates(args)
    check_folder(args.web, "--web")
    if args.serve is not None and not 0 <= args.serve <= 65535:
        raise ValueError(f"`--serve` must be in 0 .. 65535, got {args.serve}.")
    config = load_config(args.model, config_values(args))
    model = load_model(args.model, config).model
    site = build_site(
        model,
        load_image_processor(args.model),
        args.web,
        args.keep_rates,
        args.precision,
        args.webgpu,
        args.runtime,
        args.title or Path(args.model).name,
        args.tolerance,
    )
    text = page_table(site)
    if args.serve is not None:
        sys.stdout.write(f"{text}\n")

        def ready(address: str) -> None:
            sys.stdout.write(f"The page is at {address} until Ctrl-C.\n")
            sys.stdout.flush()

        serve_folder(site.folder, args.serve, ready)
        return "The page is closed."
    return text


def page_table(site: Site) -> str:
    """Return the sizes of the page's parts, and the difference between its graphs and the model."""
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, sizes in site.sizes.items():
        part = name.partition("/")[0] if "/" in name else "page"
        parts.setdefault(part, []).append(sizes)
    parts["total"] = list(site.sizes.values())
    rows = [["part", "MB", "MB gzipped"]]
    for part, sizes in parts.items():
        rows.append([part, *(f"{sum(size[kind] for size in sizes) / 1e6:.2f}" for kind in (0, 1))])
    lines = [align(rows), ""]
    for _, graph in site.graphs:
        rate = "its own keep rate" if graph.keep_rate is None else f"keep rate {graph.keep_rate:g}"
        lines.append(f"{rate}: {graph.macs / 1e9:.3g} GMACs; largest difference of logits {graph.difference:.1e}")
    return "\n".join([*lines, f"wrote the page to {site.folder}: serve it, or push the folder as a static Space"])


def table(exported: list[Exported]) -> str:
    """Return a table of files: size, nodes, and the comparison with the model."""
    known = exported[0].check.accuracy is not None
    top1 = ["top-1 (%)", "model's top-1 (%)"] if known else []
    rows = [["file", "MB", "nodes", "largest difference of logits", "same class", *top1]]
    for one in exported:
        size = sum(f.stat().st_size for f in one.path.parent.glob(f"{one.path.name}*"))
        weights = one.path.with_suffix(".bin")
        size += weights.stat().st_size if one.path.suffix == ".xml" else 0
        same = f"{round(one.check.agreement * one.check.images)} of {one.check.images}"
        nodes = str(sum(one.operators.values()))
        top1 = [f"{100 * share:.1f}" for share in (one.check.accuracy, one.check.model_accuracy) if share is not None]
        rows.append([str(one.path), f"{size / 1e6:.1f}", nodes, f"{one.difference:.1e}", same, *top1])
    return align(rows)


def notes(exported: list[Exported]) -> list[str]:
    """Return notes about the images of the comparison, what computes in int8, and the support of operators in TensorRT."""
    first = exported[0]
    kind = "the given images" if first.check.given else "random images; `--check` compares on others"
    lines = [f"file and model were compared on {kind}"]
    if first.precision == "int8":
        lines.append(f"computed in int8: {_counted(first.int8_operators)}")
        lines.append(f"stayed in floating point: {_counted(first.float_operators)}")
    elif first.path.suffix == ".onnx":
        lines.append(_tensorrt(exported))
    return lines


def _counted(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(operators.items())) or "nothing"


def _tensorrt(exported: list[Exported]) -> str:
    missing = sorted({name for one in exported for name in one.not_in_tensorrt})
    note = (
        f"operators missing from TensorRT's published list: {', '.join(missing)}"
        if missing
        else ("all operators are in TensorRT's published list (not run on TensorRT)")
    )
    doubtful = sorted({name for one in exported for name in one.doubtful_in_tensorrt})
    if doubtful:
        note += f"; the list does not state whether the reduction of {', '.join(doubtful)} is supported"
    return note
