"""The record of a run, `run.json` in its folder, used by `ufgir sweep` and `ufgir results`."""

import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.files import write_text_atomically
from ..utils.provenance import (
    NOT_STORED,
    PACKAGES,
    PREDICTIONS_FILE,
    _version,
    as_read,
    describe_host,
    now,
    peak_memory,
    source_commit,
)


logger = logging.getLogger(__name__)

RECORD = "run.json"
REQUIRED = {"settings", "config", "metrics", "split_sizes", "macs", "seed"}
MANIFEST = "sweep.json"  # in the folder of a sweep: its runs and how they ended
NOT_STORED |= {"transformers_version", "clca_version"}  # these are stored with the versions
NOT_STORED |= {"use_cache"}  # Trainer disables it in training
NOT_RUNS = ("checkpoint-", "tensorboard", ".", "_")  # prefixes of folders that contain no runs


def write_run_record(
    output_dir: str | os.PathLike,
    *,
    settings: Mapping[str, Any],
    dataset: str,
    split_sizes: Mapping[str, int],
    config: Any,
    metrics: Mapping[str, Mapping[str, float]],
    macs: int | None,
    dense_macs: int,
    num_parameters: int,
    seed: int,
    train_seconds: float | None = None,
    images_per_second: Mapping[str, float] | None = None,
    model_images_per_second: float | None = None,
    resumed_from: str | None = None,
    data: Mapping[str, Mapping[str, Any] | None] | None = None,
    pushed: bool | None = None,
    command: Sequence[str] | None = None,
) -> Path:
    """Write `run.json` into `output_dir`, atomically, as the last result of a run, except for its upload.

    Adds versions, commit, machine, date and peak memory. A run that only evaluates adds its splits to the record of the
    training of the same model in that folder. Metrics on another data set, or on other images of a split that was
    measured before, are added to `evaluations` only. The record of another model's training is not changed, with a
    warning.

    Args:
        output_dir: folder of the run.
        settings: every option that was given, see `RecipeParser.settings`.
        dataset: name, folder or Hub repository of the data.
        split_sizes: split -> number of images.
        config: the model's `CLCAViTConfig`.
        metrics: split -> metric -> value, as computed (accuracies are fractions in [0, 1]).
        macs: multiply-adds per image, None if they differ between images.
        dense_macs: the same for this backbone without reduction, cache and aggregation head.
        num_parameters: number of parameters of the model.
        seed: seed of the training.
        train_seconds: seconds of training, None for a run that only evaluates; for a resumed run, since it was
            resumed.
        images_per_second: split -> images per second in its evaluation, including loading and decoding.
        model_images_per_second: images per second of the model only, if measured.
        resumed_from: the checkpoint from which this run was resumed, if any.
        data: options that determine the evaluated images, see `option_checks.evaluated_data`.
        pushed: whether the run was uploaded to the Hub, see `mark_pushed`; None if no upload is requested.
        command: `sys.argv` by default.

    Returns:
        the path of the file.
    """
    path = Path(output_dir) / RECORD
    described = {k: v for k, v in config.to_dict().items() if k not in NOT_STORED} | {"num_labels": config.num_labels}
    described = as_read(described)
    measured = {
        "split_sizes": dict(split_sizes),
        "metrics": {split: {k: float(v) for k, v in values.items()} for split, values in metrics.items()},
        "images_per_second": dict(images_per_second or {}),
    }
    run = {"command": shlex.join(sys.argv if command is None else command), "date": now(), "host": describe_host()}
    old = _read(path)
    if isinstance(old, str):
        logger.warning("Replacing %s: %s", path, old)
    if train_seconds is None and isinstance(old, dict) and old.get("train_seconds") is not None:
        if {k: v for k, v in old["config"].items() if k not in NOT_STORED} != described:
            logger.warning("%s holds the training of another model and is not changed", path)
            return path
        about = as_read({"dataset": dataset, "data": data, "settings": dict(settings), **measured})
        kept = _fitting(old, about)
        record = old | {n: old.get(n, {}) | {s: v for s, v in measured[n].items() if s in kept} for n in measured}
        record["data"] = (old.get("data") or {}) | {s: v for s, v in (about["data"] or {}).items() if s in kept}
        if others := [split for split in measured["metrics"] if split not in kept]:
            logger.warning(
                "%s: the metrics of %s are of other images, or of training images, and are only added to its `evaluations`",
                *(path, ", ".join(others)),
            )
        record["evaluations"] = [
            *old.get("evaluations", []),
            run | {"splits": list(measured["metrics"])} | about,
        ]
        record |= {} if pushed is None else {"pushed": pushed}
    else:
        record = {
            **run,
            "seed": seed,
            "dataset": dataset,
            "data": data,
            "settings": dict(settings),
            "config": described,
            **measured,
            "macs": macs,
            "dense_macs": dense_macs,
            "num_parameters": num_parameters,
            "train_seconds": train_seconds,
            "model_images_per_second": model_images_per_second,
            "resumed_from": resumed_from,
            **({} if pushed is None else {"pushed": pushed}),
            "peak_memory": peak_memory(),
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
            "commit": source_commit(),
        }
    return _write(path, record)


def mark_pushed(output_dir: str | os.PathLike) -> None:
    """Mark the upload of a run as successful in its record."""
    path = Path(output_dir) / RECORD
    record = _read(path)
    if isinstance(record, dict) and record.get("pushed") is False:
        _write(path, record | {"pushed": True})


