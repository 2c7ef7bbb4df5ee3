"""Measure how cost scales with image size and depth, compared with the dense model: `ufgir benchmark --scaling`.

Multiply-adds are counted at every point. Time and memory are measured only where that is expected to take less than a time limit.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.reductions_clca import get_reduction

from ..utils.files import write_csv, write_text_atomically
from ..utils.plotting import label, method_style, new_figure, plain_style, save_figure, style
from ..utils.signals import ending_signals, raise_pending
from .backends import activation_memory
from .benchmark import Benchmark, Report, Result, make_dense
from .benchmark_cases import Case, Setting, case_config, quarters
from .benchmark_report import MEGA, TextTable, markdown_table, origin
from .macs import count_macs, dense_config, on_meta


logger = logging.getLogger(__name__)

SIZES = (224, 320, 448, 576, 672, 784, 896, 1024)  # pixels
DEPTHS = (6, 12, 18, 24)  # layers
DEPTH_SIZE = 448  # pixels, for the points of the depth axis
TRAINING_BATCH = 2  # smallest number of images: the BatchNorm of the CLA head needs two
TRAINING_PASSES = 8  # time of a forward and backward pass with counted tensors, in forward passes
AXES = {"image size": "image side, pixels", "depth": "layers"}


class Point(NamedTuple):
    """Cost at one image size or depth.

    Attributes:
        axis: a key of `AXES`.
        value: pixels or layers.
        dense, case: results in inference of the dense and the reduced model.
        dense_training, case_training: bytes of activations in training, for at least `TRAINING_BATCH` images; None if not measured.
        skipped: why time and memory were not measured.
    """

    axis: str
    value: int
    dense: Result
    case: Result
    dense_training: int | None = None
    case_training: int | None = None
    skipped: str | None = None


class Scaling:
    """Measure the cost at several image sizes and depths.

    Args:
        base: configuration without reduction.
        case: method, variant, keep rate and setting of the reduced model; image size and depth are replaced.
        device, threads, repetitions, seed, progress: see `Benchmark`.
        limit: a point is measured only if that is expected to take at most this many seconds.
    """

    def __init__(
        self,
        base: CLCAViTConfig,
        case: Case,
        device: torch.device,
        threads: int | None = None,
        repetitions: int = 3,
        seed: int = 0,
        limit: float = 180.0,
        progress: Any = None,
    ) -> None:
        self.base = base
        self.case = case
        self.device = device
        self.options = {"threads": threads, "repetitions": repetitions, "seed": seed, "progress": progress}
        self.limit = limit
        self.pace: float | None = None  # seconds per multiply-add at the last point
        self.bytes_a_token: float | None = None  # activations of one layer of the dense model in training
        self.points: list[Point] = []
        self.report = Report(device=str(device), repetitions=repetitions)

    def run(
        self, sizes: Sequence[int] = SIZES, depths: Sequence[int] = DEPTHS, save: Callable[[], Any] | None = None
    ) -> None:
        """Measure all points into `points` and `report`. Ctrl-C stops after the step that is measured, and keeps what was measured.

        Args:
            sizes: image sizes, pixels.
            depths: numbers of layers.
            save: called after each point.
        """
        places = [("image size", size, self.base.num_hidden_layers) for size in sorted(sizes)]
        places += [("depth", depth, depth) for depth in sorted(depths)]
        try:
            with ending_signals(hold=True):
                for axis, value, depth in places:
                    size = value if axis == "image size" else DEPTH_SIZE
                    self.points.append(self._point(axis, value, size, depth))
                    if self.report.interrupted:
                        break
                    if save is not None:
                        save()
                    raise_pending()
        except KeyboardInterrupt:
            self.report.interrupted = True

    def remarks(self) -> list[str]:
        """Return one sentence for each reason to doubt the numbers or for missing numbers."""
        skipped = [f"{p.value} ({AXES[p.axis]}): {p.skipped}" for p in self.points if p.skipped]
        sentences = [f"Counted but not measured: {'; '.join(skipped)}."] if skipped else []
        failed = [f"{r.name}, {r.setting}: {r.error}" for r in self.report.results if r.error]
        return [*sentences, *failed, *self.report.warnings]

    def _point(self, axis: str, value: int, size: int, depth: int) -> Point:
        base = self.base
        if depth != base.num_hidden_layers:
            changes = {"num_hidden_layers": depth, "reduction_layers": quarters(depth)}
            base = CLCAViTConfig.from_dict(dense_config(base).to_dict() | changes)
        case = self.case._replace(setting=self.case.setting._replace(image_size=size))
        configs = [
            CLCAViTConfig.from_dict(dense_config(base).to_dict() | {"image_size": size}),
            case_config(base, case),
        ]
        counts = [_count(config) for config in configs]
        batch = case.setting.batch_size
        work = configs[0].num_patches * max(batch, TRAINING_BATCH) * depth
        why = self._reason_to_skip(sum(counts) * batch, work)
        if why is not None:
            dense = Result(case.setting, None, "dense", macs=counts[0])
            return Point(axis, value, dense, Result(case.setting, case, str(case), dense, macs=counts[1]), skipped=why)

        part = Benchmark(base, self.device, **self.options).run([case])
        dense, reduced = part.results
        self._gather(part)
        training = [None, None]
        if not part.interrupted:
            makers = (lambda: make_dense(base, case.setting), lambda: CLCAViTForImageClassification(configs[1]))
            training = [self._training(make, case.setting) for make in makers]
        if dense.time and reduced.time:
            self.pace = (dense.time.median + reduced.time.median) / (sum(counts) * batch)
        if training[0]:
            self.bytes_a_token = training[0] / work
        return Point(axis, value, dense, reduced, *training)

    def _gather(self, part: Report) -> None:
        """Add the report of one point to the whole report."""
        whole = self.report
        whole.add_run(part.seconds, part.other_cores)
        whole.results += part.results
        whole.threads = part.threads
        whole.interrupted |= part.interrupted
        whole.missing += part.missing

    def _reason_to_skip(self, macs: int, work: int) -> str | None:
        """Return why a point is not measured, or None."""
        if self.pace is not None:
            expected = self.pace * macs * (self.options["repetitions"] + 3 + TRAINING_PASSES)
            if expected > self.limit:
                return f"expected to take {expected:.0f} s, more than {self.limit:g} s"
        if self.bytes_a_token is not None and self.device.type == "cpu":
            needed, there = self.bytes_a_token * work, _available_memory()
            if there is not None and needed > 0.7 * there:
                return f"would need {needed / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are free"
        return None

    def _training(self, make: Callable[[], nn.Module], setting: Setting) -> int | None:
        """Return the bytes of activations in a forward and backward pass, or None if it failed."""
        torch.manual_seed(self.options["seed"])
        model = make().to(self.device).train()
        batch = max(setting.batch_size, TRAINING_BATCH)
        pixels = torch.randn(batch, model.config.num_channels, *[setting.image_size] * 2, device=self.device)
        labels = torch.zeros(batch, dtype=torch.long, device=self.device)

        def gradients() -> None:
            model(pixel_values=pixels, labels=labels).loss.backward()

        try:
            return activation_memory(model, gradients, self.device)
        except RuntimeError as error:  # usually out of memory
            logger.warning("training at %d px failed: %s", setting.image_size, error)
            return None


def _count(config: CLCAViTConfig) -> int:
    static = get_reduction(config.reduction).is_static(config)
    return count_macs(on_meta(config) if static else CLCAViTForImageClassification(config))


def _available_memory() -> int | None:
    """Return the bytes of free memory, or None if unknown."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def scaling_table(points: Sequence[Point], axis: str) -> TextTable:
    """Return the points of one axis as a table of strings."""
    points = [p for p in points if p.axis == axis]
    name = points[0].case.name
    head = [
        AXES[axis],
        "GMACs dense",
        name,
        "ratio",
        "ms dense",
        name,
        "speed-up",
        "training, MB dense",
        name,
        "share",
    ]
    rows = [head]
    for p in points:
        row = [str(p.value), f"{p.dense.macs / 1e9:.2f}", f"{p.case.macs / 1e9:.2f}", f"{p.case.macs_ratio:.2f}"]
        times = [r.time for r in (p.dense, p.case)]
        row += ["-" if t is None else f"{1e3 * t.median:.1f}" for t in times]
        row.append("-" if p.case.speedup is None else f"{p.case.speedup:.2f}")
        row += ["-" if m is None else f"{m / MEGA:.1f}" for m in (p.dense_training, p.case_training)]
        share = p.case_training / p.dense_training if p.dense_training and p.case_training else None
        rows.append([*row, "-" if share is None else f"{share:.1%}"])
    return rows


