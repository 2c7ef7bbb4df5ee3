"""In-place GELU. The hidden activations of the MLP are the largest tensor of a model, and a second copy costs as much
time as the function.
"""

import torch
from torch import nn
from transformers.activations import GELUActivation

from .fast_paths_clca import fast_paths_enabled
from .hooks_clca import is_hooked


def activate(activation: nn.Module, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Apply `activation` to `hidden`, the output of `layer`.

    GELU is applied in place if no other code can hold a reference to `hidden`: in inference, after a plain
    `nn.Linear`, and without hooks. In all other cases, and with `set_fast_paths(False)`, `activation` is called.

    Args:
        activation: activation function of an MLP.
        layer: module that computed `hidden`.
        hidden: tensor of any shape.

    Returns:
        Tensor of the same shape.
    """
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
