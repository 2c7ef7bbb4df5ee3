"""GELU in place: the hidden units of an MLP are a model's largest tensor, and a second one costs as much as the function."""

import torch
from torch import nn
from transformers.activations import GELUActivation

from .fast_paths_clca import fast_paths_enabled
from .hooks_clca import is_hooked


def activate(activation: nn.Module, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The activation of what a layer gave, `hidden` (...): in place where nobody else can hold that tensor, which is in
    inference, for GELU, behind torch's own linear layer and without hooks; otherwise by calling `activation`.
    `set_fast_paths(False)` always calls it."""
    if (
        not torch.is_grad_enabled()
        and type(activation) is GELUActivation
        and type(layer) is nn.Linear
        and fast_paths_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and "forward" not in layer.__dict__
        and not is_hooked(layer)
        and not is_hooked(activation)
    ):
        return torch.ops.aten.gelu_(hidden)
    return activation(hidden)
