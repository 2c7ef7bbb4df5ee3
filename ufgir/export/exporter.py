"""Write a model to a file, and compare the file with the model."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair
from clca.reductions_clca import get_reduction

from ..utils.files import whole_files
from . import onnx_files, openvino_files, tensorrt, torch_files
from .checks import CHECKED_BATCHES, Check, Logits, Run, compare, example


PRECISIONS = ("float32", "float16", "bfloat16", "int8")


class Exported(NamedTuple):
    """Result of an export.

    Attributes:
        path: the file.
        check: comparison with the model.
        operators: operator -> number of occurrences in the graph; scatter operators of ONNX with a reduction include its name:
            `ScatterElements (add)`.
        not_in_tensorrt: operators that TensorRT's published list does not contain; ONNX only, not in int8.
        doubtful_in_tensorrt: listed operators whose reduction the list does not mention.
        precision: one of `PRECISIONS`.
        int8_operators, float_operators: operator -> number of occurrences that compute in int8, or stay in floating point, as the runtime
            executes the file; operators that only move values are left out. Empty but for int8.
    """

    path: Path
    check: Check
    operators: dict[str, int]
    not_in_tensorrt: list[str]
    doubtful_in_tensorrt: list[str]
    precision: str = "float32"
    int8_operators: Mapping[str, int] = {}
    float_operators: Mapping[str, int] = {}

    @property
    def difference(self) -> float:
        """Return the largest absolute difference of logits."""
        return self.check.difference


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


class Exporter:
    """Write one model to any number of files; its ONNX graph is made once.

    Args:
        model: model with a method of static shapes; it is not changed.

    Raises:
        ValueError: see `check_exportable`.
    """

    def __init__(self, model: CLCAViTForImageClassification) -> None:
        check_exportable(model.config)
        self.config = model.config
        self.program = Logits(copy.deepcopy(model).float().cpu()).eval()
        self.program.model.set_attn_implementation("sdpa")
        self.size = sum(p.numel() * p.element_size() for p in self.program.parameters())

    def _export(self, flat: bool = True) -> torch.onnx.ONNXProgram:
        """Export the graph; `flat` as in `onnx_rewrites.rewrite`."""
        onnx_files.import_onnx()
        return onnx_files.onnx_program(self.program, example(self.program, 2), flat=flat)

    @cached_property
    def onnx_program(self) -> torch.onnx.ONNXProgram:
        """The exported graph, whatever its size."""
        return self._export()

    def _check_size(self) -> None:
        """Check that the graph fits in one message of protobuf, which has at most 2 GB."""
        if self.size > onnx_files.LARGEST_ONNX:
            raise ValueError(
                f"the model has {self.size / 1e9:.1f} GB of weights; only `precision`='float32' takes more than 2 GB."
            )

    @cached_property
    def graph(self) -> onnx_files.OnnxGraph:
        """The graph as one message of protobuf."""
        self._check_size()
        return onnx_files.clean_graph(self.onnx_program.model_proto)

    @cached_property
    def token_graph(self) -> onnx_files.OnnxGraph:
        """The graph with linear layers on tokens (B, N, D). OpenVINO 2026.4 cannot load it in int8 with matrices (B * N, D)."""
        self._check_size()
        return onnx_files.clean_graph(self._export(flat=False).model_proto)

    def write_onnx(self, path: Path, precision: str, calibration: Sequence[torch.Tensor] | None) -> None:
        """Write an ONNX file."""
        if precision == "float32" and self.size > onnx_files.LARGEST_ONNX:
            self.onnx_program.save(path, external_data=True)
            return
        model = self.graph.model
        if precision == "float16":
            model = onnx_files.halved(model)
        elif precision == "int8":
            model = onnx_files.quantized(self.graph, calibration)
        path.write_bytes(model.SerializeToString())

    def write_ir(self, path: Path, precision: str, calibration: Sequence[torch.Tensor] | None) -> None:
        """Write an OpenVINO IR: an .xml file, and a .bin file with the weights."""
        openvino_files.import_openvino(*(["nncf"] if precision == "int8" else []))
        if precision == "int8" and calibration is None:
            raise ValueError(
                "`precision`='int8' of an .xml file requires `calibration`: images on which the ranges of the activations are measured."
            )
        with tempfile.TemporaryDirectory(prefix="ufgir-") as folder:
            graph = Path(folder, "model.onnx")
            if precision == "int8":
                graph.write_bytes(self.token_graph.model.SerializeToString())
            else:
                self.write_onnx(graph, "float32", None)
            model = openvino_files.read_onnx(graph)
        if precision == "int8":
            model = openvino_files.quantized_ir(model, calibration, self.token_graph.exact)
        openvino_files.write_ir(model, path, half=precision == "float16")

    def torch_program(self, precision: str) -> torch.export.ExportedProgram:
        """Return the program of torch.export."""
        return torch_files.torch_program(
            self.program if precision == "float32" else copy.deepcopy(self.program), precision
        )

    def write_torch(self, path: Path, precision: str, calibration: Sequence[torch.Tensor] | None) -> None:
        """Write a program of torch.export."""
        torch_files.write_torch(self.torch_program(precision), path)

    def write(
        self,
        path: str | os.PathLike,
        metadata: Mapping[str, Any] | None = None,
        tolerance: float = 1e-3,
        precision: str = "float32",
        calibration: Sequence[torch.Tensor] | None = None,
        images: Sequence[torch.Tensor] | None = None,
        labels: Sequence[int] | None = None,
        drawn: Sequence[int] = CHECKED_BATCHES,
    ) -> Exported:
        """Write the model to a file; see `export_model`.

        Args:
            drawn: batch sizes of the random images on which file and model are compared.
        """
        path = Path(path)
        check_format(path, precision)
        kind = FORMATS[path.suffix]
        with whole_files(path.parent) as folder:
            file = folder / path.name
            kind.write(self, file, precision, calibration)
            images = calibration if images is None else images
            real = precision == "int8" and images is not None  # it measures the ranges of activations on real images
            check = compare(self.program, kind.run(file), images, () if real else drawn, labels)
            if precision == "float32" and not check.difference <= tolerance:
                raise ValueError(
                    f"the {kind.name} file differs from the model by {check.difference:.1e} in its logits, more than "
                    f"`tolerance`={tolerance}. It was not written."
                )
            if not math.isfinite(check.difference):
                raise ValueError(f"`precision`={precision!r} gives logits that are not finite. Use float32.")
            operators = kind.operators(file)
            int8, floats = kind.computed(file) if precision == "int8" and kind.computed else ({}, {})
            known = {
                "precision": precision,
                "check": check._asdict(),
                "int8_operators": int8,
                "float_operators": floats,
            }
            facts = {**self._facts(), **known, **(metadata or {})}
            kind.store(file, {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
        for_tensorrt = tensorrt.unsupported(operators if path.suffix == ".onnx" and precision != "int8" else ())
        return Exported(path, check, operators, *for_tensorrt, precision, int8, floats)

    def _facts(self) -> dict[str, Any]:
        config = self.config
        return {
            "reduction": config.reduction,
            "keep_rate": config.keep_rate,
            "keep_tokens": config.keep_tokens,
            "image_size": list(as_pair(config.image_size)),
            "class_names": [config.id2label[index] for index in range(config.num_labels)],
            "clca_version": config.clca_version,
        }


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        name: its name.
        precisions: those of `PRECISIONS` that it has.
        write: writes it, given the exporter, path, precision and calibration images.
        run: path -> function that runs the file.
        operators: path -> number of operators by name.
        store: stores facts in the file, each a text in JSON.
        computed: path -> operators that compute in int8, and in floating point.
    """

    name: str
    precisions: tuple[str, ...]
    write: Callable[[Exporter, Path, str, Sequence[torch.Tensor] | None], None]
    run: Callable[[Path], Run]
    operators: Callable[[Path], dict[str, int]]
    store: Callable[[Path, dict[str, str]], None]
    computed: Callable[[Path], tuple[dict[str, int], dict[str, int]]] | None = None


