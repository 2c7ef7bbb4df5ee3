"""Text for people: one sentence of an error, shortened values, lists of problems, aligned tables, differences of options."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def listed(problems: Sequence[str], most: int = 12) -> str:
    """Problems in one sentence; a whole network's worth of them is cut short."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


def one_sentence(error: Exception) -> str:
    """The text of an error on one line; but an error with `has_list` keeps the lines of its list."""
    lines = str(error).splitlines() if getattr(error, "has_list", False) else [str(error)]
    return "\n  ".join(" ".join(line.split()) for line in lines)


def shortened(text: str, most: int = 160) -> str:
    """The beginning of a text, on one line: up to the end of a sentence if one ends there, else up to that of a word.

    Args:
        text: any.
        most: characters it may have.
    """
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?= )", text[: most + 1])]
    return text[: ends[-1]] if ends else textwrap.shorten(text, most, placeholder=" ...")


def differences(old: dict[str, Any], new: dict[str, Any], where: str) -> str:
    """What two sets of options disagree on, for a sentence: ``` `seed` (1 in runs/a, not set now)```."""

    def told(values: dict[str, Any], name: str) -> str:
        return str(values[name]) if name in values else "not set"

    names: Iterable[str] = (n for n in dict.fromkeys([*old, *new]) if (n in old, old.get(n)) != (n in new, new.get(n)))
    return ", ".join(f"`{n}` ({told(old, n)} in {where}, {told(new, n)} now)" for n in names)


def align(rows: Sequence[Sequence[str]]) -> str:
    """A table of text, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
