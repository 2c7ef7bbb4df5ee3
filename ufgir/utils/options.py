"""Options that contradict others, and options without effect: one mechanism for the script, the commands and calls from Python.

A `Requirement` says what some options need. `check_options` looks at the options that were given: those that contradict others
raise ValueError, those without effect are named in one warning.

    WARMUP = Requirement(("ema_warmup",), "`ema_decay`", lambda group: group.ema_decay)
    check_options(group, ["ema_warmup"], [WARMUP])      # Options without effect: `ema_warmup` needs `ema_decay`.

A caller that checks in several steps logs one warning for all of them:

    with collected() as without_effect:
        ...                                             # any number of `check_options`
    warn_of(without_effect)
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, fields
from typing import Any, NamedTuple


logger = logging.getLogger(__name__)

_collector: ContextVar[dict[str, str] | None] = ContextVar("collector", default=None)
_names: ContextVar[Mapping[str, str] | None] = ContextVar("names", default=None)


class Requirement(NamedTuple):
    """What some options need.

    Attributes:
        options: their names; one that ends in _ stands for all that begin with it.
        needs: what they need, in words that follow "needs".
        holds: whether that is there, of the subject of `check_options`.
        refused: without it the options contradict others. Otherwise they have no effect.
    """

    options: tuple[str, ...]
    needs: str
    holds: Callable[[Any], object]
    refused: bool = False

    def concerns(self, name: str) -> bool:
        """Whether `name` is one of the options."""
        return any(name.startswith(o) if o.endswith("_") else name == o for o in self.options)


def check_options(subject: Any, given: Collection[str], requirements: Sequence[Requirement]) -> dict[str, str]:
    """Refuse options that contradict others, and warn once of those without effect.

    Args:
        subject: what the requirements look at, e.g. an instance of a dataclass of options.
        given: names of the options that were given.
        requirements: to check.

    Returns:
        Option -> what it needs, for the options without effect, under the names that the caller uses (see `called`).

    Raises:
        ValueError: an option contradicts others.
    """
    found: dict[str, str] = {}
    for requirement in requirements:
        names = [_called(name) for name in given if requirement.concerns(name)]
        if names and not requirement.holds(subject):
            if requirement.refused:
                raise ValueError(_sentence(names, requirement.needs))
            found |= dict.fromkeys(names, requirement.needs)
    collector = _collector.get()
    if collector is None:
        warn_of(found)
    else:
        collector |= found
    return found


@contextmanager
def collected() -> Iterator[dict[str, str]]:
    """Within this context the options without effect are added to the dict that it yields, and nothing is logged."""
    token = _collector.set(found := {})
    try:
        yield found
    finally:
        _collector.reset(token)


def warn_of(found: Mapping[str, str]) -> None:
    """Log one warning that names options without effect, if there are any.

    Args:
        found: option -> what it needs, as `check_options` returns it.
    """
    if found:
        parts = [_sentence([n for n in found if found[n] == needs], needs) for needs in dict.fromkeys(found.values())]
        logger.warning("Options without effect: %s.", "; ".join(parts))


def _sentence(names: Sequence[str], needs: str) -> str:
    return f"{', '.join(f'`{name}`' for name in names)} {'needs' if len(names) == 1 else 'need'} {needs}"


def changed_fields(group: Any) -> list[str]:
    """The fields of a dataclass instance that differ from their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(group)}
    return [name for name, default in defaults.items() if getattr(group, name) != default]


class OptionGroup:
    """Base of dataclasses of options: making one checks its `requirements`, of the fields that differ from their defaults."""

    requirements: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        check_options(self, changed_fields(self), self.requirements)


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Within this context messages call arguments as the caller does.

    Args:
        names: argument -> what the caller calls it.
    """
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def argument(name: str) -> str:
    """An argument for a message, in backticks: under its own name, or as the caller calls it (see `called`)."""
    return f"`{_called(name)}`"


def _called(name: str) -> str:
    return (_names.get() or {}).get(name, name)
