"""Measure speed and memory of models next to dense ViTs of the same shape, for `ufgir benchmark`.

There are three kinds of dense models: that of transformers as it comes (`ViTForImageClassification` with sdpa, eager), ours with the kernels of
the reduced models, and the fastest of all dense ones on any backend that is measured. All cases of one size, batch and mode run in one process
with the dense ones, with interleaved timing. They share weights: those of a checkpoint, or random ones. Random weights have a larger std than for training, so that attention prefers some patches as it
does after training; with the usual std attention is almost uniform, and ATS keeps an unrealistic number of tokens. Images are random. In
inference, dtypes below float32 apply to weights and images; in training, weights are float32 under autocast, with a scaled loss for float16, as in
Trainer.
"""

import contextlib
import gc
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..utils.provenance import as_read
from ..utils.signals import ending_signals, raise_pending
from ..utils.text import one_sentence, shortened
from .agreement import Agreement, Answers, Images, agreement, answers, share
from .backends import Files, prepare, why_not
from .benchmark_cases import Case, Setting, by_table, case_config, chunks
from .macs import count_macs, dense_config
from .timing import IDLE, InterleavedTiming, OtherLoad, Quartiles, Run, quartiles, steady, synchronize


logger = logging.getLogger(__name__)

AT_ONCE = {
    "inference": 16,
    "training": 4,
}  # cases in memory together with the dense model; more are timed in several groups
ATTENTIVE = 1.5  # std of the random weights times the square root of the width; attention logits have its square
BUSY = 0.1  # share of the cores used by other processes above which a warning appears
CALIBRATION = 8  # random images for int8 of OpenVINO
WIDE = 0.1  # relative distance of the quartiles above which a warning appears
RESTORED = (
    "seconds",
    "macs",
    "macs_executed",
    "parameters",
    "setup_seconds",
    "activation_memory",
    "peak_memory",
    "accuracy",
    "error",
)
NO_CLASSIFIER = "MODEL has no trained classifier, so classes are not compared."


