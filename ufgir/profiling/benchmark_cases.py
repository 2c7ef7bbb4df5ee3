"""Cases that `ufgir benchmark` compares, their settings, and goals for some of them."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

from clca import REDUCTIONS, CLCAViTConfig
from clca.reductions_clca import get_reduction


class Backend(NamedTuple):
    """What computes a model.

    Attributes:
        title: name in sentences.
        dtypes: those of `DTYPES` in which it is measured.
        trains: whether it measures training steps.
    """

    title: str
    dtypes: tuple[str, ...]
    trains: bool = False


BACKENDS = {
    "eager": Backend("PyTorch", ("float32", "bfloat16", "float16"), trains=True),
    "compiled": Backend("torch.compile", ("float32", "bfloat16", "float16"), trains=True),
    "aoti": Backend("AOTInductor", ("float32", "bfloat16", "float16")),
    "onnx": Backend("ONNX Runtime", ("float32", "int8")),
    "openvino": Backend("OpenVINO", ("float32", "bfloat16", "float16", "int8")),
}
MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16", "float16", "int8")

_CACHE = {"cross_layer_cache": True, "num_clr_tokens": 1}
# Name -> fields that it adds to a configuration.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "CLC": _CACHE,
    "CLA": {"head": "cla"},
    "CLCA": {**_CACHE, "head": "cla"},
    "IFA": {"head": "ifa"},
    "H2T": {"head": "h2t"},
    "VQT": {"head": "vqt"},
}
# Name -> width, layers, heads.
MODEL_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


class Setting(NamedTuple):
    """How a model is measured. A table has the models of one setting on all backends."""

    image_size: int  # pixels
    batch_size: int = 1
    dtype: str = "float32"
    backend: str = "eager"
    mode: str = "inference"

    @property
    def table(self) -> "Setting":
        """The setting without its backend."""
        return self._replace(backend="")

    def __str__(self) -> str:
        parts = (self.mode, f"{self.image_size} px", f"batch {self.batch_size}", self.dtype, self.backend)
        return ", ".join(part for part in parts if part)


class Goal(NamedTuple):
    """A bound for a measured value, see `Result`: `speedup`, `realised`, `over_fastest` or, for the fastest deployment of a model, `share` (at
    least), `same_kernels` (at least); `activations` and `peak` memory and the time (`over_stock`) as shares of transformers' dense model
    (at most)."""

    measure: str
    value: float

    @property
    def at_most(self) -> bool:
        return self.measure in ("activations", "peak", "over_stock")

    def met(self, value: float) -> bool:
        """Return whether a measured value meets the goal."""
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        words = {
            "speedup": "{}x",
            "realised": "{} of GMACs",
            "over_fastest": "{}x the fastest dense",
            "share": "{} of GMACs over the fastest dense",
            "same_kernels": "{} of GMACs over dense (ours)",
            "over_float32": "{}x its float32",
            "over_stock": "time {}x transformers'",
            "activations": "activations {}",
            "peak": "peak memory {}",
        }
        sign = "≤" if self.at_most else "≥"
        return words[self.measure].format(f"{sign} {self.value:g}")


class Case(NamedTuple):
    """One model to measure."""

    setting: Setting
    method: str | None  # of token reduction
    variant: str = "base"
    keep_rate: float = 1.0
    goals: tuple[Goal, ...] = ()
    layers: tuple[int, ...] | None = None  # that reduce; None for those of the network
    options: tuple[tuple[str, Any], ...] = ()  # of the method
    target_gmacs: float | None = None  # cost per image that the keep rate was chosen for

    @property
    def is_dense(self) -> bool:
        """Whether this is our dense model, with the kernels of the others."""
        return self.method is None and self.variant == "base"

    @property
    def model(self) -> "Case":
        """The case without how it is measured: what the deployments of one model share."""
        return self._replace(setting=Setting(self.setting.image_size), goals=())

    def __str__(self) -> str:
        if self.is_dense:
            return "dense (ours)"
        name = self.method or "no reduction"
        name = name if self.variant == "base" else f"{name} + {self.variant}"
        where = "" if self.layers is None else f" in {len(self.layers)} layers"
        return f"{name}{where}, {self.keep_rate:g}" if self.method else name


def case_config(base: CLCAViTConfig, case: Case) -> CLCAViTConfig:
    """Return the configuration of a case.

    Args:
        base: configuration without reduction; its `reduction_layers` apply to the case.
        case: the case. A method whose token counts depend on the image is padded to its bound if the backend needs static shapes.

    Raises:
        ValueError: if `CLCAViTConfig` refuses the configuration.
    """
    values = base.to_dict() | {"image_size": case.setting.image_size} | VARIANTS[case.variant]
    if case.layers is not None:
        values["reduction_layers"] = list(case.layers)
    if case.method is not None:
        options = dict(case.options)
        if case.setting.backend != "eager" and not get_reduction(case.method).static_shapes:
            options["pad_to_bound"] = True
        values |= {"reduction": case.method, "keep_rate": [case.keep_rate], "reduction_kwargs": options or None}
    return CLCAViTConfig.from_dict(values)


def quarters(num_layers: int) -> list[int]:
    """Return reduction layers at a quarter, half and three quarters of the depth, for example 3, 6, 9 of 12."""
    return sorted({num_layers * i // 4 for i in (1, 2, 3)})


def cross(
    methods: Iterable[str | None],
    variants: Iterable[str],
    keep_rates: Iterable[float],
    settings: Iterable[Setting],
) -> list[Case]:
    """Return every combination; a model without reduction has no keep rate and appears once."""
    cases = []
    for setting, method, variant, rate in product(settings, methods, variants, keep_rates):
        cases.append(Case(setting, method, variant, rate if method else 1.0))
    return list(dict.fromkeys(cases))


def by_table(cases: Iterable[Any]) -> dict[Setting, list[Any]]:
    """Group cases or results by size, batch, precision and mode, all backends together. Those of one group are timed in turn."""
    groups: dict[Setting, list[Any]] = {}
    for case in cases:
        groups.setdefault(case.setting.table, []).append(case)
    return groups


def chunks(cases: Sequence[Case], most: int) -> list[list[Case]]:
    """Divide cases into lists of about `most` that can be in memory together. All deployments of a model stay together."""
    models: dict[Case, list[Case]] = {}
    for case in cases:
        models.setdefault(case.model, []).append(case)
    found: list[list[Case]] = []
    for deployments in models.values():
        if not found or len(found[-1]) + len(deployments) > most:
            found.append([])
        found[-1] += deployments
    return found


class Preset(NamedTuple):
    """Cases of one table, and how they are measured.

    Attributes:
        title: title of the table.
        cases: the cases, with goals for ViT-B/16.
        device: cpu or cuda.
        threads: threads of torch on a CPU; None for the default.
        repetitions: timings of each case; 0 to measure memory alone.
        model_size: a key of `MODEL_SIZES`.
        network: fields of the configuration that differ from that.
        time_limit: seconds after which no further measurement starts.
        dense_backends: backends on which the dense model is measured as well; None for those of `deployments`.
    """

    title: str
    cases: list[Case]
    device: str = "cpu"
    threads: int | None = 2
    repetitions: int = 9
    model_size: str = "base"
    time_limit: float | None = None
    dense_backends: tuple[str, ...] | None = None
    network: tuple[tuple[str, Any], ...] = ()


def _at_least(speedup: float) -> tuple[Goal, ...]:
    return (Goal("speedup", speedup),)


def _cpu448() -> Preset:
    at = Setting(448, 4)
    own = {"evit": _at_least(3.0), "topk": _at_least(3.2), "ats": _at_least(3.1)}
    own["heuristic"] = _at_least(0.97)  # hides patches but removes none
    others = (Goal("realised", 0.95),)
    cases = [Case(at, None, "base", goals=_at_least(1.05)), Case(at, None, "CLCA", goals=_at_least(1.0))]
    cases += [Case(at, method, "CLCA", 0.1, own.get(method, others)) for method in sorted(REDUCTIONS)]
    cases.append(Case(at, "evit", "CLCA", 0.7, _at_least(1.5)))
    return Preset("ViT-B/16, 448 px, batch 4, float32 on two cores of a CPU, inference", cases)


def _cpu224() -> Preset:
    goals = {1: _at_least(2.6), 8: _at_least(2.7)}
    cases = []
    for batch in (1, 2, 4, 8):
        at = Setting(224, batch)
        cases += [Case(at, None), Case(at, "evit", "CLCA", 0.1, goals.get(batch, ())), Case(at, "topk", "CLCA", 0.1)]
    cases += cross(["evit"], ["base", "CLCA"], [0.25, 0.5, 0.7], [Setting(224, 8)])
    return Preset("ViT-B/16, 224 px, float32 on two cores of a CPU, inference", cases, repetitions=15)


def _backends() -> Preset:
    static = [method for method in sorted(REDUCTIONS) if REDUCTIONS[method].static_shapes]
    cases = cross(static, ["CLCA"], [0.1], [Setting(224, 1), Setting(224, 1, backend="onnx")])
    cases += cross(["evit", "topk", "tome"], ["CLCA"], [0.1], [Setting(224, 1, backend="compiled")])
    return Preset(
        "ViT-B/16, 224 px, batch 1, float32 on two cores of a CPU: eager, ONNX Runtime, torch.compile", cases
    )


def _training() -> Preset:
    same = Goal("same_kernels", 0.95)
    goals = {"evit": (Goal("speedup", 2.8), Goal("activations", 0.35), same)}
    at = Setting(448, 4, mode="training")
    cases = [Case(at, method, "CLCA", 0.1, goals.get(method, ())) for method in ("evit", "topk", "ats")]
    cases.append(Case(at._replace(dtype="bfloat16"), "evit", "CLCA", 0.1, (same,)))
    return Preset(
        "ViT-B/16, 448 px, batch 4, on two cores of a CPU, training step", cases, repetitions=5, time_limit=600.0
    )


def _memory() -> Preset:
    """Measure no times, so that the machine need not be idle."""
    training = Setting(448, 4, mode="training")
    goals = (Goal("activations", 0.35),)
    cases = [Case(Setting(1024), "evit", "CLCA", 0.1)]
    cases += [Case(training._replace(dtype=dtype), "evit", "CLCA", 0.1, goals) for dtype in ("float32", "bfloat16")]
    return Preset(
        "ViT-B/16, memory of a forward at 1024 px and of training at 448 px, batch 4",
        cases,
        repetitions=0,
        dense_backends=(),
    )


def _gpu() -> Preset:
    cases = []
    for backend, goal in (("eager", Goal("speedup", 2.8)), ("compiled", Goal("over_fastest", 2.9))):
        at = Setting(448, 128, "bfloat16", backend)
        cases.append(Case(at, "evit", "CLCA", 0.1, (goal,)))
    at = Setting(448, 32, "bfloat16", mode="training")
    cases.append(Case(at, "evit", "CLCA", 0.1, (Goal("speedup", 2.6), Goal("peak", 0.5))))
    at = Setting(448, 1, "bfloat16", "compiled")
    static = [method for method in sorted(REDUCTIONS) if REDUCTIONS[method].static_shapes]
    faster = (Goal("over_fastest", 1.0),)
    cases += [Case(at, method, "CLCA", 0.1, faster) for method in static]
    title = "ViT-B/16, 448 px, bfloat16 on a GPU"
    return Preset(title, cases, "cuda", None, repetitions=20, time_limit=420.0, dense_backends=())


def _quick() -> Preset:
    every = [None, *sorted(REDUCTIONS)]
    cases = cross([None, "evit"], ["CLCA"], [0.25, 0.5], [Setting(224, 1), Setting(224, 4)])
    cases += cross(every, ["CLCA"], [0.25], [Setting(224, 4)])
    cases += cross(["evit"], ["CLCA"], [0.25], [Setting(224, 4, mode="training")])
    cases += cross(["evit"], ["CLCA"], [0.25], [Setting(224, 1, backend=b) for b in ("onnx", "compiled")])
    cases = list(dict.fromkeys(cases))
    title = "ViT-Ti/16, 224 px, float32: an overview, too short for exact numbers"
    return Preset(title, cases, "auto", None, 5, "tiny", time_limit=110.0, dense_backends=("eager", "onnx"))


DEPLOYED = {"float32": ("eager", "onnx", "openvino"), "bfloat16": ("eager", "openvino"), "int8": ("onnx", "openvino")}
# Backends that take up to a minute to compile.
COMPILED = {
    (448, 1, "float32"): ("compiled",),
    (224, 1, "float32"): ("compiled", "aoti"),
    (448, 1, "bfloat16"): ("compiled",),
    (224, 1, "bfloat16"): ("compiled",),
}


def _deployments() -> Preset:
    """In the order of importance: what the time limit leaves out comes last."""
    shares = {
        (448, 1, "float32"): 0.92,
        (448, 4, "float32"): 0.92,
        (224, 1, "float32"): 0.82,
        (224, 8, "float32"): 0.92,
        (448, 1, "bfloat16"): 0.95,
        (224, 1, "bfloat16"): 0.78,
    }
    cases = []
    for batches in ({448: 1, 224: 1}, {448: 4, 224: 8}):
        for dtype, names in DEPLOYED.items():
            for at in ((size, batch, dtype) for size, batch in batches.items()):
                goals = (Goal("share", shares[at]),) if at in shares else ()
                goals += (Goal("over_float32", 1.6),) if dtype == "int8" else ()
                for name in (*names, *COMPILED.get(at, ())):
                    cases.append(Case(Setting(*at, name), "evit", "CLCA", 0.1, goals))
    title = "ViT-B/16 on two cores of a CPU: the fastest deployments, reduced and dense"
    return Preset(title, cases, repetitions=9, time_limit=1500.0, dense_backends=())


def _tiny() -> Preset:
    goals = {"float32": (Goal("share", 0.75),)}
    cases = [
        Case(Setting(224, 1, dtype, name), "evit", "CLCA", 0.25, goals.get(dtype, ()))
        for dtype, names in DEPLOYED.items()
        for name in (*names, *COMPILED.get((224, 1, dtype), ()))
    ]
    title = "ViT-Ti/16, 224 px, batch 1, on two cores of a CPU: the fastest deployments, reduced and dense"
    return Preset(title, cases, repetitions=15, model_size="tiny", time_limit=300.0, dense_backends=())


def _overhead() -> Preset:
    at = Setting(32)
    cases = [
        Case(at, None, goals=(Goal("over_stock", 1.05),)),
        Case(at, "evit", "CLCA", 0.1, (Goal("over_stock", 1.5),)),
    ]
    network = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 8, "num_labels": 2}
    title = "12 layers of width 8, 32 px, batch 1, eager, one thread: a network too small to compute anything"
    return Preset(title, cases, threads=1, repetitions=101, dense_backends=(), network=tuple(network.items()))


def _sizes() -> Preset:
    """Measure the largest images last: they take longest."""
    settings = [Setting(224, batch) for batch in (1, 4, 16, 64)]
    settings += [Setting(size) for size in (448, 1024, 1536, 2048)]
    cases = [
        Case(setting._replace(backend=name), "evit", "CLCA", 0.1)
        for setting in settings
        for name in ("eager", "onnx", "openvino")
    ]
    title = "ViT-Ti/16, float32 on two cores of a CPU: 224 to 2048 px, batch 1 to 64, the fastest deployments"
    return Preset(title, cases, repetitions=3, model_size="tiny", time_limit=540.0, dense_backends=())


def _methods448() -> Preset:
    share = {"kmedoids": 0.85}
    cases = []
    for method in sorted(set(REDUCTIONS) - {"heuristic"}):  # which removes no tokens
        goals = (Goal("share", share.get(method, 0.9)),)
        is_exported = REDUCTIONS[method].max_exported_patches is None
        for backend in DEPLOYED["float32"] if is_exported else ("eager", "compiled"):
            cases.append(Case(Setting(448, 4, backend=backend), method, "CLCA", 0.1, goals))
    return Preset(
        "ViT-B/16, 448 px, batch 4, float32 on two cores of a CPU: every method on its fastest backend",
        cases,
        repetitions=5,
        dense_backends=DEPLOYED["float32"],
        time_limit=1320.0,
    )


PRESETS = {
    "cpu448": _cpu448(),
    "cpu224": _cpu224(),
    "backends": _backends(),
    "training": _training(),
    "memory": _memory(),
    "gpu": _gpu(),
    "quick": _quick(),
    "deployments": _deployments(),
    "deployments-tiny": _tiny(),
    "overhead": _overhead(),
    "sizes": _sizes(),
    "methods448": _methods448(),
}
