"""Tables of runs: one row per run, and means with stds over seeds (`ufgir results`)."""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..utils.files import Row
from ..utils.metric_names import METRIC_NAMES, measured
from .details import gradients_of


# Columns that distinguish settings in every study; other options are added if they differ.
FACTORS = ("dataset", "backbone", "image_size", "method", "keep_rate", "variant")
# Options covered by the factors, and options that do not change the results.
COVERED_BY_FACTORS = {"dataset", "model_name_or_path", "image_size", "reduction", "keep_rate", "keep_tokens"}
COVERED_BY_FACTORS |= {"cross_layer_cache", "head"}
WITHOUT_EFFECT = {"seed", "run_name", "report_to", "project", "logging_steps", "logging_strategy", "disable_tqdm"}
WITHOUT_EFFECT |= {"num_pictures", "predictions_file", "per_device_eval_batch_size", "dataloader_num_workers"}
WITHOUT_EFFECT |= {"save_total_limit", "push_to_hub", "hub_model_id", "hub_revision", "do_eval", "do_predict"}

AFTER_OPTIONS = "parameters"  # the first column of `run_rows` after the options
COSTS = ("gmacs", "images_per_second", "model_images_per_second", "train_seconds")
INTERVAL = ("low", "high")
DIFFERENCE = ("difference", "difference_std", "pairs", "pairs_won", "difference_low", "difference_high", "p", "p_holm")
# columns of a summary that are not factors
SUMMARY = ("metric", "mean", "std", "n", *COSTS, *INTERVAL, "baseline", *DIFFERENCE, "significant")
FRACTIONS = METRIC_NAMES  # metrics that are fractions, displayed in percent


def variant_of(config: Mapping[str, Any]) -> str:
    """Return base, CLC, CLA or CLCA; other heads by name: IFA, CLC+IFA."""
    cache, head = bool(config.get("cross_layer_cache")), config.get("head", "linear")
    if head in ("linear", "cla"):
        return {(False, "linear"): "base", (True, "linear"): "CLC", (False, "cla"): "CLA", (True, "cla"): "CLCA"}[
            cache, head
        ]
    return "CLC+" * cache + head.upper()


def _plain(value: Any) -> Any:
    """Return a value for a cell: lists as words, or one number if all are equal."""
    if isinstance(value, list):
        return value[0] if len(set(map(str, value))) == 1 else " ".join(map(str, value))
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else "" if value is None else value


def run_rows(records: Sequence[Mapping[str, Any]], gradients: bool = False) -> list[Row]:
    """Return a row for each record of `read_runs`.

    Columns: `run`, the factors, `seed`, every option in which the runs differ, `parameters`, all metrics as
    `split_metric`, costs, machine, date and commit. Units: metrics as recorded, GMACs, seconds, GiB.

    Args:
        records: one per run.
        gradients: read recorded gradients, too. Columns: `largest_gradient_median_last_third`, ..., the median and the
            maximum of the largest |gradient| over the steps of each third of the training.
    """

    def option(record: Mapping[str, Any], name: str) -> Any:
        source = record["config"] if name in record["config"] else record["settings"]
        return _plain(source.get(name))

    names = dict.fromkeys(name for record in records for name in record["settings"])
    names = [name for name in names if name not in COVERED_BY_FACTORS | WITHOUT_EFFECT | {"output_dir"}]
    names = [name for name in names if len({str(option(record, name)) for record in records}) > 1]
    rows = []
    for record in records:
        config, settings = record["config"], record["settings"]
        kept = config["keep_rate"] if config.get("keep_tokens") is None else config["keep_tokens"]
        row = {
            "run": record["folder"],
            "dataset": record.get("dataset", settings.get("dataset", "")),
            "backbone": settings.get("model_name_or_path") or "from scratch",
            "image_size": _plain(config["image_size"]),
            "method": config.get("reduction") or "none",
            "keep_rate": _plain(kept) if config.get("reduction") else 1.0,
            "variant": variant_of(config),
            "seed": record["seed"],
            **{name: option(record, name) for name in names},
            AFTER_OPTIONS: record.get("num_parameters", ""),
        }
        for split, metrics in record["metrics"].items():
            row |= {f"{split}_{name}": value for name, value in metrics.items()}
        speeds = record.get("images_per_second", {})
        row |= {f"{split}_images_per_second": speed for split, speed in speeds.items()}
        memory = record.get("peak_memory", {})
        row |= {
            "gmacs": "" if record["macs"] is None else record["macs"] / 1e9,  # None if they differ between images
            "dense_gmacs": record["dense_macs"] / 1e9,
            # for a resumed run, only the time since then is known
            "train_seconds": "" if record.get("resumed_from") else record.get("train_seconds") or "",
            "model_images_per_second": record.get("model_images_per_second") or "",
            **{f"peak_{kind}_gib": size / 2**30 for kind, size in memory.items()},
            "host": record.get("host", ""),
            "date": record.get("date", ""),
            "commit": record.get("commit") or "",
        }
        if gradients and (found := gradients_of(record)):
            row |= found.columns()
        rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    rows.sort(key=lambda row: [sort_key(row[name]) for name in (*FACTORS, *names, "seed")])
    return [{name: row.get(name, "") for name in columns} for row in rows]


