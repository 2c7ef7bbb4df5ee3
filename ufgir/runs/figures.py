"""The paper's figures, plotted from runs: accuracy over cost, box plots, ablation bars, gradient curves.

All except `draw_gradients` take the rows of `ufgir.runs.tables.summarize` (or `read_summary`). They return a
matplotlib figure; call them inside `ufgir.utils.plotting.style()`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..training.gradients import GradientCurve, draw_curves
from ..utils.files import Row
from ..utils.plotting import (
    METHOD_STYLES,
    OTHER_HATCHES,
    VARIANT_HATCHES,
    VARIANT_STYLES,
    label,
    new_figure,
    plain_style,
)
from .tables import factors_of, grouped, metric_name, scale_of, sort_key, varying


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


MAX_PANELS = 6
COST_NAMES = {
    "gmacs": "GMACs per image",
    "images_per_second": "Images per second, including loading",
    "model_images_per_second": "Images per second, model only",
}


def draw_cost(summary: Sequence[Row], cost: str, title: str | None = None) -> "Figure":
    """Plot accuracy over cost per image, with a line through the keep rates of each setting, like the paper's figure.

    Each variant (or each method, if there is one variant) has its own style, and image sizes have filled or hollow
    markers; further factors have a panel for each value. Error bars are sample stds over seeds; points are labeled
    with the keep rate in percent.

    Args:
        summary: rows of `summarize`.
        cost: `gmacs`, `images_per_second` or `model_images_per_second`; rows without it are ignored.
        title: title of the figure.

    Raises:
        ValueError: if no row has the cost, or there are too many panels.
    """
    rows = [row for row in summary if row[cost] is not None]
    if not rows:
        why = ": the multiply-adds of their methods differ between images" if cost == "gmacs" else ""
        raise ValueError(f"none of the runs has `{cost}`{why}")
    look = _style_factor(rows)
    inside = [name for name in (look, "image_size", "keep_rate") if name in rows[0]]
    sizes = (
        sorted({row["image_size"] for row in rows}, key=sort_key) if "image_size" in varying(rows, inside) else [None]
    )
    lowest, highest = min(row[cost] for row in rows), max(row[cost] for row in rows)
    figure, panels = _panels(rows, inside, title)
    for axes, group in panels:
        lines = grouped(group, [name for name in inside if name != "keep_rate"])
        for line in lines.values():
            line = sorted(line, key=lambda row: row[cost])
            style = _style(look, line[0][look], rows) | ({} if len(line) > 1 else {"linestyle": ""})
            if len(sizes) > 1:
                position = sizes.index(line[0]["image_size"])
                style["label"] += f", {line[0]['image_size']} px"
                style["markerfacecolor"] = style["color"] if position == len(sizes) - 1 else "white"
            _line(axes, [row[cost] for row in line], line, style)
        if "keep_rate" in inside:
            _name_rates(axes, lines.values(), cost)
        if highest > 2.5 * lowest > 0:
            _log_axis(axes)
        axes.margins(x=0.08, y=0.1)
    rates = "; numbers: keep rate in %" if "keep_rate" in inside else ""
    _finish(figure, panels, COST_NAMES[cost] + rates, rows, legend_inside=True)
    return figure


def _line(axes: "Axes", x: list[float], line: list[Row], style: dict[str, Any]) -> None:
    scale = scale_of(line[0]["metric"])
    spread = [scale * (row["std"] or 0.0) for row in line]
    axes.errorbar(
        x, [scale * row["mean"] for row in line], yerr=spread if any(spread) else None, elinewidth=0.8, **style
    )


def _name_rates(axes: "Axes", lines: Any, cost: str) -> None:
    """Write each keep rate, in percent, above its highest point of each image size."""
    highest: dict[tuple, Row] = {}
    for row in itertools.chain.from_iterable(lines):
        place = (sort_key(row["keep_rate"]), sort_key(row.get("image_size")))
        if place not in highest or row["mean"] > highest[place]["mean"]:
            highest[place] = row
    scale = scale_of(next(iter(highest.values()))["metric"])
    for row in highest.values():
        rate = row["keep_rate"]
        text = f"{100 * rate:g}" if isinstance(rate, float | int) and rate <= 1 else str(rate)
        top = scale * (row["mean"] + (row["std"] or 0.0))
        axes.annotate(text, (row[cost], top), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=7)


def _log_axis(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_boxes(summary: Sequence[Row], title: str | None = None) -> "Figure":
    """Plot a box per variant for each method (or each keep rate, if there is one method), over all other factors.

    Boxes span the quartiles, whiskers 1.5 times that range, and circles are settings beyond. The axis label gives the
    number of settings per box.

    Raises:
        ValueError: if every box has only one setting.
    """
    _columns(summary, "variant")
    across = _across(summary, "method", "keep_rate")
    groups = grouped(summary, [across, "variant"])
    if max(map(len, groups.values())) < 2:
        raise ValueError("box plots need several settings (backbones, data sets, ...) per method and variant")
    places = sorted({key[0] for key in groups})
    variants = sorted({key[1] for key in groups})
    names = {sort_key(row[name]): row[name] for row in summary for name in (across, "variant")}
    scale, width = scale_of(summary[0]["metric"]), 0.8 / len(variants)
    figure, axes = new_figure()
    axes.set_title(title or "")
    figure.set_figwidth(max(figure.get_figwidth(), 1.0 + 0.42 * len(places) * len(variants)))
    for index, variant in enumerate(variants):
        values = {i: groups[place, variant] for i, place in enumerate(places) if (place, variant) in groups}
        style = _style("variant", names[variant], summary)
        drawn = axes.boxplot(
            [[scale * row["mean"] for row in rows] for rows in values.values()],
            positions=[i + (index - (len(variants) - 1) / 2) * width for i in values],
            widths=0.8 * width,
            patch_artist=True,
            manage_ticks=False,
            medianprops={"color": "black", "linewidth": 1.4},
            boxprops={"facecolor": style["color"], "alpha": 0.65, "hatch": _hatch(names[variant], summary)},
            flierprops={"marker": "o", "markersize": 3, "markeredgecolor": style["color"]},
        )
        drawn["boxes"][0].set_label(style["label"])
    counts = {len(rows) for rows in groups.values()}
    axes.set_xticks(range(len(places)), [_tick(across, names[place]) for place in places])
    axes.grid(visible=False, axis="x")
    count = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    _finish(figure, [(axes, summary)], f"{_AXIS[across]}; {count} settings per box", summary)
    return figure


def draw_bars(summary: Sequence[Row], title: str | None = None) -> "Figure":
    """Plot a bar per variant for each keep rate (or each method, if there is one rate): an ablation.

    Error bars are sample stds over seeds; further factors have a panel for each value.

    Raises:
        ValueError: if there are too many panels.
    """
    _columns(summary, "variant")
    across = _across(summary, "keep_rate", "method")
    figure, panels = _panels(summary, ["variant", across], title)
    variants = sorted({sort_key(row["variant"]) for row in summary})
    places = sorted({sort_key(row[across]) for row in summary})
    names = {sort_key(row[name]): row[name] for row in summary for name in (across, "variant")}
    scale, width = scale_of(summary[0]["metric"]), 0.8 / len(variants)
    for axes, group in panels:
        for index, variant in enumerate(variants):
            rows = [row for row in group if sort_key(row["variant"]) == variant]
            style = _style("variant", names[variant], summary)
            axes.bar(
                [places.index(sort_key(row[across])) + (index - (len(variants) - 1) / 2) * width for row in rows],
                [scale * row["mean"] for row in rows],
                0.92 * width,
                yerr=[scale * (row["std"] or 0.0) for row in rows] if any(row["std"] for row in rows) else None,
                color=style["color"],
                alpha=0.6,
                edgecolor="white",
                hatch=_hatch(names[variant], summary),
                error_kw={"elinewidth": 0.9, "ecolor": "black"},
                label=style["label"],
            )
        axes.set_xticks(range(len(places)), [_tick(across, names[place]) for place in places])
        axes.grid(visible=False, axis="x")
    _finish(figure, panels, _AXIS[across], summary)
    return figure


def draw_gradients(
    rows: Sequence[Row],
    curves: Mapping[str, GradientCurve],
    metric: str,
    factors: Sequence[str],
    title: str | None = None,
) -> "Figure":
    """Plot the largest gradient at each step of each run that recorded gradients, like the paper's stability figure.

    The legend shows the factor in which the runs differ and the mean accuracy.

    Args:
        rows: rows of `run_rows`.
        curves: run -> largest gradients; rows without a curve are ignored.
        metric: a column.
        factors: columns that distinguish settings; runs with the same values share a legend entry.
        title: title of the figure.

    Raises:
        ValueError: if no run has recorded gradients, or if the runs that have differ in more than one factor.
    """
    rows = [row for row in rows if row["run"] in curves]
    if not rows:
        raise ValueError("none of the runs has recorded gradients. Train with `record_gradients`")
    changing = varying(rows, sorted(factors, key=lambda name: name != "variant"))
    if len(changing) > 1:
        raise ValueError(f"runs with recorded gradients differ in {' and '.join(changing)}. Select one with `--where`")
    groups = grouped(rows, changing)
    labels: dict[str, str] = {}
    for group in groups.values():
        values = [row[metric] for row in group if isinstance(row[metric], float)]
        mean = [f"{scale_of(metric) * sum(values) / len(values):.1f}"] if values else []
        name = [str(group[0][factor]) for factor in changing]
        labels |= {row["run"]: " ".join(name + mean) for row in group}
    figure = draw_curves([curves[row["run"]] for row in rows], [labels[row["run"]] for row in rows])
    (axes,) = figure.axes
    axes.set_title(title or "")
    if axes.get_legend():
        axes.get_legend().set_title(metric_name(metric))
    return figure


_AXIS = {"method": "Token reduction", "keep_rate": "Keep rate"}


def _panel_title(factor: str, value: Any) -> str:
    """Return a value for the title of a panel."""
    if factor == "image_size":
        return f"{value} px"
    return str(value) if factor in ("dataset", "backbone", "method", "variant") else f"{factor} {value}"


def _tick(factor: str, value: Any) -> str:
    if factor == "keep_rate" and isinstance(value, (int, float)) and value <= 1:
        return f"{100 * value:g} %"
    return str(value)


def _style_factor(rows: Sequence[Row]) -> str:
    """Return the factor shown by colors and markers: variant or method, whichever varies, preferring the variant."""
    existing = _columns(rows, "variant", "method")
    return next((name for name in existing if varying(rows, [name])), existing[0])


def _across(rows: Sequence[Row], *names: str) -> str:
    """Return the column on the horizontal axis: the first that varies, else the first that exists."""
    existing = _columns(rows, *names)
    return (varying(rows, existing) or existing)[0]


def _columns(rows: Sequence[Row], *names: str) -> list[str]:
    """Return the columns that exist; raise ValueError if there is none."""
    existing = [name for name in names if name in rows[0]]
    if not existing:
        raise ValueError(f"this figure needs the column {' or '.join(names)}. Add it to `--by`")
    return existing


def _finish(
    figure: "Figure", panels: Sequence[tuple], x: str, rows: Sequence[Row], legend_inside: bool = False
) -> None:
    """Label the axes, and put one legend inside the only panel or below all panels."""
    handles: dict[str, Any] = {}
    for axes, _ in panels:
        first = axes.get_subplotspec().colspan.start == 0
        inside = legend_inside and len(panels) == 1
        label(axes, x, metric_name(rows[0]["metric"]) if first else "", axes.get_title(), legend=inside)
        new, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, new, strict=True))
        if not inside and handles:
            figure.legends.clear()
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))


def _style(factor: str, value: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the style of a value of a factor, including its label.

    Values without a style in the project get a color of the palette, starting with colors that no variant uses.
    """
    known = {name.lower() for name in VARIANT_STYLES | METHOD_STYLES}
    unknown = [name for name in dict.fromkeys(str(row[factor]) for row in rows) if name.lower() not in known]
    index = unknown.index(str(value)) if str(value) in unknown else 0
    look = plain_style(str(value), (5, 2, 3, 1, 4, 0, 6)[index % 7])
    return {"marker": "vP<X>hp"[index % 7], **look, "label": str(value)}


