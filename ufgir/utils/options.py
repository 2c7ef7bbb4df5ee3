"""Checks for conflicting options and options without effect, shared by the script, the commands and the Python API.

A `Requirement` states what some options need. `check_options` checks the options that were given: conflicting options raise
ValueError, and one warning lists all options without effect.

    WARMUP = Requirement(("ema_warmup",), "`ema_decay`", lambda group: group.ema_decay)
    check_options(group, ["ema_warmup"], [WARMUP])      # Options without effect: `ema_warmup` needs `ema_decay`.

To log a single warning for several checks:

    with collected() as without_effect:
        ...                                             # any number of `check_options`
    warn_without_effect(without_effect)
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
    """A requirement of some options.

    Attributes:
        options: names of the options; a name that ends in _ is a prefix.
        needs: what they need, as the object of "needs".
        holds: returns whether the requirement is met, given the subject of `check_options`.
        refused: whether the options conflict with others if it is not met. Otherwise they have no effect.
    """

    options: tuple[str, ...]
    needs: str
    holds: Callable[[Any], object]
    refused: bool = False

    def concerns(self, name: str) -> bool:
        """Return whether `name` is one of the options."""
        return any(name.startswith(o) if o.endswith("_") else name == o for o in self.options)


def check_options(subject: Any, given: Collection[str], requirements: Sequence[Requirement]) -> dict[str, str]:
    """Raise an error for conflicting options, and log one warning for options without effect.

    Args:
        subject: argument of `Requirement.holds`, e.g. an instance of a dataclass of options.
        given: names of the options that were given.
        requirements: the requirements to check.

    Returns:
        Option without effect -> what it needs, under the caller's names (see `called`).

    Raises:
        ValueError: if an option conflicts with others.
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
        warn_without_effect(found)
    else:
        collector |= found
    return found


@contextmanager
def collected() -> Iterator[dict[str, str]]:
    """Context manager that collects options without effect in the dict it yields, instead of logging them."""
    token = _collector.set(found := {})
    try:
        yield found
    finally:
        _collector.reset(token)


def warn_without_effect(found: Mapping[str, str]) -> None:
    """Log one warning that lists options without effect, if there are any.

    Args:
        found: option -> what it needs, as returned by `check_options`.
    """
    if found:
        parts = [_sentence([n for n in found if found[n] == needs], needs) for needs in dict.fromkeys(found.values())]
        logger.warning("Options without effect: %s.", "; ".join(parts))


def _sentence(names: Sequence[str], needs: str) -> str:
    return f"{', '.join(f'`{name}`' for name in names)} {'needs' if len(names) == 1 else 'need'} {needs}"


def changed_fields(group: Any) -> list[str]:
    """Return the names of the fields of a dataclass instance that differ from their defaults."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(group)}
    return [name for name, default in defaults.items() if getattr(group, name) != default]


class OptionGroup:
    """Base class for dataclasses of options; checks `requirements` for fields that differ from their defaults."""

    requirements: tuple[Requirement, ...] = ()

    def __post_init__(self) -> None:
        check_options(self, changed_fields(self), self.requirements)


@contextmanager
def called(names: Mapping[str, str]) -> Iterator[None]:
    """Context manager in which messages use the caller's names of arguments.

    Args:
        names: argument -> the caller's name.
    """
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def argument(name: str) -> str:
    """Return the name of an argument for a message, in backticks; the caller's name inside `called`."""
    return f"`{_called(name)}`"


def _called(name: str) -> str:
    return (_names.get() or {}).get(name, name)
