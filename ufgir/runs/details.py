"""What a run measured besides the metrics of its record: its test images, right or wrong, and its gradients.

Both are read from the folder of the run, or from its record if that comes from a summary (`ufgir.runs.summaries`).
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..evaluation.prediction import read_predictions
from ..training.gradients import GRADIENTS_FILE, GradientCurve, read_gradients
from .records import prediction_files


logger = logging.getLogger(__name__)

METRIC = "test_top1"  # the metric whose single outcomes are known
THIRDS = ("first", "middle", "last")
STATISTIC = "max_grad_all"  # the statistic of the gradients that is kept


class Outcomes(NamedTuple):
    """Which test images a run classified correctly.

    Attributes:
        images: hash of the images: their positions, file names and labels, and the options that distinguish data sets of
            the same name.
        right: (N,) bool, in the order of the data set.
    """

    images: str
    right: np.ndarray

    def to_json(self) -> dict[str, Any]:
        """Return a compact form: one bit per image, as hexadecimal digits."""
        return {"images": self.images, "count": len(self.right), "right": np.packbits(self.right).tobytes().hex()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Outcomes":
        """Return the outcomes of a compact form; ValueError, KeyError or TypeError if it is none."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(content["right"]), dtype=np.uint8))
        count = int(content["count"])
        if len(bits) != -(-count // 8) * 8:
            raise ValueError(f"{len(bits)} bits for {count} images")
        return cls(str(content["images"]), bits[:count].astype(bool))


def outcomes_of(record: Mapping[str, Any]) -> Outcomes | None:
    """Return which test images a run classified correctly; None if that is not known.

    It is not known without a file of predictions with labels whose share of correct images is the recorded top-1 (a
    file that a later evaluation of other images wrote is ignored), and for images with several classes.

    Args:
        record: of `ufgir.runs.summaries.read_runs`.

    Raises:
        ValueError: if a file of predictions is damaged.
    """
    if "outcomes" in record:
        return record["outcomes"] and Outcomes.from_json(record["outcomes"])
    recorded = record["metrics"].get("test", {}).get("top1")
    if recorded is None:
        return None
    for name in prediction_files(record["folder"]):
        path = Path(record["folder"]) / name
        if not path.is_file():
            continue
        try:
            lines = [line for line in read_predictions(path).values() if line["label"]]
            pairs = [(line["label"], line["prediction"]) for line in lines]
            seen = [[int(line["index"]), Path(line["file"]).name, line["label"]] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of predictions: {error!r}. Remove it or predict again") from error
        right = np.asarray([label == prediction for label, prediction in pairs], dtype=bool)
        if len(right) and abs(right.mean() - recorded) < 1e-6:
            about = [(record.get("data") or {}).get("source"), seen]
            hashed = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
            return Outcomes(hashed.hexdigest()[:16], right)
        logger.warning("%s does not have the top-1 of run.json and is ignored", path)
    return None


class Gradients(NamedTuple):
    """The largest gradient over the training steps.

    Attributes:
        statistics: `median` and `max` over the steps of each third of the training.
        curve: to draw it.
    """

    statistics: dict[str, list[float]]
    curve: GradientCurve

    def columns(self) -> dict[str, float]:
        """Return the statistics as cells of a table: `largest_gradient_median_first_third`, ..."""
        return {
            f"largest_gradient_{name}_{third}_third": value
            for name, values in self.statistics.items()
            for third, value in zip(THIRDS, values, strict=True)
        }

    def to_json(self) -> dict[str, Any]:
        """Return a compact form, with a shortened curve; NaN becomes None."""
        curve = {name: _plain(values) for name, values in self.curve.shortened()._asdict().items()}
        return {name: _plain(values) for name, values in self.statistics.items()} | {"curve": curve}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Gradients":
        """Return the gradients of a compact form; ValueError, KeyError or TypeError if it is none."""
        numbers = {name: np.asarray(content[name], dtype=np.float64).tolist() for name in ("median", "max")}
        curve = {name: np.asarray(content["curve"][name], dtype=np.float64) for name in GradientCurve._fields}
        steps = {name: curve[name].astype(np.int64) for name in ("steps", "level_steps")}
        return cls(numbers, GradientCurve(**curve | steps))


def _plain(values: Any) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in np.asarray(values).tolist()]


def gradients_of(record: Mapping[str, Any]) -> Gradients | None:
    """Return the largest gradient of a run over its steps; None if it recorded no gradients.

    Args:
        record: of `ufgir.runs.summaries.read_runs`.

    Raises:
        ValueError: if the file of gradients is damaged.
    """
    if "gradients" in record:
        return record["gradients"] and Gradients.from_json(record["gradients"])
    path = Path(record["folder"]) / GRADIENTS_FILE
    if not path.exists():
        return None
    table = read_gradients(path)
    if STATISTIC not in table:
        raise ValueError(f"{path} has no column `{STATISTIC}`, so it is not a file of recorded gradients. Remove it")
    values = table[STATISTIC]
    thirds = [part for part in np.array_split(values, len(THIRDS)) if len(part)]
    thirds += [values[-1:]] * (len(THIRDS) - len(thirds))  # fewer than three steps
    statistics = {"median": [float(np.median(part)) for part in thirds], "max": [float(part.max()) for part in thirds]}
    return Gradients(statistics, GradientCurve.of(table["step"], values))
