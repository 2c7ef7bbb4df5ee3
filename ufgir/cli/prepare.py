"""`ufgir prepare`: a raw download of Ultra-FGVC, checked, as parquet files."""

import argparse

from ..data.catalog import SETS
from ..data.prepare.parquet_folder import prepare
from ..data.prepare.ultra_fgvc import UnsoundData


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("set", metavar="SET", choices=SETS, help=", ".join(SETS))
    parser.add_argument("--source", required=True, metavar="RAW", help="folder of the raw download")
    parser.add_argument("--output", required=True, metavar="OUT", help="new folder; appears when all of it is there")
    parser.add_argument(
        "--validation",
        choices=("none", "last", "random"),
        default="none",
        help="images of each class that leave train for a validation split; with none the loader splits off the last "
        "20 %% of each class, as the original code does [none]",
    )
    parser.add_argument(
        "--validation-fraction", type=float, metavar="SHARE", help="of each class, in (0, 1), at least one stays [0.2]"
    )
    parser.add_argument("--shots", type=int, metavar="K", help="images of each class that stay in train [all]")
    parser.add_argument("--seed", type=int, help="of `--validation random` and of --shots, which are drawn [0]")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad files out instead of writing nothing")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="threads that decode [number of cores, at most 8]"
    )
    parser.add_argument("--shard-size", default="256MB", metavar="BYTES", help="of images in a file at most [256MB]")


def run(args: argparse.Namespace) -> str | tuple[str, int]:
    """What was written, or every problem of the data with status 1."""
    options = ("validation", "validation_fraction", "seed", "shots", "skip_bad", "num_workers", "shard_size")
    try:
        return prepare(SETS[args.set], args.source, args.output, **{name: getattr(args, name) for name in options})
    except UnsoundData as error:
        return f"{error}\nnothing was written; --skip-bad leaves bad files out", 1
