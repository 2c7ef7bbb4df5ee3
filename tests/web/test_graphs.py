"""The graphs of the page give the same results as PyTorch: logits, and kept patches after each stage."""

import numpy as np
import onnxruntime
import pytest
import torch

from tests.helpers import CACHES, METHODS, TINY, build, images, slow_unless, tiny_config
from tests.web.helpers import small_graph
from ufgir.export.onnx_files import halved
from ufgir.interpret.patterns import kept_patches
from ufgir.web.graphs import make_graph


SHORT = TINY | {"num_hidden_layers": 3, "reduction_layers": [1]}  # an export takes seconds, most of them per layer
OPTIONS = {"ats": {"pad_to_bound": True}, "tofu": {"merge_from": 0}}


def model_of(method, **changes):
    options = SHORT | CACHES["clca"]
    if method is not None:
        options |= {"reduction": method, "keep_rate": 0.5, "reduction_kwargs": OPTIONS.get(method)}
    return build(tiny_config(**options | changes)).float()


def run(graph, pixels):
    session = onnxruntime.InferenceSession(graph.model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {"pixel_values": pixels.numpy()})]


@pytest.mark.parametrize("method", slow_unless(["topk"].__contains__, METHODS), ids=str)
def test_logits_and_kept_patches_are_those_of_pytorch(method):
    model = model_of(method)
    graph = make_graph(model)
    for seed in (11, 12):
        pixels = images(1, seed=seed).float()
        with torch.no_grad():
            output = model(pixels, output_assignments=method is not None)
        found = run(graph, pixels)
        torch.testing.assert_close(found[0], output.logits, atol=1e-5, rtol=1e-4)
        if method is None:
            assert len(found) == 1
        else:
            torch.testing.assert_close(found[1] > 0.999, kept_patches(output.assignments, model.config))
    assert graph.tokens == list(output.token_counts)
    text = graph.model.SerializeToString()
    assert b"site-packages" not in text and b".py" not in text  # paths of this machine


@pytest.mark.slow
@pytest.mark.parametrize("precision, most", [("float16", 0.1), ("int8", 1.0)])
def test_precisions_are_smaller_and_close(precision, most):
    model = model_of("evit", hidden_size=64, intermediate_size=256)
    whole, small = make_graph(model), make_graph(model, precision=precision)
    assert small.model.ByteSize() < {"float16": 0.65, "int8": 0.6}[precision] * whole.model.ByteSize()
    pixels = images(1, seed=5).float()
    exact = run(whole, pixels)[0]
    difference = float((run(small, pixels)[0] - exact).abs().max())
    assert 0 < difference < most * exact.std() and whole.difference < small.difference


def test_what_no_graph_can_hold_is_refused():
    with pytest.raises(ValueError, match=r"`precision` must be one of float32, float16, int8, got 'int4'"):
        make_graph(model_of("topk"), precision="int4")
    with pytest.raises(ValueError, match="`reduction`='ats'"):
        make_graph(model_of("ats", reduction_kwargs=None))


def test_a_value_beyond_float16_is_refused():
    graph = small_graph(spread=8.0).model
    for tensor in graph.graph.initializer:
        if tensor.name == "filters":
            values = np.frombuffer(tensor.raw_data, "f4").copy()
            values[3] = 1e5
            tensor.raw_data = values.tobytes()
    with pytest.raises(ValueError, match="filters has values above 65504"):
        halved(graph)
