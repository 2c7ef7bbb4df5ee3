"""Collect the measurements of methods off the shelf: a compact table, a figure, and the tables of docs/choosing.md.

    python docs/off_the_shelf.py outputs/photographs_all outputs/photographs_three outputs/leaves_all outputs/time_all

Each folder was written by `ufgir benchmark MODEL --target-gmacs ... --output FOLDER`, with `--images` or, if its name begins with `time_`, with
times only. Its name up to the first `_` names the images; several folders may share it, for example one per cost. Writes
docs/data/off_the_shelf.csv, in which rows stay that were not measured again (delete the file to start again), and
docs/figures/off_the_shelf.png, and prints a table for each kind of images. Without folders, the figure and tables are made from the
committed table.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ufgir.utils.files import write_csv


DOCS = Path(__file__).parent
TABLE, FIGURE = DOCS / "data" / "off_the_shelf.csv", DOCS / "figures" / "off_the_shelf.png"
MEASURES = {
    "cosine": "cosine with the dense feature",
    "same_neighbor": "same nearest image, %",
    "accuracy": "top-1, %",
}
TABLES = {
    "photographs": ("cosine", "same_neighbor"),
    "leaves": ("cosine", "same_top1", "accuracy"),
    "time": ("ms",),  # of one image
}
TITLES = {"photographs": "photographs", "leaves": "drawn leaves, linear probe"}
Row = dict[str, Any]


def read(folder: Path) -> Iterator[Row]:
    """Yield the compact rows of the measurements in a folder.

    Raises:
        ValueError: if the name of the folder does not say what was measured.
    """
    images = folder.name.partition("_")[0]
    if images not in TABLES:
        raise ValueError(
            f"`folders`: a name must begin with one of {', '.join(f'{n}_' for n in TABLES)}, got {folder}."
        )
    with (folder / "benchmark.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    dense = next(row for row in rows if row["method"] == "dense")
    for row in rows:
        seconds = row["seconds_median"]  # of a batch
        compact = {
            "images": images,
            "method": row["method"],
            "layers": row["reduction_layers"],
            "keep_rate": row["keep_rate"],
            "target_gmacs": row["target_gmacs"],
            "gmacs": f"{float(row['macs']) / 1e9:.3f}",
            "of_dense": f"{float(row['macs']) / float(dense['macs']):.4f}",
            **{name: row[name] for name in ("cosine", "same_neighbor", "same_top1", "accuracy")},
            "ms": f"{1000 * float(seconds) / int(row['batch_size']):.2f}" if seconds else "",
        }
        # Others failed, were interrupted, ran on another backend, or are dense models of another group of the timing.
        measured = row["backend"] == "eager" and compact[TABLES[images][0]]
        if row is dense or (row["method"] != "dense" and measured):
            yield compact


def collect(folders: Sequence[Path], earlier: Sequence[Row] = ()) -> list[Row]:
    """Return the rows of all folders and those of `earlier` that they lack, the dense model once for each kind of images."""
    found = [*earlier, *(row for folder in folders for row in read(folder))]
    rows = list({tuple(row[n] for n in ("images", "method", "layers", "target_gmacs")): row for row in found}.values())
    dense = {row["images"]: row for row in rows if row["method"] == "dense"}
    reduced = sorted(
        (row for row in rows if row["method"] != "dense"),
        key=lambda row: (row["images"], len(row["layers"]), row["method"], -float(row["target_gmacs"])),
    )
    return [*dense.values(), *reduced]


def cell(row: Row | None, measures: Sequence[str]) -> str:
    """Format measures of a row, separated by slashes: cosines with three decimals, shares in percent, times with one decimal."""
    if row is None:
        return "-"
    formats = {"cosine": (1, ".3f"), "ms": (1, ".1f")}
    chosen = [(m, *formats.get(m, (100, ".0f"))) for m in measures]
    return " / ".join(format(scale * float(row[m]), form) for m, scale, form in chosen)


def table(rows: Sequence[Row], images: str) -> str:
    """Return a Markdown table of methods and costs, every layer first, in percent of the dense model's GMACs."""
    measures = TABLES[images]
    dense = next(row for row in rows if row["images"] == images and row["method"] == "dense")
    these = {(r["method"], r["layers"], r["target_gmacs"]): r for r in rows if r["images"] == images and r["layers"]}
    places = sorted(
        {(layers, cost) for _, layers, cost in these}, key=lambda place: (-len(place[0]), -float(place[1]))
    )
    most = places[0][0]
    head = [
        f"{100 * float(cost) / float(dense['gmacs']):.0f} %" + ("" if layers == most else f", layers {layers}")
        for layers, cost in places
    ]
    lines = [["method", *head], ["---", *["---:"] * len(head)]]
    lines += [
        [m, *(cell(these.get((m, *place)), measures) for place in places)] for m in sorted({m for m, *_ in these})
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(rows: Sequence[Row]) -> None:
    """Draw the results of reduction in every layer: measures (rows) over the cost for each kind of images (columns), and for photographs
    over the time as well."""
    from ufgir.utils.plotting import label, method_style, new_figure, save_figure, style

    most = max(len(row["layers"]) for row in rows)
    every = [row for row in rows if len(row["layers"]) == most]
    milliseconds = {(r["method"], r["target_gmacs"]): float(r["ms"]) for r in every if r["images"] == "time"}
    columns = [(images, title, False) for images, title in TITLES.items()]
    columns += [("photographs", TITLES["photographs"], True)] if milliseconds else []
    with style():
        figure, axes = new_figure(len(MEASURES), len(columns), squeeze=False, sharex="col")
        for line, (measure, name) in zip(axes, MEASURES.items(), strict=True):
            for place, (images, title, timed) in zip(line, columns, strict=True):
                these = [row for row in every if row["images"] == images and row[measure]]
                if timed:
                    these = [row for row in these if (row["method"], row["target_gmacs"]) in milliseconds]
                if not these:
                    place.axis("off")
                    continue
                scale = 1 if measure == "cosine" else 100
                for method in sorted({row["method"] for row in these}):
                    points = sorted(
                        (
                            milliseconds[method, r["target_gmacs"]] if timed else 100 * float(r["of_dense"]),
                            scale * float(r[measure]),
                        )
                        for r in these
                        if r["method"] == method
                    )
                    place.plot(*zip(*points, strict=True), **method_style(method))
                dense = next(row for row in rows if row["images"] == images and row["method"] == "dense")
                if dense[measure]:
                    place.axhline(scale * float(dense[measure]), color="#808080", linewidth=1)
                x = "milliseconds per image" if timed else "GMACs, % of dense"
                label(place, x, name, title if measure == "cosine" else None, legend=False)
                place.tick_params(labelbottom=True)
        lines = {
            text: item for place in axes.flat for item, text in zip(*place.get_legend_handles_labels(), strict=True)
        }
        figure.set_figwidth(figure.get_figwidth() + 1.2)  # inches
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
        save_figure(figure, FIGURE)


def main(folders: Sequence[Path]) -> None:
    """Update the table if there are folders, then the figure, and print the tables of the page."""
    rows = list(csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines())) if TABLE.exists() else []
    if folders:
        rows = collect(folders, rows)
        columns = dict.fromkeys(name for row in rows for name in row)
        write_csv(TABLE, [{name: row.get(name, "") for name in columns} for row in rows])
    draw(rows)
    sys.stdout.write(
        "\n\n".join(table(rows, images) for images in TABLES if images in {row["images"] for row in rows}) + "\n"
    )


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