def _hatch(variant: Any, rows: Sequence[Row]) -> str:
    """Return the hatch of a variant's bars and boxes; it does not depend on the other variants in the figure."""
    known = {name.lower(): hatch for name, hatch in VARIANT_HATCHES.items()}
    if str(variant).lower() in known:
        return known[str(variant).lower()]
    unknown = [name for name in dict.fromkeys(str(row["variant"]) for row in rows) if name.lower() not in known]
    return OTHER_HATCHES[unknown.index(str(variant)) % len(OTHER_HATCHES)]


def _panels(rows: Sequence[Row], inside: Sequence[str], title: str | None) -> tuple["Figure", list[tuple]]:
    """Make a figure with a panel for each combination of the varying factors that are not shown inside a panel.

    Returns:
        (figure, [(axes, rows), ...])

    Raises:
        ValueError: if there are more than `MAX_PANELS` panels.
    """
    outside = varying(rows, [name for name in factors_of(rows) if name not in inside])
    groups = grouped(rows, outside)
    if len(groups) > MAX_PANELS:
        raise ValueError(
            f"the figure would have {len(groups)} panels, one for each {', '.join(outside)}; at most {MAX_PANELS} are "
            "allowed. Select runs with `--where`, or list fewer columns in `--by` to average over the others"
        )
    columns = min(3, len(groups))
    figure, axes = new_figure(math.ceil(len(groups) / columns), columns, sharey=True, squeeze=False)
    if len(groups) > 1:  # smaller than a figure of its own
        width, height = figure.get_size_inches()
        figure.set_size_inches(0.72 * width, 0.85 * height)
    panels = []
    for place, group in zip(axes.flat, groups.values(), strict=False):
        name = ", ".join(_panel_title(factor, group[0][factor]) for factor in outside)
        place.set_title(name if len(groups) > 1 else title or "")
        panels.append((place, group))
    for place in axes.flat[len(groups) :]:
        place.set_axis_off()
    if title and len(groups) > 1:
        figure.suptitle(title)
    return figure, panels
