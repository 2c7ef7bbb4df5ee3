"""Tiny models and the table of cases that several test files use."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from transformers import TrainingArguments

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, TokenReduction


METHODS: list[str | None] = [None, *sorted(REDUCTIONS)]

TINY: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,  # 16 patches
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 3,
    "reduction_layers": [1, 2],
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.2,  # with the usual 0.02 so narrow a network attends to everything alike
}

# Options with which the five layers of TINY show all that a method does: by default ToFu would only drop tokens in them.
OPTIONS: dict[str | None, dict[str, Any]] = {"tofu": {"merge_from": 2}}

CACHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cache": {"cross_layer_cache": True, "num_clr_tokens": 1},
    "clca": {"cross_layer_cache": True, "num_clr_tokens": 1, "head": "cla"},
}
TOKENS: dict[str, dict[str, Any]] = {
    "cls": {},
    "cls_mean": {"pooling": "mean"},
    "registers": {"num_register_tokens": 2},
    "no_cls": {"use_class_token": False, "pooling": "mean", "num_clr_tokens": 0},  # CLR start from CLS
}

# By method, and by head and backbone: parameters that sit directly on some module, or are used outside its forward.
VARIANTS: dict[str, dict[str, Any]] = {
    str(method): CACHES["clca"]
    | ({"reduction": method, "keep_rate": 0.5, "reduction_kwargs": OPTIONS.get(method)} if method else {})
    for method in METHODS
} | {
    "ifa": {"reduction": "topk", "keep_rate": 0.5, "head": "ifa"},
    "h2t": {"reduction": "evit", "keep_rate": 0.5, "head": "h2t", "num_register_tokens": 2},
    "vqt": {"reduction": "evit", "keep_rate": 0.5, "head": "vqt", "cross_layer_cache": True},
    "vqt_slicing": {"head": "vqt", "vqt_original_slicing": True},
    "scaled": {"layerscale_value": 0.1, "pre_norm": True, "use_qk_norm": True, "use_swiglu_ffn": True},
    "map": {"reduction": "tome", "keep_rate": 0.5, "use_class_token": False, "pooling": "map"},
}


class Case(NamedTuple):
    """One case of the table: method, cache and head, tokens of the backbone."""

    method: str | None
    cache: str
    tokens: str

    def __str__(self) -> str:
        return "-".join(str(part).lower() for part in self)

    def config(self, **changes: Any) -> CLCAViTConfig:
        options = TINY | CACHES[self.cache] | TOKENS[self.tokens]
        if self.method is not None:
            options |= {"reduction": self.method, "keep_rate": 0.5, "reduction_kwargs": OPTIONS.get(self.method)}
        return CLCAViTConfig(**(options | changes))

    def model(self, **changes: Any) -> CLCAViTForImageClassification:
        return build(self.config(**changes))

    @property
    def reduction(self) -> type[TokenReduction]:
        return TokenReduction if self.method is None else REDUCTIONS[self.method]


# The CLA head reads CLS, so it does not meet `no_cls`.
CASES = [Case(m, c, t) for m in METHODS for c in CACHES for t in TOKENS if (c, t) != ("clca", "no_cls")]


def first_of_families() -> Iterable[str | None]:
    """Yield the first method of each base class. The others differ from it in what they choose, not in the surrounding
    code."""
    families = set()
    for method in METHODS:
        family = None if method is None else REDUCTIONS[method].__mro__[1]
        if family not in families or family is TokenReduction:
            yield method
        families.add(family)


FIRST_OF_FAMILIES = frozenset(first_of_families())


def pairs() -> Iterable[Case]:
    """Yield cases that combine the first method of each family with each cache and each kind of tokens, and each cache
    with each kind of tokens. The other methods of a family get every second combination."""
    caches = list(CACHES)
    for i, method in enumerate(METHODS):
        for j, tokens in enumerate(TOKENS):
            if method not in FIRST_OF_FAMILIES and (i + j) % 2:
                continue
            case = Case(method, caches[(i + j) % 3], tokens)
            yield case if case in CASES else Case(method, caches[i // 3 % 2], tokens)


PAIRS = list(pairs())


def slow_unless(fast: Callable[[Any], bool], cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize` with one name, marking those that are not `fast` as slow."""
    return [case if fast(case) else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def table(cases: Iterable[Case]) -> list[Any]:
    """Return cases for `parametrize`. Those in PAIRS are always run; combinations of all three of method, cache and
    tokens are slow."""
    return slow_unless(PAIRS.__contains__, cases)


def tiny_config(**changes: Any) -> CLCAViTConfig:
    return CLCAViTConfig(**(TINY | changes))


def tiny_model(**changes: Any) -> CLCAViTForImageClassification:
    return build(tiny_config(**changes))


def variant_model(variant: str) -> CLCAViTForImageClassification:
    """Return one of VARIANTS in float32."""
    return tiny_model(**VARIANTS[variant]).float()


def build(config: CLCAViTConfig) -> CLCAViTForImageClassification:
    """Return a float64 model in evaluation mode, always with the same weights for the same configuration."""
    torch.manual_seed(0)
    return CLCAViTForImageClassification(config).double().eval()


def images(count: int = 3, height: int = 32, width: int = 32, seed: int = 1) -> torch.Tensor:
    """Return random images (count, 3, height, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


# The name of the option in the installed transformers: 5.23 changed it.
CHECKPOINTING = next(
    n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n)
)


def checkpoint_activations(model: torch.nn.Module, options: dict[str, Any] | None = None) -> None:
    """Enable activation checkpointing."""
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def labels(count: int = 3) -> torch.Tensor:
    return torch.arange(count) % 3
