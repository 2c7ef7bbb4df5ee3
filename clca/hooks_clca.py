"""Who looks at modules: a model leaves out, or computes in another way, only what nobody sees."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module


_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Their hooks on layers gather, move or record tensors, and read no rows.
_HOOKING_LIBRARIES = ("accelerate.", "deepspeed.", "peft.", "torch.distributed.", "torch.utils.", "transformers.")


def hooks_on(modules: Iterable[nn.Module]) -> Iterator[Callable]:
    """All hooks on these modules themselves and those on every module, of forward and backward passes."""
    yield from (hook for kind in _KINDS for hook in getattr(torch_module, "_global" + kind).values())
    yield from (hook for module in modules for kind in _KINDS for hook in getattr(module, kind).values())


def is_hooked(module: nn.Module) -> bool:
    """Whether there is any hook on a module or on a part of it."""
    return any(True for _ in hooks_on(module.modules()))


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody's hooks look at what these modules take or give. Those of libraries that move or record weights do not
    count, nor those that have an attribute `reads_no_rows`, and none do while a graph is compiled."""
    if torch.compiler.is_compiling():
        return False
    return any(not (_is_of_library(hook) or getattr(hook, "reads_no_rows", False)) for hook in hooks_on(modules))


def _is_of_library(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_HOOKING_LIBRARIES)