def scaling_tables(scaling: Scaling) -> list[TextTable]:
    """Return one table for each axis that has points."""
    return [scaling_table(scaling.points, axis) for axis in AXES if any(p.axis == axis for p in scaling.points)]


def scaling_markdown(scaling: Scaling, facts: Mapping[str, Any]) -> str:
    """Return the tables, remarks and provenance as Markdown."""
    parts = [markdown_table(rows) for rows in scaling_tables(scaling)]
    parts += [f"> {remark}" for remark in scaling.remarks()]
    setting = scaling.case.setting
    about = (
        f"Inference: {setting.dtype}, batch {setting.batch_size}, medians of {scaling.report.repetitions} interleaved rounds. "
        f"Training: activations of a forward and backward pass, float32, batch {max(setting.batch_size, TRAINING_BATCH)}."
    )
    return "\n\n".join([*parts, f"{about} {origin(facts, scaling.report.threads)}."])


def write_scaling(folder: Path, scaling: Scaling, facts: Mapping[str, Any], figures: bool = True) -> list[Path]:
    """Write scaling.csv, scaling.md, scaling.json and scaling.png; return the files written."""
    if not scaling.points:
        return []
    rows = scaling_rows(scaling.points)
    record = {**facts, "threads": scaling.report.threads, "remarks": scaling.remarks(), "points": rows}
    return [
        write_csv(folder / "scaling.csv", rows),
        write_text_atomically(folder / "scaling.md", scaling_markdown(scaling, facts) + "\n"),
        write_text_atomically(folder / "scaling.json", json.dumps(record, indent=1, default=str) + "\n"),
        *([draw_scaling(scaling.points, folder / "scaling.png")] if figures else []),
    ]


