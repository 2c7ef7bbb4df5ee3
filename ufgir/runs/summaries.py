"""Summaries of finished runs in one small JSON file that is read instead of their folders.

A summary has one line per run, with everything that tables, statistics and figures need: the record of the run
(`run.json`), one bit per test image, and a shortened gradient curve. Settings that all runs share are stored once.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import write_text_atomically
from .details import Gradients, Outcomes, gradients_of, outcomes_of
from .records import REQUIRED, RunRecords, read_run_records


FORMAT = "ufgir runs, version 1"
SUFFIX = ".json"
SHARED = ("settings", "config", "data", "split_sizes", "versions", "dataset", "host", "commit", "dense_macs")
LEFT_OUT = ("evaluations", "pushed", "outcomes", "gradients")  # the last two are stored in another form


def read_runs(sources: Iterable[str | os.PathLike]) -> RunRecords:
    """Read runs from folders (see `read_run_records`) and from summaries, which are files that end in `.json`.

    A run that is in a folder and in a summary is read from the folder; one that is in two summaries, from the first.

    Raises:
        ValueError: if a source does not exist, contains no run or is not a summary.
    """
    sources = [Path(source) for source in sources]
    folders = [source for source in sources if source.suffix != SUFFIX or source.is_dir()]
    records = read_run_records(folders) if folders else RunRecords([], {})
    known = {_identity(record) for record in records.finished}
    names = {record["folder"] for record in records.finished}
    for path in (source for source in sources if source not in folders):
        for record in read_summary_file(path):
            if _identity(record) in known:
                continue
            if record["folder"] in names:  # of another machine
                record["folder"] = f"{path}: {record['folder']}"
            known.add(_identity(record))
            names.add(record["folder"])
            records.finished.append(record)
    return records


def _identity(record: Mapping[str, Any]) -> str:
    """Return what two copies of a run have in common, and two runs do not."""
    settings = {name: value for name, value in record["settings"].items() if name != "output_dir"}
    about = [record.get("date"), record.get("host"), record["seed"], settings, record["config"]]
    return json.dumps(about, sort_keys=True)


def write_summary_file(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write the summary of some runs atomically.

    Args:
        path: the file. It is replaced, but only if `records` contain all its runs.
        records: of `read_runs`; not empty.

    Returns:
        the path of the file.

    Raises:
        ValueError: if predictions or gradients of a run are damaged, or the file contains other runs or other content.
    """
    lost = set(map(_identity, read_summary_file(path))) - set(map(_identity, records)) if path.exists() else ()
    if lost:
        raise ValueError(
            f"{path} contains runs that are not among the sources ({len(lost)}). Pass the file as a further source to keep "
            "them, or delete it"
        )
    runs = []
    for record in records:
        outcomes, gradients = outcomes_of(record), gradients_of(record)
        run = {name: value for name, value in record.items() if name not in LEFT_OUT}
        run["folder"] = _short(record["folder"])
        if record.get("resumed_from"):
            run["resumed_from"] = Path(record["resumed_from"]).name
        run["command"] = _portable(record.get("command", ""))
        run["settings"] = {name: value for name, value in record["settings"].items() if name != "output_dir"}
        run["outcomes"] = outcomes and outcomes.to_json()
        run["gradients"] = gradients and gradients.to_json()
        runs.append(run)
    shared = _shared([{name: run[name] for name in SHARED if name in run} for run in runs])
    runs.sort(key=lambda run: run["folder"])
    lines = ",\n".join(_text({"folder": run["folder"], **dict(sorted(_without(run, shared).items()))}) for run in runs)
    return write_text_atomically(
        path, f'{{"format": {_text(FORMAT)},\n"shared": {_text(shared)},\n"runs": [\n{lines}\n]}}\n'
    )


def read_summary_file(path: Path) -> list[dict[str, Any]]:
    """Return the records of a summary, like those of `read_run_records`, with `outcomes` and `gradients`.

    Raises:
        ValueError: if the file is missing, damaged or not a summary.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} could not be read: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a summary of this version ({FORMAT!r}). Pass a file that `ufgir results --summary` wrote, or "
            "the folder of the runs"
        )
    try:
        records = [_merged(content["shared"], run) for run in content["runs"]]
        for record in records:
            if missing := (REQUIRED | {"dense_macs", "folder", "outcomes", "gradients"}) - set(record):
                raise ValueError(f"a run lacks {', '.join(sorted(missing))}")
            if record["outcomes"] is not None:
                Outcomes.from_json(record["outcomes"])
            if record["gradients"] is not None:
                Gradients.from_json(record["gradients"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged summary: {error!r}. Write it again with `--summary`") from error
    if not records:
        raise ValueError(f"{path} has no runs")
    return records


def _short(folder: str) -> str:
    """Return the path of a run without folders that others do not have."""
    if not os.path.isabs(folder):
        return folder
    relative = os.path.relpath(folder)
    return relative if not relative.startswith(os.pardir) else str(Path(*Path(folder).parts[-2:]))


def _portable(command: str) -> str:
    """Return a command line without the folder of its script, and with paths below the current folder relative to it."""
    script, *words = shlex.split(command) or [""]
    return shlex.join([Path(script).name, *words]).replace(f"{os.getcwd()}{os.sep}", "")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _shared(values: Sequence[Any]) -> Any:
    """Return what all values have in common: the value, or the common entries of dicts, or an empty dict."""
    if len({json.dumps(value, sort_keys=True) for value in values}) == 1:
        return values[0]
    if not all(isinstance(value, dict) for value in values):
        return {}
    names = [name for name in values[0] if all(name in value for value in values)]
    common = {name: _shared([value[name] for value in values]) for name in names}
    return {name: value for name, value in common.items() if value != {} or all(v[name] == {} for v in values)}


def _without(value: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `value` that `_merged` does not find in `shared`."""
    rest = {}
    for name, entry in value.items():
        if name not in shared:
            rest[name] = entry
        elif isinstance(entry, dict) and (inner := _without(entry, shared[name])):
            rest[name] = inner
    return rest


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of both, dicts merged."""
    merged = dict(shared)
    for name, entry in own.items():
        both = isinstance(entry, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], entry) if both else entry
    return merged
