"""Linear layers, norms and activations in as little time as the CPU allows, and products with queries that are never
computed.

Calling a module takes longer than a small matrix product, because torch looks for hooks in several places on the way.
A plain module without hooks is therefore not called: its function is, with its parameters.

On a CPU, torch multiplies float32 matrices with a BLAS library that is optimized for many rows. With a dozen tokens,
as they are left after a reduction, it can take twice as long as reading the weights. oneDNN, which torch includes, is
faster there, and not slower otherwise unless the layer is tiny. It also computes the GELU that follows a product
before the product leaves the cache.

The layers stay plain `nn.Linear` and `nn.LayerNorm`, because libraries for quantization and adapters look for exactly
these classes.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import GELUActivation

from .fast_paths_clca import fast_paths_enabled
from .hooks_clca import has_own_hooks, is_hooked


_onednn_linear: Any = None
try:
    # The operator that torch.compile uses for linear layers on a CPU, and functions to detect tracers. They are not public:
    # if a torch version lacks one of them, oneDNN is not used.
    from torch._C import _are_functorch_transforms_active as _is_transformed
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _ = forward_ad._current_level
    _onednn_linear = torch.ops.mkldnn._linear_pointwise.default
except (ImportError, AttributeError):
    pass

# The function behind `torch.ops.aten.gelu_`, which is faster to call.
_gelu_in_place = getattr(getattr(torch._C, "_nn", None), "gelu_", torch.ops.aten.gelu_)

# In smaller layers, looking up the plan (about 20 us) takes longer than the multiplication. Measured for 1 to 788 tokens.
_MIN_WEIGHTS = 2**16


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return the submodules of a module by name. Looking them up as attributes is slower."""
    return module._modules  # ty: ignore[invalid-explicit-return]  # None is possible, but not in the modules of this model


def is_bare(module: nn.Module) -> bool:
    """Return whether calling a module does nothing but run the `forward` of its class, so that its function can be
    called instead.

    A module must be called

    - if it has hooks, or there are global ones;
    - if its own `forward` was replaced, as in offloading, or it was compiled with `module.compile()`;
    - while a graph is compiled or exported, because its nodes are named after the modules;
    - with `set_fast_paths(False)`.

    A `forward` replaced in the class is not noticed."""
    return (
        not torch.compiler.is_compiling()
        and fast_paths_enabled()
        and not is_hooked(module)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


def linear(layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer to `hidden_states` (..., in_features).

    A plain `nn.Linear` is not called as a module, and oneDNN is used in inference on a CPU in float32.
    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off, `set_fast_paths(False)` both."""
    weight = _weight(layer, hidden_states) if type(layer) is nn.Linear else None
    if weight is None:
        return layer(hidden_states)
    bias = layer._parameters["bias"]
    if weight.numel() >= _MIN_WEIGHTS and _suits_onednn(weight, hidden_states):
        return _onednn_linear(hidden_states, weight, bias, "none", [], "")
    return nn.functional.linear(hidden_states, weight, bias)


def activated_linear(layer: nn.Module, activation: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a linear layer and then an activation function to `hidden_states` (..., in_features).

    GELU after a plain `nn.Linear` is computed together with the product by oneDNN where `linear` would use it, or else
    in place in inference: the hidden activations of the MLP are the largest tensor of a model. In all other cases, and
    with `set_fast_paths(False)`, the activation is called."""
    is_plain = type(layer) is nn.Linear and type(activation) is GELUActivation
    weight = _weight(layer, hidden_states) if is_plain else None
    if weight is None or not is_bare(activation):
        return activation(linear(layer, hidden_states))
    bias = layer._parameters["bias"]
    if weight.numel() >= _MIN_WEIGHTS and _suits_onednn(weight, hidden_states):
        return _onednn_linear(hidden_states, weight, bias, "gelu", [], "none")  # "none": not the tanh approximation
    hidden = nn.functional.linear(hidden_states, weight, bias)
    if torch.is_grad_enabled() or torch.jit.is_tracing():
        return activation(hidden)
    return _gelu_in_place(hidden)


def layer_norm(norm: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Apply a norm to `hidden_states` (..., channels). A plain `nn.LayerNorm` is not called as a module."""
    if type(norm) is nn.LayerNorm and (weight := _weight(norm, hidden_states)) is not None:
        return torch.layer_norm(hidden_states, norm.normalized_shape, weight, norm._parameters["bias"], norm.eps)
    return norm(hidden_states)


def _weight(module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
    """Return the weight of a module if the module need not be called, else None.

    Some libraries for distributed training replace parameters by plain attributes, and torch.fx traces with objects that
    are no tensors. In both cases the module is called."""
    parameters = module._parameters
    if "bias" not in parameters or not isinstance(hidden_states, torch.Tensor) or not is_bare(module):
        return None
    return parameters.get("weight")


def _suits_onednn(weight: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Return whether oneDNN computes a product: in inference, in float32 on a CPU, with plain weights, and while no
    tracer, mode or transform of torch is active.

    Quantized and distributed weights are of other classes."""
    # With few tokens these checks take a noticeable share of the time, so the checks that fail most often come first.
    return (
        _onednn_linear is not None
        and not torch.is_grad_enabled()
        and type(weight) is nn.Parameter
        and type(hidden_states) is torch.Tensor
        and weight.dtype == hidden_states.dtype == torch.float32
        and weight.is_cpu
        and hidden_states.is_cpu
        and hidden_states.shape[-1:] == weight.shape[1:]  # otherwise torch raises a clear error
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and not torch.jit.is_tracing()
        and not _is_transformed()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None  # ty: ignore[invalid-explicit-return]  # torch hides a property's type
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
