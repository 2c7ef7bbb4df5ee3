"""`ufgir results`: collect runs in tables and figures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.records import RunRecords, read_run_records
from ..utils.files import write_csv, write_text_atomically
from .outputs import check_file, check_folder, print_before_error


FIGURES = ("gmacs", "throughput", "box", "ablation", "gradients")
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
EPILOG = """
  ufgir results runs/study                                   the table, as text
  ufgir results runs/study --output results                  results.csv, summary.csv, results.md and figures
  ufgir results runs/study --output results.csv              one row per run
  ufgir results runs/study --by variant,keep_rate --figure ablation --output results
  ufgir results results/summary.csv --where keep_rate=0.1 --figure box --output box.png

The std is the sample std over the runs of a row, which differ only in the seed unless --by pools others.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="FOLDER|SUMMARY.csv",
        help="folders that are searched for runs, or one summary.csv of this command",
    )
    parser.add_argument(
        "--by",
        metavar="COLUMN,COLUMN",
        help="columns to group the runs by, one row per combination of values [dataset, backbone, image_size, method, "
        "keep_rate, variant and all other columns that differ, except the seed]",
    )
    parser.add_argument(
        "--where", action="append", default=[], metavar="COLUMN=VALUE,VALUE", help="only runs with these values [all]"
    )
    parser.add_argument(
        "--metric",
        default="top1",
        help="top1, top5, macro_f1, ... on the test split (else validation), or a column [top1]",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER|FILE",
        help="folder for tables and figures, or one file: .csv (one row per run), .md, .png, .svg or .pdf [print only]",
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        choices=FIGURES,
        metavar="NAME",
        help=f"figures to write as PNG and PDF: {', '.join(FIGURES)} [gmacs and throughput]",
    )
    parser.add_argument("--title", help="title of each figure [none]")


def run(args: argparse.Namespace) -> str:
    """Return the table, the unfinished runs and the written files."""
    from ..runs import tables as run_tables

    kind = args.output.suffix if args.output else None
    if args.figure and (args.output is None or kind in (".csv", ".md")):
        raise ValueError("`--figure` requires `--output`: a folder, or for one figure a .png, .svg or .pdf file.")
    if kind in FIGURE_SUFFIXES and len(args.figure or ()) != 1:
        raise ValueError(
            f"`--output` {args.output} takes one figure: choose it with `--figure`, one of {', '.join(FIGURES)}."
        )
    if args.output is not None:
        (check_file if kind in (".csv", ".md", *FIGURE_SUFFIXES) else check_folder)(args.output)
    by = [name.strip().replace("-", "_") for name in args.by.split(",")] if args.by else None
    rows, records = None, RunRecords([], {})
    if len(args.sources) == 1 and args.sources[0].suffix == ".csv":
        summary = run_tables.matching(run_tables.read_summary(args.sources[0]), args.where)
        if by:
            summary = run_tables.pool(summary, [run_tables.known_column(name, summary, "--by") for name in by])
    else:
        records = read_run_records(args.sources)
        if not records.finished:
            return f"There is no finished run.\n{_unfinished(records)}"
        rows = run_tables.matching(run_tables.run_rows(records.finished), args.where)
        metric = run_tables.default_metric(rows, args.metric)
        by = [run_tables.known_column(name, rows, "--by") for name in by] if by else run_tables.default_factors(rows)
        summary = run_tables.summarize(rows, metric, by)
    parts = [run_tables.markdown(summary), _repeated(rows, by) if rows and not args.by else "", _unfinished(records)]
    text = "\n\n".join(part for part in parts if part)
    if args.output is None:
        return text
    if kind == ".csv":
        with print_before_error([text]):
            written = [write_csv(args.output, rows if rows is not None else summary)]
    elif kind == ".md":
        with print_before_error([text]):
            written = [write_text_atomically(args.output, text + "\n")]
    else:
        written = _write_figures(args, rows, by, summary, text)
    return "\n".join([text, "", *(f"wrote {path}" for path in written)])


def _write_figures(
    args: argparse.Namespace,
    rows: Sequence[dict[str, Any]] | None,
    by: Sequence[str] | None,
    summary: Sequence[dict[str, Any]],
    text: str,
) -> list[Path]:
    from ..runs import figures as paper_figures
    from ..utils import plotting as figures

    if "gradients" in (args.figure or ()) and rows is None:
        raise ValueError(
            "`--figure` gradients requires the folders of the runs; a summary does not contain gradients."
        )
    speed = "model_images_per_second" if all(r["model_images_per_second"] for r in summary) else "images_per_second"
    draw = {
        "gmacs": lambda: paper_figures.draw_cost(summary, "gmacs", args.title),
        "throughput": lambda: paper_figures.draw_cost(summary, speed, args.title),
        "box": lambda: paper_figures.draw_boxes(summary, args.title),
        "ablation": lambda: paper_figures.draw_bars(summary, args.title),
        "gradients": lambda: paper_figures.draw_gradients(rows, summary[0]["metric"], by, args.title),
    }
    names = args.figure or [
        n for n, cost in (("gmacs", "gmacs"), ("throughput", speed)) if any(r[cost] for r in summary)
    ]
    written = []
    with figures.style():
        drawn = {name: draw[name]() for name in names}  # before anything is written, so that errors come first
        with print_before_error([text]):
            if args.output.suffix in FIGURE_SUFFIXES:
                return [figures.save_figure(drawn[names[0]], args.output)]
            if rows is not None:  # a summary gives figures only
                written.append(write_csv(args.output / "results.csv", rows))
                written.append(write_csv(args.output / "summary.csv", summary))
                written.append(write_text_atomically(args.output / "results.md", text + "\n"))
            for name, figure in drawn.items():
                written += [figures.save_figure(figure, args.output / f"{name}.{kind}") for kind in ("png", "pdf")]
    return written


def _unfinished(records: RunRecords) -> str:
    if not records.unfinished:
        return ""
    lines = [f"- {folder}: {why}" for folder, why in records.unfinished.items()]
    return f"Unfinished runs, not in the table: {len(lines)}\n\n" + "\n".join(lines)


def _repeated(rows: Sequence[dict[str, Any]], by: Sequence[str]) -> str:
    """Return a warning if runs have the same settings and the same seed, which makes the std too small; else an empty text."""
    seen: dict[tuple, str] = {}
    for row in rows:
        key = (*(str(row[name]) for name in by), row["seed"])
        if key in seen:
            return f"Warning: {seen[key]} and {row['run']} have the same settings and the same seed; both are counted."
        seen[key] = row["run"]
    return ""
