"""`ufgir predict`: classify images without labels."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.loading import load_config, load_model
from ..data.folders import FoundImages, find_images, load_found_images
from ..data.transformed import TransformedImages
from ..evaluation.prediction import ENDINGS, Predictions, predict_to_file
from ..transforms.preprocessing import EvalTransform
from ..utils.files import write_text_atomically
from ..utils.provenance import PACKAGES, _version, describe_host, now
from .common import add_reduction_options, config_values, load_image_processor
from .outputs import check_file


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files, or folders that are searched recursively"
    )
    parser.add_argument(
        "--output",
        default="predictions.csv",
        metavar="FILE",
        help=f"table to write, {' or '.join(ENDINGS)} [%(default)s]",
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images per batch [%(default)s]")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="number of best classes to write per image [%(default)s]"
    )
    parser.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="number of processes that load images [%(default)s]"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU if available [%(default)s]"
    )
    add_reduction_options(parser)


def run(args: argparse.Namespace) -> str | tuple[str, int]:
    """Write the table and its provenance record; status 1 if some images could not be read."""
    if Path(args.output).suffix not in ENDINGS:
        raise ValueError(f"`--output` must end in {' or '.join(ENDINGS)}, got {args.output}.")
    for name, least in (("batch_size", 1), ("top", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {least}, got {getattr(args, name)}.")
    check_file(args.output)
    record = record_of(args.output)
    if record.is_dir():
        raise ValueError(
            f"`--output` {args.output} requires the file {record.name} next to it, which is a folder: move the folder."
        )
    PartialState(cpu=args.device == "cpu")
    found = find_images(args.images)
    images = load_found_images(found, verify=False)
    config = load_config(args.model, config_values(args))
    transform = EvalTransform(load_image_processor(args.model, config))
    model = load_model(args.model, config).model
    try:
        result = predict_to_file(
            model,
            TransformedImages(images, transform, label_column=None),
            args.output,
            [config.id2label[label] for label in range(config.num_labels)],
            files=images["path"],
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            top=args.top,
            skip_broken=True,
            progress=True,
        )
    except KeyboardInterrupt:
        return "interrupted: run the same command again to continue", 130
    rate = f"{result.predicted / result.seconds:.1f} images per second"
    if PartialState().is_main_process:
        write_text_atomically(
            record, json.dumps(_provenance(args, found, result), indent=1, ensure_ascii=False) + "\n"
        )
    lines = [f"wrote {result.path}: {result.images} images of {len(images)}, {rate}"]
    if result.broken:
        lines += [f"{len(result.broken)} could not be read:", *(f"  {name}" for name in result.broken)]
    lines += found.describe()
    complete = not (result.broken or found.problems or any(found.others.values()))
    return "\n".join(lines) if complete else ("\n".join(lines), 1)


def record_of(output: str | os.PathLike) -> Path:
    """Return the path of the provenance record next to the table, such as `predictions.provenance.json`."""
    return Path(output).with_suffix(".provenance.json")


def _provenance(args: argparse.Namespace, found: FoundImages, result: Predictions) -> dict[str, Any]:
    """Return the provenance of the table, including images that are not in it."""
    return {
        "created": now(),
        "host": describe_host(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "model": args.model,
        "options": config_values(args),
        "given": [str(path) for path in args.images],
        "images": len(found.files),
        "predicted": result.images,
        "broken": result.broken,
        "unusable": found.problems,
        "no_images": found.others,
    }
