"""Linear layers for the few rows that a reduction leaves, and products with rows that are not computed.

On a CPU, torch multiplies float32 matrices by its BLAS, which is made for many rows: with a dozen of them it may take twice
the time it takes to read the weights. oneDNN, which torch brings along too, is faster there, and not slower elsewhere if the
layer is not tiny.

The layers themselves stay plain `nn.Linear`: what quantises or adapts models looks for just that class.
"""

import torch
from torch import nn
from torch.autograd import forward_ad

from .fast_paths_clca import fast_paths_enabled
from .hooks_clca import has_own_hooks, is_hooked


try:
    # What torch.compile puts in the place of a linear layer on a CPU, and ways to see who else is listening. They are not
    # public: in a torch that lacks one of them, all stays as it is there.
    from torch._C import _are_functorch_transforms_active as _is_transformed
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _onednn_linear = torch.ops.mkldnn._linear_pointwise
    _ = forward_ad._current_level
except (ImportError, AttributeError):
    _onednn_linear = None

# Below, looking up the plan of a multiplication (some 20 us) takes longer than the multiplication. Measured for 1 to 788 rows.
_FEWEST_WEIGHTS = 2**16


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of rows (..., in_features): by oneDNN in inference on a CPU in float32, and by calling the
    layer in all other cases. `set_fast_paths(False)` turns the former off, `torch.backends.mkldnn.flags(enabled=False)` too."""
    # Few rows take little more time than these questions: those that most often answer no come first.
    if (
        _onednn_linear is not None
        and not torch.is_grad_enabled()
        and type(layer) is nn.Linear
        and layer.in_features * layer.out_features >= _FEWEST_WEIGHTS
        and _is_plain(hidden_states)
        and _is_plain_layer(layer, hidden_states)
    ):
        return _onednn_linear(hidden_states, layer.weight, layer.bias, "none", [], "")
    return layer(hidden_states)


def _is_plain(hidden_states: torch.Tensor) -> bool:
    """Whether these are float32 numbers on a CPU that nobody traces, counts or transforms."""
    return (
        fast_paths_enabled()
        and not torch.compiler.is_compiling()
        and type(hidden_states) is torch.Tensor
        and hidden_states.device.type == "cpu"
        and hidden_states.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and not torch.jit.is_tracing()
        and not _is_transformed()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None  # ty: ignore[invalid-explicit-return]  # torch hides a property's type
    )


def _is_plain_layer(layer: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a linear layer has weights of numbers that fit, and nobody has to know that it is called. Quantised and
    distributed weights are of other classes; where offloading replaces `forward`, that stands on the layer itself."""
    return (
        "forward" not in layer.__dict__
        and not is_hooked(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and hidden_states.shape[-1:] == (layer.in_features,)  # else torch says it more clearly
    )


def linear_products(layer: nn.Module, hidden_states: torch.Tensor, vector: torch.Tensor) -> torch.Tensor | None:
    """Products (B, N) of what a linear layer makes of rows (B, N, in_features) with one vector (B, out_features), in the
    vector's dtype: h (W^T v) + b v, at the price of one row. None where its weights do not tell what a call of it gives: it is
    another layer, or hooks on it may bring or change something."""
    if (
        not fast_paths_enabled()
        or type(layer) is not nn.Linear
        or "forward" in layer.__dict__
        or has_own_hooks(layer)
        or type(layer.weight) is not nn.Parameter
    ):
        return None
    products = hidden_states.to(vector.dtype) @ (vector @ layer.weight.to(vector.dtype)).unsqueeze(2)
    products = products.squeeze(2)
    return products if layer.bias is None else products + vector @ layer.bias.to(vector.dtype).unsqueeze(1)
