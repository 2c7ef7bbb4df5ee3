"""Tables, files and figures of `ufgir benchmark`."""

import json
import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..utils.files import write_csv, write_text_atomically
from ..utils.plotting import label, method_style, new_figure, plain_style, save_figure, style
from ..utils.provenance import as_read, describe_host, now, peak_memory, source_checksum, source_commit
from ..utils.text import counted
from .benchmark import RESTORED, Report, Result, executed_ratio
from .benchmark_cases import Setting, by_table
from .timing import Quartiles


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

RECORD = "benchmark.json"
# Values of a record, and of each of its results, with which a run continues.
NEEDED = {"complete", "date", "load", "notes", "other_cores", "results", "seconds"}
NEEDED_ROW = {"identity", "finished", "model", "cosine", "same_neighbor", "same_top1", *RESTORED}
PACKAGES = ("clca-vit", "torch", "transformers", "onnxruntime", "openvino", "nncf", "numpy", "datasets", "pillow")
MEGA = 1e6
COLUMNS = 3  # panels per row
SUMMARY = "The fastest deployment of each model, and of the dense one"
TextTable = list[list[str]]


def provenance() -> dict[str, Any]:
    """Return command, date, machine, versions, and commit and checksum of the code."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # optional, or run from a checkout
            continue
    program = Path(sys.argv[0]).name
    command = shlex.join(["ufgir" if program == "cli.py" else program, *sys.argv[1:]])
    return {
        "command": command,
        "date": now(),
        "host": describe_host(),
        "versions": versions,
        "commit": source_commit(),
        "code": source_checksum(),
    }


def origin(facts: Mapping[str, Any], threads: int | None = None) -> str:
    """Describe the provenance of numbers in one line."""
    versions = [f"{name} {facts['versions'].get(name, '?')}" for name in ("torch", "transformers")]
    parts = [f"`{facts['command']}`", facts["host"], counted(threads, "thread") if threads else ""]
    parts += [", ".join(versions), facts["date"][:10]]
    return "; ".join(part for part in parts if part)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _time(time: Quartiles) -> str:
    """Format the median in milliseconds with its quartiles."""
    quartiles = [1e3 * seconds for seconds in time]
    digits = 0 if quartiles[0] >= 1000 else 1 if quartiles[0] >= 10 else 3
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*quartiles, d=digits)


def _goals(result: Result) -> str:
    """List each goal and whether it is met."""
    lines = []
    for goal in result.case.goals if result.case else ():
        if goal.measure in ("share", "over_float32") and not result.is_fastest:
            continue  # it is a goal for the fastest deployment of the model
        value = result.measured(goal.measure)
        lines.append(f"{goal}: {'not measured' if value is None else 'met' if goal.met(value) else 'missed'}")
    return ", ".join(lines)


def setting_table(results: Sequence[Result]) -> TextTable:
    """Return the results of one table as strings, without empty columns."""
    head = ["model", "backend", "ms [quartiles]", "images/s", "over transformers", "over fastest dense", "GMACs"]
    head += ["executed", "ratio", "possible", "share", "same kernels"]
    head += ["cosine", "same neighbor", "same top-1", "top-1"]
    head += ["activations, MB", "of dense", "peak, MB", "of dense", "set-up, s", "goal"]
    rows = [head]
    untimed = (
        ()
        if any(r.time for r in results)
        else ("images/s", "over transformers", "over fastest dense", "share", "same kernels")
    )
    for r in results:
        if r.error:
            rows.append([r.name, r.setting.backend, r.error, *[""] * (len(head) - 3)])
            continue
        memory = []
        for kind in ("activation_memory", "peak_memory"):
            size = getattr(r, kind)
            memory += ["" if size is None else _number(size / MEGA, 1), _share(r.memory_ratio(kind))]
        rows.append(
            [
                r.name,
                r.setting.backend,
                _time(r.time) if r.time else "not measured",
                _number(r.images_per_second, 2 if (r.images_per_second or 0) < 100 else 0),
                "" if r.dense is None else _number(r.speedup),
                "" if r.over_fastest is None else _number(r.over_fastest),
                *(_number(n / 1e9 if n else None, 3) for n in (r.macs, r.macs_executed)),
                "" if r.dense is None else _number(r.macs_ratio),
                "" if r.possible is None else _number(r.possible),
                _share(r.share),
                _share(r.same_kernels),
                *_agreement(r),
                *memory,
                "" if r.setup_seconds is None else _number(r.setup_seconds, 1),
                _goals(r),
            ]
        )
    filled = [i for i, name in enumerate(head) if i < 3 or (name not in untimed and any(row[i] for row in rows[1:]))]
    return [[row[i] for i in filled] for row in rows]


def summary_table(report: Report) -> TextTable:
    """Return the fastest deployment of each reduced model beside the fastest dense one, per precision; empty if each model was measured on one
    backend only."""
    head = [
        "setting",
        "model",
        "ms",
        "backend",
        "fastest dense, ms",
        "backend",
        "over fastest dense",
        "possible",
        "share",
    ]
    head += ["over transformers", "over its float32", "goal"]
    rows = [head]
    best: dict[Any, Result] = {}
    for r in report.results:
        if r.is_dense or not r.time or not r.is_fastest:
            continue
        best[r.case.model, r.setting.table] = r
    for (_, table), r in best.items():
        dense = r.fastest_dense
        rows.append(
            [
                str(table),
                r.name,
                _number(1e3 * r.time.median, 1),
                r.setting.backend,
                _number(1e3 * dense.time.median, 1) if dense else "-",
                dense.setting.backend if dense else "",
                *map(_number, (r.over_fastest, r.possible)),
                _share(r.share),
                _number(r.speedup),
                "" if r.over_float32 is None else _number(r.over_float32),
                ", ".join(text for text in (_goals(one) for one in r.deployments) if text),
            ]
        )
    several = any(len(r.deployments) > 1 for r in best.values())
    return rows if several else []


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _agreement(result: Result) -> list[str]:
    """Format cosine similarity, same neighbor, same class and accuracy."""
    return [show(measure(result)) for measure, show in MEASURES.values()]


class Measure(NamedTuple):
    """A measure of what is left of the dense model's answers on some images."""

    of: Callable[[Result], float | None]
    show: Callable[[float | None], str]


