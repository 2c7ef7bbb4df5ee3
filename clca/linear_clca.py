"""Linear layers for small numbers of tokens, and products with queries that are never computed.

On a CPU, torch multiplies float32 matrices with a BLAS library that is optimized for many rows. With a dozen tokens,
as they are left after a reduction, it can take twice as long as reading the weights. oneDNN, which torch includes, is
faster there, and not slower otherwise unless the layer is tiny.

The layers stay plain `nn.Linear`, because libraries for quantization and adapters look for exactly this class.
"""

import torch
from torch import nn
from torch.autograd import forward_ad

from .fast_paths_clca import fast_paths_enabled
from .hooks_clca import has_own_hooks, is_hooked


try:
    # The operator that torch.compile uses for linear layers on a CPU, and functions to detect tracers. They are not public:
    # if a torch version lacks one of them, layers are always called.
    from torch._C import _are_functorch_transforms_active as _is_transformed
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _onednn_linear = torch.ops.mkldnn._linear_pointwise
    _ = forward_ad._current_level
except (ImportError, AttributeError):
    _onednn_linear = None

# In smaller layers, looking up the plan (about 20 us) takes longer than the multiplication. Measured for 1 to 788 tokens.
_MIN_WEIGHTS = 2**16


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer to `hidden_states` (..., in_features).

    oneDNN is used in inference on a CPU in float32; in all other cases the layer is called. `set_fast_paths(False)`
    and `torch.backends.mkldnn.flags(enabled=False)` turn oneDNN off."""
    # With few tokens these checks take a noticeable share of the time, so the checks that fail most often come first.
    if (
        _onednn_linear is not None
        and not torch.is_grad_enabled()
        and type(layer) is nn.Linear
        and layer.in_features * layer.out_features >= _MIN_WEIGHTS
        and _is_plain(hidden_states)
        and _is_plain_layer(layer, hidden_states)
    ):
        return _onednn_linear(hidden_states, layer.weight, layer.bias, "none", [], "")
    return layer(hidden_states)


def _is_plain(hidden_states: torch.Tensor) -> bool:
    """Return whether the tensor is float32 on a CPU, and no tracer, mode or transform of torch is active."""
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
    """Return whether a linear layer has plain float32 weights that fit, and neither hooks nor a replaced `forward`.

    Quantized and distributed weights are of other classes. Offloading replaces `forward` on the layer itself."""
    return (
        "forward" not in layer.__dict__
        and not is_hooked(layer)
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and hidden_states.shape[-1:] == (layer.in_features,)  # otherwise torch raises a clear error
    )


def linear_products(layer: nn.Module, hidden_states: torch.Tensor, vector: torch.Tensor) -> torch.Tensor | None:
    """Return the products (B, N) of the outputs of a linear layer with one vector, without computing the outputs.

    They are computed as h (W^T v) + b v, at the cost of one output channel.

    Args:
        layer: linear layer with weight W and bias b.
        hidden_states: h, (B, N, in_features).
        vector: v, (B, out_features).

    Returns:
        (B, N) in the dtype of `vector`, or None if the layer is not a plain linear layer or has hooks that may change
        its output.
    """
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
