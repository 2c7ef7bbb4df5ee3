"""Detect hooks on modules. Fast paths must not skip computations that a hook observes."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module


_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Hooks of these libraries gather, move or record tensors of layers. They do not read tokens.
_HOOKING_LIBRARIES = ("accelerate.", "deepspeed.", "peft.", "torch.distributed.", "torch.utils.", "transformers.")


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether a module itself has a forward or backward hook."""
    return any(getattr(module, kind) for kind in _KINDS)


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module itself has a forward or backward hook, or a global module hook is registered.

    torch makes the same test before it calls only `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


class HookWatch:
    """Detect hooks that observe a module, one of its submodules, or one of some other modules.

    Hooks can be added and submodules replaced at any time (peft and quantization do so), so both are checked in each
    call. To be fast, a call checks a cached list of submodules and walks the module tree only if the list is out of
    date."""

    def __init__(self) -> None:
        self._parts: list[nn.Module] = []  # the module of the last call and its submodules
        self._children: list[nn.Module | None] = []  # children of all parts, in order

    def __call__(self, module: nn.Module, *others: nn.Module) -> bool:
        """Return whether hooks observe `module` with all its submodules, or one of `others` without theirs.

        Hooks of libraries that move or record tensors are ignored, and hooks with an attribute `reads_no_rows`. While
        a graph is compiled, the answer is False."""
        if torch.compiler.is_compiling():
            return False
        modules = (*self._parts_of(module), *others)
        if not any(map(is_hooked, modules)):
            return False
        return any(not (_is_of_library(hook) or getattr(hook, "reads_no_rows", False)) for hook in _hooks_on(modules))

    def _parts_of(self, module: nn.Module) -> list[nn.Module]:
        parts = self._parts  # local reference, in case another thread replaces it
        same = bool(parts) and parts[0] is module
        if not same or [child for part in parts for child in part._modules.values()] != self._children:
            parts = list(module.modules())
            self._children = [child for part in parts for child in part._modules.values()]
            self._parts = parts
        return parts


def _hooks_on(modules: Iterable[nn.Module]) -> Iterator[Callable]:
    """Yield all hooks on these modules and all global module hooks."""
    yield from (hook for kind in _KINDS for hook in getattr(torch_module, "_global" + kind).values())
    yield from (hook for module in modules for kind in _KINDS for hook in getattr(module, kind).values())


def _is_of_library(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_HOOKING_LIBRARIES)
