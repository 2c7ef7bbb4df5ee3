"""Heuristic: attend only to patches near the centre of the image (the baseline of https://huggingface.co/papers/2308.04657).

The official code of that study is MIT. No token is removed: patches outside a radius are masked. CLS, registers, CLR
and retrieved tokens are never masked.
"""

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .budget_clca import Budget
from .reduction_base import TokenReduction, TokenState, identity_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


# The same operations as in the original, in float32, because their last bit decides about patches on the circle. (The square
# root of MKL rounds differently on different CPUs: at 14 x 14 a keep rate of 0.2 leaves 36 patches on some, 44 on others.)
_NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda y, x: y.abs() + x.abs(),
    "l2": lambda y, x: (y * y + x * x).sqrt(),
    "linf": lambda y, x: torch.maximum(y.abs(), x.abs()),
}


class HeuristicReduction(TokenReduction):
    """Before the layer, shrink the circle of patches that are attended to. It stays the same until the next stage.

    Args:
        pattern: norm that defines the circle: `l1`, `l2` or `linf`.
        contiguous: shrink the circle evenly towards `min_radius`, in every layer from the first reduction layer to the
            last; there is no keep rate then. By default the circle shrinks only in the reduction layers, to the radius
            whose number of patches is nearest to the keep rate's cumulative share of all patches.
        min_radius: final radius in patches with `contiguous`; zero or less for the smallest possible one.
    """

    name = "heuristic"

    def __init__(
        self,
        config: "CLCAViTConfig",
        stage: int,
        *,
        pattern: str = "l1",
        min_radius: float = 1.0,
        contiguous: bool = False,
    ) -> None:
        super().__init__(config, stage)
        self.pattern, self.min_radius, self.contiguous = pattern, min_radius, contiguous
        self.make_constants()

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "pattern", lambda v: v in _NORMS, f"one of {', '.join(_NORMS)}")
        if cls.option(config, "contiguous") and (config.keep_tokens is not None or config.keep_rate != [1.0]):
            raise ValueError(
                "`keep_rate` and `keep_tokens` have no effect on `reduction`='heuristic' with `contiguous`, which shrinks "
                f"evenly; got {config.keep_tokens or config.keep_rate}. Remove them, or `contiguous`."
            )

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str | None:
        return "with `contiguous` the circle shrinks evenly" if cls.option(config, "contiguous") else None

    @classmethod
    def layers(cls, config: "CLCAViTConfig") -> list[int]:
        if cls.option(config, "contiguous"):
            return list(range(config.reduction_layers[0], config.reduction_layers[-1] + 1))
        return list(config.reduction_layers)

    @classmethod
    def key_mask(cls, state: TokenState) -> torch.Tensor | None:
        return state.tracks.get("key_mask")

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        tail = hidden_states.shape[1] - state.prefix - state.num_patches
        key_mask = nn.functional.pad(self.constant("inside", state), (state.prefix, tail), value=True)
        key_mask = key_mask.expand(hidden_states.shape[:2])
        return hidden_states, state.with_tracks(key_mask=key_mask).with_assignment(
            lambda: identity_assignment(hidden_states) * key_mask.unsqueeze(-1)
        )

    def constants(self, budget: Budget, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return `inside`: whether each patch of the grid lies inside the circle of the stage, in row-major order."""
        if self.contiguous:
            layers = self.config.reduction_layers
            # The first step is the full grid, unless the first stage is layer 0.
            step, steps = self.stage + (layers[0] > 0), layers[-1] - layers[0] + 3
            inside = inside_by_step(self.pattern, grid, self.min_radius, step, steps)
        else:
            target = operator.index(
                budget.of_patches(self.stage, math.prod(grid))
            )  # a plain number for compilers, too
            inside = inside_by_count(self.pattern, grid, target)
        inside = [self.config.num_prefix_tokens == 0 or inside[0], *inside[1:]]  # token 0 is never masked
        return {"inside": torch.tensor(inside, device="cpu")}


# These functions return, in row-major order, whether each patch of a grid lies inside a circle. The results are lists of plain
# values, which a compiler treats as constants.


@torch.compiler.assume_constant_result
def inside_by_step(pattern: str, grid: tuple[int, int], min_radius: float, step: int, steps: int) -> list[bool]:
    """Return which patches lie inside the circle of step `step` of `steps` even steps from the whole grid down to
    `min_radius`."""
    radius = grid_radius(grid, pattern)
    smallest = min_radius if min_radius > 0 else radius[radius.shape[0] // 2, radius.shape[1] // 2]
    radii = torch.linspace(float(radius[0, 0]), float(smallest), steps, device="cpu")
    return (radius <= radii[step]).flatten().tolist()


@torch.compiler.assume_constant_result
def inside_by_count(pattern: str, grid: tuple[int, int], target: int) -> list[bool]:
    """Return which patches lie inside the circle whose number of patches is nearest to `target`; of two, the smaller
    circle."""
    radius = grid_radius(grid, pattern)
    radii = radius.unique()  # ascending
    counts = (radius.flatten() <= radii.unsqueeze(1)).sum(dim=1)
    return (radius <= radii[(counts - target).abs().argmin()]).flatten().tolist()


def grid_radius(grid: tuple[int, int], pattern: str) -> torch.Tensor:
    """Return the distance of each patch from the center, in patches, (rows, columns).

    It is always computed on the CPU, also if models are created on another device."""
    axes = [torch.linspace(math.floor(-side / 2), math.floor(side / 2), side, device="cpu") for side in grid]
    return _NORMS[pattern](*torch.meshgrid(*axes, indexing="ij"))
