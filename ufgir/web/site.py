"""Assemble the folder of the page: graphs, weights, ONNX Runtime Web, and the page's own files."""

import base64
import gzip
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair

from ..profiling.macs import count_macs, dense_config, describe, on_meta
from ..transforms.preprocessing import normalization, sizes_of
from ..utils.files import whole_files
from .graphs import Graph, make_graph, share_weights
from .runtime import VERSION, runtime_files


MODEL, RUNTIME = "model", "runtime"  # folders whose old files are deleted when the page is rebuilt
SURE = 0.5  # the page calls a prediction uncertain if its probability is lower
_RESAMPLING = (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX)
_RESAMPLING += (Image.Resampling.HAMMING,)
_NOT_CACHED = ("README.md", "sw.js")

_SPACE = """---
title: {title}
emoji: 🌿
colorFrom: green
colorTo: gray
sdk: static
pinned: false
custom_headers:
  cross-origin-embedder-policy: require-corp
  cross-origin-opener-policy: same-origin
  cross-origin-resource-policy: cross-origin
---

# {title}

A static page that runs a token-reduction Vision Transformer in the visitor's browser. Made by `ufgir export --web`.
"""


class Site(NamedTuple):
    """A built page.

    Attributes:
        folder: folder of the page.
        sizes: file, relative to the folder -> size in bytes, and size compressed with gzip.
        graphs: file and graph of each keep rate; equal graphs share a file.
    """

    folder: Path
    sizes: dict[str, tuple[int, int]]
    graphs: list[tuple[str, Graph]]


def build_site(
    model: CLCAViTForImageClassification,
    image_processor: Any,
    folder: str | os.PathLike[str],
    keep_rates: Sequence[float] | None = None,
    precision: str = "float32",
    webgpu: bool = False,
    runtime: str | os.PathLike[str] | None = None,
    title: str = "Leaves",
    tolerance: float = 1e-3,
) -> Site:
    """Write a page that runs a model.

    Args:
        model: model of a method with static shapes.
        image_processor: image processor that is saved with the model.
        folder: folder of the page, created if missing; other files in it are not changed.
        keep_rates: keep rates that visitors can choose, in (0, 1]; None for only the model's own.
        precision: precision of the weights, see `make_graph`.
        webgpu: use the larger runtime that also supports GPUs.
        runtime: source of the runtime, see `runtime_files`.
        title: title of the page.
        tolerance: see `make_graph`.

    Raises:
        ValueError: as `runtime_files`, `make_graph` and `preprocessing`; or if two keep rates are equal.
    """
    rates = [None] if keep_rates is None else list(keep_rates)
    if len(set(rates)) < len(rates):
        raise ValueError(f"`keep_rates` must differ, got {', '.join(map(str, rates))}.")
    steps = preprocessing(image_processor, model.config)  # report errors before the export, which takes long
    runtime_parts = runtime_files(webgpu, runtime)
    graphs = [make_graph(model, rate, precision, tolerance) for rate in rates]
    return assemble(model.config, steps, graphs, runtime_parts, folder, precision, title)


