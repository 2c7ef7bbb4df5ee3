"""The methods of token reduction as their files and classes describe them, and the README's table of them.

    python docs/_extensions/method_table.py

writes the table anew between its two marks in README.md; so does `make style`. All but the tokens after a stage comes from the
code; for those, what a row says stays, and a new row begins with what the class says of its keep rate.
"""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BEGIN, END = "<!-- method table -->", "<!-- end of the method table -->"
_TABLE = re.compile(rf"{BEGIN}\n(.*?)\n{END}", re.DOTALL)
_HEAD = "| `reduction` | idea | paper | file | tokens after a stage | GMACs | with CLCA |\n| --- | --- | --- | --- | --- | ---: | ---: |"


class Method(NamedTuple):
    """What the file of a method says about it.

    Attributes:
        name: of `clca.REDUCTIONS`.
        module: its file, as a module.
        title, idea: the first line of the file, `Title: idea (remarks).`
        paper: number on arXiv of the first paper that the file names, or empty.
        rate: the sentence of the class about the keep rate, or empty.
    """

    name: str
    module: str
    title: str
    idea: str
    paper: str
    rate: str


def methods() -> list[Method]:
    """The methods of this repository, in the order of `clca.REDUCTIONS`."""
    from clca import REDUCTIONS

    return [describe(cls) for cls in REDUCTIONS.values() if cls.__module__.startswith("clca.")]


def describe(cls: type) -> Method:
    """Read the description of a method.

    Raises:
        ValueError: the first line of its file is not `Title: idea.`
    """
    text = inspect.getdoc(importlib.import_module(cls.__module__)) or ""
    first = re.match(r"([^:\n]+): (.+)", text)
    if first is None:
        file = f"{cls.__module__.replace('.', '/')}.py"
        raise ValueError(f"the first line of {file} must be `Title: idea.`, got {text.splitlines()[:1]}.")
    idea = re.sub(r" \([^()]*\)\.?$", "", first[2]).rstrip(".")
    paper = re.search(r"(?:huggingface\.co/papers|arxiv\.org/abs)/(\d{4}\.\d+)", text)
    rate = re.search(r"The keep rate is[^.]*", " ".join((inspect.getdoc(cls) or "").split()))
    return Method(cls.name, cls.__module__, first[1], idea, paper[1] if paper else "", rate[0] if rate else "")


def readme_table(old: str) -> str:
    """The table, with the cells of `old` that the code does not tell."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in old.splitlines()[2:]]
    order, tokens = [row[0].strip('`"') for row in rows], {row[0].strip('`"'): row[4] for row in rows}
    found = {method.name: method for method in methods()}
    lines = [_HEAD, _row("`None`", "keep every token", "", "", "N", None)]
    for name in sorted(found, key=lambda name: (name not in order, order.index(name) if name in order else name)):
        one = found[name]
        file = f"{one.module.partition('.')[2]}.py"
        paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else ""
        lines.append(
            _row(f'`"{name}"`', one.idea, paper, f"[{file}](clca/{file})", tokens.get(name) or one.rate, name)
        )
    return "\n".join(lines)


def _row(shown: str, idea: str, paper: str, file: str, tokens: str, method: str | None) -> str:
    cells = [shown, idea, paper, file, tokens, _giga(method, False), _giga(method, True)]
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _giga(method: str | None, clca: bool) -> str:
    """GMACs of ViT-B/16 at 448 px, keep rate 0.25, as `ufgir profile` counts them."""
    from clca import CLCAViTConfig
    from ufgir.cli.common import CLCA
    from ufgir.profiling.macs import macs_in_advance

    values = {"image_size": 448, "num_labels": 1000, "reduction": method, "keep_rate": 0.25 if method else 1.0}
    macs = macs_in_advance(CLCAViTConfig(**values | (CLCA if clca else {})))
    return "differs by image" if macs is None else f"{macs / 1e9:.2f}"


def updated(text: str) -> str:
    """The README's text with its table as it should be."""
    return _TABLE.sub(lambda match: f"{BEGIN}\n{readme_table(match[1])}\n{END}", text)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
