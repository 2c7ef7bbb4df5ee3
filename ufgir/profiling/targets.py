"""Find the keep rate for a given cost, and the options with which a method needs no training or has static shapes."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clca import CLCAViTConfig, token_schedule
from clca.configuration_clca import check_config, without_targets
from clca.reductions_clca import get_reduction

from .macs import count_macs, dense_config, on_meta


STEPS = 10**6  # resolution of the search: keep rates are multiples of 1 / STEPS
NEAR = 1000  # first step width around the estimated rate
DIGITS = range(2, 7)  # numbers of decimals to try
GIGA = 1e9


def changed(config: CLCAViTConfig, **values: Any) -> CLCAViTConfig:
    """Return the configuration with some fields replaced, validated."""
    return CLCAViTConfig.from_dict(config.to_dict() | values)


def at_rate(config: CLCAViTConfig, keep_rate: float) -> CLCAViTConfig:
    """Return the configuration with one keep rate for all stages instead of its own rates or counts."""
    return changed(config, keep_rate=[keep_rate], keep_tokens=None)


def options_with(config: CLCAViTConfig, holds: Callable[[CLCAViTConfig], bool]) -> dict[str, Any] | None:
    """Return options of the configuration's method for which a condition holds.

    Its own options are tried first, then those with one boolean option inverted. None if the condition holds for none of them.

    Args:
        config: a configuration with a `reduction`.
        holds: the condition on a configuration.
    """
    own = config.reduction_kwargs or {}
    if holds(config):
        return own
    method = get_reduction(config.reduction)
    for name, default in method.option_defaults.items():
        if isinstance(default, bool):
            options = own | {name: not own.get(name, default)}
            try:
                other = changed(config, reduction_kwargs=options)
            except ValueError:  # incompatible with the other options
                continue
            if holds(other):
                return options
    return None


def own_parameters(config: CLCAViTConfig) -> int:
    """Count the parameters that the method adds to the network, in all stages."""
    with torch.random.fork_rng(devices=[]):
        named = on_meta(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if ".reduction." in name)


def training_free_options(config: CLCAViTConfig) -> dict[str, Any] | None:
    """Return options with which the method has no parameters, so that the weights of a trained ViT suffice; None if there are none.

    Args:
        config: a configuration with a `reduction`.
    """
    return options_with(config, lambda other: own_parameters(other) == 0)


def static_options(config: CLCAViTConfig) -> dict[str, Any] | None:
    """Return options with which the method keeps the same number of tokens for every image; None if there are none.

    Args:
        config: a configuration with a `reduction`.
    """
    return options_with(config, lambda other: get_reduction(other.reduction).is_static(other))


def bounded(config: CLCAViTConfig) -> CLCAViTConfig:
    """Return the configuration, or for a method whose token counts differ by image, one padded to the upper bound.

    Raises:
        ValueError: if the method has no option for it.
    """
    options = static_options(config)
    if options is None:
        raise ValueError(
            f"GMACs of `reduction`={config.reduction!r} differ by image and have no bound that is known in advance."
        )
    return changed(config, reduction_kwargs=options or None)


def keep_rate_for(config: CLCAViTConfig, target_gmacs: float) -> float:
    """Return the largest keep rate, the same for all stages, at which an image costs at most `target_gmacs`.

    Multiply-adds are counted as in the paper (`count_macs`), at the image size of the configuration. For ATS, whose token counts differ by
    image, the upper bound counts. Since token counts are integers, the cost is slightly below the target. The search takes one to three seconds
    for a ViT-B/16.

    Args:
        config: a configuration with a `reduction`. Its `keep_rate` and `keep_tokens` are ignored.
        target_gmacs: multiply-adds per image, in units of 10^9.

    Returns:
        The keep rate, rounded to between two and six decimals such that the token counts do not change.

    Raises:
        ValueError: if no keep rate has this cost, or if there is no `reduction`.

    Example:

        config = CLCAViTConfig(reduction="tome", reduction_layers="all")
        config.keep_rate = [keep_rate_for(config, target_gmacs=9.0)]
    """
    if config.reduction is None:
        raise ValueError(f"`target_gmacs` {target_gmacs:g} requires a `reduction`, which is None.")
    search = _Search(bounded(at_rate(config, 1.0)), target_gmacs * GIGA)
    with torch.random.fork_rng(devices=[]):
        found = search.largest()
        if found == 0:
            raise ValueError(_unreachable_message(search, target_gmacs))
    for digits in DIGITS:
        unit = STEPS // 10**digits
        short = found // unit * unit
        if short and search.tokens(short) == search.tokens(found):
            return short / STEPS
    return found / STEPS


def check_target(values: Mapping[str, Any], target_gmacs: float | None, option: str) -> None:
    """Refuse a target cost together with keep rates or token counts.

    Args:
        values: fields of a configuration that were given.
        target_gmacs: None if it was not given.
        option: name of the target option, for the message.

    Raises:
        ValueError: if both are given.
    """
    for name in ("keep_rate", "keep_tokens"):
        if target_gmacs is not None and values.get(name) is not None:
            raise ValueError(f"{option} and `{name}` both set the keep rate. Pass only one of them.")


def spend(config: CLCAViTConfig, target_gmacs: float, keep_options: bool = False) -> float:
    """Set the keep rate of a configuration to the one for a cost (see `keep_rate_for`), and return it.

    Args:
        config: changed in place.
        target_gmacs: cost per image.
        keep_options: keep all options of the method; by default those that belong to other keep rates are removed.
    """
    rate = keep_rate_for(config, target_gmacs)
    config.keep_rate, config.keep_tokens = [rate], None
    if not keep_options:
        config.reduction_kwargs = without_targets(config.reduction_kwargs)
    check_config(config)
    return rate


class _Search:
    """Search for the largest keep rate, in steps of 1 / STEPS, whose cost does not exceed a target.

    The cost is counted for few rates only; an estimate from the token schedule narrows the range first.
    """

    def __init__(self, config: CLCAViTConfig, target: float) -> None:
        self.config, self.target = config, target
        self._costs: dict[tuple[int, ...], int] = {}

    def tokens(self, step: int) -> tuple[int, ...]:
        """Return the tokens that enter each layer, followed by those that leave it."""
        schedule = token_schedule(at_rate(self.config, step / STEPS))
        return (*schedule.before, *schedule.after)

    def cost(self, step: int) -> int:
        """Return the multiply-adds per image."""
        counts = self.tokens(step)
        if counts not in self._costs:
            with warnings.catch_warnings():  # at the lowest rates SiT has no slots
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                self._costs[counts] = count_macs(on_meta(at_rate(self.config, step / STEPS)))
        return self._costs[counts]

    def work(self, step: int) -> float:
        """Estimate the cost from the projections, MLP and attention of the layers."""
        width, inside = self.config.hidden_size, self.config.intermediate_size
        counts, layers = self.tokens(step), self.config.num_hidden_layers
        before, after = counts[:layers], counts[layers + 1 :]
        return sum(
            4 * n * width**2 + 2 * n * n * width + 2 * m * width * inside for n, m in zip(before, after, strict=True)
        )

    def largest(self) -> int:
        """Return the step; 0 if there is none, or if even a keep rate of 1 costs less."""
        if self.cost(STEPS) <= self.target:
            return STEPS if self.cost(STEPS) == self.target else 0
        guess = STEPS
        for _ in range(2):
            share = self.target / self.cost(guess) * self.work(guess)
            guess = max(_last(0, STEPS, lambda step: self.work(step) <= share), 1)  # noqa: B023 (used at once)
        low = high = guess
        width = NEAR
        while low > 0 and self.cost(low) > self.target:
            high, low, width = low, max(low - width, 0), 2 * width
        while high < STEPS and self.cost(high) <= self.target:
            low, high, width = high, min(high + width, STEPS), 2 * width
        return _last(low, high, lambda step: self.cost(step) <= self.target)


def _last(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return by bisection the last number before `high` for which a condition holds; it holds for `low` and not for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _unreachable_message(search: _Search, target: float) -> str:
    config = search.config
    least, most = search.cost(1), search.cost(STEPS)
    dense = count_macs(on_meta(dense_config(config)))
    layers = ", ".join(map(str, config.reduction_layers))
    reach = f"from {least / GIGA:.3f} to {most / GIGA:.3f}" if least < most else f"always {most / GIGA:.3f}"
    return (
        f"`target_gmacs` {target:g} cannot be reached by `reduction`={config.reduction!r} in layers {layers}: an image "
        f"costs {reach} GMACs, {dense / GIGA:.3f} without reduction."
    )