def scaling_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return one CSV row per model and point. Units: multiply-adds per image, seconds per batch, bytes."""
    rows = []
    for p in points:
        for result, training in ((p.dense, p.dense_training), (p.case, p.case_training)):
            rows.append(
                {
                    "axis": p.axis,
                    "value": p.value,
                    "model": result.name,
                    **result.setting._asdict(),
                    "macs": result.macs,
                    "seconds_median": result.time and result.time.median,
                    "seconds_lower_quartile": result.time and result.time.lower,
                    "seconds_upper_quartile": result.time and result.time.upper,
                    "speedup": result.speedup,
                    "inference_activations": result.activation_memory,
                    "training_activations": training,
                    "not_measured": p.skipped or result.error,
                }
            )
    return rows


def draw_scaling(points: Sequence[Point], path: Path) -> Path:
    """Draw multiply-adds, time and memory (rows) over image size and depth (columns)."""
    axes_there = [axis for axis in AXES if any(p.axis == axis for p in points)]
    with style():
        figure, grid = new_figure(3, len(axes_there), squeeze=False)
        for column, axis in enumerate(axes_there):
            here = [p for p in points if p.axis == axis]
            for which, look in (("dense", method_style(None)), ("case", plain_style(here[0].case.name))):
                results = [getattr(p, which) for p in here]
                look = look | {"label": "dense" if which == "dense" else results[0].name}
                training = [getattr(p, f"{which}_training") for p in here]
                lines = (
                    [r.macs / 1e9 for r in results],
                    [r.time.median if r.time else None for r in results],
                    [m / 1e9 if m else None for m in training],
                )
                for axes, numbers in zip(grid[:, column], lines, strict=True):
                    known = [(p.value, n) for p, n in zip(here, numbers, strict=True) if n is not None]
                    axes.plot(*(zip(*known, strict=True) if known else ([], [])), **look)
            names = ("GMACs per image", "seconds, inference", "GB of activations, training")
            for axes, name in zip(grid[:, column], names, strict=True):
                axes.set_ylim(bottom=0)
                axes.set_xticks([p.value for p in here])
                label(axes, AXES[axis], name, None if axis == "image size" else f"{DEPTH_SIZE} px")
        return save_figure(figure, path)
