"""`ufgir export`: a model as an ONNX file or a torch.export program."""

import argparse
from pathlib import Path

from ..checkpoints.loading import load_config, load_image_processor, load_model
from ..export import FORMATS, Exported, budget_files, export_budgets, export_model
from ..transforms.preprocessing import sizes_of
from ..utils.text import align
from .common import add_reduction_options, check_rates, config_values
from .outputs import check_file


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument(
        "--output", default="model.onnx", metavar="FILE", help="ends in .onnx or .pt2 (torch.export) [%(default)s]"
    )
    parser.add_argument(
        "--keep-rates",
        type=float,
        nargs="+",
        metavar="RATE",
        help="write one file per keep rate, in (0, 1], its name with the rate [one file, the model's own rate]",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-3,
        help="largest difference of logits between file and model at which the file is written [%(default)s]",
    )
    add_reduction_options(parser)


def run(args: argparse.Namespace) -> str:
    """Writes the files; a table of what was checked."""
    if Path(args.output).suffix not in FORMATS:
        raise ValueError(f"`--output` must end in {' or '.join(FORMATS)}, got {args.output}.")
    if args.keep_rates and (args.keep_rate or args.keep_tokens):
        raise ValueError(
            "`--keep-rates` writes one file per rate, so `--keep-rate` and `--keep-tokens` have no place."
        )
    check_rates(args.keep_rates, "--keep-rates")
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
        facts["image_mean"] = None  # the checkpoint does not say how its pixels were normalised
    options = {"metadata": facts, "tolerance": args.tolerance}
    if args.keep_rates:
        exported = export_budgets(model, args.output, args.keep_rates, **options)
    else:
        exported = [export_model(model, args.output, **options)]
    return "\n".join([table(exported), *notes(exported)])


def table(exported: list[Exported]) -> str:
    """File, size, nodes and the difference from the model."""
    rows = [["file", "MB", "nodes", "largest difference of logits"]]
    for one in exported:
        size = sum(f.stat().st_size for f in one.path.parent.glob(f"{one.path.name}*"))
        rows.append([str(one.path), f"{size / 1e6:.1f}", str(sum(one.operators.values())), f"{one.difference:.1e}"])
    return align(rows)


def notes(exported: list[Exported]) -> list[str]:
    """What an ONNX file means for TensorRT."""
    if exported[0].path.suffix != ".onnx":
        return []
    lacking = sorted({name for one in exported for name in one.not_in_tensorrt})
    said = (
        f"not in TensorRT's published list of operators: {', '.join(lacking)}"
        if lacking
        else ("all operators are in TensorRT's published list (TensorRT itself was not run)")
    )
    doubtful = sorted({name for one in exported for name in one.doubtful_in_tensorrt})
    if doubtful:
        said += f"; that list does not say whether it takes the reduction of {', '.join(doubtful)}"
    return [said]
