"""Equivalent graphs that runtimes execute faster: fewer operators, none that only computes shapes (requires the extra `export`).

ONNX Runtime spends some microseconds per operator, whatever its size. In a small model that is a noticeable share of the time.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch


if TYPE_CHECKING:
    import onnx_ir as ir

_UNARY = ("Gelu", "Erf", "Sigmoid", "Tanh", "Relu")
_BINARY = ("Add", "Sub", "Mul", "Div")


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate `scaled_dot_product_attention` to operators of ONNX.

    The translation of torch scales queries and keys, and computes the shapes of the transposed keys in the graph. Attention as one
    operator (opset 23) is not faster in ONNX Runtime or OpenVINO, and other runtimes do not support it.

    Args:
        query: (B, H, n, d).
        key, value: (B, H, N, d).
        attn_mask: boolean (True: attend) or additive, broadcast to (B, H, n, N), or None.
        dropout_p, is_causal, enable_gqa: not used by our models.
        scale: factor of the logits; default: d ** -0.5.
    """
    from onnxscript import opset18 as op

    assert dropout_p == 0.0 and not is_causal and not enable_gqa
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = op.MatMul(op.Mul(query, op.Constant(value_float=float(factor))), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        if attn_mask.dtype.name == "BOOL":
            least = float(torch.finfo(torch.float32).min)
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=least))
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


TRANSLATIONS = {torch.ops.aten.scaled_dot_product_attention.default: attention}


def rewrite(model: "ir.Model", flat: bool = True) -> None:
    """Rewrite the graph of a model in place; the results stay the same up to rounding.

    Args:
        model: the model.
        flat: compute linear layers on matrices (B * N, D) instead of tokens (B, N, D).
    """
    import onnx_ir.passes.common as passes

    graph = model.graph
    _gather_whole_tokens(graph)
    _skip_expansions(graph)
    if flat:
        _flatten_tokens(graph)
    _skip_reshapes(graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)


def _constant(value: "ir.Value | None") -> np.ndarray | None:
    """Return the constant of a value, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _dims(value: "ir.Value | None") -> list[Any]:
    """Return the dimensions of a value: numbers or names; an empty list if they are unknown."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def _same_sizes(dims: list[Any], others: list[Any]) -> bool:
    """Return whether dimensions are equal numbers or names; unknown ones (None) may differ."""
    return dims == others and None not in dims


def _is_tokens(value: "ir.Value | None") -> bool:
    """Return whether a value has the shape (B, N, D) with known N and D, and is computed."""
    dims = _dims(value)
    return len(dims) == 3 and all(isinstance(dim, int) for dim in dims[1:]) and _constant(value) is None


def _integer(node: "ir.Node", name: str, default: int) -> int:
    """Return an attribute of a node."""
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def _add_constant(graph: "ir.Graph", name: str, array: np.ndarray) -> "ir.Value":
    """Add a constant to a graph. No other value must have its name."""
    import onnx_ir as ir

    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    return value


def _new_node(like: "ir.Node", operator: str, inputs: list[Any], dims: list[Any], suffix: str, **options: Any) -> Any:
    """Return a node that belongs to the same module of the model as another one."""
    import onnx_ir as ir

    node = ir.node(operator, inputs, attributes=options or None, name=f"{like.name}_{suffix}")
    node.metadata_props.update(like.metadata_props)
    (output,) = node.outputs
    output.name = f"{like.outputs[0].name}_{suffix}"
    output.type, output.shape = like.outputs[0].type, ir.Shape(dims)
    return node


def _producer(value: "ir.Value | None", operator: str) -> "ir.Node | None":
    """Return the node that computes a value, if it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _gather_whole_tokens(graph: "ir.Graph") -> None:
    """Gather tokens (B, M, D) by indices (B, M) instead of by indices (B, M, D) that repeat them D times."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "GatherElements" or _integer(node, "axis", 0) != 1 or not _is_tokens(node.inputs[0]):
            continue
        expand = _producer(node.inputs[1], "Expand")
        dims = _dims(expand.inputs[0]) if expand is not None else []
        given, made = _dims(node.inputs[0]), _dims(node.outputs[0])
        if len(dims) != 3 or dims[2] != 1 or dims[0] != given[0]:
            continue
        if not _same_sizes([*dims[:2], given[2]], made):
            continue
        inputs = [node.inputs[0], expand.inputs[0]]
        new = _new_node(node, "GatherND", inputs, made, "whole", batch_dims=1)
        ir.convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


