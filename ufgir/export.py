"""Export a trained model to ONNX (requires the extra `export`) or a torch.export program, which run without Python.

The exported program maps normalized `pixel_values` (batch, 3, height, width) to `logits` (batch, classes), for any batch size, at
the image size and keep rate of the model. Token counts are constants of the graph, so each keep rate has its own file.
"""

import copy
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair
from clca.reductions_clca import get_reduction

from .utils.files import whole_files


logger = logging.getLogger(__name__)

FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
CHECKED_BATCHES = (1, 3)  # batch sizes of the comparison between file and model
LARGEST_ONNX = 2**31 - 2**20  # size limit of protobuf, bytes; larger weights are stored in a second file

# Operators in the support matrix of onnx-tensorrt (docs/operators.md, TensorRT 10) that ViTs and reductions may use. Copied by
# hand; not tested on TensorRT.
TENSORRT_OPERATORS = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "BatchNormalization",
        "Cast",
        "Ceil",
        "Clip",
        "Concat",
        "Constant",
        "ConstantOfShape",
        "Conv",
        "CumSum",
        "Div",
        "Einsum",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Gemm",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "InstanceNormalization",
        "IsInf",
        "IsNaN",
        "LayerNormalization",
        "Less",
        "LessOrEqual",
        "Log",
        "LogSoftmax",
        "MatMul",
        "Max",
        "Mean",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "NonZero",
        "OneHot",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Shape",
        "Sigmoid",
        "Sign",
        "Size",
        "Slice",
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "TopK",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)


class Exported(NamedTuple):
    """Result of an export.

    Attributes:
        path: the file.
        difference: largest absolute difference between its logits and the model's.
        operators: operator -> number of occurrences in the graph; scatter operators with a reduction include its name:
            `ScatterElements (add)`.
        not_in_tensorrt: operators that TensorRT's published list does not contain; ONNX only.
        doubtful_in_tensorrt: listed operators whose reduction the list does not mention.
    """

    path: Path
    difference: float
    operators: dict[str, int]
    not_in_tensorrt: list[str]
    doubtful_in_tensorrt: list[str]


