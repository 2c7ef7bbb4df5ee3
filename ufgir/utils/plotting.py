"""Consistent figure style: colors that color-blind readers can distinguish, with line styles and markers for gray-scale print.

Each reduction method, and each of base, CLC, CLA and CLCA, has the same style in every figure:

    with style():
        figure, axes = new_figure()
        axes.plot(rates, accuracies, **variant_style("CLCA"))
        label(axes, x="Keep rate", y="Test top-1 (%)")
        save_figure(figure, "accuracy.png")

matplotlib is imported on first use. pyplot is not used, and no window is opened.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import install_command
from .files import whole_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color), without its yellow, which is hard to see on white.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
]
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK)

# Name -> arguments of `Axes.plot`.
VARIANT_STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": BLACK, "linestyle": ":", "marker": "o"},
    "CLC": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "CLA": {"color": SKY, "linestyle": "-.", "marker": "^"},
    "CLCA": {"color": BLUE, "linestyle": "-", "marker": "D"},
}
# Name -> hatch of its bars and boxes, to distinguish them in gray.
VARIANT_HATCHES = {"base": "", "CLC": "//", "CLA": "..", "CLCA": "\\\\"}
OTHER_HATCHES = ("xx", "++", "oo", "--")
METHOD_STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": BLACK, "linestyle": "-", "marker": "*"},
    # pruning: solid lines
    "ats": {"color": GREEN, "linestyle": "-", "marker": "^"},
    "dyvit": {"color": RED, "linestyle": "-", "marker": "v"},
    "evit": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "heuristic": {"color": PINK, "linestyle": "-", "marker": "x"},
    "topk": {"color": ORANGE, "linestyle": "-", "marker": "s"},
    # merging: dashed lines
    "dpcknn": {"color": GREEN, "linestyle": "--", "marker": "D"},
    "kmedoids": {"color": SKY, "linestyle": "--", "marker": "P"},
    "patchmerger": {"color": RED, "linestyle": "--", "marker": "X"},
    "sinkhorn": {"color": PINK, "linestyle": "--", "marker": "h"},
    "sit": {"color": ORANGE, "linestyle": "--", "marker": "p"},
    "tome": {"color": BLUE, "linestyle": "--", "marker": "<"},
}

# Styles of methods that are not in METHOD_STYLES: other line styles and markers. The numbers of line styles, colors and markers
# are coprime, so that 3 * 7 * 8 = 168 consecutive numbers give different styles.
OTHER_LINES = ("-.", ":", (0, (5, 1, 1, 1, 1, 1)))
OTHER_MARKERS = (">", "d", "H", "8", "1", "2", "3", "4")

_WIDTH, _HEIGHT = 5.0, 3.4  # inches: a column and a half of a page
_RC: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # long enough to distinguish dashes
    "errorbar.capsize": 2.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ufgir",  # reproducible files
    "pdf.fonttype": 42,
}


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(f"figures need matplotlib: {install_command('visualization')}") from error
    return matplotlib


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context manager that applies the project's figure style and restores matplotlib's settings afterwards.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    with _matplotlib().rc_context(_RC):
        yield


def new_figure(rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple["Figure", Any]:
    """Create a figure and its axes, one `Axes` or an array of them. Call it inside `style()`.

    Args:
        rows: number of rows of axes; each adds its height to the figure.
        columns: number of columns of axes; each adds its width to the figure.
        kwargs: further arguments of `matplotlib.figure.Figure.subplots`, such as `sharey`.
    """
    figure = _matplotlib().figure.Figure(figsize=(_WIDTH * columns, _HEIGHT * rows))
    return figure, figure.subplots(rows, columns, **kwargs)


def label(axes: "Axes", x: str, y: str, title: str | None = None, legend: bool = True) -> None:
    """Label the axes, with units, and add a legend where it covers the least."""
    axes.set(xlabel=x, ylabel=y, title=title)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def variant_style(name: str) -> dict[str, Any]:
    """Return arguments of `Axes.plot` for base, CLC, CLA or CLCA, including the label.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in VARIANT_STYLES:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANT_STYLES)}, got {name!r}.")
    return {"label": name, **VARIANT_STYLES[name]}


def method_style(name: str | None) -> dict[str, Any]:
    """Return arguments of `Axes.plot` for a reduction method, or for None, the model without reduction, including the label. The style of
    a method that is not in `METHOD_STYLES` is derived from its name, so it is the same in every figure."""
    name = name or "none"
    return {"label": name, **METHOD_STYLES.get(name, _other_style(name))}


def _other_style(name: str) -> dict[str, Any]:
    number = zlib.crc32(name.encode())  # `hash` differs between processes
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": OTHER_LINES[number % len(OTHER_LINES)],
        "marker": OTHER_MARKERS[number % len(OTHER_MARKERS)],
    }


def plain_style(name: str, position: int = 0) -> dict[str, Any]:
    """Return arguments of `Axes.plot` for any name, including the label: the style of the variant or method that `name` begins with, such
    as `CLCA 53.2 %`, or otherwise the color at `position` of the palette, modulo its length."""
    word = (name.split() or [""])[0].rstrip(",:;").lower()
    styles = {known.lower(): look for known, look in (METHOD_STYLES | VARIANT_STYLES).items()}
    return {"label": name, **styles.get(word, {"color": PALETTE[position % len(PALETTE)], "linestyle": "-"})}


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Save a figure as .png, .svg or .pdf. The file is written atomically; missing folders are created. Call it inside `style()`.

    Raises:
        ValueError: if the extension is another one.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"`path` of a figure must end in .png, .svg or .pdf, got {path}.")
    # no date, so that files are reproducible
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=undated)
    return path
