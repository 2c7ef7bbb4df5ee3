"""The keep rate at which a network costs what an image may cost, and what the classes of methods say about training and cost."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from clca import CLCAViTConfig, token_schedule
from clca.configuration_clca import check_config, without_targets
from clca.reductions_clca import get_reduction

from .macs import count_macs, dense_config, on_meta


STEPS = 10**6  # keep rates are looked for in steps of one over this
NEAR = 1000  # steps from where the rate is supposed to be to where it is looked for first
DIGITS = range(2, 7)  # of the rate: as few as keep the same tokens
GIGA = 1e9


def changed(config: CLCAViTConfig, **values: Any) -> CLCAViTConfig:
    """A configuration with other values of some fields, checked."""
    return CLCAViTConfig.from_dict(config.to_dict() | values)


def at_rate(config: CLCAViTConfig, keep_rate: float) -> CLCAViTConfig:
    """A configuration with one keep rate for all stages, in place of its own rates or counts."""
    return changed(config, keep_rate=[keep_rate], keep_tokens=None)


def options_with(config: CLCAViTConfig, holds: Callable[[CLCAViTConfig], bool]) -> dict[str, Any] | None:
    """Options of the configuration's method for which something holds: those that it has, if it holds for them, or those with
    one switch of the method turned over. None if it holds for none of these.

    Args:
        config: with a `reduction`.
        holds: asked of the configuration, and of those that differ from it in one switch.
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
            except ValueError:  # the switch does not go with the rest
                continue
            if holds(other):
                return options
    return None


def own_parameters(config: CLCAViTConfig) -> int:
    """Parameters that the method itself brings into the network, in all its stages."""
    with torch.random.fork_rng(devices=[]):
        named = on_meta(config).named_parameters()
    return sum(parameter.numel() for name, parameter in named if ".reduction." in name)


def training_free_options(config: CLCAViTConfig) -> dict[str, Any] | None:
    """Options with which the configuration's method brings no parameters, so that the weights of a trained ViT are all it
    needs; None if it always brings some.

    Args:
        config: with a `reduction`.
    """
    return options_with(config, lambda other: own_parameters(other) == 0)


def static_options(config: CLCAViTConfig) -> dict[str, Any] | None:
    """Options with which the configuration's method keeps as many tokens of every image; None if there are none.

    Args:
        config: with a `reduction`.
    """
    return options_with(config, lambda other: get_reduction(other.reduction).is_static(other))


def bounded(config: CLCAViTConfig) -> CLCAViTConfig:
    """The configuration, or the one that counts the most that a method whose token counts differ by image may cost.

    Raises:
        ValueError: the method has no option for it.
    """
    options = static_options(config)
    if options is None:
        raise ValueError(
            f"GMACs of `reduction`={config.reduction!r} differ by image and have no bound that is known in advance."
        )
    return changed(config, reduction_kwargs=options or None)


def keep_rate_for(config: CLCAViTConfig, target_gmacs: float) -> float:
    """The largest keep rate, the same for all stages, at which an image costs at most `target_gmacs`.

    Multiply-adds are counted as the paper counts them (`count_macs`), at the image size of the configuration. Of ATS, whose
    token counts differ by image, it is the most that an image may cost. Counts of tokens are whole numbers, so that the cost
    is a little below the target, by a token or so in each stage. The search takes one to three seconds for a ViT-B/16.

    Args:
        config: of the network, with a `reduction`. Its own `keep_rate` and `keep_tokens` are not read.
        target_gmacs: multiply-adds of one image, in units of 10^9.

    Returns:
        The keep rate, with as few decimals, from two to six, as keep the same numbers of tokens.

    Raises:
        ValueError: no keep rate has this cost, or there is no `reduction`.

    Example:

        config = CLCAViTConfig(reduction="tome", reduction_layers="all")
        config.keep_rate = [keep_rate_for(config, target_gmacs=9.0)]
    """
    if config.reduction is None:
        raise ValueError(
            f"`target_gmacs` {target_gmacs:g} needs a `reduction`: without one there is no keep rate to find."
        )
    search = _Search(bounded(at_rate(config, 1.0)), target_gmacs * GIGA)
    with torch.random.fork_rng(devices=[]):
        found = search.largest()
        if found == 0:
            raise ValueError(_out_of_reach(search, target_gmacs))
    for digits in DIGITS:
        unit = STEPS // 10**digits
        short = found // unit * unit
        if short and search.tokens(short) == search.tokens(found):
            return short / STEPS
    return found / STEPS


