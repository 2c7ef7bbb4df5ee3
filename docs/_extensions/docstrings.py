"""Our docstrings are Google's sections with Markdown in them; autodoc reads reStructuredText."""

import re
from itertools import takewhile
from typing import Any

from sphinx.application import Sphinx


_CODE = re.compile(r"(?<!`)`(?!`)(?P<code>(?:[^`\n]|\n(?!\s*\n))+)`(?!`)")
_ITEM = re.compile(r"\s*- ")
_BESIDE = re.compile(r"(\s*)(Args|Attributes) \((.+)\):$")
_SECTION = re.compile(r"\s*[A-Z]\w+:$")
_OPENS, _CLOSES = "\t\n -:/'\"<([{", "\t\n '\")]}>-/\\:.,;!?"  # what may stand beside inline markup


def _escaped(text: str) -> str:
    """Escape prose for reStructuredText, except *emphasis*."""
    special = r"(?<!\w)\*\w+\*(?!\w)|[\\*|]|(?<=\w)_(?!\w)"
    return re.sub(special, lambda match: match[0] if len(match[0]) > 1 else f"\\{match[0]}", text)


def inline(text: str) -> str:
    """Convert `code` to a link to the object that it names, or to a literal."""
    parts, end = [], 0
    for match in _CODE.finditer(text):
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        parts.append(_escaped(text[end : match.start()]))
        code = match["code"]
        parts.append("" if not before or before in _OPENS else "\\ ")
        parts.append(f":py:obj:`{code}`" if re.fullmatch(r"[A-Za-z][\w.]+\w", code) else f"``{code}``")
        parts.append("" if not after or after in _CLOSES else "\\ ")
        end = match.end()
    return "".join(parts) + _escaped(text[end:])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _table(rows: list[str]) -> list[str]:
    """Convert a Markdown table to a list table."""
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    lines = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in [cells[0], *cells[2:]]:
        lines += [f"   {'  -' if i else '* -'} {inline(cell)}" for i, cell in enumerate(row)]
    return [*lines, ""]


def _fenced(lines: list[str]) -> list[str]:
    """Convert a fenced code block."""
    margin = _indent(lines[0])
    code = [
        "",
        f".. code-block:: {lines[0].strip()[3:] or 'text'}",
        "",
        *("   " + c[margin:] for c in lines[1:-1]),
        "",
    ]
    return [" " * margin + line for line in code]


def _block(lines: list[str], start: int, text_indent: int) -> tuple[list[str], int]:
    """Convert a table or code block that begins at line `start`, and return it with its end; the end is `start` if there is none."""
    line, rest = lines[start], lines[start + 1 :]
    if line.lstrip().startswith("|") and rest and "---" in rest[0]:
        rows = list(takewhile(lambda row: row.lstrip().startswith("|"), lines[start:]))
        return _table(rows), start + len(rows)
    if line.lstrip().startswith("```"):
        length = 2 + len(list(takewhile(lambda code: code.strip() != "```", rest)))
        return _fenced(lines[start : start + length]), start + length
    after_blank = start > 0 and not lines[start - 1].strip()
    if line.strip() and after_blank and _indent(line) >= text_indent + 4 and not _ITEM.match(line):
        code = list(takewhile(lambda code: not code.strip() or _indent(code) > text_indent, lines[start:]))
        return [" " * text_indent + "::", "", *code, ""], start + len(code)
    return [], start


def to_rst(lines: list[str]) -> list[str]:
    """Convert the lines of a docstring from Markdown to reStructuredText: tables, lists, indented code and `code`."""
    result: list[str] = []
    prose: list[str] = []
    position, text_indent, item_indent = 0, 0, -1  # of the list that goes on, or -1
    while position < len(lines):
        line = lines[position]
        block, end = _block(lines, position, text_indent)
        if end > position:
            result += [*inline("\n".join(prose)).split("\n"), *block]
            prose, position = [], end
            continue
        is_item = bool(_ITEM.match(line))
        ends_list = item_indent >= 0 and line.strip() and _indent(line) <= item_indent and not is_item
        if ends_list or (is_item and item_indent < 0):
            prose.append("")  # Markdown needs no empty line around a list
        item_indent = _indent(line) if is_item else -1 if ends_list else item_indent
        if beside := _BESIDE.match(line):  # such as `Args (beside those of ViTConfig):`
            prose += [f"{beside[1]}{beside[3][0].upper()}{beside[3][1:]}:", ""]
            line = f"{beside[1]}{beside[2]}:"
        prose.append(line)
        if line.strip():
            text_indent = _indent(line) + 4 * bool(_SECTION.match(line)) + 2 * is_item
        position += 1
    return result + inline("\n".join(prose)).split("\n")


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")  # in the first line, napoleon takes what stands before a colon for a type


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Skip the fields of a NamedTuple, which its docstring documents; Python's own docstrings of them are not helpful."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def _signature(app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, result: str) -> tuple | None:
    """Remove the fields of options, which have a separate page, and write `...` for a default factory."""
    if what == "class" and name.endswith("Arguments"):
        return "", result
    return (signature.replace("<factory>", "..."), result) if signature else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
