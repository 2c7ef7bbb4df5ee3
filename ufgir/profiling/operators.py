"""Time of each operator of an exported model, as ONNX Runtime or OpenVINO measure it, for `ufgir profile --operators`."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from clca import CLCAViTForImageClassification

from ..export import Exporter
from ..export.onnx_files import open_session
from ..export.openvino_files import compile_ir, import_openvino


RUNTIMES = {"onnx": ".onnx", "openvino": ".xml"}
Times = dict[tuple[str, str], list[float]]  # (kind, name) -> seconds of each run


class Operator(NamedTuple):
    """All operators of one kind.

    Attributes:
        count: their number.
        seconds: their time in one batch: of each, the shortest of all runs, which other processes disturb least.
    """

    count: int
    seconds: float


def operator_times(
    model: CLCAViTForImageClassification, pixels: torch.Tensor, runtime: str, threads: int, repetitions: int
) -> dict[str, Operator]:
    """Export a model in float32 and return the time of its operators by kind, the slowest first.

    Args:
        model: model with a method of static shapes.
        pixels: a batch (B, C, height, width).
        runtime: one of `RUNTIMES`. It may fuse operators, and gives them other names.
        threads: number of threads.
        repetitions: number of runs.

    Raises:
        ValueError: see `export_model`.
    """
    with tempfile.TemporaryDirectory(prefix="ufgir-") as folder:
        path = Path(folder, f"model{RUNTIMES[runtime]}")
        Exporter(model).write(path)
        measure = _onnx if runtime == "onnx" else _openvino
        times = measure(path, pixels, threads, repetitions)
    kinds: dict[str, list[float]] = defaultdict(list)
    for (kind, _), seconds in times.items():
        kinds[kind].append(min(seconds))
    found = {kind: Operator(len(seconds), sum(seconds)) for kind, seconds in kinds.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1].seconds))


def _onnx(path: Path, pixels: torch.Tensor, threads: int, runs: int) -> Times:
    """Return the seconds of each node of a file in ONNX Runtime in every run, by operator and name."""
    session = open_session(path, threads, len(pixels), profile=path.with_name("profile"))
    for _ in range(runs):
        session.run(None, {"pixel_values": pixels.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: Times = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e6)
    return times


def _openvino(path: Path, pixels: torch.Tensor, threads: int, runs: int) -> Times:
    """Return the seconds of each layer of a file in OpenVINO in every run that executed it, by kind and name."""
    import_openvino()
    request = compile_ir(path, "f32", threads, tuple(pixels.shape), profiled=True).create_infer_request()
    times: Times = defaultdict(list)
    for _ in range(runs):
        request.infer([pixels.numpy()])
        for info in request.get_profiling_info():
            if info.status.name == "EXECUTED":
                times[info.node_type, info.node_name].append(info.real_time.total_seconds())
    return times


def operator_table(ours: Mapping[str, Operator], dense: Mapping[str, Operator]) -> list[list[str]]:
    """Return a table of the operators of a model and of the dense one: number and milliseconds, and their sums."""
    rows = [["operator", "number", "ms", "dense: number", "ms"]]
    kinds = sorted({*ours, *dense}, key=lambda kind: -max(_time(ours, kind), _time(dense, kind)))
    for kind in kinds:
        rows.append(
            [kind, *_cells([ours[kind]] if kind in ours else []), *_cells([dense[kind]] if kind in dense else [])]
        )
    return [*rows, ["all", *_cells(ours.values()), *_cells(dense.values())]]


def _time(operators: Mapping[str, Operator], kind: str) -> float:
    return operators[kind].seconds if kind in operators else 0.0


def _cells(operators: Iterable[Operator]) -> list[str]:
    """Return the number and milliseconds of operators together; dashes if there are none."""
    operators = list(operators)
    if not operators:
        return ["-", "-"]
    return [str(sum(one.count for one in operators)), f"{1e3 * sum(one.seconds for one in operators):.2f}"]
