"""ONNX graphs and files (requires the extra `export`): export, lower precision, int8 by ONNX Runtime's quantization."""

import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..utils.extras import install_command
from .checks import Run
from .onnx_rewrites import TRANSLATIONS, rewrite


if TYPE_CHECKING:
    import onnx
    import onnxruntime

LARGEST_ONNX = 2**31 - 2**20  # size limit of protobuf, bytes; larger weights are stored in a second file
SMALLEST_HALVED = 1024  # bytes of a tensor from which on float16 stores it so
LARGEST_HALF = 65504  # largest float16

# Operators that move or round values. All others compute.
MOVES = frozenset(
    [
        "Cast",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
        "QuantizeLinear",
        "Range",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)


class OnnxGraph(NamedTuple):
    """An ONNX model.

    Attributes:
        model: the model in float32.
        exact: names of the nodes that int8 leaves in float32: all outside of the layers, which are small, and those of reductions, because
            a rounded score can drop another token. Linear layers of the attention are quantized, whoever calls them.
    """

    model: "onnx.ModelProto"
    exact: list[str]


def import_onnx() -> None:
    """Import the packages for ONNX files.

    Raises:
        ValueError: if a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"ONNX export requires the package {error.name}: {install_command('export')}") from error


def onnx_program(
    program: nn.Module,
    pixels: torch.Tensor,
    outputs: Sequence[str] = ("logits",),
    any_batch: bool = True,
    flat: bool = True,
) -> torch.onnx.ONNXProgram:
    """Export a module with the input `pixel_values`.

    Args:
        program: module that returns the outputs.
        pixels: example input (B, C, height, width).
        outputs: names of the outputs.
        any_batch: accept every batch size, or only that of the example.
        flat: see `rewrite`.
    """
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=2**16)}} if any_batch else None
    how: dict[str, Any] = {"input_names": ["pixel_values"], "output_names": list(outputs)}
    how |= {"dynamo": True, "dynamic_shapes": shapes, "custom_translation_table": TRANSLATIONS, "verbose": False}
    with torch.no_grad(), errors_only("torch.onnx"):
        made = torch.onnx.export(program, (pixels,), **how)
    assert made is not None  # it is, if no file is written
    rewrite(made.model, flat)
    return made


def clean_graph(model: "onnx.ModelProto") -> OnnxGraph:
    """Remove what the exporter notes of the Python code, its paths included, and find the nodes that int8 leaves as they are.

    Args:
        model: is changed.
    """
    exact = []
    for node in model.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
        # The innermost module counts: a stage calls the query projection.
        _, layer, inside = scopes.rpartition("'model.vit.layers.")
        if not layer or ".reduction" in inside:
            exact.append(node.name)
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    del model.graph.value_info[:]  # quantization would check the shapes again, and fail
    del model.metadata_props[:], model.graph.metadata_props[:]
    return OnnxGraph(model, exact)


def halved(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Store the weights in float16. They are cast to float32 once, when the model is loaded.

    Raises:
        ValueError: if a weight exceeds the range of float16.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = onnx.ModelProto()
    graph.CopyFrom(model)
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.nbytes < SMALLEST_HALVED:
            continue
        if abs(values).max() > LARGEST_HALF:
            raise ValueError(
                f"`precision` cannot be float16: {tensor.name} has values above {LARGEST_HALF}. Use float32 or int8."
            )
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype("float16"), f"{name}_float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"cast_{name}", to=onnx.TensorProto.FLOAT))
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*casts, *nodes])
    return graph


def quantized(graph: OnnxGraph, calibration: Iterable[torch.Tensor] | None = None) -> "onnx.ModelProto":
    """Quantize the linear layers to int8, with one scale per output channel.

    Args:
        graph: is not changed.
        calibration: batches (B, C, height, width) on which the ranges of the activations are measured (static quantization). None to
            measure them in every call (dynamic quantization), which is closer to float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    weights = {tensor.name for tensor in model.graph.initializer}
    attention = [node.name for node in model.graph.node if node.op_type == "MatMul" and not weights & {*node.input}]
    how: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
    how["nodes_to_exclude"] = [*graph.exact, *attention]
    # It advises to simplify the graph first, which fails.
    with errors_only(), tempfile.TemporaryDirectory(prefix="ufgir-") as folder:
        path = Path(folder, "int8.onnx")
        if calibration is None:
            quantize_dynamic(model, path, **how)
        else:
            how |= {"quant_format": QuantFormat.QDQ, "calibrate_method": CalibrationMethod.MinMax}
            quantize_static(model, path, _reader(calibration), activation_type=QuantType.QUInt8, **how)
        return onnx.load(path)


@contextlib.contextmanager
def errors_only(name: str | None = None) -> Iterator[None]:
    """Context manager in which a logger, by default the root logger, drops warnings and notes."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


def single_images(batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the images (1, C, height, width) of batches (B, C, height, width)."""
    for batch in batches:
        yield from batch.split(1)


def _reader(batches: Iterable[torch.Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = single_images(batches)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {"pixel_values": image.numpy()}

    return Reader()


def run_onnx(path: Path) -> Run:
    """Return a function that runs a file in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])

    return run


def open_session(
    path: Path, threads: int, batch_size: int, provider: str = "CPUExecutionProvider", profile: Path | None = None
) -> "onnxruntime.InferenceSession":
    """Open a file in ONNX Runtime for batches of one size.

    Args:
        path: the file.
        threads: number of threads.
        batch_size: images per batch; the graph is optimized for it.
        provider: where it computes.
        profile: beginning of the name of a file for the times of all operators; None for no profile.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_free_dimension_override_by_name("batch", batch_size)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(path, options, providers=[provider])


def onnx_operators(path: Path) -> dict[str, int]:
    """Count the nodes by operator; scatter operators with a reduction include its name: `ScatterElements (add)`."""
    import onnx

    graph = onnx.load(path, load_external_data=False)
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    return dict(Counter(map(_operator, nodes)))


def _operator(node: Any) -> str:
    """Return the operator of a node, with its reduction if it has one."""
    reductions = [a.s.decode() for a in node.attribute if a.name == "reduction" and a.s not in (b"", b"none")]
    return f"{node.op_type} ({reductions[0]})" if reductions else node.op_type


def onnx_computed(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Count the operators that compute in int8, and in floating point, after the optimizations of ONNX Runtime."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="ufgir-") as folder:
        optimized = Path(folder, "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3  # it warns that the file depends on this machine
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        counts = onnx_operators(optimized)
    names = {name: name.partition(" ")[0] for name in counts}
    int8 = {name for name, kind in names.items() if kind not in MOVES and _is_int8(kind)}
    both = ({n: c for n, c in counts.items() if n in int8}, {n: c for n, c in counts.items() if n not in int8})
    return both[0], {name: count for name, count in both[1].items() if names[name] not in MOVES}


def _is_int8(operator: str) -> bool:
    """Return whether an operator of ONNX Runtime reads int8 values."""
    return "Integer" in operator or "DynamicQuantize" in operator or operator.startswith("Q")


def store_in_onnx(path: Path, facts: dict[str, str]) -> None:
    """Add facts to the metadata of a file."""
    import onnx

    more = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=k, value=v) for k, v in facts.items()])
    with path.open("ab") as file:  # protobuf merges messages that follow each other
        file.write(more.SerializeToString())
