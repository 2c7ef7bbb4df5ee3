"""Text formatting: error messages, shortened values, lists of problems, aligned tables, differences of options."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def listed(problems: Sequence[str], most: int = 12) -> str:
    """Join problems in one sentence; only the first `most` are listed."""
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number and a noun, as in `1 file` and `1,200 files`; the plural is the noun with an s by default."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one_sentence(error: Exception) -> str:
    """Return the text of an error on one line; an error with the attribute `has_list` keeps its lines."""
    lines = str(error).splitlines() if getattr(error, "has_list", False) else [str(error)]
    return "\n  ".join(" ".join(line.split()) for line in lines)


def shortened(text: str, most: int = 160) -> str:
    """Shorten a text to one line, at the end of a sentence if possible, otherwise at the end of a word.

    Args:
        text: any text.
        most: maximal number of characters.
    """
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?= )", text[: most + 1])]
    return text[: ends[-1]] if ends else textwrap.shorten(text, most, placeholder=" ...")


def differences(old: dict[str, Any], new: dict[str, Any], where: str) -> str:
    """Describe the differences between two sets of options: ``` `seed` (1 in runs/a, not set now)```."""

    def shown(values: dict[str, Any], name: str) -> str:
        return str(values[name]) if name in values else "not set"

    names: Iterable[str] = (n for n in dict.fromkeys([*old, *new]) if (n in old, old.get(n)) != (n in new, new.get(n)))
    return ", ".join(f"`{n}` ({shown(old, n)} in {where}, {shown(new, n)} now)" for n in names)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Format a table of text, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