def _skip_expansions(graph: "ir.Graph") -> None:
    """Remove expansions of tokens that have the size already."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type != "Expand" or not _is_tokens(node.inputs[0]) or node.outputs[0].is_graph_output():
            continue
        if _same_sizes(_dims(node.inputs[0]), _dims(node.outputs[0])):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


class _Flat:
    """Tokens (B * N, D) in place of (B, N, D), by value."""

    def __init__(self, graph: "ir.Graph") -> None:
        self.graph = graph
        self.matrices: dict[Any, Any] = {}
        self.shapes: dict[int, Any] = {}
        values = [*graph.inputs, *graph.initializers.values()]
        values += [output for node in graph.all_nodes() for output in node.outputs]
        self.names = {value.name for value in values}

    def unused(self, name: str) -> str:
        """Return a name that no value of the graph has, and reserve it."""
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def of(self, value: "ir.Value", node: "ir.Node") -> "ir.Value":
        """Return the matrix of tokens; if there is none, it is made before a node."""
        if value not in self.matrices:
            width = _dims(value)[2]
            if width not in self.shapes:
                self.shapes[width] = _add_constant(self.graph, self.unused(f"flat_{width}"), np.array([-1, width]))
            origin = value.producer() or node
            reshape = _new_node(origin, "Reshape", [value, self.shapes[width]], [None, width], "flat")
            reshape.outputs[0].name, reshape.outputs[0].type = self.unused(f"{value.name}_flat"), value.type
            reshape.name = f"{node.name}_input_{list(node.inputs).index(value)}"
            self.graph.insert_before(node, reshape)
            self.matrices[value] = reshape.outputs[0]
        return self.matrices[value]

    def computes(self, node: "ir.Node", tokens: "list[ir.Value]") -> None:
        """Let a node compute matrices. Its output is no output of the graph, which would lose its name."""
        import onnx_ir as ir

        for index, value in enumerate(node.inputs):
            if value in tokens:
                node.replace_input_with(index, self.of(value, node))
        (output,) = node.outputs
        dims = _dims(output)
        shape = _add_constant(self.graph, self.unused(f"{output.name}_shape"), np.array([-1, *dims[1:]]))
        back = _new_node(node, "Reshape", [output, shape], dims, "tokens")
        back.outputs[0].name = self.unused(back.outputs[0].name)
        ir.convenience.replace_all_uses_with(output, back.outputs[0])
        back.replace_input_with(0, output)
        output.shape = ir.Shape([None, dims[2]])
        self.graph.insert_after(node, back)
        self.matrices[back.outputs[0]] = output


def _flatten_tokens(graph: "ir.Graph") -> None:
    """Compute linear layers, norms, activations and sums of tokens (B, N, D) on matrices (B * N, D).

    ONNX Runtime has a faster operator for products of matrices with a bias, and reshapes the tokens before and after each
    otherwise."""
    flat = _Flat(graph)
    for node in list(graph):
        tokens = [value for value in node.inputs if _is_tokens(value)]
        others = [value for value in node.inputs if value is not None and value not in tokens]
        output = node.outputs[0]
        if not tokens or len(node.outputs) != 1 or not _is_tokens(output) or output.is_graph_output():
            continue
        kind = node.op_type
        if kind == "MatMul":
            suits = len(tokens) == 1 and node.inputs[0] is tokens[0] and len(_dims(node.inputs[1])) == 2
        elif kind == "LayerNormalization":
            flat_scale = all(len(_dims(value)) <= 1 for value in others)
            suits = len(tokens) == 1 and flat_scale and _integer(node, "axis", -1) in (-1, 2)
        elif kind in _UNARY:
            suits = tokens[0] in flat.matrices
        elif kind in _BINARY:
            same = all(_same_sizes(_dims(value), _dims(output)) for value in tokens)
            small = all(_constant(value) is not None and len(_dims(value)) <= 1 for value in others)
            suits = same and small and any(value in flat.matrices for value in tokens)
        else:
            suits = False
        if suits:
            flat.computes(node, tokens)


def _skip_reshapes(graph: "ir.Graph") -> None:
    """Of reshapes that follow each other, keep the last."""
    for node in list(graph):
        before = _producer(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
        target = _constant(node.inputs[1]) if before is not None else None
        if before is not None and target is not None and 0 not in target:
            node.replace_input_with(0, before.inputs[0])
