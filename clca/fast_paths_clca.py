"""The switch of all fast paths: what a model leaves out, or computes in another way than by calling its modules.

| fast path | where | off in one model or process |
| --- | --- | --- |
| tokens that nobody reads are not computed | `CLCAViTModel.shortcuts` | `model.vit.skip_unread_rows = False` |
| linear layers by oneDNN, in inference on a CPU in float32 | `linear_clca` | `torch.backends.mkldnn.flags(enabled=False)` |
| GELU in place, in inference | `gelu_clca` | |
| attention and what is asked of all of it from one pass, in inference | `AttentionContext._of_chunks` | |
| products of all queries with one vector by the projection's weights | `linear_clca.linear_products` | |

Results are equal but for rounding. Each path steps aside by itself where it would be noticed: for hooks (`hooks_clca`),
recorded hidden states and attention maps, replaced modules and tracers. So the switch is for comparisons and for the search
for a fault.
"""

_enabled = True


def fast_paths_enabled() -> bool:
    """Whether fast paths may be taken, as `set_fast_paths` says."""
    return _enabled


class set_fast_paths:
    """Turn all fast paths on or off, for all models of the process and all of its threads: from now on, or in a `with` block.

    Args:
        enabled: whether fast paths may be taken. They may by default.

    Example:

    ```python
    >>> from clca import set_fast_paths
    >>> with set_fast_paths(False):
    ...     pass  # forwards here call every module, on all tokens
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