@dataclass
class Result:
    """Measurements of a case, or of the dense model of its setting.

    Attributes:
        setting, case: `case` is None for the dense model of transformers. It computes in float32 in tables of int8.
        name: name in tables.
        dense: result of the dense model of transformers that was timed in turn with this one; None for itself.
        dense_rows: results of all dense models in the same precision that were timed in turn with this one.
        deployments: results of the same model on all backends in the same precision, this one included.
        in_float32: `deployments` in float32; empty for float32 itself.
        seconds: seconds per batch, one value per round.
        macs, macs_executed: multiply-adds per image, as the paper counts them and as executed; see `count_macs`.
        parameters: number of parameters.
        setup_seconds: time to compile, or to export and load, with the first call; None for eager. An export is included in every row that
            uses its file.
        activation_memory: largest increase of tensor memory in bytes. In training, gradients are allocated before, so this is the peak without
            weights, gradients and optimizer state.
        peak_memory: largest memory in bytes, including weights and optimizer state. Both are measured for eager only.
        agreement: agreement with the dense model on images, if any were given.
        accuracy: share of these images that are classified correctly; None if their classes are not known.
        error: why there are no numbers.
        finished: whether all rounds ran, or it failed.
        place: number of its group in the table, and its index in that group; every group times the dense models again.
    """

    setting: Setting
    case: Case | None
    name: str
    dense: "Result | None" = None
    seconds: list[float] = field(default_factory=list)
    dense_rows: "list[Result]" = field(default_factory=list, repr=False)
    deployments: "list[Result]" = field(default_factory=list, repr=False)
    in_float32: "list[Result]" = field(default_factory=list, repr=False)
    macs: int | None = None
    macs_executed: int | None = None
    parameters: int | None = None
    setup_seconds: float | None = None
    activation_memory: int | None = None
    peak_memory: int | None = None
    agreement: Agreement | None = None
    accuracy: float | None = None
    error: str | None = None
    finished: bool = False
    place: tuple[int, int] = (0, 0)

    @property
    def identity(self) -> Any:
        """Return what is measured and with which group, as a value that a JSON file can hold; no two results of a run share it."""
        case = self.case and {name: value for name, value in self.case._asdict().items() if name != "goals"}
        return as_read([self.place, self.setting, case])

    @property
    def time(self) -> Quartiles | None:
        """Return median and quartiles of the seconds per batch."""
        return quartiles(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        return self.setting.batch_size / self.time.median if self.time else None

    @property
    def speedup(self) -> float | None:
        """Return the median time of transformers' dense model divided by that of this one."""
        if self.dense is None or not self.time or not self.dense.time:
            return None
        return self.dense.time.median / self.time.median

    @property
    def macs_ratio(self) -> float | None:
        """Return the multiply-adds of the dense model divided by those of this one, as the paper counts them."""
        return self.dense.macs / self.macs if self.dense and self.dense.macs and self.macs else None

    @property
    def realised(self) -> float | None:
        """Return the speed-up as a share of the ratio of executed multiply-adds, both over transformers' dense model."""
        ratio = executed_ratio(self.dense, self)
        return self.speedup / ratio if self.speedup and ratio else None

    @property
    def is_dense(self) -> bool:
        """Whether this is a dense model."""
        return self.case is None or self.case.is_dense

    @property
    def fastest_dense(self) -> "Result | None":
        """Return the result of the fastest dense deployment in the same precision."""
        return fastest(self.dense_rows)

    @property
    def is_fastest(self) -> bool:
        """Whether no other backend runs this model faster in the same precision."""
        return fastest(self.deployments or [self]) is self

    @property
    def over_fastest(self) -> float | None:
        """Return the median time of the fastest dense deployment divided by that of this model."""
        dense = self.fastest_dense
        return dense.time.median / self.time.median if dense and dense.time and self.time else None

    @property
    def possible(self) -> float | None:
        """Return what `over_fastest` would be if only executed multiply-adds took time."""
        return executed_ratio(self.fastest_dense, self)

    @property
    def share(self) -> float | None:
        """Return `over_fastest` as a share of `possible`."""
        return self.over_fastest / self.possible if self.over_fastest and self.possible else None

    @property
    def over_float32(self) -> float | None:
        """Return the median time of the fastest deployment in float32 divided by that of this model."""
        whole = fastest(self.in_float32)
        return whole.time.median / self.time.median if whole and whole.time and self.time else None

    @property
    def same_kernels(self) -> float | None:
        """Return the speed-up over our dense model on the same backend as a share of the ratio of their executed multiply-adds."""
        ours = next((r for r in self.dense_rows if r.case and r.setting == self.setting), None)
        ratio = executed_ratio(ours, self)
        if ours is None or ours is self or not ours.time or not self.time or not ratio:
            return None
        return ours.time.median / self.time.median / ratio

    @property
    def over_stock(self) -> float | None:
        """Return the median time divided by that of transformers' dense model."""
        return 1 / self.speedup if self.speedup else None

    def memory_ratio(self, kind: str) -> float | None:
        """Return `activation_memory` or `peak_memory`, divided by that of the dense model."""
        theirs, ours = self.dense and getattr(self.dense, kind), getattr(self, kind)
        return ours / theirs if theirs and ours is not None else None

    def measured(self, measure: str) -> float | None:
        """Return the value that a goal refers to."""
        if measure in ("activations", "peak"):
            return self.memory_ratio({"activations": "activation_memory", "peak": "peak_memory"}[measure])
        return getattr(self, measure)


def executed_ratio(dense: Result | None, reduced: Result) -> float | None:
    """Return the executed multiply-adds of one result divided by those of another."""
    if dense is None or not dense.macs_executed or not reduced.macs_executed:
        return None
    return dense.macs_executed / reduced.macs_executed


def _join_precisions(results: Iterable[Result]) -> None:
    """Fill in `in_float32`, which are in other groups."""
    models = {(r.case.model, r.setting.table): r for r in results if r.case}
    for (model, table), result in models.items():
        whole = models.get((model, table._replace(dtype="float32")))
        if whole is not None and table.dtype != "float32":
            for one in result.deployments:
                one.in_float32 = whole.deployments


def _restore(results: Sequence[Result], known: Mapping[str, Mapping[str, Any]]) -> bool:
    """Fill in results from the rows of an earlier run, by identity. Return False, without changes, unless all of them are there."""
    rows = [known.get(json.dumps(result.identity)) for result in results]
    if not all(rows):
        return False
    for result, row in zip(results, rows, strict=True):
        result.name, result.finished = row["model"], True
        for name in RESTORED:
            setattr(result, name, row[name])
        if row["cosine"] is not None:
            result.agreement = Agreement(row["cosine"], row["same_neighbor"], row["same_top1"])
    return True


def fastest(results: Iterable[Result]) -> Result | None:
    """Return the result with the smallest median time, or None if none has a time."""
    return min((r for r in results if r.time), key=lambda r: r.time.median, default=None)


@dataclass
class Report:
    """Results in the order of the cases, the dense models first in each table.

    Attributes:
        load: load of the machine before the benchmark, the average of a minute; None if unknown.
        other_cores: cores that other processes used on average; None if unknown.
        interrupted, over_time: whether results are missing because of Ctrl-C or the time limit.
        missing: settings that are not finished yet.
        complete: whether nothing is missing, and all files were written; set by the caller of `Benchmark.run`.
        notes: further remarks, one sentence each.
    """

    results: list[Result] = field(default_factory=list)
    device: str = "cpu"
    threads: int = 1
    repetitions: int = 0
    load: float | None = None
    other_cores: float | None = None
    interrupted: bool = False
    over_time: bool = False
    missing: list[str] = field(default_factory=list)
    complete: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """Return one sentence for each reason to doubt the numbers."""
        found = list(self.notes)
        cores = torch.multiprocessing.cpu_count()
        if self.repetitions and self.other_cores is not None and self.other_cores > BUSY * cores:
            found.append(
                f"The machine was busy: other processes used {self.other_cores:.1f} of its {cores} cores. Times are "
                "wrong, and their ratios may be."
            )
        if self.repetitions and self.load is not None and self.load > IDLE:
            found.append(
                f"Measured with --force at a load of {self.load:.2f}, above {IDLE}. Do not quote these times."
            )
        wide = [r for r in self.results if r.time and r.time.spread > WIDE]
        if wide:
            worst = max(wide, key=lambda r: r.time.spread)
            found.append(
                f"{len(wide)} of {len(self.results)} times have quartiles more than {WIDE:.0%} apart, the largest distance for "
                f"{worst.name} ({worst.setting}): {worst.time.spread:.0%}. Repeat on an idle machine."
            )
        if self.missing:
            why = (
                "the time limit"
                if self.over_time
                else "an interruption"
                if self.interrupted
                else "the end of the process"
            )
            names = "; ".join(dict.fromkeys(self.missing))
            found.append(f"Partial: {why} came before everything was measured. Left out, or not finished: {names}.")
        return found

    def add_run(self, seconds: float, other_cores: float | None) -> None:
        """Add the seconds of a further run, and the cores that other processes used in it."""
        loads = [(self.other_cores, self.seconds), (other_cores, seconds)]
        loads = [(cores, span) for cores, span in loads if cores is not None]
        self.seconds += seconds
        whole = sum(span for _, span in loads)
        self.other_cores = sum(cores * span for cores, span in loads) / whole if whole else None


class Benchmark:
    """Measure cases.

    Args:
        base: configuration without reduction, see `case_config`.
        device: device to measure on.
        checkpoint: folder or Hub repository with the weights to use; None for random weights.
        threads: threads of torch and ONNX Runtime on a CPU; None for torch's default.
        repetitions: timings of each case; 0 for costs and memory alone or, with images, costs and agreement alone.
        seed: seed of weights, images and the order within rounds.
        time_limit: seconds after which no further measurement starts.
        images: images on which agreement with the dense model is measured, in eager inference only, and on which int8 of OpenVINO is
            calibrated; random ones without them.
        labels: class indices of these images, to measure accuracy as well.
        dense_backends: in inference, backends on which our dense model is measured besides those of the cases; None for no dense model
            but that of transformers.
        progress: an object like a `tqdm` bar: `total`, `update()`, `set_description_str(text)`.
    """

    def __init__(
        self,
        base: CLCAViTConfig,
        device: torch.device,
        checkpoint: str | None = None,
        threads: int | None = None,
        repetitions: int = 7,
        seed: int = 0,
        time_limit: float | None = None,
        progress: Any = None,
        images: Images | None = None,
        labels: Sequence[int] | None = None,
        dense_backends: Sequence[str] | None = None,
    ) -> None:
        self.base = dense_config(base)
        if checkpoint is None:
            self.base.initializer_range = ATTENTIVE / base.hidden_size**0.5
        self.device = device
        self.checkpoint = checkpoint
        self.threads = threads
        self.repetitions = repetitions
        self.seed = seed
        self.time_limit = math.inf if time_limit is None else time_limit
        self.progress = progress
        self.images = images
        self.labels = None if labels is None else torch.tensor(labels)
        self.dense_backends = dense_backends
        self.deadline = math.inf
        self._macs: dict[Any, tuple[int, int]] = {}
        self._weights: tuple[int, dict[str, torch.Tensor]] = (0, {})  # image size, and its weights
        self._answers: dict[tuple[int, str], Answers] = {}  # of the dense model by image size and dtype
        self._compared: dict[Any, tuple[Agreement, float | None]] = {}  # agreement and accuracy of cases

    def run(
        self,
        cases: Sequence[Case],
        save: Callable[[Report], Any] | None = None,
        earlier: Mapping[str, Any] | None = None,
    ) -> Report:
        """Measure all cases, one setting after another.

        A failure is recorded in the result of its case. Ctrl-C and other signals that end a run take effect between two calls of models, and
        what was measured is kept.

        Args:
            cases: the cases.
            save: called with the report whenever a setting is finished.
            earlier: record of an unfinished run (`benchmark_report.record`), whose finished settings are not measured again.
        """
        report = Report(device=str(self.device), repetitions=self.repetitions)
        if earlier is not None:
            report.add_run(earlier["seconds"], earlier["other_cores"])
            report.notes += [note for note in earlier["notes"] if note == NO_CLASSIFIER]
        load, start = OtherLoad(), time.monotonic()
        before = report.seconds, report.other_cores

        def keep() -> None:
            report.seconds, report.other_cores = before
            seconds = time.monotonic() - start
            report.add_run(seconds, load.cores(seconds))
            lacks = self.images is not None and self.base.num_labels == 0  # known once the weights are loaded
            if lacks and NO_CLASSIFIER not in report.notes:
                report.notes.append(NO_CLASSIFIER)
            if save is not None:
                save(report)

        self.files = Files(self._calibration)
        self.deadline = start + self.time_limit
        groups = [
            (setting, self._with_dense(chunk, number))
            for setting, group in by_table(cases).items()
            for number, chunk in enumerate(chunks(group, AT_ONCE[setting.mode]))
        ]
        _join_precisions([result for _, group in groups for result in group])
        rows = earlier["results"] if earlier is not None else []
        known = {json.dumps(row["identity"]): row for row in rows if row["finished"]}
        todo = []
        for setting, group in groups:
            if _restore(group, known):
                report.results += group
            else:
                todo.append((setting, group))
        report.missing = [str(setting) for setting, _ in todo]
        if self.progress is not None:
            self.progress.total = sum(len(group) for _, group in todo) * (self.repetitions + 1)
        with steady(self.threads) as report.threads:
            try:
                with ending_signals(hold=True):
                    for index, (setting, group) in enumerate(todo):
                        if time.monotonic() > self.deadline:
                            report.over_time = True
                            break
                        self._time_group(setting, group, report)
                        later = (result for _, group in todo[index + 1 :] for result in group)
                        self.files.forget_models((r.case.model, r.setting) for r in later if r.case)
                        if all(result.finished for result in group):
                            report.missing.remove(str(setting))
                        keep()
            except KeyboardInterrupt:
                report.interrupted = True
            finally:
                self.files.close()
        save = None  # the caller has the report
        keep()
        return report

    @property
    def _only_compares(self) -> bool:
        return not self.repetitions and self.images is not None

    def _step(self, text: str | None = None) -> None:
        raise_pending()
        if self.progress is not None:
            self.progress.update(0 if text else 1)
            if text:
                self.progress.set_description_str(text)

    def _with_dense(self, cases: Sequence[Case], number: int = 0) -> list[Result]:
        """Return results to be filled, of cases and the dense models of their tables, as the group of this number."""
        results: list[Result] = []
        for table in dict.fromkeys(case.setting.table for case in cases):
            here = [case for case in cases if case.setting.table == table]
            stock = Result(table._replace(backend="eager"), None, "dense")
            if self.dense_backends is not None and not self._only_compares:
                more = self.dense_backends if table.mode == "inference" else ()
                backends = dict.fromkeys([*(case.setting.backend for case in here), *more])
                settings = [table._replace(backend=backend) for backend in backends]
                ours = [Case(setting, None) for setting in settings if why_not(setting) is None]
                known = [case._replace(goals=()) for case in here]
                here = [*(case for case in ours if case not in known and self._differs(case)), *here]
            rows = [Result(case.setting, case, str(case), stock) for case in here]
            dense = [r for r in (stock, *rows) if r.is_dense and (r.case or table.dtype != "int8")]
            models: dict[Case, list[Result]] = {}
            for row in rows:
                row.dense_rows, row.deployments = dense, models.setdefault(row.case.model, [])
                row.deployments.append(row)
            results += [stock, *rows]
        for index, result in enumerate(results):
            result.place = (number, index)
        return results

    def _differs(self, case: Case) -> bool:
        """Whether our dense model is another than the one that takes the place of transformers'."""
        return (
            case.setting.backend != "eager"
            or case.setting.dtype == "int8"
            or stock_config(self.base, case.setting) is not None
        )

    def _time_group(self, setting: Setting, results: Sequence[Result], report: Report) -> None:
        """Time some models in turn."""
        report.results += results
        runs: dict[str, Run] = {}
        with contextlib.ExitStack() as stack:
            for index, result in enumerate(results):
                if time.monotonic() > self.deadline:
                    result.error = f"not started: the time limit of {self.time_limit:g} s had passed"
                    report.over_time = True
                    continue
                self._step(f"{result.name} ({result.setting}): setting up")
                try:
                    runs[str(index)] = stack.enter_context(self._ready(result))
                except Exception as error:  # one failing case must not stop the others
                    result.error, result.finished = _reason(error), True
                if not self.repetitions:
                    self._step()
            if self.repetitions:
                self._step(str(setting))
                self._time(runs, results, report)
        for result in results:
            untimed = not self.repetitions and result.error is None
            result.finished |= untimed or len(result.seconds) == self.repetitions > 0
        if any(result.setting.backend == "compiled" for result in results):
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _time(self, runs: dict[str, Run], results: Sequence[Result], report: Report) -> None:
        """Time functions in turn, each named by the index of its result."""
        pause = len({results[int(index)].setting.backend for index in runs}) > 1
        timing = InterleavedTiming(runs, self.device, self.seed, pause)
        for index, seconds in timing.seconds.items():
            results[int(index)].seconds = seconds  # the same list, so that an interrupted run keeps its times
        try:
            timing.warm_up(after=self._step)
            for round_index in range(self.repetitions):
                if round_index and time.monotonic() > self.deadline:
                    report.over_time = True
                    break
                timing.run(1, after=self._step)
        finally:
            for index, error in timing.failures.items():
                results[int(index)].error = _reason(error)
                results[int(index)].seconds = []
                results[int(index)].finished = True

    @contextlib.contextmanager
    def _ready(self, result: Result) -> Iterator[Run]:
        """Set up the function to time, and fill in all of the result except the times."""
        setting = result.setting
        if result.case is None and setting.dtype == "int8":
            setting = setting._replace(dtype="float32")
        if (why := why_not(setting)) is not None:
            raise ValueError(why)
        model = self._model(result)
        result.parameters = sum(p.numel() for p in model.parameters())
        result.macs, result.macs_executed = self._count(model, result)
        if self.images is not None and (setting.backend, setting.mode) == ("eager", "inference"):
            self._compare(model, result)
        if self._only_compares:
            yield lambda: None
            return
        generator = torch.Generator().manual_seed(self.seed)
        shape = (setting.batch_size, model.config.num_channels, *[setting.image_size] * 2)
        pixels = torch.randn(shape, generator=generator).to(self.device)
        start = time.perf_counter()
        with prepare(model, pixels, setting, self.device, self.files, result.case and result.case.model) as prepared:
            result.activation_memory, result.peak_memory = prepared.activation_memory, prepared.peak_memory
            if setting.backend != "eager":
                prepared.run()
                synchronize(self.device)
                result.setup_seconds = time.perf_counter() - start + prepared.seconds
            yield prepared.run

    def _calibration(self, size: int) -> Iterable[torch.Tensor]:
        """Return images for int8."""
        if self.images is not None:
            return self.images(size)
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.randn(CALIBRATION, self.base.num_channels, size, size, generator=generator)]

    def _model(self, result: Result) -> nn.Module:
        """Create a model with the shared weights, in the mode of the setting, on the device."""
        setting = result.setting
        if self._weights[0] != setting.image_size:
            self._weights = (setting.image_size, self._draw_weights(setting))
        weights = self._weights[1]
        torch.manual_seed(self.seed)
        if result.case is None:
            model = make_dense(self.base, setting)
            result.name = f"dense ({'ours' if isinstance(model, CLCAViTForImageClassification) else 'transformers'})"
            if setting.dtype == "int8":
                result.name += " in float32"
        else:
            model = CLCAViTForImageClassification(case_config(self.base, result.case))
        trains = setting.mode == "training"
        dtype = torch.float32 if trains or setting.dtype == "int8" else getattr(torch, setting.dtype)
        model = model.to(self.device, dtype).train(trains)
        for name, parameter in model.named_parameters():
            shared = weights.get(name)
            if shared is not None and shared.shape == parameter.shape:
                shared = shared.to(self.device, dtype)
                parameter.data = shared.clone() if trains else shared
        return model

    def _draw_weights(self, setting: Setting) -> dict[str, torch.Tensor]:
        config = CLCAViTConfig.from_dict(dense_config(self.base).to_dict() | {"image_size": setting.image_size})
        if self.checkpoint is None:
            torch.manual_seed(self.seed)
            return CLCAViTForImageClassification(config).state_dict()
        from ..checkpoints.loading import HEAD, first_few, load_with_report  # here, as it takes seconds to import

        model, untrained = load_with_report(self.checkpoint, config, ignore_mismatched_sizes=True)
        if self.images is not None:
            if lacking := [name for name in untrained if not name.startswith(HEAD)]:
                raise ValueError(f"{self.checkpoint} has no {first_few(lacking)}: its predictions would be random.")
            if untrained:
                self.base.num_labels = 0
        return model.state_dict()

    def _compare(self, model: nn.Module, result: Result) -> None:
        """Fill in accuracy, and agreement with the dense model except for the dense model itself."""
        assert self.images is not None
        size, dtype = result.setting.image_size, result.setting.dtype
        dense = self._answers.get((size, dtype))
        if result.case is None:
            if dense is None:
                dense = self._answers[size, dtype] = answers(model, self.images(size))
            result.accuracy = self._accuracy(dense)
            return
        key = result.case._replace(setting=Setting(size, dtype=dtype), goals=())
        if dense is not None and key not in self._compared:
            ours = answers(model, self.images(size))
            self._compared[key] = agreement(ours, dense, self.base.num_labels > 0), self._accuracy(ours)
        result.agreement, result.accuracy = self._compared.get(key, (None, None))

    def _accuracy(self, found: Answers) -> float | None:
        """Return the share of images that are classified correctly; None without labels or a trained classifier."""
        if self.labels is None or self.base.num_labels == 0:
            return None
        return share(found.logits.argmax(dim=1) == self.labels)

    def _count(self, model: nn.Module, result: Result) -> tuple[int, int]:
        case = result.case and result.case._replace(setting=Setting(result.setting.image_size), goals=())
        key = (
            case,
            result.setting.image_size,
            (getattr(model.config, "reduction_kwargs", None) or {}).get("pad_to_bound"),
        )
        if key not in self._macs:
            self._macs[key] = count_macs(model), count_macs(model, as_executed=True)
        return self._macs[key]


