"""Speed and memory of models beside transformers' own dense ViT of the same shape: what `ufgir benchmark` measures.

The dense model (`ViTForImageClassification`, sdpa) and all cases of a setting run in one process, in turn. Weights are shared:
random ones, drawn wider than for training, so that attention prefers some patches as trained attention does (in a narrow
distribution all patches get nearly the same, and ATS keeps other numbers of tokens than it does in use); or those of a
checkpoint. Images are random. In inference, dtypes below float32 mean weights and images in that type; in training, float32
weights under autocast, with a scaled loss for float16, as Trainer does.
"""

import contextlib
import gc
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..utils.text import one_sentence, shortened
from .agreement import Agreement, Pictures, agreement, answers
from .benchmark_cases import Case, Setting, by_setting, case_config
from .macs import count_macs, dense_config
from .timing import OtherLoad, Quartiles, Race, Run, peak_growth, quartiles, steady, synchronize


logger = logging.getLogger(__name__)

AT_ONCE = {"inference": 16, "training": 4}  # cases in memory beside the dense model; more are timed in several races
ATTENTIVE = 1.5  # deviation of the random weights times the root of the width; of logits of attention it is the square
BUSY = 0.1  # of the cores: more taken by others is worth a warning
WIDE = 0.1  # distance of the quartiles over the median, likewise
NO_CLASSIFIER = (
    "MODEL has no trained classifier: cosines are of the pooled features that one would read, and no classes agree."
)


@dataclass
class Result:
    """What was measured of a case, or of the dense model of its setting.

    Attributes:
        setting, case: None as the case means the dense model.
        name: what it is.
        dense: the dense model that it was timed in turn with; None for that itself.
        seconds: of a batch, one for each round.
        macs, macs_executed: multiply-adds of one image, as the paper counts and as they run; see `count_macs`.
        parameters: of the model.
        setup_seconds: compiling, or exporting and loading, and the first call; None for eager.
        activation_memory: bytes by which the memory of tensors grows at most; in training while gradients are in place, so
            that it is what the peak has beside weights, gradients and the optimizer's state.
        peak_memory: bytes at most, weights and the optimizer's state included. Neither is measured but in eager.
        agreement: with what the dense model says of the pictures, where there are some.
        error: why there are no numbers.
    """

    setting: Setting
    case: Case | None
    name: str
    dense: "Result | None" = None
    seconds: list[float] = field(default_factory=list)
    macs: int | None = None
    macs_executed: int | None = None
    parameters: int | None = None
    setup_seconds: float | None = None
    activation_memory: int | None = None
    peak_memory: int | None = None
    agreement: Agreement | None = None
    error: str | None = None

    @property
    def time(self) -> Quartiles | None:
        """Seconds of a batch."""
        return quartiles(self.seconds) if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        return self.setting.batch_size / self.time.median if self.time else None

    @property
    def speedup(self) -> float | None:
        """Median time of the dense model over that of this one."""
        if self.dense is None or not self.time or not self.dense.time:
            return None
        return self.dense.time.median / self.time.median

    @property
    def macs_ratio(self) -> float | None:
        """Multiply-adds of the dense model over those of this one, as the paper counts."""
        return self.dense.macs / self.macs if self.dense and self.dense.macs and self.macs else None

    @property
    def possible(self) -> float | None:
        """The same, as executed: the speed-up there would be if only multiply-adds took time."""
        executed = self.dense and self.dense.macs_executed
        return executed / self.macs_executed if executed and self.macs_executed else None

    @property
    def realised(self) -> float | None:
        """Share of the possible speed-up that is there."""
        return self.speedup / self.possible if self.speedup and self.possible else None

    def memory_ratio(self, kind: str) -> float | None:
        """`activation_memory` or `peak_memory` over that of the dense model."""
        theirs, ours = self.dense and getattr(self.dense, kind), getattr(self, kind)
        return ours / theirs if theirs and ours is not None else None

    def measured(self, measure: str) -> float | None:
        """The value that a goal is about."""
        if measure in ("activations", "peak"):
            return self.memory_ratio({"activations": "activation_memory", "peak": "peak_memory"}[measure])
        return getattr(self, measure)


