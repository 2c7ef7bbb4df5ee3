"""Parameters, multiply-adds and time per part of a model, for `ufgir profile --layers`.

The parts are the embeddings, each layer with its reduction, the final norm and the head. Everything else, mainly retrieval from the cache and
pooling, is the rest. All parts add up to the model.
"""

import contextlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTForImageClassification

from clca import CLCAViTConfig, CLCAViTForImageClassification, token_schedule
from clca.cache_clca import recovery_layers

from ..utils.files import temporary_path, write_csv, write_text_atomically
from ..utils.plotting import BLACK, BLUE, label, new_figure, save_figure, style
from .macs import count_macs
from .timing import steady, synchronize


REST = "rest"
TextTable = list[list[str]]


class Part(NamedTuple):
    """One part of a model, and the same part of the dense model.

    Attributes:
        name: embeddings, layer 0, ..., final norm, head, or rest.
        tokens_in, tokens_out, retrieved: tokens of one image; upper bounds if they depend on the image; None for parts without tokens.
        dense_tokens: tokens that enter this part of the dense model.
        parameters, macs, macs_executed, dense_macs: multiply-adds per image, see `count_macs`.
        seconds, dense_seconds: median seconds per batch; None if not measured.
    """

    name: str
    tokens_in: int | None
    tokens_out: int | None
    retrieved: int
    dense_tokens: int | None
    parameters: int
    macs: int
    macs_executed: int
    dense_macs: int
    seconds: float | None = None
    dense_seconds: float | None = None