def make_dense(base: CLCAViTConfig, setting: Setting) -> nn.Module:
    """Build transformers' `ViTForImageClassification` of the same shape. Build our model without reduction if the shape has no counterpart
    (registers, a norm before the layers, ...)."""
    stock = stock_config(base, setting)
    if stock is None:
        return CLCAViTForImageClassification(dense_at(base, setting))
    return ViTForImageClassification._from_config(stock, attn_implementation="sdpa")


def dense_at(base: CLCAViTConfig, setting: Setting) -> CLCAViTConfig:
    """Return the configuration of our dense model at the image size of a setting."""
    return CLCAViTConfig.from_dict(dense_config(base).to_dict() | {"image_size": setting.image_size})


def stock_config(base: CLCAViTConfig, setting: Setting) -> ViTConfig | None:
    """Return the configuration of transformers' ViT of the same shape, or None if there is none."""
    config = dense_at(base, setting)
    values = {name: getattr(config, name) for name in ViTConfig.__dataclass_fields__ if hasattr(config, name)}
    values |= {"num_labels": config.num_labels}
    values = {name: value for name, value in values.items() if name not in ("id2label", "label2id", "architectures")}
    stock = ViTConfig(**values)
    with torch.device("meta"):
        models = CLCAViTForImageClassification(config), ViTForImageClassification(stock)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    return stock if shapes[0] == shapes[1] and config.pooling == "cls" else None


def _reason(error: Exception) -> str:
    text = one_sentence(error)
    return shortened(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}", 200)