def matching(rows: Sequence[Row], conditions: Iterable[str]) -> list[Row]:
    """Return the rows for which every `column=value,value` holds, ignoring case.

    Raises:
        ValueError: if a column does not exist or no row is left.
    """
    rows = list(rows)
    for condition in conditions:
        column, equals, values = condition.partition("=")
        if not equals or not values:
            raise ValueError(f"`--where` must be COLUMN=VALUE,VALUE, got {condition!r}")
        column = known_column(column.replace("-", "_"), rows, "--where")
        wanted = {sort_key(parsed_cell(value.strip())) for value in values.split(",")}
        left = [row for row in rows if sort_key(row[column]) in wanted]
        if not left:
            there = ", ".join(sorted({str(row[column]) for row in rows}))
            raise ValueError(f"`--where` {condition} matches no run; values of `{column}`: {there}")
        rows = left
    return rows


def known_column(name: str, rows: Sequence[Row], flag: str) -> str:
    """Return `name` if the rows have it; otherwise raise ValueError with the existing columns."""
    if name not in rows[0]:
        close = get_close_matches(name, rows[0], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"`{flag}`: no column {name!r}{hint}; columns: {', '.join(rows[0])}")
    return name


def default_metric(rows: Sequence[Row], metric: str = "top1") -> str:
    """Return the column of a metric: on test images if any run has it, else on validation images.

    Raises:
        ValueError: if no run has it; lists the existing metrics.
    """
    for name in (metric, f"test_{metric}", f"validation_{metric}"):
        if any(isinstance(row.get(name), (int, float)) for row in rows):
            return name
    there = [name for name in rows[0] if name.startswith(("test_", "validation_")) and not name.endswith("_second")]
    raise ValueError(f"`--metric` {metric} is missing in all runs; available: {', '.join(there) or 'none'}")


def default_factors(rows: Sequence[Row]) -> list[str]:
    """Return `FACTORS`, and every option that differs between runs with equal factors."""
    columns = list(rows[0])
    options = columns[columns.index("seed") + 1 : columns.index(AFTER_OPTIONS)]
    groups = grouped(rows, FACTORS)
    return [*FACTORS, *(o for o in options if any(len({str(r[o]) for r in group}) > 1 for group in groups.values()))]


def grouped(rows: Iterable[Row], by: Sequence[str]) -> dict[tuple, list[Row]]:
    """Group the rows by the `sort_key` of their values in some columns, sorted by these keys."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(sort_key(row[name]) for name in by), []).append(row)
    return dict(sorted(groups.items()))


def sort_key(value: Any) -> tuple[int, float, str]:
    """Return a key to sort and compare cells: numbers by value, then variants in the paper's order, then text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return 0, float(value), ""
    order = ("base", "clc", "cla", "clca")
    text = str(value).lower()
    return (1, order.index(text), text) if text in order else (2, 0, text)


