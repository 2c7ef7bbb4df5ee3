"""What a run leaves behind for people: metrics, and a table of the results."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .model_card import METRIC_NAMES, measured, write_text_atomically


ALL_METRICS = "all_results.json"  # of all splits: Trainer adds to it


def forget_metrics(output_dir: str | os.PathLike, split: str) -> None:
    """Take what an earlier run has measured on a split out of `ALL_METRICS`, for a run that will not replace it."""
    path = Path(output_dir) / ALL_METRICS
    if path.exists():
        metrics = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in metrics.items() if not name.startswith(f"{split}_")}
        write_text_atomically(path, json.dumps(kept, indent=4, sort_keys=True))


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