# Column of tables -> measure.
MEASURES = {
    "cosine": Measure(
        lambda r: r.agreement and r.agreement.cosine, lambda value: "" if value is None else f"{value:.4f}"
    ),
    "same neighbor": Measure(lambda r: r.agreement and r.agreement.neighbor, _share),
    "same top-1": Measure(lambda r: r.agreement and r.agreement.top1, _share),
    "top-1": Measure(lambda r: r.accuracy, _share),
}


def tables(report: Report) -> list[tuple[str, TextTable]]:
    """Return all tables with their titles: the summary if models were measured on several backends, one table per size, batch, precision and
    mode, and if methods are compared at several costs, one per measure and list of layers."""
    summary = summary_table(report)
    found = [(SUMMARY, summary)] if summary else []
    found += [(str(table), setting_table(results)) for table, results in by_table(report.results).items()]
    return found + [table for results in cost_panels(report).values() for table in cost_tables(results)]


def cost_panels(report: Report) -> dict[Setting, list[Result]]:
    """Return the results of each setting with agreement at several costs, without repetitions of the dense model."""
    panels = {}
    for setting, results in by_setting(report.results).items():
        compared = [r for r in results if r.case and r.case.target_gmacs is not None and r.agreement]
        if len({r.case.target_gmacs for r in compared}) > 1:
            panels[setting] = [next(r for r in results if r.case is None), *compared]
    return panels


