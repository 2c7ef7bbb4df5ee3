"""Record gradient magnitudes of each training step in a CSV file, and plot them like the paper's figure."""

import csv
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback

from ..utils.files import raise_disk_full, whole_file
from ..utils.plotting import label, new_figure, plain_style, save_figure, style
from .checkpoint_files import GRADIENTS_FILE


if TYPE_CHECKING:
    from matplotlib.figure import Figure


logger = logging.getLogger(__name__)

STATISTICS = {  # column -> axis label, see `gradient_statistics`
    "max_grad_all": "Largest |gradient|",
    "mean_max_grad_layer": "Mean over parameters of the largest |gradient|",
    "std_max_grad_layer": "Std over parameters of the largest |gradient|",
    "mean_avg_grad_layer": "Mean over parameters of the mean |gradient|",
    "std_avg_grad_layer": "Std over parameters of the mean |gradient|",
}


def _sizes(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest and the summed absolute value of each gradient: (2, P)."""
    return (_sizes_in_place if gradients[0].device.type == "cpu" else _sizes_fused)(gradients)


def _sizes_fused(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Compute `_sizes` with two fused kernels: fast on a GPU, slow on a CPU."""
    maxima = torch._foreach_norm(gradients, math.inf)
    return torch.stack([*maxima, *torch._foreach_norm(gradients, 1)]).view(2, -1)


def _sizes_in_place(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Compute `_sizes` in one reused buffer, which takes a third of the time on a CPU."""
    buffer = gradients[0].new_empty(max(gradient.numel() for gradient in gradients))
    maxima, sums = [], []
    for gradient in gradients:
        absolute = torch.abs(gradient, out=buffer[: gradient.numel()].view(gradient.shape))
        maxima.append(absolute.max())
        sums.append(absolute.sum())
    return torch.stack(maxima + sums).view(2, -1)


def _statistics(maxima: np.ndarray, means: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the statistics of `gradient_statistics` from max|g| and mean|g| of each parameter, (..., P) each."""
    several = maxima.shape[-1] > 1  # the sample std of one number is not defined
    return {
        "max_grad_all": maxima.max(-1),
        "mean_max_grad_layer": maxima.mean(-1),
        "std_max_grad_layer": maxima.std(-1, ddof=1) if several else np.full(maxima.shape[:-1], np.nan),
        "mean_avg_grad_layer": means.mean(-1),
        "std_avg_grad_layer": means.std(-1, ddof=1) if several else np.full(maxima.shape[:-1], np.nan),
    }


def is_counted(name: str, parameter: torch.nn.Parameter) -> bool:
    """Return whether a parameter is part of the statistics: trainable, with a gradient, and not named a bias."""
    return parameter.requires_grad and "bias" not in name and parameter.grad is not None and parameter.numel() > 0


def gradient_statistics(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, float]:
    """Compute statistics of gradient magnitudes, as the original does.

    Args:
        parameters: name -> parameter; frozen parameters, biases and parameters without gradients are ignored.

    Returns:
        dict of `max_grad_all`, the largest |g|; the mean and sample std over parameters of max|g|
        (`mean_max_grad_layer`, `std_max_grad_layer`) and of mean|g| (`mean_avg_grad_layer`, `std_avg_grad_layer`). The
        original calls a parameter a layer.

    Raises:
        ValueError: if no parameter counts.
    """
    gradients = [p.grad for n, p in parameters.items() if is_counted(n, p)]
    if not gradients:
        raise ValueError("`parameters` must contain a trainable parameter with a gradient that is not a bias.")
    maxima, sums = _sizes(gradients).double().cpu().numpy()
    means = sums / [g.numel() for g in gradients]
    return {name: float(value) for name, value in _statistics(maxima, means).items()}


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: `vit.layers.3`, `vit.embeddings`, `classifier`, ..."""
    return re.match(r"(.*?\.\d+|(.*\.)?vit\.[^.]+|[^.]+)(\.|$)", name)[1]


class GradientRecorder(TrainerCallback):
    """Callback that records gradients in `output_dir/gradients.csv` at each optimizer step, before clipping.

    The columns are `step`, counted from 1, the statistics of `gradient_statistics`, and for each layer `max/<layer>`
    and `mean/<layer>`, the largest and the mean |g| of its weights. Gradients are those of the full batch: accumulated
    and, in fp16, unscaled. Lines are written in blocks, and before every evaluation and checkpoint. A resumed training
    drops the lines after its checkpoint, so that the file equals that of an uninterrupted run. Process 0 writes. At
    the end, the largest gradient of each step is plotted in `gradients.png` in the same folder, if matplotlib is
    installed.

    Requires a `ufgir.training.callbacks.ObserverMixin`, which calls `on_gradients` and `on_abort`.

    Args:
        path: the CSV file; `gradients.csv` in the trainer's output_dir if None.
        flush_every: steps between two writes.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, flush_every: int = 50) -> None:
        if flush_every < 1:
            raise ValueError(f"`flush_every` must be at least 1 step, got {flush_every}.")
        self.path = None if path is None else Path(path)
        self.flush_every = flush_every
        self.names: list[str] = []  # recorded parameters, known from the first step on
        self.steps: list[int] = []  # of steps not written yet
        self.sizes: list[torch.Tensor] = []  # of these steps, (2, P) each, on their device

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.path = self.path or Path(args.output_dir) / GRADIENTS_FILE
        self.names, self.steps, self.sizes = [], [], []
        if state.is_world_process_zero:
            _keep_lines(self.path, state.global_step)

    def on_gradients(self, args: Any, state: Any, model: torch.nn.Module, scale: float) -> None:
        """Record the gradients of the step that follows `state.global_step`, multiplied by `scale` (fp16)."""
        if not state.is_world_process_zero:
            return
        parameters = {n: p for n, p in model.named_parameters() if is_counted(n, p)}
        gradients = [p.grad for p in parameters.values()]
        if not gradients or any(type(g) is not torch.Tensor for g in gradients):
            if not self.names:
                logger.warning("Gradients are not recorded: they are sharded across processes or stored elsewhere.")
            self.names = ["-"]
            return
        if self.names != list(parameters):  # the first step, or parameters were frozen or unfrozen
            self.flush()
            self.names, self.numels = list(parameters), [p.numel() for p in parameters.values()]
        self.steps.append(state.global_step + 1)
        self.sizes.append(_sizes(gradients) / scale)
        if len(self.steps) >= self.flush_every:
            self.flush()

    def flush(self) -> None:
        """Write the recorded steps."""
        if not self.steps:
            return
        sizes = torch.stack(self.sizes).double().cpu().numpy()  # (steps, 2, P)
        maxima, sums, numels = sizes[:, 0], sizes[:, 1], np.asarray(self.numels)
        columns = {"step": self.steps, **_statistics(maxima, sums / numels)}
        layers = np.asarray([layer_of(name) for name in self.names])
        for layer in dict.fromkeys(layers.tolist()):
            own = layers == layer
            columns[f"max/{layer}"] = maxima[:, own].max(-1)
            columns[f"mean/{layer}"] = sums[:, own].sum(-1) / numels[own].sum()
        _append(self.path, columns)
        self.steps, self.sizes = [], []

    def _flush_before(self, control: Any) -> None:
        # Steps must be on disk before the checkpoint that includes them. An evaluation may be followed by one.
        if control.should_save or control.should_evaluate:
            self.flush()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush_before(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._flush_before(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flush()
        if state.is_world_process_zero and self.path.is_file():
            try:
                with style():
                    save_figure(stability_figure([self.path]), self.path.with_suffix(".png"))
            except ImportError as error:
                logger.info("Gradients in %s are not plotted: %s", self.path, error)

    def on_abort(self) -> None:
        """Write the recorded steps when training ends with an exception."""
        self.flush()


def _append(path: Path, columns: Mapping[str, Any]) -> None:
    """Append lines; columns that the file lacks are added, empty in its previous lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header, lines = _read(path)
    missing = [name for name in columns if name not in header]
    if missing or not header:
        header += missing
        _rewrite(path, header, lines)
    text = [[f"{value:.7g}" for value in columns[name]] if name in columns else None for name in header]
    with raise_disk_full(path), path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(zip(*(t or [""] * len(columns["step"]) for t in text), strict=True))


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header and the complete lines of a file; empty if there is no file."""
    if not path.is_file():
        return [], []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(line for line in file if line.endswith("\n")))  # the last line may be cut off
    return (lines[0], lines[1:]) if lines and lines[0][:1] == ["step"] else ([], [])


def _rewrite(path: Path, header: list[str], lines: list[list[str]]) -> None:
    with whole_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(line + [""] * (len(header) - len(line)) for line in lines)])


