"""Models to test fast paths with, and functions that record what runs in them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clca import (
    CLCAViTForImageClassification,
    linear_clca,
)
from tests.helpers import METHODS, tiny_model


CACHE = {"cross_layer_cache": True, "num_clr_tokens": 1, "num_register_tokens": 1}
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def make(method: str | None, **options: Any) -> CLCAViTForImageClassification:
    """Return a model with nonzero biases, like a trained one."""
    model = tiny_model(**options | ({"reduction": method, "keep_rate": 0.5} if method else {}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


# Linear layers by oneDNN.


def count_onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Record the shapes that oneDNN is called with, also by tiny layers."""
    monkeypatch.setattr(linear_clca, "_MIN_WEIGHTS", 0)
    seen: list[tuple[int, ...]] = []
    original = linear_clca._onednn_linear

    def watched(tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(tuple(tokens.shape))
        return original(tokens, *args)

    monkeypatch.setattr(linear_clca, "_onednn_linear", watched)
    return seen


def tokens_seen(module: nn.Module, call: Callable[[], Any]) -> list[int]:
    """Record the number of tokens (B, N, D) that a module is called with."""
    seen: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    call()
    hook.remove()
    return seen
