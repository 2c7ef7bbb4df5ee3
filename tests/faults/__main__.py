"""`make faults`: random faults of many kinds, and a table of the results.

python -m tests.faults --minutes 60
python -m tests.faults --tries 500 --minutes 600 --record faults.jsonl      continues where it was stopped
python -m tests.faults --only kills --tries 500 --minutes 600 --record faults.jsonl --shard 1/2        one of two processes
"""

import argparse
import importlib.util
import logging
import shutil
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from tests.faults import kills
from tests.faults.results import Result
from ufgir.profiling.benchmark_report import check_place, fill_in
from ufgir.utils.provenance import describe_host


DATA = "tests.faults.data_faults"
TABLE = "faults"  # its name in the page of `--into`


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table with sums."""
    rows = [["kind", "tries", "survived", "lost"]]
    rows += [[r.kind, str(r.tries), str(r.survived), str(r.lost)] for r in results if r.tries]
    sums = [sum(getattr(r, name) for r in results) for name in ("tries", "survived", "lost")]
    rows.append(["all", *map(str, sums)])
    rows.insert(1, ["---", "---:", "---:", "---:"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shard(text: str) -> tuple[int, int]:
    number, count = map(int, text.split("/"))
    if not 1 <= number <= count:
        raise ValueError
    return number, count


def main() -> int:
    """Run the requested faults; return 1 if any try was lost."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="no try starts after this time [%(default)s]")
    parser.add_argument(
        "--tries", type=int, default=500, help="maximum number of kills, and of data faults [%(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices [%(default)s]")
    parser.add_argument(
        "--only",
        default="",
        help="`kills`: only kills; `data`: only data faults; else only kinds of kills whose name contains this",
    )
    parser.add_argument("--into", type=Path, help="page whose table is updated, e.g. docs/reliability.md")
    parser.add_argument("--record", type=Path, help="file with a line for each kill; kills in it are not repeated")
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="K/N",
        help="every N-th kill from the K-th on, with a common record",
    )
    args = parser.parse_args()
    if args.into is not None:
        check_place(args.into, TABLE)
    torch.set_num_threads(1)  # forks must not share a thread pool
    logging.disable(logging.NOTSET)
    results: list[Result] = []
    data = args.only in ("", "data") and importlib.util.find_spec(DATA) is not None
    work = Path(tempfile.mkdtemp(prefix="faults."))
    if args.only != "data":
        only = args.only if args.only != "kills" else ""
        share = args.minutes * (0.75 if data else 1.0)
        results += kills.run(share, args.tries, args.seed, work, args.record, only, args.shard)
    if data:
        share = args.minutes * (0.25 if args.only == "" else 1.0)
        results += importlib.import_module(DATA).run(share, args.tries, args.seed)
    for result in results:
        if result.notes:
            sys.stdout.write(f"{'lost, ' if result.lost else ''}{result.kind}: {result.notes}\n")
    lost = sum(result.lost for result in results)
    if lost:
        sys.stdout.write(f"Their files are in {work}\n")
    else:
        shutil.rmtree(work)
    text = f"{table(results)}\n\n{describe_host()}; {date.today().isoformat()}; seed {args.seed}."
    sys.stdout.write(f"\n{text}\n")
    if args.into is not None:
        fill_in(args.into, TABLE, text)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
