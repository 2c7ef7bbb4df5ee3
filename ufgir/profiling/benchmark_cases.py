"""Cases that `ufgir benchmark` compares, their settings, and goals for some of them."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

from clca import REDUCTIONS, CLCAViTConfig
from clca.reductions_clca import get_reduction


BACKENDS = ("eager", "compiled", "onnx")
MODES = ("inference", "training")
DTYPES = ("float32", "bfloat16", "float16")

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
    """What a case shares with the dense model it is compared with. Cases of one setting are timed in turn."""

    image_size: int  # pixels
    batch_size: int = 1
    dtype: str = "float32"
    backend: str = "eager"
    mode: str = "inference"

    def __str__(self) -> str:
        return f"{self.mode}, {self.image_size} px, batch {self.batch_size}, {self.dtype}, {self.backend}"


class Goal(NamedTuple):
    """A bound for a measured value: `speedup` over the dense model and `realised` share of the GMAC ratio (at least), `activations` and
    `peak` memory as shares of the dense model (at most)."""

    measure: str
    value: float

    @property
    def at_most(self) -> bool:
        return self.measure in ("activations", "peak")

    def met(self, value: float) -> bool:
        """Return whether a measured value meets the goal."""
        return value <= self.value if self.at_most else value >= self.value

    def __str__(self) -> str:
        words = {
            "speedup": "{}x",
            "realised": "{} of GMACs",
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

    def __str__(self) -> str:
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


def by_setting(cases: Sequence[Case]) -> dict[Setting, list[Case]]:
    """Group the cases by setting, that is by the dense model they are compared with."""
    groups: dict[Setting, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.setting, []).append(case)
    return groups


class Preset(NamedTuple):
    """Cases of one table, and how they are measured.

    Attributes:
        title: title of the table.
        cases: the cases, with goals for ViT-B/16.
        device: cpu or cuda.
        threads: threads of torch on a CPU; None for the default.
        repetitions: timings of each case.
        model_size: a key of `MODEL_SIZES`.
        time_limit: seconds after which no further measurement starts.
    """

    title: str
    cases: list[Case]
    device: str = "cpu"
    threads: int | None = 2
    repetitions: int = 9
    model_size: str = "base"
    time_limit: float | None = None


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
    at = Setting(448, 4, mode="training")
    goals = {"evit": (Goal("speedup", 2.8), Goal("activations", 0.45))}
    cases = [Case(at, method, "CLCA", 0.1, goals.get(method, ())) for method in ("evit", "topk", "ats")]
    return Preset("ViT-B/16, 448 px, batch 4, float32 on two cores of a CPU, training step", cases, repetitions=5)


def _gpu() -> Preset:
    cases = []
    for backend, goal in (("eager", 2.8), ("compiled", 2.9)):
        at = Setting(448, 128, "bfloat16", backend)
        cases.append(Case(at, "evit", "CLCA", 0.1, _at_least(goal)))
    at = Setting(448, 1, "bfloat16", "compiled")
    static = [method for method in sorted(REDUCTIONS) if REDUCTIONS[method].static_shapes]
    cases += [Case(at, method, "CLCA", 0.1, _at_least(1.0)) for method in static]
    at = Setting(448, 32, "bfloat16", mode="training")
    cases.append(Case(at, "evit", "CLCA", 0.1, (Goal("speedup", 2.6), Goal("peak", 0.5))))
    return Preset("ViT-B/16, 448 px, bfloat16 on a GPU", cases, device="cuda", threads=None, repetitions=20)


def _quick() -> Preset:
    every = [None, *sorted(REDUCTIONS)]
    cases = cross([None, "evit"], ["CLCA"], [0.25, 0.5], [Setting(224, 1), Setting(224, 4)])
    cases += cross(every, ["CLCA"], [0.25], [Setting(224, 4)])
    cases += cross(["evit"], ["CLCA"], [0.25], [Setting(224, 4, mode="training")])
    cases += cross(["evit"], ["CLCA"], [0.25], [Setting(224, 1, backend=b) for b in ("onnx", "compiled")])
    cases = list(dict.fromkeys(cases))
    title = "ViT-Ti/16, 224 px, float32: an overview, too short for exact numbers"
    return Preset(title, cases, "auto", None, repetitions=5, model_size="tiny", time_limit=110.0)


PRESETS = {
    "cpu448": _cpu448(),
    "cpu224": _cpu224(),
    "backends": _backends(),
    "training": _training(),
    "gpu": _gpu(),
    "quick": _quick(),
}
