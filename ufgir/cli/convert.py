"""`ufgir convert`: convert pretrained ViTs and checkpoints of the original code to model folders."""

import argparse
from pathlib import Path

from ..checkpoints.convert import convert_pretrained
from ..checkpoints.convert_original import REPORT, convert_file, convert_folder, read_class_names
from ..checkpoints.sources import KINDS, WEIGHT_FILES, find_source
from .common import add_network_options, add_reduction_options, config_values
from .outputs import check_folder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="transformers or timm model: folder or Hub repository, or a weights file with --architecture; "
        "original code: a .pth file, or a folder that is searched for .pth files",
    )
    parser.add_argument("--architecture", metavar="NAME", help="timm architecture name, see `ufgir pretrained`")
    parser.add_argument("--output", required=True, metavar="DIR", help="model folder, or parent folder of several")
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="CSV with class_id,class_name, a text file with one name per line, or a folder of such files",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace folders written by an earlier conversion")
    add_reduction_options(parser, with_defaults=True)
    add_network_options(parser)


def run(args: argparse.Namespace) -> tuple[str, int]:
    """Write one model folder, or one per convertible file; status 1 if a file could not be converted."""
    source, output, values = Path(args.source), Path(args.output), config_values(args)
    check_folder(output, whole=True)
    if not source.exists() and (args.source.startswith(("/", ".", "~")) or args.source.endswith(("/", *WEIGHT_FILES))):
        raise ValueError(f"there is no file or folder {args.source}.")
    folder_of_files = args.architecture is None and source.is_dir() and not (source / "config.json").exists()
    if not folder_of_files and find_source(args.source, architecture=args.architecture)[0] is not KINDS["original"]:
        if args.class_names is not None:
            raise ValueError("`--class-names` only applies to checkpoints of the original code.")
        convert_pretrained(args.source, output, args.architecture, args.overwrite, **values)
        return f"wrote {output}", 0
    options = {**values, "overwrite": args.overwrite}
    class_names = None if args.class_names is None else read_class_names(args.class_names)
    if source.is_dir():
        outcome = convert_folder(source, output, class_names, **options)
        return f"{outcome.summary()}\nwrote {output / REPORT}", int(bool(outcome.failed))
    if isinstance(class_names, dict):
        raise ValueError(f"`--class-names` must be a file for one checkpoint, got the folder {args.class_names}.")
    written = convert_file(source, output, class_names=class_names, **options)
    return f"wrote {output}" if written else f"{output} already exists, converted from the same file", 0