def _write(path: Path, record: Mapping[str, Any]) -> Path:
    return write_text_atomically(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def _fitting(old: Mapping[str, Any], new: Mapping[str, Any]) -> set[str]:
    """Return the splits of an evaluation whose metrics can be added to a record.

    They must be of the same data set, not used for training, and either not measured before or with the same images as
    before.
    """
    before, now = old.get("data") or {}, new["data"] or {}
    same = os.path.realpath(str(old.get("dataset"))) == os.path.realpath(str(new["dataset"]))  # `leaves`, `./leaves`
    if not same or before.get("source", now.get("source")) != now.get("source"):
        return set()
    changed = {split for split in before if before[split] != now.get(split)}
    trained_on = {split for split in before if before[split] is None}
    return set(new["metrics"]) - (changed & set(old["metrics"])) - trained_on


def remove_run_record(output_dir: str | os.PathLike) -> None:
    """Delete the record before a training starts over, so that the folder does not count as a finished run."""
    (Path(output_dir) / RECORD).unlink(missing_ok=True)


def prediction_files(output_dir: str | os.PathLike) -> list[str]:
    """Return the names of the prediction files written by a run and its later evaluations, and the default name."""
    record = _read(Path(output_dir) / RECORD)
    runs = [record, *record.get("evaluations", [])] if isinstance(record, dict) else []
    names = [str(run.get("settings", {}).get("predictions_file", PREDICTIONS_FILE)) for run in runs]
    # never return a path outside the folder
    return [name for name in dict.fromkeys([PREDICTIONS_FILE, *names]) if Path(name).name == name]


def is_finished(folder: str | os.PathLike) -> bool:
    """Return whether a folder has the record of a run whose upload, if requested, has succeeded."""
    record = _read(Path(folder) / RECORD)
    return isinstance(record, dict) and record.get("pushed") is not False


class RunRecords(NamedTuple):
    """The finished runs, each its record with its `folder`, and folder -> reason for unfinished ones."""

    finished: list[dict[str, Any]]
    unfinished: dict[Path, str]


def read_run_records(folders: Iterable[str | os.PathLike]) -> RunRecords:
    """Read all runs in or below some folders, sorted by name; each run once, even if folders overlap.

    Unfinished runs are: a run that a sweep lists and that has no record, a folder with checkpoints and no record, and
    a record that could not be read.

    Raises:
        ValueError: if a folder does not exist or contains no run.
    """
    finished: dict[Path, dict[str, Any]] = {}
    unfinished: dict[Path, str] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"folder {folder} does not exist")
        before = len(finished) + len(unfinished)
        seen = False
        for place, names, files in os.walk(folder):
            place = Path(place)
            checkpoints = any(name.startswith("checkpoint-") for name in names)
            names[:] = sorted(name for name in names if not name.startswith(NOT_RUNS))
            if MANIFEST in files:
                seen = True
                for name, why in _missing_runs(place).items():
                    unfinished.setdefault((place / name).resolve(), why)
            if RECORD in files:
                seen = True
                record = _read(place / RECORD)
                if isinstance(record, str):
                    unfinished[place.resolve()] = record
                else:
                    finished[place.resolve()] = record | {"folder": str(place)}
            elif checkpoints:
                seen = True
                unfinished.setdefault(place.resolve(), "interrupted, with checkpoints")
        if not seen and before == len(finished) + len(unfinished):
            raise ValueError(f"no runs found in {folder}; a finished run has a {RECORD}")
    return RunRecords(list(finished.values()), unfinished)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the sweep in `folder`, None if there is none.

    Raises:
        ValueError: if the file was not written by `ufgir sweep`.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["runs"].items()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest written by `ufgir sweep`: {error!r}") from error
    return manifest


def _missing_runs(folder: Path) -> dict[str, str]:
    """Return name -> status for the runs of a sweep that have no record."""
    runs = (read_manifest(folder) or {"runs": {}})["runs"]
    missing = {name: run for name, run in runs.items() if not (folder / name / RECORD).exists()}
    shown = {"running": "running or killed"}  # a killed sweep cannot update the status
    return {
        name: ": ".join(filter(None, (shown.get(run["status"], run["status"]), run.get("error"))))
        for name, run in missing.items()
    }


def _read(path: Path) -> dict[str, Any] | str | None:
    """Return a record, None if there is none, or a sentence if it could not be read."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = REQUIRED - set(record)
    except (OSError, ValueError, TypeError) as error:
        return f"{RECORD} could not be read: {error}"
    if missing:
        return f"{RECORD} lacks {', '.join(sorted(missing))}"
    return _why_unfinished(path.parent, record) or record


def _why_unfinished(folder: Path, record: Mapping[str, Any]) -> str | None:
    """Return why a recorded training has not finished, in a few words; None if it has.

    Earlier versions wrote a record when a signal had ended a training with `enable_jit_checkpoint`.
    """
    if not record["settings"].get("enable_jit_checkpoint"):
        return None
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
        if (
            stopping
            and stopping["attributes"]["early_stopping_patience_counter"]
            >= stopping["args"]["early_stopping_patience"]
        ):
            return None
        step, steps = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # nothing is known
    return f"ended by a signal after step {step} of {steps}" if step < steps else None
