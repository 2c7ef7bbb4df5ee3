"""Names of the metrics of a run: as they are stored, and as they are shown."""

from collections.abc import Iterable, Mapping
from typing import Any


# our metric -> (name on the Hub, name for people)
METRIC_NAMES = {
    "top1": ("accuracy", "top-1"),
    "top5": ("accuracy", "top-5"),
    "map": ("mean_average_precision", "mAP"),
    "micro_f1": ("f1", "micro-F1"),
    "macro_f1": ("f1", "macro-F1"),
}


def measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Those of `METRIC_NAMES` that any of the rows has."""
    rows = list(rows)
    return [key for key in METRIC_NAMES if any(key in row for row in rows)]
