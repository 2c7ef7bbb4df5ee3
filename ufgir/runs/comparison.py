"""Comparison of runs with a baseline: paired differences, confidence intervals, tests (`ufgir results --baseline`).

Two runs are a pair if they have the same seed and the same settings but those of the baseline.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..utils.files import Row
from ..utils.text import listed
from .details import METRIC, Outcomes
from .statistics import LEVEL, RESAMPLES, bootstrap_interval, holm, mcnemar
from .tables import DIFFERENCE, INTERVAL, default_factors, grouped, known_column, parsed_cell, sort_key, varying


OutcomesOf = Callable[[Row], Outcomes | None]
Pair = tuple[Row, Row]  # a run and its baseline


class NoInterval(Exception):
    """An interval could not be computed; the message says why."""


def parse_baseline(text: str, rows: Sequence[Row], by: Sequence[str]) -> dict[str, Any]:
    """Parse `variant=base`, `variant=base,keep_rate=1.0`, or `base` for `variant=base`: return column -> value.

    Args:
        text: the value of `--baseline`.
        rows: of `run_rows`.
        by: columns that the table is grouped by.

    Raises:
        ValueError: if a column does not exist or is not in `by`, or no row has these values.
    """
    conditions: dict[str, Any] = {}
    for part in text.split(","):
        column, equals, value = part.rpartition("=")
        column = known_column(column.strip().replace("-", "_") if equals else "variant", rows, "--baseline")
        if not value.strip() or column in conditions:
            raise ValueError(f"`--baseline` must be COLUMN=VALUE,COLUMN=VALUE with each column once, got {text!r}")
        if column not in by:
            raise ValueError(f"`--baseline` {text}: the table is not grouped by {column}. Add it to `--by`")
        conditions[column] = parsed_cell(value.strip())
    found = next((row for row in rows if _fits(row, conditions)), None)
    if found is None:
        there = sorted({tuple(str(row[name]) for name in conditions) for row in rows})
        shown = listed([",".join(values) for values in there])
        raise ValueError(f"`--baseline` {text} matches no run; values of {','.join(conditions)}: {shown}")
    return {name: found[name] for name in conditions}  # as the table writes them


def _fits(row: Row, conditions: Mapping[str, Any]) -> bool:
    return all(sort_key(row[name]) == sort_key(value) for name, value in conditions.items())


def pairs_of(rows: Sequence[Row], metric: str, conditions: Mapping[str, Any]) -> list[Pair]:
    """Return each run that is not a baseline and has one, with its baseline.

    Args:
        rows: of `run_rows`; rows without the metric are ignored.
        metric: a column.
        conditions: column -> value of the baseline.

    Raises:
        ValueError: if two runs have the same settings and the same seed, so that their partner is not known.
    """
    factors = default_factors(rows)
    measured = [row for row in rows if isinstance(row[metric], int | float)]
    for same in grouped(measured, list(dict.fromkeys([*factors, *conditions, "seed"]))).values():
        if len(same) > 1:
            raise ValueError(
                f"`--baseline`: {same[0]['run']} and {same[1]['run']} have the same settings and the same seed, so they "
                "cannot be paired. Remove one, or select runs with `--where`"
            )
    rest = [*(name for name in factors if name not in conditions), "seed"]
    baselines = grouped([row for row in measured if _fits(row, conditions)], rest)
    others = [row for row in measured if not _fits(row, conditions)]
    partners = [(row, baselines.get(tuple(sort_key(row[name]) for name in rest))) for row in others]
    return [(row, found[0]) for row, found in partners if found]


def add_intervals(
    summary: Sequence[Row], rows: Sequence[Row], by: Sequence[str], outcomes_of: OutcomesOf, resamples: int = RESAMPLES
) -> list[str]:
    """Add `low` and `high` to each row of a summary: the 95 % interval of its mean, None if it is not known.

    Args:
        summary: of `summarize`, for top-1 on test images.
        rows: of `run_rows`.
        by: columns of the groups.
        outcomes_of: row -> outcomes of the run, None if they are not known.
        resamples: number of resamples.

    Returns:
        Notes for the reader.
    """
    groups = grouped([row for row in rows if isinstance(row[METRIC], int | float)], by)
    notes: dict[str, list[str]] = {}
    for cell in summary:
        group = groups[tuple(sort_key(cell[name]) for name in by)]
        cell |= dict.fromkeys(INTERVAL)
        try:
            values = _matrix([_known(row, outcomes_of) for row in group])
        except NoInterval as error:
            notes.setdefault(str(error), []).append(_name(cell, summary, by))
            continue
        interval = bootstrap_interval(values, resamples)
        cell |= {"low": interval.low, "high": interval.high}
    return [f"No interval for {listed(names)}: {why}." for why, names in notes.items()]


def add_differences(
    summary: Sequence[Row],
    pairs: Sequence[Pair],
    by: Sequence[str],
    baseline: str,
    outcomes_of: OutcomesOf,
    resamples: int = RESAMPLES,
) -> list[str]:
    """Add the columns `baseline`, `tables.DIFFERENCE` and `significant` to each row of a summary; None where there is no pair.

    `difference` and `difference_std` are mean and sample std over the pairs, `pairs_won` the number of pairs in which
    the run has the higher value. `baseline` is the text of `--baseline`. For top-1 on test images, `difference_low` and `difference_high` are the 95 % bootstrap
    interval, `significant` says whether it excludes 0, `p` is the bootstrap p-value and `p_holm` the same after Holm's
    correction for all rows of the summary.

    Returns:
        Notes for the reader.

    Raises:
        ValueError: if the runs of a pair were tested on different images.
    """
    groups = grouped_pairs(pairs, by)
    notes: dict[str, list[str]] = {}
    for cell in summary:
        cell |= dict.fromkeys(("baseline", *DIFFERENCE, "significant"))
        group = groups.get(tuple(sort_key(cell[name]) for name in by), [])
        cell["baseline"] = baseline
        if not group:
            continue
        metric = cell["metric"]
        values = [float(run[metric]) - float(base[metric]) for run, base in group]
        cell |= {"difference": statistics.fmean(values), "pairs": len(values), "pairs_won": sum(v > 0 for v in values)}
        cell["difference_std"] = statistics.stdev(values) if len(values) > 1 else None
        if metric != METRIC:
            continue
        try:
            matrix = _matrix([_difference(run, base, outcomes_of) for run, base in group])
        except NoInterval as error:
            notes.setdefault(str(error), []).append(_name(cell, summary, by))
            continue
        interval = bootstrap_interval(matrix, resamples)
        cell |= {"difference_low": interval.low, "difference_high": interval.high, "p": interval.p}
        cell["significant"] = "no" if interval.low <= 0 <= interval.high else "yes"
    tested = [cell for cell in summary if cell["p"] is not None]
    for cell, p in zip(tested, holm([cell["p"] for cell in tested]), strict=True):
        cell["p_holm"] = p
    return [f"No interval of the difference for {listed(names)}: {why}." for why, names in notes.items()]


def grouped_pairs(pairs: Sequence[Pair], by: Sequence[str]) -> dict[tuple, list[Pair]]:
    """Group pairs by the `sort_key` of the values of their runs in some columns."""
    groups: dict[tuple, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(tuple(sort_key(pair[0][name]) for name in by), []).append(pair)
    return groups


def pair_rows(pairs: Sequence[Pair], columns: Sequence[str], metric: str, outcomes_of: OutcomesOf) -> list[Row]:
    """Return a row for each pair: some columns of the run, seed, both runs, the difference, and McNemar's exact test.

    The test needs top-1 on test images; its columns are None if the outcomes of a run are not known. `p_holm` is `p`
    after Holm's correction for all pairs.
    """
    rows = []
    for group in dict(sorted(grouped_pairs(pairs, [*columns, "seed"]).items())).values():
        for run, baseline in group:
            row = {name: run[name] for name in (*columns, "seed", "run")} | {"baseline_run": baseline["run"]}
            row |= {"difference": float(run[metric]) - float(baseline[metric])}
            row |= dict.fromkeys(("only_run_right", "only_baseline_right", "p", "p_holm"))
            own, other = (outcomes_of(run), outcomes_of(baseline)) if metric == METRIC else (None, None)
            if own is not None and other is not None:
                test = mcnemar(own.right, other.right)
                row |= {"only_run_right": test.only_first, "only_baseline_right": test.only_second, "p": test.p}
            rows.append(row)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    return rows


class _Values(NamedTuple):
    """A value per test image: `values` (N,) of a run (its name, for messages), or of the difference of two runs."""

    seed: Any
    run: str
    images: str
    values: np.ndarray


def _known(row: Row, outcomes_of: OutcomesOf) -> _Values:
    """Return 1 for the images that a run classifies correctly, else 0."""
    if (outcomes := outcomes_of(row)) is None:
        raise NoInterval(f"{row['run']} has no predictions of labeled test images")
    return _Values(row["seed"], row["run"], outcomes.images, outcomes.right.astype(np.float64))


def _difference(run: Row, baseline: Row, outcomes_of: OutcomesOf) -> _Values:
    """Return the difference of two runs on each image."""
    own, other = _known(run, outcomes_of), _known(baseline, outcomes_of)
    if own.images != other.images:
        raise ValueError(
            f"`--baseline`: {run['run']} and {baseline['run']} were tested on different images, so they cannot be "
            "compared. Select runs with `--where`"
        )
    return own._replace(values=own.values - other.values)


def _matrix(found: Sequence[_Values]) -> np.ndarray:
    """Return the values of each seed on each image, (S, N), averaged over the runs of a seed.

    Raises:
        NoInterval: if the images of two runs differ, or the seeds have different numbers of runs.
    """
    seeds: dict[Any, list[np.ndarray]] = {}
    for one in found:
        if one.images != found[0].images:
            raise NoInterval(f"{found[0].run} and {one.run} were tested on different images")
        seeds.setdefault(one.seed, []).append(one.values)
    if len({len(runs) for runs in seeds.values()}) > 1:
        raise NoInterval("some seeds have more runs than others")
    return np.stack([np.mean(runs, axis=0) for runs in seeds.values()])


def _name(cell: Row, summary: Sequence[Row], by: Sequence[str]) -> str:
    """Return the values that distinguish a row of the summary."""
    return " ".join(str(cell[name]) for name in varying(summary, by)) or "the only row"


def explain(summary: Sequence[Row], resamples: int = RESAMPLES) -> str:
    """Return what the columns of intervals and differences mean; empty if there are none."""
    level, parts = f"{100 * LEVEL:g} %", []
    if any(row.get(low) is not None for row in summary for low in ("low", "difference_low")):
        parts.append(
            f"Intervals: {level}, from {resamples:,} bootstrap resamples of seeds and test images together; of images "
            "only, where there is one seed."
        )
    if any(row.get("pairs") for row in summary):
        parts.append(
            f"Difference: to the run with {summary[0]['baseline']}, the same seed and otherwise the same settings; mean "
            "± sample std over these pairs."
        )
    if count := sum(row.get("p") is not None for row in summary):
        parts.append(
            f"Significant: the {level} interval of the difference excludes 0. p: that the difference is 0, from the same "
            f"resamples{f'; p (Holm): corrected for the {count} comparisons of the table' if count > 1 else ''}."
        )
    return "\n".join(parts)
