"""What a run leaves behind for people: predictions, and a table of the results."""

from collections.abc import Mapping, Sequence
from typing import Any

from .model_card import METRIC_NAMES, measured


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text, one line a split: images, seconds, and the metrics in percent where they were measured.

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