def summarize(rows: Sequence[Row], metric: str, by: Sequence[str]) -> list[Row]:
    """Return mean, sample std (None for one run) and number of runs for each combination of the factors `by`.

    Args:
        rows: rows of `run_rows`; rows without the metric are ignored.
        metric: a column.
        by: columns.

    Returns:
        Rows of `by`, `metric`, `mean`, `std`, `n`, and the means of `COSTS` (None if no run has them).
    """
    columns = {name: name for name in COSTS} | {"images_per_second": f"{metric.partition('_')[0]}_images_per_second"}
    summary = []
    for group in grouped([row for row in rows if _is_number(row[metric])], by).values():
        values = [float(row[metric]) for row in group]
        row = {name: group[0][name] for name in by}
        std = statistics.stdev(values) if len(values) > 1 else None
        row |= {"metric": metric, "mean": statistics.fmean(values), "std": std, "n": len(values)}
        for name, column in columns.items():
            numbers = [float(r[column]) for r in group if _is_number(r.get(column))]
            row[name] = statistics.fmean(numbers) if numbers else None
        summary.append(row)
    return summary


def pool(summary: Sequence[Row], by: Sequence[str]) -> list[Row]:
    """Average the means of a summary over the factors that are not in `by`.

    The std is None where rows were averaged, as it would mix seeds with other factors.
    """
    pooled = []
    for group in grouped(summary, by).values():
        row = {name: group[0][name] for name in by} | {"metric": group[0]["metric"]}
        row |= {"mean": statistics.fmean(r["mean"] for r in group), "std": None, "n": sum(r["n"] for r in group)}
        for name in COSTS:
            numbers = [r[name] for r in group if _is_number(r[name])]
            row[name] = statistics.fmean(numbers) if numbers else None
        pooled.append(row if len(group) > 1 else row | {"std": group[0]["std"]})
    return pooled


def factors_of(summary: Sequence[Row]) -> list[str]:
    """Return the columns of a summary that are factors."""
    return [name for name in summary[0] if name not in SUMMARY]


def varying(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """Return the columns with different values in the rows."""
    return [name for name in names if len({sort_key(row[name]) for row in rows}) > 1]


def read_summary(path: Path) -> list[Row]:
    """Read a summary from a CSV file.

    Raises:
        ValueError: if the file is not a summary.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: parsed_cell(v) for k, v in row.items()} for row in csv.DictReader(file, strict=True)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    if not rows or not {"metric", "mean", "std", "n"} <= set(rows[0]):
        raise ValueError(
            f"{path} is not a summary written by `ufgir results`: it needs the columns metric, mean, std and n"
        )
    for row in rows:
        if not _is_number(row["mean"]) or not _is_number(row["n"]):
            raise ValueError(f"{path}: `mean` and `n` must be numbers, got {row['mean']!r} and {row['n']!r}")
        row |= {name: value if _is_number(value := row.get(name)) else None for name in ("std", *COSTS)}
        row |= {name: row[name] if _is_number(row[name]) else None for name in (*INTERVAL, *DIFFERENCE) if name in row}
    return rows


def parsed_cell(text: str) -> Any:
    """Return the number that a text stands for, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            pass
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def metric_name(metric: str) -> str:
    """`test_top1` -> `Test top-1 (%)`."""
    split, _, name = metric.partition("_")
    if split not in ("test", "validation", "train"):
        split, name = "", metric
    shown = METRIC_NAMES[name][1] if name in METRIC_NAMES else name.replace("_", " ")
    text = f"{split} {shown}".strip()
    return text[0].upper() + text[1:] + (" (%)" if name in FRACTIONS else "")


def scale_of(metric: str) -> float:
    """Return the factor for displaying a metric: 100 for fractions."""
    return 100.0 if metric.partition("_")[2] in FRACTIONS or metric in FRACTIONS else 1.0


def markdown(summary: Sequence[Row]) -> str:
    """Return a summary as a Markdown table; factors with a single value are listed above it.

    Intervals and differences (`ufgir.runs.comparison`) have columns if the summary has them.
    """
    factors = factors_of(summary)
    columns = varying(summary, factors)
    metric = summary[0]["metric"]
    costs = [name for name in COSTS if any(row[name] is not None for row in summary)]
    shown = {"gmacs": "GMACs", "images_per_second": "images/s with loading"}
    shown |= {"model_images_per_second": "images/s, model only", "train_seconds": "training (s)"}
    compared = _comparison_columns(summary)
    head = [*columns, metric_name(metric), "runs", *compared, *(shown[name] for name in costs)]
    lines = [head, ["---"] * len(columns) + ["---:"] * (len(head) - len(columns))]
    for index, row in enumerate(summary):
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in costs]
        mean = _mean(metric, row["mean"], row["std"])
        cells = [values[index] for values in compared.values()]
        lines.append([*(str(row[name]) for name in columns), mean, str(row["n"]), *cells, *numbers])
    constant = ", ".join(f"{name} {summary[0][name]}" for name in factors if name not in columns)
    table = as_table(lines)
    return f"{constant}\n\n{table}" if constant else table


