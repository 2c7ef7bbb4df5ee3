"""Names of metrics: in stored results, on the Hub, and for display."""

from collections.abc import Iterable, Mapping
from typing import Any


# stored name -> (name on the Hub, display name)
METRIC_NAMES = {
    "top1": ("accuracy", "top-1"),
    "top5": ("accuracy", "top-5"),
    "map": ("mean_average_precision", "mAP"),
    "micro_f1": ("f1", "micro-F1"),
    "macro_f1": ("f1", "macro-F1"),
}


def measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return those of `METRIC_NAMES` that occur in any of the rows."""
    rows = list(rows)
    return [key for key in METRIC_NAMES if any(key in row for row in rows)]
