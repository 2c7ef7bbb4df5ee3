"""Switch for all fast paths: computations that a model skips, or does without calling its modules.

| fast path | where | disable it alone |
| --- | --- | --- |
| unused tokens are not computed | `CLCAViTModel.shortcuts` | `model.vit.skip_unread_rows = False` |
| functions are called instead of plain modules without hooks, and idle modules are skipped | `linear_clca.is_bare` | |
| torch's attention kernel is called directly | `CLCAViTAttention.attend` | |
| the convolution of the CLA head as products, in inference | `heads_clca.LayerConvolution` | |
| linear layers by oneDNN, in float32 inference on a CPU | `linear_clca.linear` | `torch.backends.mkldnn.flags(enabled=False)` |
| GELU within oneDNN's product, or in place, in inference | `linear_clca.activated_linear` | |
| attention output and statistics in one pass, in inference | `AttentionContext._of_chunks` | |
| products of all queries with one vector from the projection weights | `linear_clca.linear_products` | |

Results are the same up to rounding. A fast path is not taken where the difference would be noticeable: with hooks
(`hooks_clca`), recorded hidden states or attention maps, replaced modules, and during tracing. Use the switch for
comparisons and debugging.
"""

_enabled = True


def fast_paths_enabled() -> bool:
    """Return whether fast paths may be taken, see `set_fast_paths`."""
    return _enabled


class set_fast_paths:
    """Turn all fast paths on or off, for all models and threads of the process: permanently, or within a `with` block.

    Args:
        enabled: whether fast paths may be taken. They are on by default.

    Example:

    ```python
    >>> from clca import set_fast_paths
    >>> with set_fast_paths(False):
    ...     pass  # forward passes in this block call every module, on all tokens
    >>> _ = set_fast_paths(True)

    ```
    """

    def __init__(self, enabled: bool) -> None:
        global _enabled
        self._before, _enabled = _enabled, bool(enabled)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _enabled
        _enabled = self._before