def cost_tables(results: Sequence[Result]) -> list[tuple[str, TextTable]]:
    """Return for each measure and number of layers a title and a table of methods (rows) and costs (columns).

    Args:
        results: the dense model's, and one per method, list of layers and cost.
    """
    dense, *compared = results
    costs = sorted({r.case.target_gmacs for r in compared}, reverse=True)
    found = []
    for name, (measure, show) in MEASURES.items():
        for layers in dict.fromkeys(r.case.layers for r in compared):
            values = {(r.case.method, r.case.target_gmacs): measure(r) for r in compared if r.case.layers == layers}
            if all(value is None for value in values.values()):
                continue
            head = [f"{cost:g} GMACs ({cost * 1e9 / dense.macs:.0%})" for cost in costs]
            rows = [
                [str(method), *(show(values.get((method, cost))) or "-" for cost in costs)]
                for method in dict.fromkeys(method for method, _ in values)
            ]
            own = show(measure(dense))
            title = f"{name}, reduced in {len(layers)} layers" + (f"; dense: {own}" if own else "")
            found.append((title, [["method", *head], *rows]))
    return found


def by_setting(results: Sequence[Result]) -> dict[Setting, list[Result]]:
    """Group the results by setting, each backend by itself."""
    groups: dict[Setting, list[Result]] = {}
    for result in results:
        groups.setdefault(result.setting, []).append(result)
    return groups


def markdown_table(rows: TextTable) -> str:
    """Format a table as Markdown, the first column left-aligned and the others right-aligned."""
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(report: Report, facts: Mapping[str, Any]) -> str:
    """Return all tables, warnings and the provenance as Markdown."""
    parts = [f"**{title}**\n\n{markdown_table(rows)}" for title, rows in tables(report)]
    parts += [f"> {warning}" for warning in report.warnings]
    rounds = f"Medians of {report.repetitions} rounds, each round times one batch of every model"
    rounds = rounds if report.repetitions else "Time was not measured"
    return "\n\n".join([*parts, f"{rounds}. {origin(facts, report.threads)}."])


def csv_rows(report: Report) -> list[dict[str, Any]]:
    """Return one row per result. Units: seconds per batch, multiply-adds per image, bytes."""
    rows = []
    for r in report.results:
        time = r.time
        rows.append(
            {
                "model": r.name,
                "method": "dense" if r.is_dense else r.case.method or "none",
                "variant": "base" if r.case is None else r.case.variant,
                "keep_rate": 1.0 if r.case is None else r.case.keep_rate,
                "target_gmacs": r.case and r.case.target_gmacs,
                "reduction_layers": " ".join(map(str, (r.case and r.case.layers) or ())),
                "reduction_kwargs": json.dumps(dict(r.case.options)) if r.case and r.case.options else "",
                **r.setting._asdict(),
                "rounds": len(r.seconds),
                "seconds_median": time and time.median,
                "seconds_lower_quartile": time and time.lower,
                "seconds_upper_quartile": time and time.upper,
                "images_per_second": r.images_per_second,
                "speedup": r.speedup,
                "macs": r.macs,
                "macs_executed": r.macs_executed,
                "macs_ratio": r.macs_ratio,
                "macs_executed_ratio": executed_ratio(r.dense, r),
                "possible": r.possible,
                "realised": r.realised,
                "over_fastest_dense": r.over_fastest,
                "fastest_dense_backend": r.fastest_dense and r.fastest_dense.setting.backend,
                "share": r.share,
                "same_kernels": r.same_kernels,
                "over_float32": r.over_float32,
                "is_fastest": r.is_fastest,
                "cosine": r.agreement and r.agreement.cosine,
                "same_neighbor": r.agreement and r.agreement.neighbor,
                "same_top1": r.agreement and r.agreement.top1,
                "accuracy": r.accuracy,
                "activation_memory": r.activation_memory,
                "activation_memory_ratio": r.memory_ratio("activation_memory"),
                "peak_memory": r.peak_memory,
                "peak_memory_ratio": r.memory_ratio("peak_memory"),
                "setup_seconds": r.setup_seconds,
                "parameters": r.parameters,
                "goals": _goals(r),
                "error": r.error,
            }
        )
    return rows


