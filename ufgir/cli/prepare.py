"""`ufgir prepare`: convert a raw download of Ultra-FGVC to checked parquet files."""

import argparse

from ..data.catalog import SETS
from ..data.prepare.parquet_folder import prepare
from ..data.prepare.ultra_fgvc import UnsoundData


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("set", metavar="SET", choices=SETS, help=", ".join(SETS))
    parser.add_argument("--source", required=True, metavar="RAW", help="folder of the raw download")
    parser.add_argument(
        "--output", required=True, metavar="OUT", help="new folder; created once all files are complete"
    )
    parser.add_argument(
        "--validation",
        choices=("none", "last", "random"),
        default="none",
        help="how to move images of each class from train to a validation split; with none, the loader splits off the "
        "last 20 %% of each class, as in the original code [none]",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        metavar="SHARE",
        help="fraction of each class, in (0, 1); at least one image stays in train [0.2]",
    )
    parser.add_argument("--shots", type=int, metavar="K", help="images per class to keep in train [all]")
    parser.add_argument("--seed", type=int, help="random seed of `--validation random` and `--shots` [0]")
    parser.add_argument("--skip-bad", action="store_true", help="skip bad files instead of raising an error")
    parser.add_argument("--num-workers", type=int, metavar="N", help="decoding threads [number of cores, at most 8]")
    parser.add_argument(
        "--shard-size", default="256MB", metavar="BYTES", help="largest size of the images in one file [256MB]"
    )


def run(args: argparse.Namespace) -> str | tuple[str, int]:
    """Return a summary of the written files, or every problem of the data with status 1."""
    options = ("validation", "validation_fraction", "seed", "shots", "skip_bad", "num_workers", "shard_size")
    try:
        return prepare(SETS[args.set], args.source, args.output, **{name: getattr(args, name) for name in options})
    except UnsoundData as error:
        return f"{error}\nNothing was written. Use --skip-bad to skip bad files.", 1
