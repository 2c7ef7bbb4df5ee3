"""Figures of the analysis: similarity of layers, norms of tokens, heat maps over the patches, embeddings.

Call these functions inside `ufgir.utils.plotting.style()`. Values are drawn with the cividis color map, which is readable for
color-blind people and in gray.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.plotting import PALETTE, label, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

NUMBERS = "cividis"
MARKERS = "osD^vP"
_MOST_WRITTEN = 14  # maximal number of rows or columns with numbers in the cells
_POINTS_SIZE = (6.4, 4.8)  # inches
_MOST_NAMED = 24  # maximal number of classes with their own style and a legend entry


# measure of `comparison.WHAT` -> label of the color bar, and whether it is a distance
MEASURES = {
    "cka": ("Linear CKA, unbiased", False),
    "cka-plain": ("Linear CKA", False),
    "pwcca": ("PWCCA distance", True),
    "cca": ("Mean CCA", False),
    "cca-squared": ("Mean squared CCA", False),
    "procrustes": ("Procrustes distance", True),
}


def _heat(axes: "Axes", values: np.ndarray, high: float, digits: int, reverse: bool = False) -> Any:
    """Draw cells with colors from 0 to `high`, with numbers if there are few cells, and a dash for missing values."""
    colors = NUMBERS + ("_r" if reverse else "")
    cells = axes.imshow(np.ma.masked_invalid(values), cmap=colors, vmin=0, vmax=high, aspect="equal")
    axes.grid(visible=False)
    few = max(values.shape) <= _MOST_WRITTEN
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if not np.isfinite(value):
            axes.text(column, row, "–", ha="center", va="center")
        elif few:
            dark = value > 0.4 * high if reverse else value < 0.6 * high
            text = f"{value:.{digits}f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")
    return cells


def draw_layers(
    matrix: np.ndarray, layers: tuple[Sequence[int], Sequence[int]], names: tuple[str, str], measure: str
) -> "Figure":
    """Draw a measure of every pair of layers, (R, C); the layers of the first model go from bottom to top.

    Args:
        matrix: (R, C), non-negative.
        layers: indices of the R and of the C layers.
        names: names of the models.
        measure: one of `comparison.WHAT`, or the label of the color bar. Similar layers are bright.
    """
    figure, axes = new_figure()
    rows, columns = matrix.shape
    cell = 3.2 / max(rows, columns)  # inches
    figure.set_size_inches(max(cell * columns, 0.8) + 1.4, max(cell * rows, 1.2) + 0.6)
    text, is_distance = MEASURES.get(measure, (measure, False))
    cells = _heat(axes, matrix, max(1.0, float(np.nanmax(matrix, initial=1.0))), 2, reverse=is_distance)
    axes.invert_yaxis()
    step = 1 if max(matrix.shape) <= _MOST_WRITTEN else 3
    axes.set_xticks(range(0, columns, step), layers[1][::step])
    axes.set_yticks(range(0, rows, step), layers[0][::step])
    label(axes, x=f"Layer of {names[1]}", y=f"Layer of {names[0]}", legend=False)
    figure.colorbar(cells, ax=axes, label=text)
    return figure


def draw_spread(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> "Figure":
    """Draw norms of tokens and distances between them over the layers, a line per model, with the std as a band."""
    kinds = {
        "norm": "Norm of a token",
        "distance": "Distance of two tokens",
        "scaled_distance": "Distance, scaled to [0, 1]",
    }
    figure, panels = new_figure(1, 3)
    for axes, (kind, text) in zip(panels, kinds.items(), strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if row["model"] == "ab"[i]]
            layers = [row["layer"] for row in mine]
            mean, std = (np.array([row[f"{kind}_{part}"] for row in mine]) for part in ("mean", "std"))
            color, marker = PALETTE[i], MARKERS[i]
            axes.plot(layers, mean, color=color, marker=marker, linestyle=("-", "--")[i], label=name)
            axes.fill_between(layers, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        label(axes, x="Layer", y=text)
    return figure


def draw_maps(maps: Mapping[str, np.ndarray], high: float, measure: str) -> "Figure":
    """Draw heat maps over the patches of an image, side by side, with the same colors from 0 to `high`.

    Args:
        maps: title -> (rows, columns).
        high: value of the brightest color.
        measure: label of the color bar.
    """
    figure, panels = new_figure(1, len(maps), squeeze=False)
    rows, columns = next(iter(maps.values())).shape
    figure.set_size_inches(3.1 * len(maps) * columns / rows + 0.9, 3.4)
    for axes, (title, values) in zip(panels[0], maps.items(), strict=True):
        cells = _heat(axes, values, high, 1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(title)
    figure.colorbar(cells, ax=list(panels[0]), label=measure)
    return figure


def draw_points(
    points: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    axis_names: tuple[str, str],
    title: str | None = None,
    thumbnails: Mapping[int, "Image.Image"] | None = None,
) -> "Figure":
    """Draw an embedding, (n, 2), colored by class.

    Up to 24 classes differ in color and marker, and have a legend. More classes are drawn on a color scale, with the class index at
    the median of the points. Points of unknown class (negative label) are gray crosses.

    Args:
        points: (n, 2).
        labels: (n,) class indices.
        class_names: names by class index.
        axis_names: labels of both axes.
        title: title of the figure.
        thumbnails: index of a point -> image to draw there.
    """
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from matplotlib.patheffects import withStroke

    labels = np.asarray(labels)
    classes = sorted(set(labels[labels >= 0].tolist()))
    figure, axes = new_figure()
    figure.set_size_inches(*_POINTS_SIZE)
    size = float(np.clip(2000 / max(len(points), 1), 6, 30))
    unknown = points[labels < 0]
    if len(unknown):
        axes.scatter(*unknown.T, s=size, c="#999999", marker="x", linewidths=0.8, label="unknown")
    if len(classes) <= _MOST_NAMED:
        for i, k in enumerate(classes):
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i // len(PALETTE)]}
            axes.scatter(*points[labels == k].T, s=size, linewidths=0, label=class_names[k], **look)
    else:
        known = labels >= 0
        order = np.searchsorted(classes, labels[known])
        drawn = axes.scatter(*points[known].T, s=size, c=order, cmap=NUMBERS, linewidths=0)
        bar = figure.colorbar(drawn, ax=axes, label="Class", ticks=np.linspace(0, len(classes) - 1, 6).round())
        bar.ax.set_yticklabels([str(classes[int(i)]) for i in bar.get_ticks()])
        for k in classes:
            x, y = np.median(points[labels == k], axis=0)
            stroke = [withStroke(linewidth=1.5, foreground="white")]
            axes.text(x, y, str(k), fontsize=6, ha="center", va="center", path_effects=stroke, zorder=4)
    for index, image in (thumbnails or {}).items():
        k = classes.index(labels[index]) if labels[index] >= 0 else None
        edge = "#999999" if k is None or len(classes) > _MOST_NAMED else PALETTE[k % len(PALETTE)]
        box = AnnotationBbox(
            OffsetImage(np.asarray(image), zoom=1.0),
            points[index],
            pad=0.1,
            bboxprops={"edgecolor": edge, "lw": 1.2},
        )
        axes.add_artist(box)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    label(axes, x=axis_names[0], y=axis_names[1], title=title, legend=False)
    if axes.get_legend_handles_labels()[0]:
        legend = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
        axes.legend(**legend, fontsize=7, handlelength=1.0, markerscale=1.5, ncols=1 + (len(classes) > 12))
    return figure


def thumbnail_share(side: int) -> float:
    """Return the height of a thumbnail of `side` pixels, with its frame, as a share of the height of `draw_points`."""
    return (side + 6) / 72 / _POINTS_SIZE[1]
