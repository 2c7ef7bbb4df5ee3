"""What a run leaves behind for people: predictions, and a table of the results."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .model_card import METRIC_NAMES, measured, write_text_atomically


def write_predictions(
    path: str | Path,
    logits: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    files: Sequence[str | None],
    top: int = 5,
) -> Path:
    """Write one line an image, atomically: index, file, label, prediction, and the best guesses with probabilities.

    Args:
        path: ends in .csv (columns class_1, probability_1, class_2, ...) or .jsonl (a list `top`).
        logits: (N, K).
        labels: (N,) true class indices.
        class_names: K names.
        files: (N,) the images' file names, None where an image has none.
        top: guesses written; K if there are fewer classes.

    Raises:
        ValueError: another ending.
    """
    path = Path(path)
    logits = np.asarray(logits, dtype=np.float64)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = weights / weights.sum(axis=1, keepdims=True)  # (N, K)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]  # (N, top)
    rows = [
        {
            "index": index,
            "file": files[index] or "",
            "label": class_names[labels[index]],
            "prediction": class_names[best[index, 0]],
            "top": [(class_names[k], round(float(probabilities[index, k]), 6)) for k in best[index]],
        }
        for index in range(len(logits))
    ]
    if path.suffix == ".jsonl":
        text = "".join(
            json.dumps({**row, "top": [{"class": c, "probability": p} for c, p in row["top"]]}, ensure_ascii=False)
            + "\n"
            for row in rows
        )
    elif path.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        guesses = [name for i in range(1, best.shape[1] + 1) for name in (f"class_{i}", f"probability_{i}")]
        writer.writerow(["index", "file", "label", "prediction", *guesses])
        for row in rows:
            flat = [value for guess in row["top"] for value in guess]
            writer.writerow([row["index"], row["file"], row["label"], row["prediction"], *flat])
        text = buffer.getvalue()
    else:
        raise ValueError(f"`path` must end in .csv or .jsonl, got {path}.")
    return write_text_atomically(path, text)


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