def parts_of(model: CLCAViTForImageClassification | ViTForImageClassification) -> dict[str, nn.Module]:
    """Return the parts of a CLCA model or of transformers' ViT by name, in the order in which they run."""
    layers = {f"layer {index}": layer for index, layer in enumerate(model.vit.layers)}
    return {"embeddings": model.vit.embeddings, **layers, "final norm": model.vit.layernorm, "head": model.classifier}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each part and of the rest."""
    return _with_rest(
        {name: sum(p.numel() for p in part.parameters()) for name, part in parts_of(model).items()},
        sum(p.numel() for p in model.parameters()),
    )


def macs_by_part(model: nn.Module, **kwargs: Any) -> dict[str, int]:
    """Return `count_macs` for each part and the rest.

    Args:
        model: a CLCA model or transformers' ViT.
        kwargs: further arguments of `count_macs`.
    """
    names = {id(module): name for name, module in model.named_modules()}
    with FlopCounterMode(display=False) as counter:  # counts the same operations, by module
        total = count_macs(model, **kwargs)
    root = type(model).__name__
    counts = {
        name: sum(counter.flop_counts.get(f"{root}.{names[id(part)]}", {}).values()) // 2
        for name, part in parts_of(model).items()
    }
    return _with_rest(counts, total)


def _with_rest(values: dict[str, Any], total: Any) -> dict[str, Any]:
    return values | {REST: total - sum(values.values())}


def profile_layers(
    model: nn.Module,
    dense: nn.Module,
    config: CLCAViTConfig,
    seconds: tuple[dict[str, float], dict[str, float]] | None = None,
) -> list[Part]:
    """Return the parts of a model next to those of the dense model.

    Args:
        model: may be on the meta device, unless its token counts depend on the image.
        dense: the dense model of the same depth.
        config: configuration of `model`.
        seconds: see `time_parts`; None if not measured.
    """
    schedule, recovery = token_schedule(config), recovery_layers(config)
    last = config.num_hidden_layers
    dense_tokens = config.num_prefix_tokens + config.num_patches
    parameters, macs, dense_macs = parameters_by_part(model), macs_by_part(model), macs_by_part(dense)
    executed = macs_by_part(model, as_executed=True)
    parts = []
    for name in parameters:
        kind, _, number = name.partition(" ")
        index = int(number) if kind == "layer" else None
        tokens = {
            "embeddings": (None, schedule.before[0]),
            "final norm": (schedule.before[last], schedule.before[last]),
        }
        before, after = tokens.get(name, (None, None))
        retrieved = 0
        if index is not None:
            before, after = schedule.before[index], schedule.after[index]
            retrieved = schedule.before[index + 1] - after if index in recovery else 0
        times = (None, None) if seconds is None else tuple(times[name] for times in seconds)
        counts = parameters[name], macs[name], executed[name], dense_macs[name]
        theirs = None if before is None else dense_tokens
        parts.append(Part(name, before, after, retrieved, theirs, *counts, *times))
    return parts


def _ignoring_tokens(hook: Callable) -> Callable:
    """Mark a hook as one that does not read tokens. Otherwise the model computes everything that the hook might read, and another model is
    measured."""
    hook.reads_no_rows = True  # ty: ignore[missing-attribute]  # functions accept attributes
    return hook


class _Clock:
    """Hooks that record when each part of a model begins and ends."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any, Any]] = []
        self.handles = []
        for name, part in parts_of(model).items():
            self.handles.append(
                part.register_forward_pre_hook(_ignoring_tokens(lambda *_, name=name: self._begin(name)))
            )
            self.handles.append(part.register_forward_hook(_ignoring_tokens(lambda *_: self._end())))

    def mark(self) -> Any:
        """Record the current time on the clock of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks."""
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3

    def _begin(self, name: str) -> None:
        self.marks.append((name, self.mark(), None))

    def _end(self) -> None:
        name, start, _ = self.marks[-1]
        self.marks[-1] = name, start, self.mark()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def time_parts(
    models: Sequence[nn.Module],
    pixels: torch.Tensor,
    threads: int | None = None,
    repetitions: int = 9,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Measure the median seconds of each part, and of the rest, of several models with interleaved timing.

    The rest is the median of the time of the whole forward pass minus its parts. On a GPU, parts whose kernels are shorter than their launch show
    the time of the launch.

    Args:
        models: models in evaluation mode on the device of `pixels`.
        pixels: (B, C, height, width).
        threads: threads of torch on a CPU; None for the default.
        repetitions: rounds, after two rounds of warm-up.
        seed: seed of the order within rounds.
    """
    device = pixels.device
    clocks = [_Clock(model, device) for model in models]
    seconds: list[dict[str, list[float]]] = [{} for _ in models]
    order = random.Random(seed)
    try:
        with steady(threads), torch.inference_mode():
            for round_index in range(repetitions + 2):
                for i in order.sample(range(len(models)), len(models)):
                    clocks[i].marks.clear()
                    synchronize(device)
                    start = clocks[i].mark()
                    models[i](pixels)
                    end = clocks[i].mark()
                    synchronize(device)
                    if round_index < 2:
                        continue
                    took = {name: clocks[i].between(*times) for name, *times in clocks[i].marks}
                    for name, value in _with_rest(took, clocks[i].between(start, end)).items():
                        seconds[i].setdefault(name, []).append(value)
    finally:
        for clock in clocks:
            clock.remove()
    return [{name: float(torch.tensor(values).median()) for name, values in of.items()} for of in seconds]


def write_trace(model: nn.Module, pixels: torch.Tensor, path: Path) -> Path:
    """Write a Chrome trace of one forward pass, with the parts by name, atomically. View it in https://ui.perfetto.dev.

    Raises:
        ValueError: if `path` ends in neither .json nor .json.gz.
    """
    check_trace(path)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if pixels.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), _named_parts(model):
        model(pixels)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            model(pixels)
            synchronize(pixels.device)
    with temporary_path(path, folder=True) as folder:
        profiler.export_chrome_trace(str(folder / path.name))
        os.replace(folder / path.name, path)
    return path


def check_trace(path: Path) -> None:
    """Raise a ValueError if a trace cannot have this file name."""
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(f"`--trace` must end in .json or .json.gz, got {path}.")


@contextlib.contextmanager
def _named_parts(model: nn.Module) -> Iterator[None]:
    """Show the parts by name in the profiler inside this context."""
    open_ranges, handles = [], []

    def begin(name: str) -> None:
        open_ranges.append(torch.profiler.record_function(name))
        open_ranges[-1].__enter__()

    for name, part in parts_of(model).items():
        handles.append(part.register_forward_pre_hook(_ignoring_tokens(lambda *_, name=name: begin(name))))
        handles.append(
            part.register_forward_hook(_ignoring_tokens(lambda *_: open_ranges.pop().__exit__(None, None, None)))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layer_table(parts: Sequence[Part]) -> TextTable:
    """Return the parts and their sum as a table of strings; executed GMACs only if they differ, times only if measured."""
    timed = parts[0].seconds is not None
    differ = any(part.macs != part.macs_executed for part in parts)
    head = ["part", "tokens in", "out", "retrieved", "parameters", "GMACs", *["executed"] * differ, "dense", "share"]
    rows = [head + (["ms", "dense", "share"] if timed else [])]
    total = _sum(parts)
    for part in (*parts, total):
        macs = [part.macs, *[part.macs_executed] * differ, part.dense_macs]
        row = [part.name, *("" if n is None else str(n) for n in (part.tokens_in, part.tokens_out))]
        row += [f"+{part.retrieved}" if part.retrieved else "", f"{part.parameters:,}"]
        row += [*(f"{n / 1e9:.3f}" for n in macs), _ratio(part.macs, part.dense_macs)]
        if timed:
            row += [f"{1e3 * part.seconds:.2f}", f"{1e3 * part.dense_seconds:.2f}"]
            row.append(_ratio(part.seconds, part.dense_seconds) if part.name != REST else "")
        rows.append(row)
    return rows


def _sum(parts: Sequence[Part]) -> Part:
    def total(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else sum(values)

    counts = ("parameters", "macs", "macs_executed", "dense_macs", "seconds", "dense_seconds")
    return Part("sum", None, None, 0, None, *map(total, counts))


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.1%}" if theirs > 0 else ""


def layer_rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Return one CSV row per part."""
    return [part._asdict() for part in parts]


def draw_layers(parts: Sequence[Part], path: Path, title: str = "") -> Path:
    """Draw tokens, GMACs and, if measured, time of each part as bars, with those of the dense model as outlines."""
    shown = [part for part in parts if part.name != REST]
    names = [part.name for part in shown]
    timed = shown[0].seconds is not None
    panels = [("tokens", "tokens_in", "dense_tokens", 1.0), ("GMACs per image", "macs", "dense_macs", 1e-9)]
    panels += [("ms per batch", "seconds", "dense_seconds", 1e3)] * timed
    with style():
        figure, axes = new_figure(len(panels), 1, sharex=True)
        figure.set_size_inches(6.5, 2.2 * len(panels))
        for place, (name, ours, theirs, scale) in zip(axes, panels, strict=True):
            values = [[scale * (getattr(part, field) or 0) for part in shown] for field in (ours, theirs)]
            place.bar(names, values[0], color=BLUE, label="this model")
            place.bar(names, values[1], fill=False, edgecolor=BLACK, linewidth=1, label="dense")
            label(place, "", name, title if place is axes[0] else None, legend=False)
            place.grid(axis="x", visible=False)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        axes[-1].set_xticks(range(len(names)), names)
        for text in axes[-1].get_xticklabels():
            text.set(rotation=45, ha="right")
        return save_figure(figure, path)


def write_layers(
    folder: Path, parts: Sequence[Part], facts: Mapping[str, Any], title: str, content: str
) -> list[Path]:
    """Write layers.csv, layers.md, layers.json and layers.png; return the files written.

    Args:
        folder: created if missing.
        parts: see `profile_layers`.
        facts: provenance of the numbers, see `provenance`.
        title: title of the figure.
        content: content of the Markdown file.
    """
    record = {**facts, "title": title, "parts": layer_rows(parts)}
    return [
        write_csv(folder / "layers.csv", layer_rows(parts)),
        write_text_atomically(folder / "layers.md", content + "\n"),
        write_text_atomically(folder / "layers.json", json.dumps(record, indent=1) + "\n"),
        draw_layers(parts, folder / "layers.png", title),
    ]
