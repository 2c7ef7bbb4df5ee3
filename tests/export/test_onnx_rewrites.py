"""Rewritten graphs compute the same with fewer operators."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from ufgir.export.onnx_rewrites import rewrite


GENERATOR = np.random.default_rng(0)
WEIGHTS = {
    "w": GENERATOR.normal(size=(8, 6)),
    "b": GENERATOR.normal(size=6),
    "v": GENERATOR.normal(size=(6, 8)),
    "square": GENERATOR.normal(size=(8, 8)),
    "scale": GENERATOR.normal(size=8),
    "shift": GENERATOR.normal(size=8),
    "positions": GENERATOR.normal(size=(1, 5, 8)),
}
INDICES = {
    "one": [1],
    "four": [4],
    "five": [5],
    "first": [0],
    "heads": [-1, 5, 3, 2],
    "step": [2],
    "twice": [1, 1, 8],
    "images": [3, 1, 1],
    "two": [-1, 5, 8],
}


def graph(lines, inputs="float[batch, 5, 8] x", outputs="float[batch, k, l] y"):
    """Return an ONNX model with these nodes; constants are the weights and indices above."""
    text = f'<ir_version: 9, opset_import: ["" : 20]> test ({inputs}) => ({outputs}) {{ {lines} }}'
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    for name, value in (WEIGHTS | INDICES).items():
        if name in used:
            array = np.array(value, dtype="float32" if name in WEIGHTS else "int64")
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for index, node in enumerate(model.graph.node):
        node.name = f"node{index}"
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def rewritten(model):
    """Return a rewritten copy, after comparing its outputs for two batch sizes, and its operators."""
    inner = ir.serde.deserialize_model(model)
    rewrite(inner)
    made = ir.serde.serialize_model(inner)
    onnx.checker.check_model(made)
    assert [value.name for value in made.graph.output] == [value.name for value in model.graph.output]
    for batch in (1, 3):
        fed = {}
        for given in model.graph.input:
            shape = [dim.dim_value or batch for dim in given.type.tensor_type.shape.dim]
            whole = given.type.tensor_type.elem_type == onnx.TensorProto.INT64
            fed[given.name] = (
                GENERATOR.integers(0, 5, shape) if whole else GENERATOR.normal(size=shape).astype("float32")
            )
        ours, theirs = (onnxruntime.InferenceSession(one.SerializeToString()).run(None, fed) for one in (made, model))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    return made, Counter(node.op_type for node in made.graph.node)


def ranks(model, *operators):
    """Return the numbers of dimensions that the outputs of these operators have."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.output)}
    return {found[node.output[0]] for node in graph.node if node.op_type in operators}


def test_linear_layers_compute_matrices():
    """Between norm, linear layers, activation and residual sum, nothing is reshaped; heads are split from the matrix."""
    lines = """
        a = MatMul(x, w)  c = Add(a, b)  e = Gelu(c)  d = MatMul(e, v)  f = Add(x, d)
        n = LayerNormalization(f, scale, shift)  g = Mul(n, scale)  p = MatMul(g, w)  q = Add(p, b)
        h = Reshape(q, heads)  t = Transpose<perm = [0, 2, 1, 3]>(h)  y = Identity(t)
    """
    made, operators = rewritten(graph(lines, outputs="float[batch, 3, 5, 2] y"))
    assert operators["Reshape"] == 2  # of the input and of the heads
    assert operators["MatMul"] == 3 and operators["Add"] == 3
    assert ranks(made, "MatMul", "Add", "Gelu") == {2}


def test_whole_tokens_are_gathered():
    lines = "u = Unsqueeze(i, step)  e = Expand(u, twice)  y = GatherElements<axis = 1>(x, e)"
    _, operators = rewritten(graph(lines, "float[batch, 5, 8] x, int64[batch, 3] i"))
    assert operators == {"Unsqueeze": 1, "GatherND": 1}


def test_expansions_to_the_same_size_are_skipped():
    _, operators = rewritten(graph("e = Expand(x, twice)  y = Relu(e)"))
    assert operators == {"Relu": 1}


@pytest.mark.parametrize(
    "lines",
    [
        "c = Slice(x, one, five, one)  y = Concat<axis = 1>(c, x)",
        "e = Expand(x, images)  y = Identity(e)",  # more images
        "u = Reshape(x, two)  y = Transpose<perm = [0, 2, 1]>(u)",
    ],
)
def test_other_operators_stay(lines):
    model = graph(lines)
    _, operators = rewritten(model)
    assert operators == Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("lines", "inputs"),
    [
        ("a = Add(n, positions)", ""),
        ("m = ReduceMean(x, step)  a = Add(n, m)", ""),  # of another width
        ("a = Add(n, z)", ", float[1, 5, 8] z"),
        ("a = Add(n, z)", ", float[images, 5, 8] z"),
        ("a = Add(n, z)", ", float[?, 5, 8] z"),
    ],
)
def test_sums_of_other_sizes_stay(lines, inputs):
    """Their tokens do not correspond to each other, although the norm before computes a matrix."""
    norm = "n = LayerNormalization(x, scale, shift)"
    made, _ = rewritten(graph(f"{norm}  {lines}  y = Identity(a)", f"float[batch, 5, 8] x{inputs}"))
    assert ranks(made, "LayerNormalization") == {2} and ranks(made, "Add") == {3}


def test_unknown_sizes_are_not_equal():
    """The first dimension of both is unknown: the images are three times as many, and the sum is of one image and some."""
    model = graph("e = Expand(x, images)  y = Identity(e)", "float[?, 5, 8] x")
    for value in model.graph.value_info:
        value.type.tensor_type.shape.dim[0].Clear()
    _, operators = rewritten(model)
    assert operators["Expand"] == 1
    lines = "n = LayerNormalization(x, scale, shift)  a = Add(n, z)  y = Identity(a)"
    made, _ = rewritten(graph(lines, "float[?, 5, 8] x, float[?, 5, 8] z"))
    assert ranks(made, "Add") == {3}


@pytest.mark.parametrize(
    "line", ["y = LayerNormalization(x, scale, shift)", "y = Expand(x, twice)", "y = MatMul(x, square)"]
)
def test_tokens_may_be_the_output(line):
    model = graph(line, outputs="float[batch, 5, 8] y")
    _, operators = rewritten(model)
    assert operators == Counter(node.op_type for node in model.graph.node)


def test_names_that_are_taken():
    lines = "flat_8 = Relu(x)  n = LayerNormalization(flat_8, scale, shift)  n_tokens = Relu(n)"
    lines += "  n_shape = Mul(n_tokens, scale)  flat_8_flat = Identity(n_shape)  y = Identity(flat_8_flat)"
    made, _ = rewritten(graph(lines))
    assert ranks(made, "LayerNormalization", "Mul") == {2}
