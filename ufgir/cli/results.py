"""`ufgir results`: collect runs in tables and figures."""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..runs.records import RunRecords
from ..runs.statistics import RESAMPLES
from ..utils.files import Row, write_csv, write_text_atomically
from .outputs import check_file, check_folder, print_before_error


FIGURES = ("gmacs", "throughput", "box", "ablation", "gradients")
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
EPILOG = """
  ufgir results runs/study                                   the table, as text
  ufgir results runs/study --output results                  results.csv, summary.csv, results.md and figures
  ufgir results runs/study --output results.csv              one row per run
  ufgir results runs/study --by variant,keep_rate --figure ablation --output results
  ufgir results runs/study --baseline variant=base           differences to base, intervals, tests
  ufgir results runs/study --summary runs/study.json         one small file with all that tables and figures need
  ufgir results runs/study.json --baseline variant=base      the same table, without the folders
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
        metavar="FOLDER|SUMMARY.json|SUMMARY.csv",
        help="folders that are searched for runs, files written with --summary, or one summary.csv of this command",
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
    parser.add_argument(
        "--baseline",
        metavar="COLUMN=VALUE",
        help="compare each run with the run that has this value, the same seed and otherwise the same settings: mean "
        "difference, pairs won, interval, McNemar's test. Several columns: variant=base,keep_rate=1.0 [no comparison]",
    )
    parser.add_argument(
        "--intervals",
        action="store_true",
        help="95 %% interval of each mean of the test top-1; with --baseline always shown",
    )
    parser.add_argument(
        "--resamples", type=int, metavar="N", help=f"bootstrap resamples of the intervals [{RESAMPLES:,}]"
    )
    parser.add_argument(
        "--summary",
        type=Path,
        metavar="FILE.json",
        help="write a small file with all runs of the table, which this command reads instead of their folders [none]",
    )


def run(args: argparse.Namespace) -> str:
    """Return the table, the unfinished runs and the written files."""
    from ..runs import summaries
    from ..runs import tables as run_tables

    kind = args.output.suffix if args.output else None
    _check(args, kind)
    by = [name.strip().replace("-", "_") for name in args.by.split(",")] if args.by else None
    if len(args.sources) == 1 and args.sources[0].suffix == ".csv":
        summary = run_tables.matching(run_tables.read_summary(args.sources[0]), args.where)
        if by:
            summary = run_tables.pool(summary, [run_tables.known_column(name, summary, "--by") for name in by])
        table = _Table(summary, run_tables.markdown(summary))
    else:
        records = summaries.read_runs(args.sources)
        if not records.finished:
            return f"There is no finished run.\n{_unfinished(records)}"
        table = _table(args, by, records)
    written = []
    if args.output is not None and kind not in (".csv", ".md"):
        written += _write_figures(args, table)
    with print_before_error([table.text]):
        if args.summary is not None:
            written.append(summaries.write_summary_file(args.summary, list(table.records.values())))
        if kind == ".csv":
            written.append(write_csv(args.output, table.summary if table.rows is None else table.rows))
        elif kind == ".md":
            written.append(write_text_atomically(args.output, table.text + "\n"))
    return "\n".join([table.text, *([""] if written else []), *(f"wrote {path}" for path in written)])


def _check(args: argparse.Namespace, kind: str | None) -> None:
    """Check the options before anything is read."""
    if args.figure and (args.output is None or kind in (".csv", ".md")):
        raise ValueError("`--figure` requires `--output`: a folder, or for one figure a .png, .svg or .pdf file.")
    if kind in FIGURE_SUFFIXES and len(args.figure or ()) != 1:
        raise ValueError(
            f"`--output` {args.output} takes one figure: choose it with `--figure`, one of {', '.join(FIGURES)}."
        )
    if args.output is not None:
        (check_file if kind in (".csv", ".md", *FIGURE_SUFFIXES) else check_folder)(args.output)
    if args.summary is not None:
        if args.summary.suffix != ".json":
            raise ValueError(f"`--summary` must be a file that ends in .json, got {args.summary}.")
        check_file(args.summary, "--summary")
    if args.resamples is not None and args.resamples < 100:
        raise ValueError(f"`--resamples` must be at least 100, got {args.resamples}.")
    if args.resamples is not None and not args.intervals and args.baseline is None:
        raise ValueError("`--resamples` has no effect without `--intervals` or `--baseline`.")
    wants_runs = [flag for flag in ("baseline", "intervals", "summary") if getattr(args, flag) not in (None, False)]
    tables = [source for source in args.sources if source.suffix == ".csv"]
    if tables and (wants_runs or len(args.sources) > 1):
        why = f"`--{wants_runs[0]}` requires runs" if wants_runs else "several sources must be runs"
        raise ValueError(f"{why}: pass their folders, or files written with `--summary`, instead of {tables[0]}.")


class _Table(NamedTuple):
    """What is shown and written.

    Attributes:
        summary: rows of `summarize`.
        text: Markdown and notes.
        rows: one row per run; None if the source is a `summary.csv`, like all that follows.
        by: columns of the groups.
        pairs: rows of `pair_rows`.
        records: row["run"] -> record.
    """

    summary: list[Row]
    text: str
    rows: list[Row] | None = None
    by: Sequence[str] = ()
    pairs: Sequence[Row] = ()
    records: Mapping[str, Mapping[str, Any]] = {}


def _table(args: argparse.Namespace, by: Sequence[str] | None, records: RunRecords) -> _Table:
    """Return the table of some runs."""
    from ..runs import comparison, details
    from ..runs import tables as run_tables

    gradients = args.metric.startswith("largest_gradient_") or args.output is not None
    rows = run_tables.matching(run_tables.run_rows(records.finished, gradients), args.where)
    metric = run_tables.default_metric(rows, args.metric)
    by = [run_tables.known_column(name, rows, "--by") for name in by] if by else run_tables.default_factors(rows)
    summary = run_tables.summarize(rows, metric, by)
    chosen = {record["folder"]: record for record in records.finished}
    chosen = {row["run"]: chosen[row["run"]] for row in rows}
    resamples = args.resamples or RESAMPLES
    notes, pairs = [], []

    @functools.cache
    def outcomes(run: str) -> details.Outcomes | None:
        return details.outcomes_of(chosen[run])

    def outcomes_of(row: Row) -> details.Outcomes | None:
        return outcomes(row["run"])

    if args.intervals and metric != details.METRIC:
        raise ValueError(f"`--intervals` requires `--metric` top1 on test images, got {metric}.")
    if args.intervals or (args.baseline is not None and metric == details.METRIC):
        notes += comparison.add_intervals(summary, rows, by, outcomes_of, resamples)
    if args.baseline is not None:
        conditions = comparison.parse_baseline(args.baseline, rows, by)
        baseline = ", ".join(map(str, conditions.values()))
        found = comparison.pairs_of(rows, metric, conditions)
        notes += comparison.add_differences(summary, found, by, baseline, outcomes_of, resamples)
        factors = run_tables.default_factors(rows)
        columns = [*run_tables.varying(summary, by), *run_tables.varying([run for run, _ in found], factors)]
        columns = list(dict.fromkeys(columns))
        pairs = comparison.pair_rows(found, columns, metric, outcomes_of)
    parts = [run_tables.markdown(summary)]
    if args.intervals or args.baseline is not None:
        parts.append(comparison.explain(summary, resamples))
    if pairs and (tests := run_tables.pair_table(pairs, columns, baseline)):
        parts += [
            "McNemar's exact test over the test images of each pair; p (Holm): corrected for all these tests.",
            tests,
        ]
    parts += ["\n".join(notes), "" if args.by else _repeated(rows, by), _unfinished(records)]
    return _Table(summary, "\n\n".join(part for part in parts if part), rows, by, pairs, chosen)


def _write_figures(args: argparse.Namespace, table: _Table) -> list[Path]:
    from ..runs import details
    from ..runs import figures as paper_figures
    from ..utils import plotting as figures

    rows, summary = table.rows, table.summary
    curves = {}
    if "gradients" in (args.figure or ()):
        if rows is None:
            raise ValueError("`--figure` gradients requires runs; a summary.csv does not contain gradients.")
        found = {run: details.gradients_of(record) for run, record in table.records.items()}
        curves = {run: gradients.curve for run, gradients in found.items() if gradients is not None}
    speed = "model_images_per_second" if all(r["model_images_per_second"] for r in summary) else "images_per_second"
    draw = {
        "gmacs": lambda: paper_figures.draw_cost(summary, "gmacs", args.title),
        "throughput": lambda: paper_figures.draw_cost(summary, speed, args.title),
        "box": lambda: paper_figures.draw_boxes(summary, args.title),
        "ablation": lambda: paper_figures.draw_bars(summary, args.title),
        "gradients": lambda: paper_figures.draw_gradients(rows, curves, summary[0]["metric"], table.by, args.title),
    }
    names = args.figure or [
        n for n, cost in (("gmacs", "gmacs"), ("throughput", speed)) if any(r[cost] for r in summary)
    ]
    written = []
    with figures.style():
        drawn = {name: draw[name]() for name in names}  # before anything is written, so that errors come first
        with print_before_error([table.text]):
            if args.output.suffix in FIGURE_SUFFIXES:
                return [figures.save_figure(drawn[names[0]], args.output)]
            if rows is not None:  # a summary gives figures only
                written.append(write_csv(args.output / "results.csv", rows))
                written.append(write_csv(args.output / "summary.csv", summary))
                if table.pairs:
                    written.append(write_csv(args.output / "pairs.csv", table.pairs))
                written.append(write_text_atomically(args.output / "results.md", table.text + "\n"))
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
