"""`ufgir sweep`: run a grid of trainings."""

import argparse
import logging
import sys
from pathlib import Path

from ..utils.text import align


EPILOG = """
  ufgir sweep recipes/demo.yaml --set keep_rate=0.25,0.5 --set seed=1,10,100 --output runs/rates
  ufgir sweep recipes/demo.yaml --variant base clc cla clca --set seed=1,10,100 --output runs/ablation
  ufgir sweep recipes/demo.yaml --set "reduction_layers=3 6 9,2 5 8" --output runs/layers --dry-run
  ufgir sweep recipes/demo.yaml --variant small:hidden_size=96,num_attention_heads=3 big:hidden_size=192,num_attention_heads=6 \\
      --output runs/sizes --devices cuda:0,cuda:1

Commas separate alternatives; spaces (or brackets) separate the items of a list value. Run the same command again to
continue: finished runs are skipped, interrupted runs resume from their last checkpoint, failed runs are tried again. You
can add values to a grid at any time. Each run is one process with its output in FOLDER/logs. Collect the results with
`ufgir results`.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument("recipe", metavar="RECIPE", type=Path, help="YAML or JSON file with options of run_ufgir.py")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="option of run_ufgir.py and the values to try; repeat it for further options, all combinations are run",
    )
    parser.add_argument(
        "--variant",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME[:OPTION=VALUE,OPTION=VALUE]",
        help="alternatives that set several options together; base, clc, cla and clca are predefined [none]",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="folder of the sweep, with one folder per run"
    )
    parser.add_argument(
        "--devices",
        default="",
        metavar="DEVICE,DEVICE",
        help="devices to run on, such as cuda:0,cuda:1 or cpu; all for all GPUs [the first GPU, else the CPU]",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="concurrent processes per device [1]")
    parser.add_argument("--max-failures", type=int, metavar="N", help="start no more runs after N failures [no limit]")
    parser.add_argument("--dry-run", action="store_true", help="check and list the runs without starting them")


def run(args: argparse.Namespace) -> str | tuple[str, int]:
    """Run the grid and return a summary, or list the runs; status 1 if any failed, 130 after Ctrl-C."""
    from ..runs.queue import RunQueue, make_slots
    from ..runs.sweep import Grid

    if args.max_failures is not None and args.max_failures < 1:
        raise ValueError(f"`--max-failures` must be at least 1, got {args.max_failures}.")
    slots = make_slots([device.strip() for device in args.devices.split(",") if device.strip()], args.jobs)
    queue = RunQueue(Grid(args.recipe, args.set, args.variant), args.output)
    if args.dry_run:
        rows = queue.table()
        counts = ", ".join(f"{sum(row[1] == how for row in rows)} {text}" for how, text in _PLANS.items())
        return f"{align([['run', 'now'], *(row[:2] for row in rows)])}\n\n{len(rows)} runs: {counts}"
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("ufgir").setLevel(logging.INFO)
    try:
        queue.work(slots, args.max_failures)
    except KeyboardInterrupt:
        return f"interrupted\n{queue.summary()}", 130
    return queue.summary(), 1 if queue.failed else 0


_PLANS = {"start": "to start", "resume": "to resume from a checkpoint", "finished": "finished"}