@dataclass
class Report:
    """Results in the order of the cases, the dense model first in each setting, and how they came about.

    Attributes:
        other_cores: cores that other processes kept busy meanwhile, None if unknown.
        interrupted, over_time: whether something is missing because the user, or the time limit, ended it.
        notes: what else is to be said, a sentence each.
    """

    results: list[Result] = field(default_factory=list)
    device: str = "cpu"
    threads: int = 1
    repetitions: int = 0
    other_cores: float | None = None
    interrupted: bool = False
    over_time: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers doubtful, a sentence each."""
        found = list(self.notes)
        cores = torch.multiprocessing.cpu_count()
        if self.other_cores is not None and self.other_cores > BUSY * cores:
            found.append(
                f"The machine was busy: other processes used {self.other_cores:.1f} of its {cores} cores meanwhile. Ratios of "
                "times may be off, times are."
            )
        wide = [r for r in self.results if r.time and r.time.spread > WIDE]
        if wide:
            worst = max(wide, key=lambda r: r.time.spread)
            found.append(
                f"{len(wide)} of {len(self.results)} times spread by more than {WIDE:.0%} between their quartiles, most of all "
                f"{worst.name} ({worst.setting}): {worst.time.spread:.0%}. Repeat on a quiet machine."
            )
        if self.interrupted or self.over_time:
            found.append("Partial: the benchmark was ended before all was measured.")
        return found


class Benchmark:
    """Measures cases.

    Args:
        base: the network without reduction, see `case_config`.
        device: where.
        checkpoint: whose weights to use, a folder or Hub repository; None for random ones.
        threads: of torch and ONNX Runtime on a CPU; None for torch's default.
        repetitions: timings of each case.
        seed: of weights, images and the order within rounds.
        time_limit: seconds after which nothing is begun any more.
        pictures: to compare what models say with what the dense one says, eager and in inference only.
        progress: something like a `tqdm` bar: `total`, `update()`, `set_description_str(text)`.
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
        pictures: Pictures | None = None,
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
        self.pictures = pictures
        self.deadline = math.inf
        self._macs: dict[Any, tuple[int, int]] = {}
        self._weights: tuple[int, dict[str, torch.Tensor]] = (0, {})  # of one image size
        self._answers: dict[tuple[int, str], torch.Tensor] = {}  # of the dense model, by image size and dtype
        self._agreements: dict[Any, Agreement] = {}

    def run(self, cases: Sequence[Case]) -> Report:
        """Measure all; what fails is told in its result. Ctrl-C ends it, with what there is by then."""
        report = Report(device=str(self.device), repetitions=self.repetitions)
        load, start = OtherLoad(), time.monotonic()
        self.deadline = start + self.time_limit
        races = [
            (setting, group[i : i + AT_ONCE[setting.mode]])
            for setting, group in by_setting(cases).items()
            for i in range(0, len(group), AT_ONCE[setting.mode])
        ]
        if self.progress is not None:
            self.progress.total = sum(len(group) + 1 for _, group in races) * (self.repetitions + 1)
        with steady(self.threads) as report.threads:
            try:
                for setting, group in races:
                    self._race(setting, group, report)
            except KeyboardInterrupt:
                report.interrupted = True
        if self.pictures is not None and self.base.num_labels == 0:
            report.notes.append(NO_CLASSIFIER)
        report.seconds = time.monotonic() - start
        report.other_cores = load.cores(report.seconds)
        return report

    def _step(self, text: str | None = None) -> None:
        if self.progress is not None:
            self.progress.update(0 if text else 1)
            if text:
                self.progress.set_description_str(text)

    def _race(self, setting: Setting, cases: Sequence[Case], report: Report) -> None:
        """All of one setting, or a part of them, beside the dense model."""
        dense = Result(setting, None, "dense")
        results = [dense, *(Result(setting, case, str(case), dense) for case in cases)]
        report.results += results
        runs: dict[str, Run] = {}
        with contextlib.ExitStack() as stack:
            for index, result in enumerate(results):
                if time.monotonic() > self.deadline:
                    result.error = f"not begun: the time limit of {self.time_limit:g} s was over"
                    report.over_time = True
                    continue
                self._step(f"{result.name} ({setting}): setting up")
                try:
                    runs[str(index)] = stack.enter_context(self._ready(result))
                except Exception as error:  # whatever is wrong with it, the others go on
                    result.error = _reason(error)
            self._step(str(setting))
            race = Race(runs, self.device, self.seed)
            for index, seconds in race.seconds.items():
                results[int(index)].seconds = seconds  # the race fills the list: an interrupted one is of use, too
            try:
                race.warm_up(after=self._step)
                for round_index in range(self.repetitions):
                    if round_index and time.monotonic() > self.deadline:
                        report.over_time = True
                        break
                    race.go(1, after=self._step)
            finally:
                for index, error in race.failures.items():
                    results[int(index)].error = _reason(error)
                    results[int(index)].seconds = []
        if setting.backend == "compiled":
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _ready(self, result: Result) -> Iterator[Run]:
        """What is to be timed, set up, with all but the times in its result."""
        setting = result.setting
        _check_setting(setting, self.device)
        model = self._model(result)
        result.parameters = sum(p.numel() for p in model.parameters())
        result.macs, result.macs_executed = self._count(model, result)
        if self.pictures is not None and (setting.backend, setting.mode) == ("eager", "inference"):
            result.agreement = self._agree(model, result)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (setting.batch_size, model.config.num_channels, *[setting.image_size] * 2)
        pixels = torch.randn(shape, generator=generator).to(self.device)
        make = {"onnx": _onnx_run}.get(setting.backend, _torch_run)
        make = _training_run if setting.mode == "training" else make
        start = time.perf_counter()
        with make(model, pixels, setting, self.device, result) as run:
            if setting.backend != "eager":
                run()
                synchronize(self.device)
                result.setup_seconds = time.perf_counter() - start
            yield run

    def _model(self, result: Result) -> nn.Module:
        """A model with the shared weights, in the setting's mode, on the device."""
        setting = result.setting
        if self._weights[0] != setting.image_size:
            self._weights = (setting.image_size, self._draw_weights(setting))
        weights = self._weights[1]
        torch.manual_seed(self.seed)
        if result.case is None:
            model = make_dense(self.base, setting)
            result.name = f"dense ({'ours' if isinstance(model, CLCAViTForImageClassification) else 'transformers'})"
        else:
            model = CLCAViTForImageClassification(case_config(self.base, result.case))
        trains = setting.mode == "training"
        dtype = torch.float32 if trains else getattr(torch, setting.dtype)
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
        from ..checkpoints.loading import HEAD, load_with_report, some_of  # here, as it takes seconds to import

        model, untrained = load_with_report(self.checkpoint, config, ignore_mismatched_sizes=True)
        if self.pictures is not None:
            if lacking := [name for name in untrained if not name.startswith(HEAD)]:
                raise ValueError(f"{self.checkpoint} has no {some_of(lacking)}: what it would say is random.")
            if untrained:
                self.base.num_labels = 0
        return model.state_dict()

    def _agree(self, model: nn.Module, result: Result) -> Agreement | None:
        """With the dense model, whose answers are kept; None for that itself."""
        assert self.pictures is not None
        size, dtype = result.setting.image_size, result.setting.dtype
        if result.case is None:
            if (size, dtype) not in self._answers:
                self._answers[size, dtype] = answers(model, self.pictures(size))
            return None
        key = result.case._replace(setting=Setting(size, dtype=dtype), goals=())
        if (size, dtype) in self._answers and key not in self._agreements:
            ours = answers(model, self.pictures(size))
            self._agreements[key] = agreement(ours, self._answers[size, dtype], self.base.num_labels > 0)
        return self._agreements.get(key)

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
    """transformers' `ViTForImageClassification` of the same shape. Ours without reduction where there is none (registers, a
    norm before the layers, ...), and for export, which knows ours only."""
    config = CLCAViTConfig.from_dict(dense_config(base).to_dict() | {"image_size": setting.image_size})
    if setting.backend == "onnx":
        return CLCAViTForImageClassification(config)
    values = {name: getattr(config, name) for name in ViTConfig.__dataclass_fields__ if hasattr(config, name)}
    values |= {"num_labels": config.num_labels}
    values = {name: value for name, value in values.items() if name not in ("id2label", "label2id", "architectures")}
    stock = ViTConfig(**values)
    with torch.device("meta"):
        models = CLCAViTForImageClassification(config), ViTForImageClassification(stock)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in models]
    if shapes[0] != shapes[1] or config.pooling != "cls":
        return CLCAViTForImageClassification(config)
    return ViTForImageClassification._from_config(stock, attn_implementation="sdpa")


