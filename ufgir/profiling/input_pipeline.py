"""Measure how many images per second the input pipeline delivers: reading, decoding, transforming, and transfer between processes.

`ufgir benchmark --input-pipeline DATASET` measures it without the model and reports which of the two is the bottleneck. Files are read
repeatedly and come from the cache of the system, so a slow disk or network adds to these times.
"""

import io
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..data.load import SYNTHETIC_LEAVES, load_ufgir_dataset
from ..data.splits import random_subset
from ..data.transformed import TransformedImages
from ..transforms.preprocessing import EvalTransform, TrainTransform, make_image_processor
from ..utils.files import write_csv, write_text_atomically
from .benchmark import Report
from .benchmark_report import TextTable, markdown_table, origin
from .timing import InterleavedTiming, OtherLoad, quartiles, steady


logger = logging.getLogger(__name__)

SHARDS = 2  # parquet files that the images are written into
JPEG_QUALITY = 95
AS_STORED = "as stored"


@dataclass
class Pipeline:
    """Speeds of the input pipeline in images per second.

    Attributes:
        source, count: the data set, and the number of images used.
        pixels: mean width and height of the images.
        stages: (format, operation, image size or None) -> speed on one core.
        loaders: (image size, workers) -> speed of a DataLoader with the training transform and images as stored.
        models: image size -> (name, speed in inference), if measured.
        crossing: what a worker transfers per image: name -> dtype and shape; `crossing_bytes` is its size.
        images_cross: whether PIL images are pickled between processes.
        device: device of the models.
        cores: cores of this machine.
    """

    source: str
    count: int
    pixels: tuple[float, float]
    stages: dict[tuple[str, str, int | None], float] = field(default_factory=dict)
    loaders: dict[tuple[int, int], float] = field(default_factory=dict)
    models: dict[int, tuple[str, float]] = field(default_factory=dict)
    crossing: dict[str, str] = field(default_factory=dict)
    crossing_bytes: int = 0
    images_cross: bool = False
    device: str = "cpu"
    cores: int = 1
    other_cores: float | None = None
    interrupted: bool = False

    def add_models(self, report: Report) -> None:
        """Add the speeds of models, one per image size."""
        self.device = report.device
        self.interrupted |= report.interrupted
        for result in report.results:
            if result.case is not None and result.images_per_second:
                self.models[result.setting.image_size] = result.name, result.images_per_second


def sample(source: str, count: int, image_size: int, seed: int = 0) -> datasets.Dataset:
    """Return `count` random images of the first split of a data set. `synthetic_leaves` are drawn larger than `image_size`, like photos.

    Raises:
        ValueError: if `count` is below 2, or if `load_ufgir_dataset` refuses the data set.
    """
    if count < 2:
        raise ValueError(f"`--count` must be at least 2 images, got {count}.")
    options: dict[str, Any] = {}
    if source == SYNTHETIC_LEAVES:
        options = {"images_per_class": [math.ceil(count / 10), 0, 0], "image_size": int(image_size / 0.875)}
    data = load_ufgir_dataset(source, verify=False, validation_fraction=0.0, **options)
    images = random_subset(next(iter(data.values())), count, seed).select_columns(["image"])
    return images.add_column("label", [0] * len(images))  # labels do not affect the speed