def record(report: Report, facts: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything, including every timing, for the JSON file."""
    more = [{"seconds": r.seconds, "identity": r.identity, "finished": r.finished} for r in report.results]
    results = [row | about for row, about in zip(csv_rows(report), more, strict=True)]
    about = {name: value for name, value in vars(report).items() if name != "results"}
    # peak memory of the process since its start, including all models that are timed together: it cannot be measured per case
    return {
        **facts,
        **about,
        "warnings": report.warnings,
        "process_peak_memory": peak_memory(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "network": network,
        "results": results,
    }


def write_report(
    folder: Path, report: Report, facts: Mapping[str, Any], network: Mapping[str, Any], figures: bool = True
) -> list[Path]:
    """Write benchmark.csv, benchmark.md, benchmark.json and the figures, each atomically; return the files written."""
    record_text = json.dumps(record(report, facts, network), indent=1, ensure_ascii=False, default=str)
    return [
        write_text_atomically(folder / RECORD, record_text + "\n"),
        write_csv(folder / "benchmark.csv", csv_rows(report)),
        write_text_atomically(folder / "benchmark.md", markdown(report, facts) + "\n"),
        *(draw(report, folder, "benchmark") if figures else []),
    ]


def unfinished(folder: Path, facts: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of a run that was ended before everything was measured and written, or None.

    Args:
        folder: folder with the files of the run.
        facts: provenance of this run.
        about: further values of the record that must be the same: network, repetitions, threads.

    A record of another command, machine, code or versions is ignored, with a warning: its times do not compare with new ones. One that
    cannot be read, or lacks values, is ignored with a warning, too.
    """
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        found = None
    if not _is_record(found):
        logger.warning("%s cannot be read and is replaced", folder / RECORD)
        return None
    if found["complete"]:
        return None
    same = as_read({**{name: facts[name] for name in ("command", "host", "versions", "code")}, **about})
    if differ := [name for name, value in same.items() if found.get(name) != value]:
        logger.warning("%s is an unfinished run with another %s; it is replaced", folder / RECORD, ", ".join(differ))
        return None
    return found


def _is_record(found: Any) -> bool:
    """Return whether a value from a JSON file has what a run needs to continue."""
    if not isinstance(found, dict) or not found.keys() >= NEEDED or not isinstance(found["results"], list):
        return False
    return all(isinstance(row, dict) and row.keys() >= NEEDED_ROW for row in found["results"])


def draw(report: Report, folder: Path, prefix: str) -> list[Path]:
    """Draw PREFIX_throughput.png; with several batch sizes PREFIX_latency.png; with measured agreement PREFIX_agreement.png, over the cost if
    there are several and otherwise over time. Return the files written."""
    drawn = []
    with style():
        panels = throughput_panels(report)
        if panels:
            drawn.append(_draw_panels(panels, _draw_throughput, folder / f"{prefix}_throughput.png"))
        panels = latency_panels(report)
        if panels:
            drawn.append(_draw_panels(panels, _draw_latency, folder / f"{prefix}_latency.png"))
        costs = cost_panels(report)
        panels = {
            title: group for title, group in throughput_panels(report).items() if any(r.agreement for r in group)
        }
        if costs:
            drawn.append(_draw_costs(next(iter(costs.values())), folder / f"{prefix}_agreement.png"))
        elif panels:
            drawn.append(_draw_panels(panels, _draw_agreement, folder / f"{prefix}_agreement.png"))
    return drawn


def throughput_panels(report: Report) -> dict[str, list[Result]]:
    """Return title -> results of each setting with more than dense models."""
    groups = by_setting([r for r in report.results if r.time])
    return {str(s): group for s, group in groups.items() if len(group) > 1 and any(r.case for r in group)}


def latency_panels(report: Report) -> dict[str, list[Result]]:
    """Return title -> results of settings that differ only in batch size."""
    panels: dict[str, list[Result]] = {}
    for result in report.results:
        if result.time:
            s = result.setting
            panels.setdefault(f"{s.mode}, {s.image_size} px, {s.dtype}, {s.backend}", []).append(result)
    return {title: group for title, group in panels.items() if len({r.setting.batch_size for r in group}) > 1}


def _draw_panels(panels: Mapping[str, list[Result]], draw_one: Any, path: Path) -> Path:
    columns = 2 if len(panels) == 4 else min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(rows, columns, squeeze=False)
    for place, (title, results) in zip(axes.flat, panels.items(), strict=False):
        draw_one(place, title, results)
    for place in list(axes.flat)[len(panels) :]:
        place.remove()
    known = [place.get_legend_handles_labels() for place in list(axes.flat)[: len(panels)]]
    lines = {name: line for lines, names in known for line, name in zip(lines, names, strict=True)}
    figure.set_figwidth(figure.get_figwidth() + 2)  # inches
    figure.legend(lines.values(), lines.keys(), loc="outside right center")
    return save_figure(figure, path)


def _lines(results: Sequence[Result]) -> dict[str, tuple[dict[str, Any], list[Result]]]:
    """Return name -> style and results of each line: one method with one variant.

    Colors distinguish methods, or variants if there is only one method. Models without cache and aggregation have hollow markers.
    """
    variants = {r.case.variant for r in results if r.case}
    one_method = len({r.case.method for r in results if r.case}) == 1 < len(variants)
    lines: dict[str, tuple[dict[str, Any], list[Result]]] = {}
    for result in results:
        if result.case is None:
            continue
        method, variant = result.case.method, result.case.variant
        name = (method or "no reduction") + ("" if variant == "base" else f" + {variant}")
        look = plain_style(variant, len(lines)) if one_method and method else method_style(method)
        look = look | {"label": name} | ({"markerfacecolor": "white"} if variant == "base" else {})
        lines.setdefault(name, (look, []))[1].append(result)
    return lines


def _draw_throughput(axes: "Axes", title: str, results: Sequence[Result]) -> None:
    """Draw images per second over executed GMACs; the gray line shows the speed if only multiply-adds took time."""
    dense = next((r for r in results if r.is_dense), None)
    for look, line in _lines(results).values():
        line = sorted(line, key=lambda r: r.macs_executed)
        axes.plot([r.macs_executed / 1e9 for r in line], [r.images_per_second for r in line], **look)
    if dense is not None:
        least = min(r.macs_executed for r in results)
        work = [least + (dense.macs_executed - least) * i / 50 for i in range(51)]
        ideal = [dense.images_per_second * dense.macs_executed / macs for macs in work]
        axes.plot([macs / 1e9 for macs in work], ideal, color="#808080", linewidth=1, label="as the GMACs")
        axes.plot(dense.macs_executed / 1e9, dense.images_per_second, "k+", markersize=9, label=dense.name)
    label(axes, "executed GMACs per image", "images/s", title, legend=False)


def _draw_agreement(axes: "Axes", title: str, results: Sequence[Result]) -> None:
    """Draw agreement with the dense model over milliseconds per batch, one named marker per model. If models differ in the number of
    reduction layers, those with most have hollow markers."""
    compared = [r for r in results if r.case and r.agreement]
    has_classes = all(r.agreement.top1 is not None for r in compared)
    stages = sorted({len(r.case.layers or ()) for r in compared})
    for r in compared:
        name, count = r.case.method or "no reduction", len(r.case.layers or ())
        hollow = bool(stages[1:]) and count == stages[-1]
        look = {"linestyle": "none", "color": "black" if hollow else "#0072b2"}
        look |= {"marker": "o", "markersize": 4, "markerfacecolor": "white" if hollow else look["color"]}
        value = 100 * r.agreement.top1 if has_classes else r.agreement.cosine
        axes.plot(1e3 * r.time.median, value, **look | {"label": f"in {count} layers"})
        axes.annotate(
            name, (1e3 * r.time.median, value), xytext=(3, 3), textcoords="offset points", fontsize="xx-small"
        )
    for dense in (r for r in results if r.case is None):
        axes.axvline(1e3 * dense.time.median, color="#808080", linewidth=1, label=dense.name)
    what = "images with the dense model's class, %" if has_classes else "cosine with the dense model's feature"
    label(axes, "ms per batch", what, title, legend=False)


def _draw_costs(results: Sequence[Result], path: Path) -> Path:
    """Draw every measure (rows) over the multiply-adds as a share of the dense model's, for each list of layers (columns)."""
    dense, *compared = results
    measures = {name: of for name, (of, _) in MEASURES.items() if any(of(r) is not None for r in compared)}
    places = sorted({r.case.layers for r in compared}, key=len)
    figure, axes = new_figure(len(measures), len(places), squeeze=False, sharey="row", sharex=True)
    for row, (name, of) in zip(axes, measures.items(), strict=True):
        for place, layers in zip(row, places, strict=True):
            lines: dict[str, list[Result]] = {}
            for r in sorted((r for r in compared if r.case.layers == layers), key=lambda r: r.macs):
                lines.setdefault(r.case.method, []).append(r)
            for method, line in lines.items():
                shares = [100 * r.macs / dense.macs for r in line]
                place.plot(shares, [of(r) for r in line], **method_style(method))
            if of(dense) is not None:
                place.axhline(of(dense), color="#808080", linewidth=1, label="dense")
            title = f"reduced in {len(layers)} layers" if row is axes[0] else None
            label(place, "GMACs, % of dense" if row is axes[-1] else "", name, title, legend=False)
            place.label_outer()
    named = [place.get_legend_handles_labels() for place in axes.flat]
    lines = {name: line for found, names in named for line, name in zip(found, names, strict=True)}
    figure.set_figwidth(figure.get_figwidth() + 1.2)  # inches
    figure.legend(lines.values(), lines.keys(), loc="outside right center")
    return save_figure(figure, path)


def _draw_latency(axes: "Axes", title: str, results: Sequence[Result]) -> None:
    """Draw milliseconds per batch over batch size."""
    from matplotlib.ticker import LogLocator  # optional; axes exist only where it is installed

    rates = sorted({r.case.keep_rate for r in results if r.case and r.case.method})
    lines = []
    reduced = [r for r in results if r.case and r.case.method]
    for index, rate in enumerate(rates):
        alpha = 1 - 0.6 * index / len(rates)  # paler for higher keep rates
        for name, (look, line) in _lines([r for r in reduced if r.case.keep_rate == rate]).items():
            lines.append((look | {"label": f"{name}, {rate:g}", "alpha": alpha}, line))
    lines += list(_lines([r for r in results if r.case and not r.case.method]).values())
    dense = list({r.setting: r for r in results if r.case is None}.values())
    lines.append(({"color": "black", "marker": "+", "markersize": 9, "label": dense[0].name if dense else ""}, dense))
    for look, line in lines:
        line = sorted(line, key=lambda r: r.setting.batch_size)
        if len(line) > 1:
            axes.plot([r.setting.batch_size for r in line], [1e3 * r.time.median for r in line], **look)
    sizes = sorted({r.setting.batch_size for r in results})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # more labels would overlap
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, axis="y", which="minor", alpha=0.5)
    label(axes, "batch size", "ms per batch", title, legend=False)


