"""`ufgir correlate`: correlate the similarity of models with the gap between their accuracies."""

import argparse
import csv
import json
import os
from pathlib import Path
from typing import Any

from ..analysis.inputs import as_json
from ..interpret.patterns import gap_correlation
from ..runs.summaries import SUFFIX, read_runs
from ..runs.tables import default_metric, run_rows
from ..utils.files import write_csv, write_text_atomically
from ..utils.provenance import now
from ..utils.text import align
from .common import require
from .compare import RECORD
from .outputs import check_file, print_before_error


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("comparisons", nargs="+", metavar="FOLDER", help="output folders of `ufgir compare A B`")
    parser.add_argument(
        "--results",
        required=True,
        metavar="FOLDER|SUMMARY.json|results.csv",
        help="folder of the runs, or a file of `ufgir results`: of --summary, or results.csv",
    )
    parser.add_argument(
        "--metric", default="top1", help="top1, macro_f1, ... on the test split (else validation), or a column [top1]"
    )
    parser.add_argument(
        "--output", metavar="FILE.csv", help="table to write, with a .json file next to it [print only]"
    )


def run(args: argparse.Namespace) -> str:
    """Return the table of correlations."""
    require("scipy")
    output = None if args.output is None else Path(args.output)
    if output is not None and output.suffix != ".csv":
        raise ValueError(f"`--output` must end in .csv, got {output}.")
    if output is not None:
        check_file(output)
        check_file(output.with_suffix(".json"))
    metric, scores = _scores(args.results, args.metric)
    pairs = [_pair(Path(folder), scores) for folder in args.comparisons]
    measures = list(dict.fromkeys(name for pair in pairs for name in pair["scalars"]))
    rows = []
    for measure in measures:
        with_it = [pair for pair in pairs if pair["scalars"].get(measure) is not None]
        if len(with_it) >= 3:
            found = gap_correlation([p["scalars"][measure] for p in with_it], [p["gap"] for p in with_it])
            rows.append({"measure": measure, **found})
    if not rows:
        raise ValueError(
            f"a rank correlation needs at least three comparisons with the same measure, got {len(pairs)}."
        )
    head = list(rows[0])
    cells = [[f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    text = f"gap: |difference of {metric}|\n\n" + align([head, *cells])
    if output is None:
        return text
    shown = [{key: pair[key] for key in ("folder", "models", "scores", "gap")} for pair in pairs]
    record = {"date": now(), "metric": metric, "pairs": shown, "correlations": rows}
    with print_before_error([text]):
        write_csv(output, rows)
        write_text_atomically(output.with_suffix(".json"), as_json(record))
    return f"{text}\n\nwrote {output}"


def _scores(source: str, metric: str) -> tuple[str, dict[str, float]]:
    """Return the name of the metric's column, and the metric of each run by its folder."""
    if Path(source).is_dir() or Path(source).suffix == SUFFIX:
        records = read_runs([source]).finished
        if not records:
            raise ValueError(f"`--results` {source} contains no finished run.")
        rows = run_rows(records)
    else:
        try:
            with Path(source).open(encoding="utf-8", newline="") as file:
                rows: list[dict[str, Any]] = [
                    {k: v if k == "run" else _number(v) for k, v in row.items()} for row in csv.DictReader(file)
                ]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"`--results` {source} is neither a folder nor a readable CSV table.") from error
        if not rows or "run" not in rows[0]:
            raise ValueError(f"`--results` {source} has no column `run`: pass the results.csv of `ufgir results`.")
    column = default_metric(rows, metric)
    return column, {
        os.path.realpath(row["run"]): row[column] for row in rows if isinstance(row.get(column), int | float)
    }


def _number(text: str) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _pair(folder: Path, scores: dict[str, float]) -> dict[str, Any]:
    """Return the scalars of a comparison of two models and the gap between their scores."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        models, scalars = list(record["models"]), record["scalars"]
        names = [model["name"] for model in models]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} contains no valid {RECORD} of `ufgir compare`.") from error
    if len(names) != 2:
        raise ValueError(f"{folder} compares the layers of one model, not two models.")
    for model in models:
        if changes := model.get("changes"):
            listed = ", ".join(f"{field} {value}" for field, value in changes.items())
            raise ValueError(
                f"{folder} compares {model['name']} with {listed}, so the accuracy of its run does not apply: compare models "
                "without `--changes`."
            )
    if missing := [name for name in names if os.path.realpath(name) not in scores]:
        raise ValueError(f"{folder} compares {missing[0]}, which is not among the runs of `--results`.")
    found = [scores[os.path.realpath(name)] for name in names]
    return {
        "folder": str(folder),
        "models": names,
        "scores": found,
        "gap": abs(found[0] - found[1]),
        "scalars": scalars,
    }
