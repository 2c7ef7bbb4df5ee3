"""Folders of simulated runs: record, predictions and gradients."""

import csv
from collections.abc import Sequence
from pathlib import Path

from tests.helpers import tiny_config
from ufgir.runs.records import write_run_record


VARIANTS = {
    "base": {},
    "CLC": {"cross_layer_cache": True, "num_clr_tokens": 1},
    "CLA": {"head": "cla"},
    "CLCA": {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"},
}


def write_run(
    folder: Path, seed: int = 1, top1: float = 0.5, method: str | None = "evit", rate: float = 0.5, **changes
):
    """Write the record of a run."""
    options = {"reduction": method, "keep_rate": [rate], **changes.pop("options", {})}
    arguments = {
        "settings": {**options, "seed": seed, "learning_rate": 1e-3, "logging_steps": seed},
        "dataset": "leaves",
        "split_sizes": {"train": 80, "test": 20},
        "config": tiny_config(**options),
        "metrics": {"test": {"top1": top1, "macro_f1": top1 / 2}},
        "macs": int(1e9 * rate),
        "dense_macs": 10**9,
        "num_parameters": 1000,
        "seed": seed,
        "train_seconds": 10.0 * seed,
        "images_per_second": {"test": 100.0 / rate},
        "command": ["run_ufgir.py", "a b.yaml"],
    }
    return write_run_record(folder, **(arguments | changes))


def write_predictions(
    folder: Path, right: Sequence[bool], name: str = "predictions.csv", file: str = "{}.png"
) -> Path:
    """Write predictions of images of two alternating classes."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["index", "file", "label", "prediction", "class_1", "probability_1"])
        for index, correct in enumerate(right):
            label, other = ("a", "b") if index % 2 == 0 else ("b", "a")
            predicted = label if correct else other
            writer.writerow([index, file.format(index), label, predicted, predicted, 0.9])
    return folder / name


def write_gradients(folder: Path, values: Sequence[float]) -> Path:
    """Write the largest gradient of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{step},{value}\n" for step, value in enumerate(values, start=1)]
    (folder / "gradients.csv").write_text("step,max_grad_all\n" + "".join(lines))
    return folder / "gradients.csv"