def _keep_lines(path: Path, last: int) -> None:
    """Keep the lines of steps up to `last`, if the file exists; warn if some are missing."""
    header, lines = _read(path)
    kept = [line for line in lines if int(line[0]) <= last]
    if len(kept) < last:
        logger.warning("%s contains only %d of the %d steps before this checkpoint", path, len(kept), last)
    if header and kept:
        _rewrite(path, header, kept)
    else:
        path.unlink(missing_ok=True)


def read_gradients(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the columns of a file of `GradientRecorder`, (steps,) each, float64 (`step`: int64); empty cells are NaN.

    Raises:
        ValueError: if the file is missing, empty or not of this kind.
    """
    header, lines = _read(Path(path))
    if not lines:
        raise ValueError(f"`csv_files`: {path} is not a file of recorded gradients, or has no steps")
    try:
        table = np.asarray([[float(cell or "nan") for cell in line] for line in lines], dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"`csv_files`: {path} is damaged: {error}") from error
    columns = dict(zip(header, table.T, strict=True))
    return columns | {"step": columns["step"].astype(np.int64)}


LONG = 100  # steps; longer trainings are drawn with a running median
DIGITS = 4  # significant digits of a shortened curve


class GradientCurve(NamedTuple):
    """What `draw_curves` draws of a training.

    Attributes:
        steps: (n,) training steps, increasing.
        values: (n,) a statistic of the gradients at these steps.
        level_steps: (k,) steps of the running median; empty for a training of at most `LONG` steps.
        level: (k,) the running median over 5 % of the steps.
    """

    steps: np.ndarray
    values: np.ndarray
    level_steps: np.ndarray
    level: np.ndarray

    @classmethod
    def of(cls, steps: np.ndarray, values: np.ndarray) -> "GradientCurve":
        """Return the curve of a statistic `values` (n,) that was recorded at `steps` (n,)."""
        if len(steps) <= LONG:
            return cls(steps, values, steps[:0], values[:0])
        half = len(steps) // 20 // 2
        level = [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(steps))]
        return cls(steps, values, steps, np.asarray(level))

    def shortened(self, points: int = LONG) -> "GradientCurve":
        """Return a curve of at most `points` values: the largest in each of equal windows, and the median in their middle.

        Values have four significant digits.
        """
        windows = np.array_split(np.arange(len(self.steps)), min(points, len(self.steps)))
        highest = np.asarray([w[0] + np.nan_to_num(self.values[w], nan=-np.inf).argmax() for w in windows], dtype=int)
        middle = np.asarray([w[len(w) // 2] for w in windows], dtype=int) if len(self.level) else highest[:0]
        level_steps, level = self.level_steps[middle], _rounded(self.level[middle])
        return GradientCurve(self.steps[highest], _rounded(self.values[highest]), level_steps, level)


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.asarray([float(f"{value:.{DIGITS}g}") for value in values], dtype=np.float64)


def stability_figure(
    csv_files: Sequence[str | os.PathLike[str]],
    labels: Sequence[str] | None = None,
    column: str = "max_grad_all",
    log: bool = False,
) -> "Figure":
    """Plot the paper's figure "Max Gradient Absolute Value vs Train Step".

    Call this inside `ufgir.utils.plotting.style()`. See `draw_curves` for the lines.

    Args:
        csv_files: files written by `GradientRecorder`, one per training.
        labels: names of the trainings, see `draw_curves`. None: no legend for a single file, the names of the folders
            for several.
        column: column of the files, e.g. `mean_avg_grad_layer`, or `max/<layer>`.
        log: use a logarithmic axis for the gradients.

    Raises:
        ValueError: if there are no files, the number of labels differs, or a file lacks the column.
    """
    if not csv_files or (labels is not None and len(labels) != len(csv_files)):
        raise ValueError(
            f"`labels` must have one label per file of `csv_files`, got {len(labels or ())} for {len(csv_files)} files."
        )
    tables = [read_gradients(file) for file in csv_files]
    for file, table in zip(csv_files, tables, strict=True):
        if column not in table:
            known = ", ".join(name for name in table if name != "step")
            raise ValueError(f"`column` must be a column of {file} ({known}), got {column!r}.")
    names = list(labels) if labels is not None else [Path(file).absolute().parent.name for file in csv_files]
    curves = [GradientCurve.of(table["step"], table[column]) for table in tables]
    return draw_curves(curves, names, column, log, legend=bool(labels) or len(set(names)) > 1)


def draw_curves(
    curves: Sequence[GradientCurve],
    names: Sequence[str],
    column: str = "max_grad_all",
    log: bool = False,
    legend: bool = True,
) -> "Figure":
    """Plot curves of gradients over training steps.

    Trainings of more than 100 steps are drawn as thin lines with every step, and their running median on top.

    Args:
        curves: one per training.
        names: names of the trainings; those with the same name (e.g. several seeds) share a style and a legend entry.
            A name that starts with a variant or a method, such as `CLCA 53.2 %`, gets its style.
        column: the statistic, see `STATISTICS`, for the label of the axis.
        log: use a logarithmic axis for the gradients.
        legend: show the legend.
    """
    looks = {name: plain_style(name, i) for i, name in enumerate(dict.fromkeys(names))}
    figure, axes = new_figure()
    for position, (name, curve) in enumerate(zip(names, curves, strict=True)):
        look = looks[name] | ({"label": None} if name in names[:position] else {})
        if not len(curve.level):
            axes.plot(curve.steps, curve.values, **look | {"linewidth": 1.0, "markersize": 4})
            continue
        # A thin line with every step shows the peaks; a running median in the label's style shows the level.
        axes.plot(curve.steps, curve.values, color=look["color"], linewidth=0.5, alpha=0.35)
        width = max(1, len(curve.level) // 20)
        marks = (list(looks).index(name) * width // 2, 2 * width)
        look |= {"linewidth": 1.4, "markersize": 4, "zorder": 3}
        axes.plot(curve.level_steps, curve.level, markevery=marks, **look)
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    label(axes, "Training step", STATISTICS.get(column, f"|gradient|, {column}"), legend=legend)
    return figure