def _check_setting(setting: Setting, device: torch.device) -> None:
    if setting.backend != "onnx":
        return
    if setting.mode == "training":
        raise ValueError("ONNX files do not train")
    if setting.dtype != "float32":
        raise ValueError("files are exported in float32 only")


def _compiled(function: Callable, device: torch.device) -> Callable:
    """torch.compile, one graph without breaks, as a CUDA graph on a GPU; cases do not share their compiled code."""
    options = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
    if device.type != "cuda":
        return torch.compile(function, **options)
    # What cannot be a CUDA graph is an error, not a line in a log beside numbers of something else.
    graphs = {**torch._inductor.list_mode_options("reduce-overhead"), "triton.cudagraph_or_error": True}
    compiled = torch.compile(function, options=graphs, **options)

    def run(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the outputs of the last call are not needed any more
        return compiled(*args)

    return run


@contextlib.contextmanager
def _torch_run(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, result: Result
) -> Iterator[Run]:
    """Logits of a batch."""
    pixels = pixels.to(next(model.parameters()).dtype)

    def forward(images: torch.Tensor) -> torch.Tensor:
        return model(images).logits

    function = _compiled(forward, device) if setting.backend == "compiled" else forward

    def run() -> None:
        with torch.inference_mode():
            function(pixels)

    if setting.backend == "eager":
        result.activation_memory = peak_growth(run, device)
        result.peak_memory = result.activation_memory + _size(model)
    yield run


@contextlib.contextmanager
def _onnx_run(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, result: Result
) -> Iterator[Run]:
    """Logits of a batch, of the exported model in ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError("ONNX Runtime is not installed: pip install 'clca-vit[export]'") from error
    from ..export import export_model

    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise ValueError(f"this ONNX Runtime has no {provider}")
    with tempfile.TemporaryDirectory() as folder:
        path = export_model(model, Path(folder) / "model.onnx").path
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if provider not in session.get_providers():  # whose libraries did not load
        raise ValueError(f"this ONNX Runtime cannot start its {provider}")
    binding = session.io_binding()  # images and logits stay where they are
    images = onnxruntime.OrtValue.ortvalue_from_numpy(pixels.cpu().numpy(), device.type, device.index or 0)
    binding.bind_ortvalue_input("pixel_values", images)
    binding.bind_output("logits", device.type, device.index or 0)
    yield lambda: session.run_with_iobinding(binding)


@contextlib.contextmanager
def _training_run(
    model: nn.Module, pixels: torch.Tensor, setting: Setting, device: torch.device, result: Result
) -> Iterator[Run]:
    """Forward, backward and AdamW. The learning rate is so small that the weights, and with them ATS' choice, stay."""
    labels = torch.arange(setting.batch_size, device=device) % model.config.num_labels
    dtype = getattr(torch, setting.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, weight_decay=0.05, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def forward(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(pixel_values=images, labels=labels).loss

    function = _compiled(forward, device) if setting.backend == "compiled" else forward

    def gradients() -> None:
        scaler.scale(function(pixels, labels)).backward()

    def run() -> None:
        gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    if setting.backend == "eager":
        result.activation_memory = activation_memory(model, gradients, device)
        run()  # now there is a state of the optimizer
        kept = _size(model) + sum(_bytes(v) for state in optimizer.state.values() for v in state.values())
        result.peak_memory = kept + peak_growth(run, device)
    yield run


def activation_memory(model: nn.Module, gradients: Run, device: torch.device) -> int:
    """Bytes by which memory grows at most in forward and backward, `gradients`, while gradients to add to are in place."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    grown = peak_growth(gradients, device)
    model.zero_grad(set_to_none=True)
    return grown


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _size(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(map(_bytes, (*model.parameters(), *model.buffers())))


def _reason(error: Exception) -> str:
    text = one_sentence(error)
    return shortened(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}", 200)
