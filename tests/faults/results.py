"""What a kind of fault came to: one line of the table that `make faults` ends with."""

from typing import NamedTuple


class Result(NamedTuple):
    """The tries of one kind of fault.

    Args:
        kind: what was done, a few words.
        tries: how often.
        survived: how often it ended as promised.
        lost: how often it did not.
        notes: what else is worth knowing; for every lost try what happened, and how to repeat it.
    """

    kind: str
    tries: int
    survived: int
    lost: int
    notes: str = ""
