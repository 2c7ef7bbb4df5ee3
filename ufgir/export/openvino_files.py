"""OpenVINO IR files (requires the extra `openvino`): conversion of the ONNX graph, and int8 by NNCF."""

import contextlib
import io
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..utils.extras import install_command
from .checks import Run
from .onnx_files import errors_only, single_images


SECTION = "clca"  # of the file's runtime information
# Layers of OpenVINO's CPU plugin that move or round values. All others compute.
MOVES = frozenset(
    [
        "Broadcast",
        "Concatenation",
        "Const",
        "Convert",
        "FakeQuantize",
        "Gather",
        "GatherElements",
        "GatherND",
        "Input",
        "Output",
        "Pad",
        "Reorder",
        "Reshape",
        "ScatterElementsUpdate",
        "ScatterUpdate",
        "ShapeOf",
        "Split",
        "StridedSlice",
        "Tile",
        "Transpose",
        "Unknown",
    ]
)


def import_openvino(*packages: str) -> None:
    """Import OpenVINO and further packages.

    Raises:
        ValueError: if a package is missing.
    """
    for package in ("openvino", *packages):
        try:
            __import__(package)
        except ImportError as error:
            raise ValueError(
                f"OpenVINO files require the package {error.name}: {install_command('openvino')}"
            ) from error


def read_onnx(path: Path) -> Any:
    """Return an `openvino.Model` of an ONNX file."""
    import openvino

    return openvino.convert_model(path)


def quantized_ir(model: Any, calibration: Iterable[torch.Tensor], exact: Sequence[str]) -> Any:
    """Quantize weights and activations to int8 by NNCF.

    Args:
        model: an `openvino.Model`; it is changed.
        calibration: batches (B, C, height, width) on which the ranges of the activations are measured.
        exact: names of the nodes of the ONNX graph that stay in floating point.
    """
    import nncf

    images = [image.numpy() for image in single_images(calibration)]
    names = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() != "Constant"]
    names = [
        name for name in names if name.partition("/")[0] in {*exact, "logits"}
    ]  # the last node has the output's name
    # `nncf.set_log_level` would also change the handlers of others; what it prints are progress bars.
    with errors_only("nncf"), contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(images),
            ignored_scope=nncf.IgnoredScope(names=names, validate=False),
        )


def write_ir(model: Any, path: Path, half: bool = False) -> None:
    """Write an `openvino.Model` to `path` and the weights to a file `.bin` beside it.

    Args:
        half: store float32 weights as float16.
    """
    import openvino

    openvino.save_model(model, path, compress_to_fp16=half)


def compile_ir(
    path: Path,
    precision: str = "f32",
    threads: int | None = None,
    shape: Sequence[int] | None = None,
    profiled: bool = False,
) -> Any:
    """Return a file as an `openvino.CompiledModel` for the CPU.

    Args:
        precision: of what is not int8: f32, bf16 or f16. By itself, OpenVINO would choose bf16 where the processor has it.
        threads: number of threads; None for OpenVINO's default.
        shape: fixed shape of the input; None for any batch size.
        profiled: measure the time of each layer, see `openvino.InferRequest.get_profiling_info`.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    if shape is not None:
        model.reshape(list(shape))
    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    if profiled:
        options["PERF_COUNT"] = True
    return core.compile_model(model, "CPU", options)


def run_ir(path: Path) -> Run:
    """Return a function that runs a file in OpenVINO, in float32 where it is not int8."""
    compiled = compile_ir(path)
    return lambda pixels: torch.from_numpy(compiled([pixels.numpy()])[0])


def ir_operators(path: Path) -> dict[str, int]:
    """Count the operators of a file."""
    import openvino

    return dict(Counter(op.get_type_name() for op in openvino.Core().read_model(path).get_ops()))


def ir_computed(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Count the layers that compute in int8, and in floating point, as OpenVINO's CPU plugin runs the file."""
    counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for op in compile_ir(path).get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, precision = info["layerType"].value, info["runtimePrecision"].value
        if kind not in MOVES and precision in ("i8", "u8", "f32", "f16", "bf16"):
            counts[precision not in ("i8", "u8")][kind] += 1
    return dict(counts[0]), dict(counts[1])


def store_in_ir(path: Path, facts: dict[str, str]) -> None:
    """Add facts to the runtime information of a file, from where `model.get_rt_info(["clca", NAME])` reads them."""
    tree = ET.parse(path)
    info = tree.getroot().find("rt_info")
    info = ET.SubElement(tree.getroot(), "rt_info") if info is None else info
    section = ET.SubElement(info, SECTION)
    for name, value in facts.items():
        ET.SubElement(section, name, value=value)
    tree.write(path, encoding="utf-8", xml_declaration=True)