FORMATS = {
    ".onnx": Format(
        "ONNX",
        ("float32", "float16", "int8"),
        Exporter.write_onnx,
        onnx_files.run_onnx,
        onnx_files.onnx_operators,
        onnx_files.store_in_onnx,
        onnx_files.onnx_computed,
    ),
    ".xml": Format(
        "OpenVINO",
        ("float32", "float16", "int8"),
        Exporter.write_ir,
        openvino_files.run_ir,
        openvino_files.ir_operators,
        openvino_files.store_in_ir,
        openvino_files.ir_computed,
    ),
    ".pt2": Format(
        "torch.export",
        ("float32", "float16", "bfloat16"),
        Exporter.write_torch,
        torch_files.run_torch,
        torch_files.torch_operators,
        torch_files.store_in_torch,
    ),
}
# Why a format lacks a precision.
_LACKING = {
    (".onnx", "bfloat16"): "ONNX Runtime has no kernels for it on a CPU",
    (".xml", "bfloat16"): (
        'OpenVINO chooses it when it loads a float32 file: compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})'
    ),
    (".pt2", "int8"): "ufgir.quantization stores int8 weights that transformers loads",
}


def check_format(path: str | os.PathLike, precision: str = "float32", name: str = "path") -> None:
    """Check that there are files of this kind, without loading a model.

    Args:
        path: file to write.
        precision: its precision.
        name: name of the argument, for the message.

    Raises:
        ValueError: if the suffix is unknown, it is a folder, or the precision does not exist.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        *most, last = FORMATS
        raise ValueError(f"`{name}` must end in {', '.join(most)} or {last}, got {path}.")
    if path.is_dir():
        raise ValueError(f"`{name}` must be a file, got the folder {path}.")
    kind = FORMATS[path.suffix]
    if precision not in kind.precisions:
        why = _LACKING.get((path.suffix, precision))
        raise ValueError(
            f"`precision` of {path.suffix} files must be one of {', '.join(kind.precisions)}, got {precision!r}"
            f"{f': {why}' if why else ''}."
        )


def export_model(
    model: CLCAViTForImageClassification,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    tolerance: float = 1e-3,
    precision: str = "float32",
    calibration: Sequence[torch.Tensor] | None = None,
    images: Sequence[torch.Tensor] | None = None,
    labels: Sequence[int] | None = None,
) -> Exported:
    """Export `model` to `path` atomically, after comparing the file with the model.

    Args:
        model: model with a method of static shapes; it is not changed.
        path: file that ends in .onnx, .xml (OpenVINO IR, with its weights in a .bin file beside it) or .pt2 (torch.export).
        metadata: JSON values to store in the file, in addition to reduction, keep rate, image size, class names and the check.
        tolerance: largest accepted difference of logits between file and model in float32. Other precisions only report theirs.
        precision: one of `PRECISIONS`. ONNX and OpenVINO files with float16 store weights so and compute in float32. In int8, weights and
            activations of the linear layers are quantized; patch embedding, reductions and head are not.
        calibration: batches (B, C, height, width) of preprocessed images on which int8 measures the ranges of the activations. Without
            them, ONNX Runtime measures the ranges in every call.
        images: batches of preprocessed images on which file and model are compared; default: `calibration`, or random images.
        labels: right classes of `images`, for the accuracy of file and model; default: unknown.

    Raises:
        ValueError: if `path` has another suffix or is a folder, the format lacks the precision, token counts depend on the image, the
            graph would be too large, a package is missing, `labels` are not as many as `images`, or the logits differ by more than
            `tolerance` or are not finite.
    """
    check_format(path, precision)
    return Exporter(model).write(path, metadata, tolerance, precision, calibration, images, labels)


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
