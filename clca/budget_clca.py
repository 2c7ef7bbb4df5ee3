"""How many tokens each stage keeps, set by the configuration or by a call of the model. Also `as_pair`, for sizes.

The lowest module of the package: it imports none of the others.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class Budget(NamedTuple):
    """Keep rates, or absolute counts in their place: one for all stages or one per stage."""

    keep_rate: tuple[float, ...]
    keep_tokens: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: "CLCAViTConfig") -> "Budget":
        """What the configuration says: lists, and numbers where somebody set them after the model was made."""
        rate, tokens = config.keep_rate, config.keep_tokens
        if tokens is not None:
            tokens = (tokens,) if isinstance(tokens, int) else tuple(tokens)
        return cls((rate,) if isinstance(rate, int | float) else tuple(rate), tokens)

    @property
    def mean_rate(self) -> float:
        """One rate that stands for those of all stages: their geometric mean, since rates compound."""
        if len(set(self.keep_rate)) == 1:
            return self.keep_rate[0]
        return math.prod(self.keep_rate) ** (1 / len(self.keep_rate))

    def rate(self, stage: int) -> float:
        """The stage's own keep rate: a share of the tokens that reach it."""
        return self.keep_rate[stage if len(self.keep_rate) > 1 else 0]

    def tokens(self, stage: int) -> int | None:
        """The stage's absolute count where `keep_tokens` is used, else None."""
        if self.keep_tokens is None:
            return None
        return self.keep_tokens[stage if len(self.keep_tokens) > 1 else 0]

    def cumulative_rate(self, stage: int) -> float:
        """Share of the image's patches left after a stage: the product of the rates so far."""
        if len(self.keep_rate) == 1:
            return self.keep_rate[0] ** (stage + 1)  # not a product: the published counts were rounded from a power
        return math.prod(self.keep_rate[: stage + 1])

    def of_current(self, stage: int, candidates: int) -> int:
        """Tokens a stage keeps of those that reach it: ceil(rate * candidates). 0.1 of 785 candidates: 79."""
        count = self.tokens(stage)
        return min(math.ceil(self.rate(stage) * candidates) if count is None else count, candidates)

    def of_patches(self, stage: int, num_patches: int) -> int:
        """Tokens left after a stage as a share of the image's patches: int(patches * product of rates). At 448 px, patch
        16 and rate 0.1: 784 -> 78 -> 7 -> 0."""
        count = self.tokens(stage)
        return int(num_patches * self.cumulative_rate(stage)) if count is None else min(count, num_patches)


def check_rates(rates: Sequence[float]) -> None:
    """Refuse what is not a list of keep rates.

    Raises:
        ValueError: a rate out of (0, 1], something that is no number, or no rate at all.
    """
    for rate in rates:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:  # NaN is neither
            raise ValueError(f"`keep_rate` must be in (0, 1], got {rate}.")
    if not rates:
        raise ValueError("`keep_rate` must hold at least one rate, got [].")


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (
        (size, size) if isinstance(size, int) else cast("tuple[int, int]", tuple(size))
    )  # whoever asks users counts them