def as_formats(images: datasets.Dataset, folder: Path) -> dict[str, datasets.Dataset]:
    """Return format name -> the same images: as stored, as PNG and JPEG files, and in parquet shards."""
    options = {"png": {}, "jpeg": {"quality": JPEG_QUALITY}}
    encoded: dict[str, list[bytes]] = {suffix: [] for suffix in options}
    for image in images["image"]:  # one by one, because photos may be large
        for suffix in options:
            buffer = io.BytesIO()
            image.save(buffer, format=suffix, **options[suffix])
            encoded[suffix].append(buffer.getvalue())
    found = {AS_STORED: images}
    for suffix, contents in encoded.items():
        files = [folder / f"{index:05d}.{suffix}" for index in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        found[f"{suffix.upper()} files"] = _images([str(file) for file in files])
        whole = _images([{"bytes": content, "path": None} for content in contents])
        shards = [folder / f"{suffix}-{shard}.parquet" for shard in range(SHARDS)]
        for shard, file in enumerate(shards):
            whole.shard(SHARDS, shard, contiguous=True).to_parquet(file)
        loaded = datasets.load_dataset(
            "parquet", data_files=[str(f) for f in shards], split="train", cache_dir=str(folder / "cache")
        )
        found[f"{suffix.upper()} in parquet"] = loaded.cast_column("image", datasets.Image(mode="RGB"))
    return found


def _images(values: list[Any]) -> datasets.Dataset:
    table = datasets.Dataset.from_dict({"image": values, "label": [0] * len(values)})
    return table.cast_column("image", datasets.Image(mode="RGB"))


def transforms(image_size: int) -> dict[str, Any]:
    """Return the evaluation and training transforms with the defaults of run_ufgir.py."""
    processor = make_image_processor(image_size)
    return {"evaluation transform": EvalTransform(processor), "training transform": TrainTransform(processor)}


def measure_stages(
    formats: Mapping[str, datasets.Dataset], sizes: Sequence[int], repetitions: int = 3
) -> dict[tuple[str, str, int | None], float]:
    """Measure images per second on one core, for decoding alone and with each transform; see `Pipeline.stages`."""
    runs: dict[Any, Any] = {}
    for name, data in formats.items():
        runs[name, "decode", None] = lambda data=data: _consume(data[i]["image"].size for i in range(len(data)))
        for size in sizes:
            for what, transform in transforms(size).items():
                samples = TransformedImages(data, transform)
                runs[name, f"decode + {what}", size] = lambda s=samples: _consume(s[i] for i in range(len(s)))
    count = len(next(iter(formats.values())))
    timing = InterleavedTiming(runs, torch.device("cpu"))
    with steady(1):
        timing.warm_up(1)
        timing.run(repetitions)
    for error in timing.failures.values():
        raise error
    return {key: count / quartiles(seconds).median for key, seconds in timing.seconds.items()}


def _consume(items: Iterator[Any]) -> None:
    for _ in items:
        pass


def measure_loader(data: datasets.Dataset, image_size: int, workers: int, batch_size: int) -> float:
    """Measure images per second of a DataLoader as Trainer creates it, with the training transform, in its second epoch."""
    samples = TransformedImages(data, transforms(image_size)["training transform"])
    loader = DataLoader(
        samples,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=default_data_collator,
    )
    _consume(iter(loader))  # workers start
    start = time.perf_counter()
    _consume(iter(loader))
    return len(data) / (time.perf_counter() - start)


def crossing(data: datasets.Dataset, image_size: int) -> tuple[dict[str, str], int, bool]:
    """Return what a worker transfers to the training process for one image: name -> dtype and shape; the number of bytes; and whether it
    contains PIL images, which would be pickled."""
    batch = default_data_collator([TransformedImages(data, transforms(image_size)["training transform"])[0]])
    shapes, size = {}, 0
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            shapes[name] = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape[1:])}"
            size += value.numel() * value.element_size()
        else:
            shapes[name] = type(value).__name__
    return shapes, size, any(isinstance(leaf, Image.Image) for leaf in tree_leaves(dict(batch)))


def measure_pipeline(
    source: str,
    sizes: Sequence[int],
    workers: Sequence[int] = (0, 1, 2),
    count: int = 64,
    batch_size: int = 16,
    repetitions: int = 3,
    seed: int = 0,
) -> Pipeline:
    """Measure everything except the models. Ctrl-C stops and keeps what was measured.

    Args:
        source: data set, as for `load_ufgir_dataset`.
        sizes: image sizes of the models, pixels.
        workers: numbers of DataLoader processes; 0 is the training process itself.
        count: number of images.
        batch_size: batch size of the DataLoader.
        repetitions: timings of each stage.
        seed: seed of the choice of images.

    Raises:
        ValueError: see `sample`.
    """
    images = sample(source, count, max(sizes), seed)
    shapes = np.array([image.size for image in images["image"]], dtype=float)
    found = Pipeline(source, len(images), tuple(shapes.mean(axis=0)), cores=torch.multiprocessing.cpu_count())
    load, start = OtherLoad(), time.monotonic()
    try:
        found.crossing, found.crossing_bytes, found.images_cross = crossing(images, max(sizes))
        with tempfile.TemporaryDirectory() as folder:
            found.stages = measure_stages(as_formats(images, Path(folder)), sizes, repetitions)
        for size in sizes:
            for number in workers:
                found.loaders[size, number] = measure_loader(images, size, number, min(batch_size, len(images)))
    except KeyboardInterrupt:
        found.interrupted = True
    found.other_cores = load.cores(time.monotonic() - start)
    return found