def preprocessing(image_processor: Any, config: CLCAViTConfig) -> dict[str, Any]:
    """Return the preprocessing of the page, which is that of the image processor in evaluation.

    Raises:
        ValueError: if the processor pads, or does not resize to a height and a width with a filter of Pillow.
    """
    before, after = sizes_of(image_processor)
    does = {
        name: getattr(image_processor, name, default) for name, default in (("do_resize", True), ("do_pad", False))
    }
    if before is None or after is None or not does["do_resize"] or does["do_pad"]:
        raise ValueError(
            "the page requires an image processor that resizes to a height and a width, without padding, got "
            f"`size`={image_processor.size}, `crop_size`={getattr(image_processor, 'crop_size', None)}."
        )
    if tuple(after) != as_pair(config.image_size):
        raise ValueError(
            f"the image processor produces images of {after}, but the model requires {as_pair(config.image_size)}."
        )
    if image_processor.resample not in _RESAMPLING:
        raise ValueError(
            f"`resample` of the image processor must be one of Pillow's filters {_RESAMPLING}, got {image_processor.resample}."
        )
    scale, mean, std = normalization(image_processor)
    channels = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    return {
        "resize": list(before),
        "crop": list(after),
        "filter": Image.Resampling(image_processor.resample).name.lower(),
        "scale": scale,
        **{name: values * (3 // len(values)) for name, values in channels.items()},
    }


def assemble(
    config: CLCAViTConfig,
    steps: Mapping[str, Any],
    graphs: Sequence[Graph],
    runtime_parts: Mapping[str, Path],
    folder: str | os.PathLike[str],
    precision: str,
    title: str,
) -> Site:
    """Write the files of the page, and replace those of an earlier page; other files are not changed. See `build_site`."""
    folder = Path(folder)
    contents = {name: files(__package__).joinpath("page", name).read_bytes() for name in ("app.js", "style.css")}
    weights, name = share_weights([graph.model for graph in graphs], f"{MODEL}-{{hash}}.bin")
    contents[f"{MODEL}/{name}"] = weights
    named = []
    for graph in graphs:
        content = graph.model.SerializeToString(deterministic=True)
        file = f"{MODEL}/{MODEL}-{_short(content)}.onnx"
        contents[file] = content
        named.append((file, graph))
    contents |= {f"{RUNTIME}/{name}": path.read_bytes() for name, path in runtime_parts.items()}
    contents |= {f"icon-{side}.png": _icon(side) for side in (192, 512)}
    contents["manifest.webmanifest"] = _json(_manifest(title))
    contents["model.json"] = _json(
        {
            "title": title,
            "about": describe(config).splitlines(),
            "classes": [config.id2label[index] for index in range(config.num_labels)],
            "independent": config.problem_type == "multi_label_classification",
            "sure": SURE,
            "image": dict(steps),
            "grid": list(config.image_grid),
            "reduction": config.reduction,
            "precision": precision,
            "weights": f"{MODEL}/{name}",
            "denseMacs": count_macs(on_meta(dense_config(config))),
            "runtime": {
                "module": f"{RUNTIME}/{next(iter(runtime_parts))}",
                "version": VERSION,
                "webgpu": "asyncify" in "".join(runtime_parts),
            },
            "graphs": [
                {
                    "file": file,
                    "keepRate": graph.keep_rate,
                    "tokens": graph.tokens,
                    "macs": graph.macs,
                    "stages": graph.stages,
                }
                for file, graph in named
            ],
        }
    )
    page = files(__package__).joinpath("page", "index.html").read_text(encoding="utf-8")
    contents["index.html"] = page.replace("{{title}}", _escaped(title)).encode()
    if not (folder / "README.md").exists():  # the user may have edited the README.md of a Space
        contents["README.md"] = _SPACE.format(title=title.replace("\n", " ")).encode()
    cached = {name: _integrity(content) for name, content in sorted(contents.items()) if name not in _NOT_CACHED}
    worker = files(__package__).joinpath("page", "sw.js").read_text(encoding="utf-8")
    build = _short(json.dumps(cached).encode() + worker.encode())
    contents["sw.js"] = (
        worker.replace('"{{build}}"', json.dumps(build)).replace('"{{files}}"', json.dumps(cached)).encode()
    )
    with whole_files(folder) as place:
        for name, content in contents.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
    for part in (MODEL, RUNTIME):
        for file in (folder / part).iterdir():
            if f"{part}/{file.name}" not in contents and file.suffix in (".onnx", ".bin", ".wasm", ".mjs"):
                file.unlink()
    sizes = {name: (len(content), len(gzip.compress(content, 6))) for name, content in contents.items()}
    return Site(folder, sizes, named)


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _integrity(content: bytes) -> str:
    """Return the checksum in the format of browsers."""
    return "sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _manifest(title: str) -> dict[str, Any]:
    icons = [{"src": f"icon-{side}.png", "sizes": f"{side}x{side}", "type": "image/png"} for side in (192, 512)]
    return {
        "name": title,
        "short_name": title[:12],
        "start_url": "./",
        "scope": "./",
        "display": "standalone",
        "background_color": "#ffffff",
        "theme_color": "#2f7d32",
        "icons": icons,
    }


def _icon(side: int) -> bytes:
    """Draw a leaf on a square, large first, then resized for smooth edges."""
    drawn = 4 * 128
    icon = Image.new("RGB", (drawn, drawn), "#2f7d32")
    leaf = Image.new("L", (drawn, drawn))
    draw = ImageDraw.Draw(leaf)
    radius, centre = 330, drawn // 2
    first, second = Image.new("L", leaf.size), Image.new("L", leaf.size)
    for circle, offset in ((first, -190), (second, 190)):
        x, y = centre + offset, centre + offset
        ImageDraw.Draw(circle).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    leaf.paste(first, mask=second)
    draw.line((centre - 190, centre + 190, centre + 150, centre - 150), fill=0, width=14)
    icon.paste("#eaf5ea", mask=leaf)
    stream = io.BytesIO()
    icon.resize((side, side), Image.Resampling.LANCZOS).save(stream, format="PNG", optimize=True)
    return stream.getvalue()
