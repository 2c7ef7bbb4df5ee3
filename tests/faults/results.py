"""The result of one kind of fault: a row of the table that `make faults` prints."""

from typing import NamedTuple


class Result(NamedTuple):
    """The tries of one kind of fault.

    Args:
        kind: description in a few words.
        tries: number of tries.
        survived: tries that ended as guaranteed.
        lost: tries that did not.
        notes: further information; for every lost try, what happened and how to repeat it.
    """

    kind: str
    tries: int
    survived: int
    lost: int
    notes: str = ""