def check_target(values: Mapping[str, Any], target_gmacs: float | None, option: str) -> None:
    """Refuse a target beside keep rates or counts.

    Args:
        values: fields of a configuration that were given.
        target_gmacs: None if it was not given.
        option: what the target is called, for the message.

    Raises:
        ValueError: naming both.
    """
    for name in ("keep_rate", "keep_tokens"):
        if target_gmacs is not None and values.get(name) is not None:
            raise ValueError(f"{option} sets the keep rate, so that `{name}` contradicts it: give one of them.")


def spend(config: CLCAViTConfig, target_gmacs: float, keep_options: bool = False) -> float:
    """Give a configuration the keep rate for a cost, see `keep_rate_for`, in place of its own rates or counts; the rate.

    Args:
        config: is changed.
        target_gmacs: what an image may cost.
        keep_options: keep the method's options all; else those go that belong to other keep rates.
    """
    rate = keep_rate_for(config, target_gmacs)
    config.keep_rate, config.keep_tokens = [rate], None
    if not keep_options:
        config.reduction_kwargs = without_targets(config.reduction_kwargs)
    check_config(config)
    return rate


class _Search:
    """For the largest keep rate, in steps of 1 / STEPS, whose cost does not exceed a target.

    Costs are counted for as few rates as need be: the work of the layers, which follows from the schedule of tokens alone, says
    where to look.
    """

    def __init__(self, config: CLCAViTConfig, target: float) -> None:
        self.config, self.target = config, target
        self._costs: dict[tuple[int, ...], int] = {}

    def tokens(self, step: int) -> tuple[int, ...]:
        """Tokens that enter each layer, and that leave it."""
        schedule = token_schedule(at_rate(self.config, step / STEPS))
        return (*schedule.before, *schedule.after)

    def cost(self, step: int) -> int:
        """Multiply-adds of an image."""
        counts = self.tokens(step)
        if counts not in self._costs:
            with warnings.catch_warnings():  # at the least rates SiT has no slots: torch has nothing to initialize
                warnings.filterwarnings("ignore", "Initializing zero-element tensors")
                self._costs[counts] = count_macs(on_meta(at_rate(self.config, step / STEPS)))
        return self._costs[counts]

    def work(self, step: int) -> float:
        """About as the cost: projections, MLP and attention of the layers."""
        width, inside = self.config.hidden_size, self.config.intermediate_size
        counts, layers = self.tokens(step), self.config.num_hidden_layers
        before, after = counts[:layers], counts[layers + 1 :]
        return sum(
            4 * n * width**2 + 2 * n * n * width + 2 * m * width * inside for n, m in zip(before, after, strict=True)
        )

    def largest(self) -> int:
        """The step; 0 if there is none, or if even a keep rate of 1 costs less."""
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
    """The last number before `high` for which something holds, by bisection: it holds for `low`, and not for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _out_of_reach(search: _Search, target: float) -> str:
    config = search.config
    least, most = search.cost(1), search.cost(STEPS)
    dense = count_macs(on_meta(dense_config(config)))
    layers = ", ".join(map(str, config.reduction_layers))
    reach = f"from {least / GIGA:.3f} to {most / GIGA:.3f}" if least < most else f"always {most / GIGA:.3f}"
    return (
        f"`target_gmacs` {target:g} is out of reach of `reduction`={config.reduction!r} in the layers {layers}: an image "
        f"costs {reach} GMACs, and {dense / GIGA:.3f} in the dense network."
    )
