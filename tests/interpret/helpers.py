"""Models for the tests of interpretation."""

from collections.abc import Iterable
from typing import Any

from tests.helpers import Case, slow_unless


CACHE_OF_TOKENS = {"cls": "plain", "registers": "cache", "no_cls": "cache"}


def table(cases: Iterable[Case]) -> list[Any]:
    """For `parametrize`: each method with CLS alone, and with a cache beside registers or without CLS. The other ways to
    combine these are slow: a cache adds rows at the end, registers add some in front, whoever else is there."""
    return slow_unless(lambda case: case.cache == CACHE_OF_TOKENS[case.tokens], cases)
