"""Heuristic: attend only to patches near the centre of the image (the baseline of https://huggingface.co/papers/2308.04657).

The official code of that study is MIT. Nothing is removed: rows outside a radius are no longer attended to. CLS, registers,
CLR and recalled rows always are.
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


# The same operations as in the original, on float32: their last bit decides about patches on the circle itself. (MKL's square
# root rounds differently on different processors, so that at 14 x 14 a keep rate of 0.2 leaves 36 patches on some, 44 on others.)
_NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "l1": lambda y, x: y.abs() + x.abs(),
    "l2": lambda y, x: (y * y + x * x).sqrt(),
    "linf": lambda y, x: torch.maximum(y.abs(), x.abs()),
}


class HeuristicReduction(TokenReduction):
    """Before the layer, narrow the circle of patches that attention sees. It stays until the next stage.

    Args:
        pattern: `l1`, `l2` or `linf`, the norm that makes the circle.
        contiguous: shrink evenly, towards `min_radius`, in every layer from the first reduction layer to the last. There is
            no keep rate then. By default in the reduction layers alone, to the radius whose number of patches is nearest to
            the keep rate's share of all patches, cumulative.
        min_radius: in patches, with `contiguous`; zero or less for the smallest.
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
                "`keep_rate` and `keep_tokens` mean nothing to `reduction`='heuristic' with `contiguous`, which shrinks "
                f"evenly; got {config.keep_tokens or config.keep_rate}. Leave them out, or `contiguous`."
            )

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str | None:
        return "with `contiguous` it shrinks evenly" if cls.option(config, "contiguous") else None

    @classmethod
    def layers(cls, config: "CLCAViTConfig") -> list[int]:
        if cls.option(config, "contiguous"):
            return list(range(config.reduction_layers[0], config.reduction_layers[-1] + 1))
        return list(config.reduction_layers)

    @classmethod
    def visible(cls, state: TokenState) -> torch.Tensor | None:
        return state.tracks.get("visible")

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        tail = hidden_states.shape[1] - state.prefix - state.num_patches
        visible = nn.functional.pad(self.constant("inside", state), (state.prefix, tail), value=True)
        visible = visible.expand(hidden_states.shape[:2])
        return hidden_states, state.with_tracks(visible=visible).with_assignment(
            lambda: identity_assignment(hidden_states) * visible.unsqueeze(-1)
        )

    def constants(self, budget: Budget, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """`inside`: whether each patch of the grid lies inside the stage's circle, row by row."""
        if self.contiguous:
            layers = self.config.reduction_layers
            # The full grid comes first, except where the first stage is layer 0.
            step, steps = self.stage + (layers[0] > 0), layers[-1] - layers[0] + 3
            inside = inside_by_step(self.pattern, grid, self.min_radius, step, steps)
        else:
            target = operator.index(budget.of_patches(self.stage, math.prod(grid)))  # a number also to a compiler
            inside = inside_by_count(self.pattern, grid, target)
        inside = [self.config.num_prefix_tokens == 0 or inside[0], *inside[1:]]  # row 0 is seen, whatever it is
        return {"inside": torch.tensor(inside, device="cpu")}


# Whether each patch of a grid (rows, columns) lies inside a circle, row by row. The results are lists of plain values, which a
# compiler takes for granted.


@torch.compiler.assume_constant_result
def inside_by_step(pattern: str, grid: tuple[int, int], min_radius: float, step: int, steps: int) -> list[bool]:
    """The circle of one of a number of even steps from the whole grid down to `min_radius`."""
    radius = grid_radius(grid, pattern)
    smallest = min_radius if min_radius > 0 else radius[radius.shape[0] // 2, radius.shape[1] // 2]
    radii = torch.linspace(float(radius[0, 0]), float(smallest), steps, device="cpu")
    return (radius <= radii[step]).flatten().tolist()


@torch.compiler.assume_constant_result
def inside_by_count(pattern: str, grid: tuple[int, int], target: int) -> list[bool]:
    """The circle whose number of patches is nearest to `target`, the smaller one of two."""
    radius = grid_radius(grid, pattern)
    radii = radius.unique()  # ascending
    counts = (radius.flatten() <= radii.unsqueeze(1)).sum(dim=1)
    return (radius <= radii[(counts - target).abs().argmin()]).flatten().tolist()


def grid_radius(grid: tuple[int, int], pattern: str) -> torch.Tensor:
    """Distance of each patch from the centre, in patches, (rows, columns). Always on the CPU, also where models are made
    on another device."""
    axes = [torch.linspace(math.floor(-side / 2), math.floor(side / 2), side, device="cpu") for side in grid]
    return _NORMS[pattern](*torch.meshgrid(*axes, indexing="ij"))