def markers(name: str) -> tuple[str, str]:
    """Return the two comments in a document between which a table is inserted."""
    return f"<!-- table: {name} -->", f"<!-- end: {name} -->"


def check_place(document: Path, name: str) -> None:
    """Check that a document has a place for a table, before anything is measured.

    Raises:
        ValueError: if the file does not exist, or does not have both markers exactly once.
    """
    if not document.is_file():
        raise ValueError(f"`--into`: {document} does not exist.")
    begin, end = markers(name)
    text = document.read_text(encoding="utf-8")
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        raise ValueError(f"`--into`: {document} must contain {begin} followed by {end}, each exactly once.")


def fill_in(document: Path, name: str, content: str, figures: Sequence[Path] = ()) -> None:
    """Replace the table between two markers of a document.

    Args:
        document: a Markdown file, see `check_place`.
        name: name of the table.
        content: Markdown.
        figures: figures to show below the table.

    Raises:
        ValueError: see `check_place`.
    """
    check_place(document, name)
    begin, end = markers(name)
    shown = (f"![{_words(path)}]({Path(os.path.relpath(path, document.parent)).as_posix()})" for path in figures)
    block = "\n\n".join([begin, content, *shown, end])
    text = document.read_text(encoding="utf-8")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    write_text_atomically(document, re.sub(pattern, lambda _: block, text, count=1, flags=re.DOTALL))


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")