class _Logits(nn.Module):
    """Return only the logits of a model."""

    def __init__(self, model: CLCAViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def check_exportable(config: CLCAViTConfig) -> None:
    """Check that a model can be exported.

    Raises:
        ValueError: if the method's token counts depend on the image, or its graph would be too large.
    """
    method = get_reduction(config.reduction)
    if not method.is_static(config):
        raise ValueError(
            f"`reduction`={config.reduction!r} keeps a different number of tokens for each image, so it cannot be exported. "
            'Set `reduction_kwargs` to {"pad_to_bound": true} to pad to the upper bound.'
        )
    most = method.max_exported_patches
    if most is not None and config.num_patches > most:
        raise ValueError(
            f"`reduction`={config.reduction!r} can be exported for at most {most} patches per image, got {config.num_patches}: "
            "the graph would have too many operators. Use smaller images or another method."
        )


def export_model(
    model: CLCAViTForImageClassification,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
) -> Exported:
    """Export `model` to `path` atomically, after comparing the file with the model.

    Args:
        model: model with a method of static shapes; it is not changed.
        path: file that ends in .onnx or .pt2.
        metadata: JSON values to store in the file, in addition to reduction, keep rate, image size and class names.
        tolerance: largest accepted difference of logits between file and model on random images.

    Raises:
        ValueError: if `path` has another suffix or is a folder, token counts depend on the image, the graph would be too large, a
            package is missing, or the logits differ by more than `tolerance`.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"`path` must end in {' or '.join(FORMATS)}, got {path}.")
    if path.is_dir():
        raise ValueError(f"`path` must be a file, got the folder {path}.")
    config = model.config
    check_exportable(config)
    facts = {
        "reduction": config.reduction,
        "keep_rate": config.keep_rate,
        "keep_tokens": config.keep_tokens,
        "image_size": list(as_pair(config.image_size)),
        "class_names": [config.id2label[index] for index in range(config.num_labels)],
        "clca_version": config.clca_version,
    }
    facts = {name: json.dumps(value, ensure_ascii=False) for name, value in {**facts, **(metadata or {})}.items()}
    program = _Logits(copy.deepcopy(model).float().cpu()).eval()
    program.model.set_attn_implementation("sdpa")
    write = _write_onnx if path.suffix == ".onnx" else _write_torch
    with whole_files(path.parent) as folder:
        run, operators = write(program, folder / path.name, facts)
        difference = _largest_difference(program, run)
        if not difference <= tolerance:
            raise ValueError(
                f"the {FORMATS[path.suffix]} file differs from the model by {difference:.1e} in its logits, more than "
                f"`tolerance`={tolerance}. It was not written."
            )
    names = sorted(operators) if path.suffix == ".onnx" else []
    listed = [name for name in names if name.partition(" ")[0] in TENSORRT_OPERATORS]
    doubtful = [name for name in listed if " " in name]
    return Exported(path, difference, operators, [name for name in names if name not in listed], doubtful)


def export_budgets(
    model: CLCAViTForImageClassification, path: str | os.PathLike, keep_rates: list[float], **kwargs: Any
) -> list[Exported]:
    """Export a model at several keep rates, one file each: `leaves.onnx` becomes `leaves-keep0.1.onnx` and so on.

    Args:
        keep_rates: each in (0, 1], for all stages.
        kwargs: see `export_model`.

    Raises:
        ValueError: see `budget_files`, `export_model` and `set_keep_rate`, e.g. for methods whose slots are parameters.
    """
    exported = []
    for rate, file in budget_files(path, keep_rates).items():
        budget = copy.deepcopy(model)
        budget.set_keep_rate(rate)
        exported.append(export_model(budget, file, **kwargs))
    return exported


def budget_files(path: str | os.PathLike, keep_rates: Sequence[float]) -> dict[float, Path]:
    """Return the file that `export_budgets` writes for each keep rate.

    Raises:
        ValueError: if two rates have the same file.
    """
    path, files = Path(path), {}
    for rate in keep_rates:
        file = path.with_name(f"{path.stem}-keep{rate:g}{path.suffix}")
        if file in files.values():
            raise ValueError(
                f"`keep_rates` must differ in their first six digits, got {', '.join(map(str, keep_rates))}: {file.name} would "
                "be written twice."
            )
        files[rate] = file
    return files


def _example(program: _Logits, count: int) -> torch.Tensor:
    """Return random images (count, C, height, width), the same at each call."""
    config = program.model.config
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, config.num_channels, *as_pair(config.image_size), generator=generator)


@torch.no_grad()
def _largest_difference(program: _Logits, run: Callable[[torch.Tensor], torch.Tensor]) -> float:
    batches = [_example(program, count) for count in CHECKED_BATCHES]
    return max(float((run(pixels) - program(pixels)).abs().max()) for pixels in batches)


def _write_torch(
    program: _Logits, path: Path, facts: dict[str, str]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, int]]:
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=2**16)}}
    with torch.no_grad():
        exported = torch.export.export(program, (_example(program, 2),), dynamic_shapes=shapes)
    content = io.BytesIO()  # if the disk is full, torch ends the process when it writes the file itself
    torch.export.save(exported, content, extra_files=facts)
    path.write_bytes(content.getbuffer())
    calls = (str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    return torch.export.load(path).module(), dict(Counter(calls))


def import_onnx() -> None:
    """Import the packages for ONNX files, and silence the log of the exporter.

    Raises:
        ValueError: if a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"ONNX export requires the package {error.name}: pip install 'clca-vit[export]'.") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def _write_onnx(
    program: _Logits, path: Path, facts: dict[str, str]
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, int]]:
    import_onnx()
    import onnx
    import onnxruntime

    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=2**16)}}
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    size = sum(p.numel() * p.element_size() for p in program.parameters())
    with torch.no_grad():
        exported = torch.onnx.export(
            program, (_example(program, 2),), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
        )
    exported.model.metadata_props.update(facts)
    exported.save(path, external_data=size > LARGEST_ONNX)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])

    graph = onnx.load(path, load_external_data=False)
    nodes = [*graph.graph.node, *(node for function in graph.functions for node in function.node)]
    return run, dict(Counter(map(_operator, nodes)))


def _operator(node: Any) -> str:
    """Return the operator of a node, with its reduction if it has one."""
    reductions = [a.s.decode() for a in node.attribute if a.name == "reduction" and a.s not in (b"", b"none")]
    return f"{node.op_type} ({reductions[0]})" if reductions else node.op_type
