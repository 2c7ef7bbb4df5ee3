"""Find out whether hooks watch a module: fast paths must not skip what somebody watches."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_module


_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Their hooks on layers gather, move or record tensors, and read no tokens.
_HOOKING_LIBRARIES = ("accelerate.", "deepspeed.", "peft.", "torch.distributed.", "torch.utils.", "transformers.")


def has_own_hooks(module: nn.Module) -> bool:
    """Whether there is any hook on a module itself, of forward or backward passes."""
    return any(getattr(module, kind) for kind in _KINDS)


def is_hooked(module: nn.Module) -> bool:
    """Whether there is any hook on a module itself, or one on every module, of forward or backward passes. (torch asks the
    same before it calls `forward` and nothing else.)"""
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
    """Says whether somebody's hooks look at what a module, one of its parts, or one of some other modules takes or gives.

    Hooks may come at any time, and parts be replaced (peft and quantisation do that). So both are looked at in each call, but
    in a list of the parts, kept from call to call, which is quick; the tree is walked only when that list is out of date.
    """

    def __init__(self) -> None:
        self._parts: list[nn.Module] = []  # of the module last asked about, itself the first
        self._children: list[nn.Module | None] = []  # of all parts, in their order

    def __call__(self, module: nn.Module, *others: nn.Module) -> bool:
        """Whether anybody watches `module` with all its parts, or `others` themselves. Hooks of libraries that move or record
        tensors do not count, nor those that have an attribute `reads_no_rows`; none do while a graph is compiled."""
        if torch.compiler.is_compiling():
            return False
        modules = (*self._parts_of(module), *others)
        if not any(map(is_hooked, modules)):
            return False
        return any(not (_is_of_library(hook) or getattr(hook, "reads_no_rows", False)) for hook in _hooks_on(modules))

    def _parts_of(self, module: nn.Module) -> list[nn.Module]:
        parts = self._parts  # of its own, should another thread replace it
        same = bool(parts) and parts[0] is module
        if not same or [child for part in parts for child in part._modules.values()] != self._children:
            parts = list(module.modules())
            self._children = [child for part in parts for child in part._modules.values()]
            self._parts = parts
        return parts


def _hooks_on(modules: Iterable[nn.Module]) -> Iterator[Callable]:
    """All hooks on these modules themselves and those on every module."""
    yield from (hook for kind in _KINDS for hook in getattr(torch_module, "_global" + kind).values())
    yield from (hook for module in modules for kind in _KINDS for hook in getattr(module, kind).values())


def _is_of_library(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_HOOKING_LIBRARIES)
