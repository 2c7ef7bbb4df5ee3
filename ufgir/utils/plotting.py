"""Figures in one style: colours that colour-blind readers tell apart, and a line style and a marker for print in grey.

Each method of token reduction, and each of base, CLC, CLA and CLCA, looks the same in every figure:

    with style():
        figure, axes = new_figure()
        axes.plot(rates, accuracies, **variant_style("CLCA"))
        label(axes, x="Keep rate", y="Test top-1 (%)")
        save_figure(figure, "accuracy.png")

matplotlib is imported when a figure is drawn, not with this module; no window is opened and pyplot is not used.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import whole_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color), without its yellow, which white paper swallows.
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

# Name -> what `Axes.plot` takes.
VARIANT_STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": BLACK, "linestyle": ":", "marker": "o"},
    "CLC": {"color": ORANGE, "linestyle": "--", "marker": "s"},
    "CLA": {"color": SKY, "linestyle": "-.", "marker": "^"},
    "CLCA": {"color": BLUE, "linestyle": "-", "marker": "D"},
}
# Name -> what its bars and boxes are filled with, to be told apart in grey.
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

# What a method looks like that is not in METHOD_STYLES: lines and markers that none of those has. Their numbers have no common
# divisor with each other, so that 3 * 7 * 8 = 168 names in a row look different.
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
    "legend.handlelength": 3.0,  # long enough to tell dashes apart
    "errorbar.capsize": 2.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ufgir",  # the same figure, the same file
    "pdf.fonttype": 42,
}


def _matplotlib() -> Any:
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'clca-vit[visualization]'") from error
    return matplotlib


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw in the project's style inside this context; matplotlib's settings are as before after it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _matplotlib().rc_context(_RC):
        yield


def new_figure(rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple["Figure", Any]:
    """A figure and its axes, one `Axes` or an array of them; to be called inside `style()`.

    Args:
        rows, columns: of axes; each adds its own width and height to the figure.
        kwargs: more arguments of `matplotlib.figure.Figure.subplots`, such as `sharey`.
    """
    figure = _matplotlib().figure.Figure(figsize=(_WIDTH * columns, _HEIGHT * rows))
    return figure, figure.subplots(rows, columns, **kwargs)


def label(axes: "Axes", x: str, y: str, title: str | None = None, legend: bool = True) -> None:
    """Name the axes, with units, and put the legend where it hides least."""
    axes.set(xlabel=x, ylabel=y, title=title)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def variant_style(name: str) -> dict[str, Any]:
    """What `Axes.plot` takes for base, CLC, CLA or CLCA, the label included; ValueError for another name."""
    if name not in VARIANT_STYLES:
        raise ValueError(f"`variant` must be one of {', '.join(VARIANT_STYLES)}, got {name!r}.")
    return {"label": name, **VARIANT_STYLES[name]}


def method_style(name: str | None) -> dict[str, Any]:
    """What `Axes.plot` takes for a method of token reduction or for None, the dense model, the label included. A method that is
    not in `METHOD_STYLES` has a style that follows from its name, the same in every figure."""
    name = name or "none"
    return {"label": name, **METHOD_STYLES.get(name, _other_style(name))}


def _other_style(name: str) -> dict[str, Any]:
    number = zlib.crc32(name.encode())  # `hash` differs from process to process
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": OTHER_LINES[number % len(OTHER_LINES)],
        "marker": OTHER_MARKERS[number % len(OTHER_MARKERS)],
    }


def plain_style(name: str, position: int = 0) -> dict[str, Any]:
    """What `Axes.plot` takes for anything: the style of the variant or method that `name` begins with, such as
    `CLCA 53.2 %`, or else the colour at `position` of the palette, counted round and round; the label included."""
    word = (name.split() or [""])[0].rstrip(",:;").lower()
    styles = {known.lower(): look for known, look in (METHOD_STYLES | VARIANT_STYLES).items()}
    return {"label": name, **styles.get(word, {"color": PALETTE[position % len(PALETTE)], "linestyle": "-"})}


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure as .png, .svg or .pdf, whole or not at all; folders are made; to be called inside `style()`.

    Raises:
        ValueError: another ending.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"`path` of a figure must end in .png, .svg or .pdf, got {path}.")
    # no date inside: the same numbers give the same file
    undated = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    with whole_file(path) as beside:
        figure.savefig(beside, format=kind, metadata=undated)
    return path
