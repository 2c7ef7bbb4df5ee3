"""A trained model as a file that runs without Python: ONNX, or a program of torch.export. Needs the extra `export` for ONNX.

What is exported maps normalised `pixel_values` (batch, 3, height, width) to `logits` (batch, classes), for any batch size,
at the image size and keep rate of the model: token counts are written into the graph, so a keep rate has a file of its own.
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
CHECKED_BATCHES = (1, 3)  # images in the batches that the file is compared with the model on
LARGEST_ONNX = 2**31 - 2**20  # bytes that protobuf takes; weights beyond lie in a file beside

# Operators of the support matrix that onnx-tensorrt publishes (docs/operators.md, TensorRT 10), as far as ViTs and reductions
# may use them. Written down by hand; nothing was run on TensorRT.
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
    """What came of an export.

    Attributes:
        path: the file.
        difference: the largest absolute difference of its logits from the model's.
        operators: operator -> how often it stands in the graph; one that reduces what meets in a place is called by its
            reduction, too: `ScatterElements (add)`.
        not_in_tensorrt: those that TensorRT's published list lacks; of ONNX only.
        doubtful_in_tensorrt: those that the list has, but without a word of the reduction that is asked of them here.
    """

    path: Path
    difference: float
    operators: dict[str, int]
    not_in_tensorrt: list[str]
    doubtful_in_tensorrt: list[str]


class _Logits(nn.Module):
    """Pixels in, logits out."""

    def __init__(self, model: CLCAViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


def check_exportable(config: CLCAViTConfig) -> None:
    """Refuse a model that no graph can hold.

    Raises:
        ValueError: a method whose token counts depend on the image, or whose graph would be too large.
    """
    method = get_reduction(config.reduction)
    if not method.is_static(config):
        raise ValueError(
            f"`reduction`={config.reduction!r} keeps another number of tokens of each image, which no exported graph can. "
            'Set `reduction_kwargs` to {"pad_to_bound": true}: it then pads to the most there can be.'
        )
    most = method.most_exported_patches
    if most is not None and config.num_patches > most:
        raise ValueError(
            f"`reduction`={config.reduction!r} is exported for images of at most {most} patches, and the model's have "
            f"{config.num_patches}: the graph would hold too many operators. Use smaller images or another method."
        )


def export_model(
    model: CLCAViTForImageClassification,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
) -> Exported:
    """Write `model` to `path`, atomically, once the file has been checked against it.

    Args:
        model: of any method with static shapes; it stays as it is.
        path: ends in .onnx or .pt2.
        metadata: stored in the file beside the model's own: reduction, keep rate, image size, class names. Values are JSON.
        tolerance: the largest difference of logits between file and model on random images at which the file is written.

    Raises:
        ValueError: another ending, a folder, a method whose token counts depend on the image or whose graph would be too large, a
            package that is missing, or a file whose logits differ.
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
                f"`tolerance`={tolerance}: it was not written."
            )
    names = sorted(operators) if path.suffix == ".onnx" else []
    listed = [name for name in names if name.partition(" ")[0] in TENSORRT_OPERATORS]
    doubtful = [name for name in listed if " " in name]
    return Exported(path, difference, operators, [name for name in names if name not in listed], doubtful)


def export_budgets(
    model: CLCAViTForImageClassification, path: str | os.PathLike, keep_rates: list[float], **kwargs: Any
) -> list[Exported]:
    """One file per keep rate of the same model: `leaves.onnx` becomes `leaves-keep0.1.onnx` and so on.

    Args:
        keep_rates: each in (0, 1], for all stages.
        kwargs: see `export_model`.

    Raises:
        ValueError: see `budget_files`; what `export_model` and `set_keep_rate` refuse, e.g. methods whose slots are parameters.
    """
    exported = []
    for rate, file in budget_files(path, keep_rates).items():
        budget = copy.deepcopy(model)
        budget.set_keep_rate(rate)
        exported.append(export_model(budget, file, **kwargs))
    return exported


def budget_files(path: str | os.PathLike, keep_rates: Sequence[float]) -> dict[float, Path]:
    """Keep rate -> the file that `export_budgets` writes for it.

    Raises:
        ValueError: two rates have the same file.
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
    """Random images (count, C, height, width), the same at each call."""
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
    content = io.BytesIO()  # where the disk is full while torch itself writes a file, it ends the process
    torch.export.save(exported, content, extra_files=facts)
    path.write_bytes(content.getbuffer())
    calls = (str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    return torch.export.load(path).module(), dict(Counter(calls))


def import_onnx() -> None:
    """Import what ONNX files are written with, and let its exporter be silent.

    Raises:
        ValueError: a package is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError as error:
        raise ValueError(f"ONNX needs the package {error.name}: pip install 'clca-vit[export]'.") from error
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
    """Name of a node's operator, with its reduction if it has one."""
    reductions = [a.s.decode() for a in node.attribute if a.name == "reduction" and a.s not in (b"", b"none")]
    return f"{node.op_type} ({reductions[0]})" if reductions else node.op_type
