"""Linear layers for the few rows that a reduction leaves.

On a CPU, torch multiplies float32 matrices by its BLAS, which is made for many rows: with a dozen of them it may take twice
the time it takes to read the weights. oneDNN, which torch brings along too, is faster there, and not slower elsewhere.
"""

import torch
from torch import nn


try:
    # What torch.compile puts in the place of a linear layer on a CPU, and ways to see who else is listening. They are not
    # public: in a torch that lacks one of them, all stays as it is there.
    from torch._C import _are_functorch_transforms_active as _is_transformed
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    _onednn_linear = torch.ops.mkldnn._linear_pointwise
except (ImportError, AttributeError):
    _onednn_linear = None


class CLCAViTLinear(nn.Linear):
    """`nn.Linear` that computes by oneDNN in inference on a CPU in float32. `torch.backends.mkldnn.flags(enabled=False)`
    turns that off."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows (..., in_features) to (..., out_features)."""
        if _onednn_linear is not None and self.is_plain(hidden_states):
            return _onednn_linear(hidden_states, self.weight, self.bias, "none", [], "")
        return super().forward(hidden_states)

    def is_plain(self, hidden_states: torch.Tensor) -> bool:
        """Whether these are float32 numbers on a CPU that nobody differentiates, traces, counts or transforms, and of a
        shape that fits: the operator serves nothing else, and says so less clearly than `nn.Linear`."""
        return (
            hidden_states.device.type == "cpu"
            and hidden_states.dtype == self.weight.dtype == torch.float32
            and hidden_states.shape[-1:] == (self.in_features,)
            and type(hidden_states) is torch.Tensor
            and type(self.weight) is nn.Parameter  # quantised and distributed weights are of other classes
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and torch.backends.mkldnn.enabled
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
            and not _is_transformed()
            and _get_current_dispatch_mode() is None
        )
