"""ONNX graphs for the web page: logits of one image, and the patches that are kept after each stage.

Shapes: S reduction stages, P patches, K classes.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTForImageClassification
from clca.configuration_clca import as_pair

from ..export import check_exportable
from ..export.onnx_files import clean_graph, halved, import_onnx, onnx_program, quantized
from ..interpret.patterns import stage_layers
from ..interpret.tracing import trace_patches
from ..profiling.macs import count_macs


if TYPE_CHECKING:
    import onnx

PRECISIONS = ("float32", "float16", "int8")
MOST_BYTES = 1_500_000_000  # size of the weights; WebAssembly has 4 GB of memory and needs them twice
_SHARED = 1024  # bytes, smallest tensor that is stored in the file of weights
_ALIGNMENT = 64  # bytes
_SAME_SHARE = 1e-4  # tolerance of shares of patches


class Graph(NamedTuple):
    """ONNX graph of a model at one keep rate.

    Attributes:
        model: the graph. Its input is `pixel_values` (1, 3, height, width), normalized. Its outputs are `logits` (1, K) and,
            for a model with a reduction, `shares` (1, S, P): the largest share of each patch in a token, after each stage. It is
            1 for a patch that still has its own token, and 0 for a dropped one.
        keep_rate: keep rate of each stage; None for the model's own.
        tokens: number of tokens that enter each layer, and finally the last norm.
        macs: multiply-adds of one image.
        stages: layers that contain a stage.
        difference: largest absolute difference between the logits of graph and model, on random images.
    """

    model: "onnx.ModelProto"
    keep_rate: float | None
    tokens: list[int]
    macs: int
    stages: list[int]
    difference: float


class _Shown(nn.Module):
    """Model that returns the outputs of `Graph`."""

    def __init__(self, model: CLCAViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.model.config.reduction is None:
            return (self.model(pixel_values).logits,)
        output = self.model(pixel_values, output_assignments=True)
        stages = trace_patches(output.assignments, self.model.config, retrieve=False).stages
        return output.logits, torch.stack([stage.amax(dim=1) for stage in stages], dim=1)


@torch.no_grad()
def make_graph(
    model: CLCAViTForImageClassification,
    keep_rate: float | None = None,
    precision: str = "float32",
    tolerance: float = 1e-3,
) -> Graph:
    """Export a model for the web page, and compare the graph with the model.

    Args:
        model: model of a method with static shapes; it is not changed.
        keep_rate: keep rate of each stage, in (0, 1]; None for the model's own.
        precision: precision of the weights. float16: stored in float16, computed in float32. int8: stored and multiplied in
            int8, with one scale per column of the weights and per tensor of activations; reductions, the patch embedding and
            the head remain in float32.
        tolerance: largest accepted difference of logits on random images in float32. In other precisions, the difference is
            only reported.

    Raises:
        ValueError: if the precision is unknown, the model cannot be exported or is too large, a package is missing, or logits or
            kept patches differ.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    check_exportable(model.config)
    size = sum(p.numel() * 4 for p in model.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"the model has {size / 1e9:.1f} GB of float32 weights; a web page supports at most {MOST_BYTES / 1e9:.1f} GB."
        )
    import_onnx()
    model = copy.deepcopy(model).float().cpu()
    if keep_rate is not None:
        model.set_keep_rate(keep_rate)
    model.set_attn_implementation("sdpa")
    program = _Shown(model.eval()).eval()
    examples = [_example(model.config, seed) for seed in range(3)]
    expected = [program(pixels) for pixels in examples]
    outputs = ["logits", "shares"][: len(expected[0])]
    whole = clean_graph(onnx_program(program, examples[0], outputs, any_batch=False).model_proto)
    graph = whole.model
    _check_operators(graph)

    difference, same_patches = _compare(graph, examples, expected)
    if not difference <= tolerance or not same_patches:
        raise ValueError(
            f"the graph differs from the model by {difference:.1e} in its logits, `tolerance`={tolerance}"
            f"{'' if same_patches else ', and keeps other patches'}. It was not written."
        )
    if precision != "float32":
        graph = halved(graph) if precision == "float16" else quantized(whole)
        difference, _ = _compare(graph, examples, expected)
        if not math.isfinite(difference):
            raise ValueError(f"`precision`={precision!r} gives logits that are not finite. Use float32.")
    counts = model(examples[0]).token_counts
    stages = stage_layers(model.config) if model.config.reduction else []
    return Graph(graph, keep_rate, list(counts), count_macs(model), stages, difference)


def _compare(
    graph: "onnx.ModelProto", examples: Sequence[torch.Tensor], expected: Sequence[tuple[torch.Tensor, ...]]
) -> tuple[float, bool]:
    """Return the largest difference of logits (NaN if any is NaN), and whether the shares of patches are equal up to rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    differences = []
    for pixels, theirs in zip(examples, expected, strict=True):
        ours = [torch.from_numpy(value) for value in session.run(None, {"pixel_values": pixels.numpy()})]
        differences.append([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)])
    most = torch.tensor(differences).amax(dim=0)
    return float(most[0]), bool((most[1:] < _SAME_SHARE).all())


def _example(config: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, config.num_channels, *as_pair(config.image_size), generator=generator)


def _check_operators(graph: "onnx.ModelProto") -> None:
    """Raise a ValueError if the graph has operators that ONNX Runtime Web does not support."""
    domains = {node.domain for node in graph.graph.node} - {"", "ai.onnx", "com.microsoft"}
    if graph.functions or domains:
        raise ValueError(
            f"the graph has functions or custom operators, which a web page does not support: {sorted(domains)}."
        )


def share_weights(graphs: Sequence["onnx.ModelProto"], name: str) -> tuple[bytes, str]:
    """Move the weights of graphs to one shared file that contains each tensor once.

    Args:
        graphs: graphs, changed in place. Tensors below one kilobyte remain in them.
        name: name of the file; `{hash}` is replaced by a checksum of its contents.

    Returns:
        Contents and name of the file.
    """
    from onnx import numpy_helper
    from onnx.external_data_helper import set_external_data

    content, places, found = bytearray(), {}, []
    for graph in graphs:
        for tensor in graph.graph.initializer:
            data = numpy_helper.to_array(tensor).tobytes()
            if len(data) < _SHARED:
                continue
            key = hashlib.sha256(data).digest()
            if key not in places:
                content += bytes(-len(content) % _ALIGNMENT)
                places[key] = len(content)
                content += data
            found.append((tensor, places[key], len(data)))
    name = name.format(hash=hashlib.sha256(content).hexdigest()[:12])
    for tensor, offset, length in found:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        set_external_data(tensor, name, offset, length)
        tensor.ClearField("raw_data")
    return bytes(content), name