def verdict(found: Pipeline, size: int) -> str:
    """Describe in one sentence whether the pipeline or the model is the bottleneck at an image size."""
    name, model = found.models[size]
    core = found.stages[AS_STORED, "decode + training transform", size]
    needed = model / core
    speeds = (
        f"At {size} px the model ({name}) takes {_speed(model)} images/s on {found.device} and one core prepares "
        f"{_speed(core)}"
    )
    if found.device == "cpu":
        share = needed / (found.cores + needed)
        which = "the input pipeline" if needed > found.cores else "the model"
        return f"{speeds}: {which} is the bottleneck; preparing an image costs {share:.1%} of the work of both."
    if needed > found.cores:
        return (
            f"{speeds}: the input pipeline is the bottleneck on this machine, whose {found.cores} cores feed "
            f"{found.cores * core / model:.0%} of what the model could take; {math.ceil(needed)} workers would do."
        )
    return f"{speeds}: the model is the bottleneck as long as there are {max(1, math.ceil(needed))} workers or more."


def _speed(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def stage_table(found: Pipeline) -> TextTable:
    """Return a table of images per second on one core, with a row per operation and a column per format."""
    formats = list(dict.fromkeys(name for name, _, _ in found.stages))
    rows = [["images/s on one core", *formats]]
    for what, size in dict.fromkeys((what, size) for _, what, size in found.stages):
        name = what if size is None else f"{what}, {size} px"
        rows.append([name, *(_speed(found.stages[f, what, size]) for f in formats)])
    return rows


def loader_table(found: Pipeline) -> TextTable:
    """Return a table of images per second of the DataLoader and of the models."""
    workers = sorted({number for _, number in found.loaders})
    models = [found.models[min(found.models)][0]] if found.models else []
    rows = [["images/s", *(f"{n} workers" if n != 1 else "1 worker" for n in workers), *models]]
    for size in dict.fromkeys(size for size, _ in found.loaders):
        speeds = [found.loaders.get((size, number)) for number in workers]
        speeds += [found.models[size][1] if size in found.models else None] * len(models)
        rows.append([f"{size} px", *("-" if s is None else _speed(s) for s in speeds)])
    return rows


def remarks(found: Pipeline) -> list[str]:
    """Return remarks on the results, one sentence each, starting with the bottleneck."""
    sentences = [verdict(found, size) for size in found.models]
    parts = ", ".join(f"{name} ({what})" for name, what in found.crossing.items())
    if found.images_cross:
        sentences.append(f"A worker transfers {parts}: images are pickled between processes, which is slow.")
    elif parts:
        sentences.append(
            f"A worker transfers {parts}, {found.crossing_bytes / 1e6:.2f} MB per image, as tensors in shared memory: no image "
            "is pickled."
        )
    if found.other_cores is not None and found.other_cores > 0.1 * found.cores:
        sentences.append(
            f"The machine was busy: other processes used {found.other_cores:.1f} of its {found.cores} cores meanwhile."
        )
    if found.interrupted:
        sentences.append("Partial: the measurement was interrupted.")
    return sentences


def pipeline_rows(found: Pipeline) -> list[dict[str, Any]]:
    """Return a row per speed for a CSV file."""
    rows = [
        {"what": what, "format": name, "image_size": size, "workers": "", "images_per_second": speed}
        for (name, what, size), speed in found.stages.items()
    ]
    rows += [
        {"what": "DataLoader", "format": AS_STORED, "image_size": size, "workers": n, "images_per_second": speed}
        for (size, n), speed in found.loaders.items()
    ]
    rows += [
        {"what": name, "format": "", "image_size": size, "workers": "", "images_per_second": speed}
        for size, (name, speed) in found.models.items()
    ]
    return rows


def pipeline_markdown(found: Pipeline, facts: Mapping[str, Any]) -> str:
    """Return both tables, the remarks and the origin of the numbers, as Markdown."""
    width, height = found.pixels
    about = f"{found.count} images of {found.source}, {width:.0f} x {height:.0f} pixels on average, read from the system's cache"
    parts = [markdown_table(stage_table(found)), markdown_table(loader_table(found)), *remarks(found)]
    return "\n\n".join([*parts, f"{about}. {origin(facts)}."])


def write_pipeline(folder: Path, found: Pipeline, facts: Mapping[str, Any]) -> list[Path]:
    """Write pipeline.csv, pipeline.md and pipeline.json, and return their paths."""
    rows = pipeline_rows(found)
    if not rows:
        return []
    record = {**facts, "source": found.source, "images": found.count, "mean_width_and_height": found.pixels}
    record |= {"crossing": found.crossing, "remarks": remarks(found), "speeds": rows}
    return [
        write_csv(folder / "pipeline.csv", rows),
        write_text_atomically(folder / "pipeline.md", pipeline_markdown(found, facts) + "\n"),
        write_text_atomically(folder / "pipeline.json", json.dumps(record, indent=1, default=str) + "\n"),
    ]
