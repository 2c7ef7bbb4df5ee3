"""How many tokens each stage keeps, as set by the configuration or by a call of the model, and `as_pair` for sizes.

This module imports no other module of the package.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class Budget(NamedTuple):
    """Keep rates, or absolute token counts instead of them: one value for all stages or one per stage.

    Attributes:
        keep_rate: rates in (0, 1].
        keep_tokens: token counts, or None to use the rates.
    """

    keep_rate: tuple[float, ...]
    keep_tokens: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: "CLCAViTConfig") -> "Budget":
        """Return the budget of a configuration, whose fields may be lists or, if set after the model was built,
        numbers."""
        rate, tokens = config.keep_rate, config.keep_tokens
        if tokens is not None:
            tokens = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        return cls((rate,) if isinstance(rate, int | float) else tuple(rate), tokens)

    @property
    def mean_rate(self) -> float:
        """Geometric mean of the rates of all stages. Rates compound, so this is the equivalent single rate."""
        if len(set(self.keep_rate)) == 1:
            return self.keep_rate[0]
        return math.prod(self.keep_rate) ** (1 / len(self.keep_rate))

    def rate(self, stage: int) -> float:
        """Return the keep rate of a stage: a share of the tokens that reach it."""
        return self.keep_rate[stage if len(self.keep_rate) > 1 else 0]

    def tokens(self, stage: int) -> int | None:
        """Return the absolute token count of a stage, or None if `keep_tokens` is not used."""
        if self.keep_tokens is None:
            return None
        return self.keep_tokens[stage if len(self.keep_tokens) > 1 else 0]

    def cumulative_rate(self, stage: int) -> float:
        """Return the share of the patches of the image that is left after a stage: the product of the rates
        up to it."""
        if len(self.keep_rate) == 1:
            return self.keep_rate[0] ** (stage + 1)  # published counts use the power, which rounds differently
        return math.prod(self.keep_rate[: stage + 1])

    def of_current(self, stage: int, candidates: int) -> int:
        """Return how many of `candidates` tokens a stage keeps: ceil(rate * candidates). Rate 0.1 of 785 candidates
        gives 79."""
        count = self.tokens(stage)
        return min(math.ceil(self.rate(stage) * candidates) if count is None else count, candidates)

    def of_patches(self, stage: int, num_patches: int) -> int:
        """Return how many tokens are left after a stage as a share of all patches: int(patches * product of rates).

        At 448 px with patch size 16 and rate 0.1: 784 -> 78 -> 7 -> 0."""
        count = self.tokens(stage)
        return int(num_patches * self.cumulative_rate(stage)) if count is None else min(count, num_patches)


def check_rates(rates: Sequence[float]) -> None:
    """Check a list of keep rates.

    Raises:
        ValueError: if a rate is not a number in (0, 1], or if there are none.
    """
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:  # also refuses NaN
            raise ValueError(f"`keep_rate` must be in (0, 1], got {rate}.")
    if not rates:
        raise ValueError("`keep_rate` must hold at least one rate, got [].")


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size given as one number or two."""
    return (
        (size, size) if isinstance(size, int) else cast("tuple[int, int]", tuple(size))
    )  # the length of user input is checked elsewhere
