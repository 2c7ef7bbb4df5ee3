"""A page with a small hand-made graph, so that the results of the browser can be checked quickly."""

import json
import threading
from contextlib import contextmanager

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from clca import CLCAViTConfig
from clca.image_processing_clca import CLCAImageProcessor
from tests.app.helpers import png
from tests.helpers import TINY
from ufgir.web.graphs import Graph
from ufgir.web.runtime import is_cached, runtime_files
from ufgir.web.server import make_server
from ufgir.web.site import assemble, preprocessing


CONFIG = CLCAViTConfig(**TINY | {"image_size": 64, "id2label": {0: "ash", 1: "<b>oak</b>", 2: "elm"}})
PROCESSOR = CLCAImageProcessor(size={"height": 64, "width": 64}, crop_pct=0.875, resample=3)


def small_graph(seed=0, keep_rate=None, spread=8.0):
    """Create a graph with eight by eight patches from a convolution; `shares` are sigmoids, `logits` means per class."""
    random = np.random.default_rng(seed)
    filters = numpy_helper.from_array(random.normal(size=(16, 3, 8, 8)).astype("f4"), "filters")
    classes = numpy_helper.from_array(spread * random.normal(size=(16, 3)).astype("f4"), "classes")
    shape = numpy_helper.from_array(np.array([1, 1, 64]), "shape")
    nodes = [
        helper.make_node("Conv", ["pixel_values", "filters"], ["patches"], strides=[8, 8]),
        helper.make_node("ReduceMean", ["patches"], ["means"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["means", "classes"], ["logits"]),
        helper.make_node("ReduceMax", ["patches"], ["best"], axes=[1], keepdims=0),
        helper.make_node("Sigmoid", ["best"], ["bright"]),
        helper.make_node("Reshape", ["bright", "shape"], ["shares"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
        for name, dims in (("pixel_values", [1, 3, 64, 64]), ("logits", [1, 3]), ("shares", [1, 1, 64]))
    ]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], [filters, classes, shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return Graph(model, keep_rate, [65, 65, 33, 33, 33, 33], 10**6, [1], 0.0)


def need_runtime(webgpu=False):
    if not is_cached(webgpu):
        pytest.skip("ONNX Runtime Web was not fetched: `make browser` does it, once, if there is npm")
    return runtime_files(webgpu)


def write_page(folder, graphs=None, title="Leaves", webgpu=False):
    graphs = [small_graph()] if graphs is None else graphs
    return assemble(CONFIG, preprocessing(PROCESSOR, CONFIG), graphs, need_runtime(webgpu), folder, "float32", title)


def session_of(site):
    """Load the first graph as written, with its weights file."""
    return onnxruntime.InferenceSession(site.folder / site.graphs[0][0], providers=["CPUExecutionProvider"])


@contextmanager
def served(folder):
    with make_server(folder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def leaf(width=150, height=110):
    """Create a color image with fine structure."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(40 * x * (1 + y)), np.cos(55 * y + 9 * x), np.sin(70 * (x - y) ** 2 + 3 * x)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, -1)).astype("u1"))


def swapped_profile():
    """Return the profile of sRGB with red and green exchanged, so that applying it changes the colors."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    places = {bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * data[131], 12)}
    red, green = (slice(places[tag] + 4, places[tag] + 8) for tag in (b"rXYZ", b"gXYZ"))
    data[red], data[green] = data[green], data[red]
    return bytes(data)


def image_files(folder):
    """Write files of every kind that phones and cameras create, by name."""
    picture, exif = leaf(), Image.Exif()
    exif[274] = 6
    clear = picture.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    saved = {
        "small.jpg": (picture, {"quality": 90}),
        "fine.jpg": (picture, {"quality": 95, "subsampling": 0}),
        "progressive.jpg": (leaf(333, 97), {"progressive": True}),
        "grey.jpg": (picture.convert("L"), {}),
        "turned.jpg": (picture, {"exif": exif}),
        "profile.jpg": (picture, {"icc_profile": swapped_profile()}),
        "profile.png": (picture, {"icc_profile": swapped_profile()}),
        "plain.png": (picture, {}),
        "clear.png": (clear, {}),
        "palette.png": (picture.quantize(64), {}),
        "tiny.png": (leaf(20, 31), {}),
        "same.png": (leaf(73, 73), {}),
        "long.png": (leaf(900, 70), {}),
        "lossy.webp": (picture, {"quality": 85}),
        "lossless.webp": (clear, {"lossless": True}),
        "large.jpg": (leaf(3000, 2000), {"quality": 85}),
    }
    for name, (image, options) in saved.items():
        image.save(folder / name, **options)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.jpg").write_bytes((folder / "large.jpg").read_bytes()[:300])
    (folder / "bomb.png").write_bytes(png(12_000, 12_000))
    return sorted(saved)


def kept_json(site):
    return json.loads((site.folder / "model.json").read_text(encoding="utf-8"))