def as_table(lines: Iterable[Sequence[str]]) -> str:
    """Return lines of cells, the second of which has the alignments, as a Markdown table."""
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _mean(metric: str, mean: float, std: float | None, sign: str = "") -> str:
    scale = scale_of(metric)
    digits = 2 if scale == 100 else 4
    return f"{scale * mean:{sign}.{digits}f}" + ("" if std is None else f" ± {scale * std:.{digits}f}")


def _comparison_columns(summary: Sequence[Row]) -> dict[str, list[str]]:
    """Return title -> cells for those columns of intervals and differences that have values."""
    metric = summary[0]["metric"]

    def interval(row: Row, low: str, high: str, sign: str = "") -> str:
        if row.get(low) is None:
            return ""
        return " to ".join(_mean(metric, row[name], None, sign) for name in (low, high))

    def number(row: Row, name: str) -> str:
        return "" if row.get(name) is None else f"{row[name]:.2g}"

    def difference(row: Row) -> str:
        if row.get("difference") is None:
            return ""
        return _mean(metric, row["difference"], row["difference_std"], "+")

    higher = "pairs won" if scale_of(metric) == 100 else "pairs higher"
    columns = {
        "95 % interval": [interval(row, "low", "high") for row in summary],
        f"difference to {summary[0].get('baseline')}": [difference(row) for row in summary],
        higher: [f"{row['pairs_won']} of {row['pairs']}" if row.get("pairs") else "" for row in summary],
        "95 % interval of the difference": [
            interval(row, "difference_low", "difference_high", "+") for row in summary
        ],
        "significant": [row.get("significant") or "" for row in summary],
        "p": [number(row, "p") for row in summary],
        "p (Holm)": [number(row, "p_holm") for row in summary],
    }
    if sum(row.get("p") is not None for row in summary) < 2:
        del columns["p (Holm)"]  # the same as p
    return {title: cells for title, cells in columns.items() if any(cells)}


def pair_table(pairs: Sequence[Row], columns: Sequence[str], baseline: str) -> str:
    """Return `pair_rows` of `ufgir.runs.comparison` as a Markdown table; empty if no pair was tested.

    Args:
        pairs: the rows.
        columns: of the rows, to show before the seed.
        baseline: name of the baseline.
    """
    pairs = [row for row in pairs if row["p"] is not None]
    if not pairs:
        return ""
    columns = [*columns, "seed"]
    head = ["difference", "only this right", f"only {baseline} right", "p", "p (Holm)"]
    lines = [[*columns, *head], ["---"] * len(columns) + ["---:"] * len(head)]
    for row in pairs:
        cells = [f"{100 * row['difference']:+.2f}", str(row["only_run_right"])]
        cells += [str(row["only_baseline_right"]), f"{row['p']:.2g}", f"{row['p_holm']:.2g}"]
        lines.append([*(str(row[name]) for name in columns), *cells])
    return as_table(lines)


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return aligned text with one line per split: images, seconds, and the measured metrics in percent.

    Args:
        rows: {"split", "images", "seconds"} and any of the metrics, fractions in [0, 1].
    """
    shown = measured(rows)
    table = [["split", "images", *(f"{METRIC_NAMES[key][1]} %" for key in shown), "seconds"]]
    for row in rows:
        metrics = [f"{100 * row[key]:.2f}" if key in row else "-" for key in shown]
        table.append([row["split"], f"{row['images']:,}", *metrics, f"{row['seconds']:.1f}"])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in table
    )
