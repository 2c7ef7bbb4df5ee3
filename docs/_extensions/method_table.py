"""Read the descriptions of the reduction methods from their files and classes, and write three tables of them.

    python docs/_extensions/method_table.py

writes the tables between their markers: the short one in README.md, the full one in docs/methods.md, and the reasons to choose a method in
docs/choosing.md. `make style` runs it. Everything comes from the code except "tokens after a stage" in the full table, where existing cells
are kept and a new row starts with the sentence of the class about its keep rate, and the reasons, which are in
docs/data/when_to_choose.csv. A method that is not listed there has no reason.
"""

import csv
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).parents[2]
README, GUIDE, CHOOSING = ROOT / "README.md", ROOT / "docs" / "methods.md", ROOT / "docs" / "choosing.md"
REASONS = ROOT / "docs" / "data" / "when_to_choose.csv"
BEGIN, END = "<!-- method table -->", "<!-- end of the method table -->"
_TABLE = re.compile(rf"{BEGIN}\n(.*?)\n{END}", re.DOTALL)
_SHORT = "| `reduction` | what it does | paper | when |\n| --- | --- | --- | --- |"
_FULL = (
    "| `reduction` | what it does | paper | file | when | tokens after a stage | GMACs | with CLCA |\n"
    "| --- | --- | --- | --- | --- | --- | ---: | ---: |"
)
_REASONS = "| method | when | because |\n| --- | --- | --- |"
_TOKENS = 5  # column of the full table that is edited by hand


class Method(NamedTuple):
    """Description of a method.

    Attributes:
        name: name in `clca.REDUCTIONS`.
        module: module of its file.
        title, idea: parts of the first line of the file, `Title: idea (remarks).`
        paper: arXiv number of the first paper in the file, or empty.
        rate: sentence of the class about the keep rate, or empty.
        when: requirements and limits, from the attributes of the class.
    """

    name: str
    module: str
    title: str
    idea: str
    paper: str
    rate: str
    when: str


def methods() -> list[Method]:
    """Return the methods of this repository, in the order of `clca.REDUCTIONS`."""
    from clca import REDUCTIONS

    return [describe(cls) for cls in REDUCTIONS.values() if cls.__module__.startswith("clca.")]


def describe(cls: type) -> Method:
    """Read the description of a method.

    Raises:
        ValueError: if the first line of its file is not `Title: idea.`
    """
    text = inspect.getdoc(importlib.import_module(cls.__module__)) or ""
    first = re.match(r"([^:\n]+): (.+)", text)
    if first is None:
        file = f"{cls.__module__.replace('.', '/')}.py"
        raise ValueError(f"the first line of {file} must be `Title: idea.`, got {text.splitlines()[:1]}.")
    idea = re.sub(r" \([^()]*\)\.?$", "", first[2]).rstrip(".")
    paper = re.search(r"(?:huggingface\.co/papers|arxiv\.org/abs)/(\d{4}\.\d+)", text)
    rate = re.search(r"The keep rate is[^.]*", " ".join((inspect.getdoc(cls) or "").split()))
    return Method(
        cls.name, cls.__module__, first[1], idea, paper[1] if paper else "", rate[0] if rate else "", when(cls)
    )


def when(cls: type) -> str:
    """Describe the requirements and limits of a method: training, fixed keep rates, token counts that depend on the image."""
    from clca import CLCAViTConfig, token_schedule

    options = {"image_size": 64, "patch_size": 8, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    config = CLCAViTConfig(**options, num_hidden_layers=2, reduction=cls.name, reduction_layers=[0], keep_rate=0.1)
    before, after = token_schedule(config).before[:2]
    if after == before:
        return "no training needed; a baseline that hides tokens and saves no time"
    parts = ["needs training" if _has_parameters(config) else "no training needed"]
    if cls.fixed_rate(config):
        parts.append("one model per keep rate")
    if not cls.is_static(config):
        parts.append("token counts differ by image")
    if 2 * after >= before - 1:
        parts.append("removes at most half per stage")
    if cls.max_exported_patches is not None:
        parts.append(f"exports up to {cls.max_exported_patches} patches")
    return "; ".join(parts)


def _has_parameters(config: Any) -> bool:
    """Return whether the method of a configuration has parameters."""
    import torch

    from clca import CLCAViTConfig, CLCAViTModel

    plain = CLCAViTConfig(**config.to_dict() | {"reduction": None, "keep_rate": [1.0]})
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in CLCAViTModel(one).parameters()) for one in (config, plain)]
    return sizes[0] > sizes[1]


def _ordered(old: str) -> list[Method]:
    """Return the methods in the order of an existing table; methods that are not in it follow by name."""
    order = [cells[0] for cells in _cells(old)]
    return sorted(
        methods(), key=lambda one: (one.name not in order, order.index(one.name) if one.name in order else 0, one.name)
    )


def _cells(table: str) -> list[list[str]]:
    """Return the cells of a table's rows, with the plain name of the method in the first column."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    return [[re.sub(r'[`"\[]|\].*', "", row[0]), *row[1:]] for row in rows]


def _arxiv(method: Method) -> str:
    return f"[{method.paper}](https://arxiv.org/abs/{method.paper})" if method.paper else ""


def reasons() -> dict[str, dict[str, str]]:
    """Return name of a method -> when to `choose` it, and `because` of which number, as Markdown in docs/."""
    with REASONS.open(encoding="utf-8") as file:
        return {row["reduction"]: row for row in csv.DictReader(file)}


def short_table(old: str) -> str:
    """Return the table of README.md."""
    lines, known = [_SHORT], reasons()
    for one in _ordered(old):
        name = f'[`"{one.name}"`]({one.module.replace(".", "/")}.py)'
        clauses = [known[one.name]["choose"]] if one.name in known else []
        lines.append(_row(name, one.idea, _arxiv(one), "; ".join([*clauses, one.when])))
    return "\n".join(lines)


def reason_table(old: str) -> str:
    """Return the table of docs/choosing.md."""
    known = reasons()
    rows = [known[one.name] for one in _ordered(old) if one.name in known]
    return "\n".join([_REASONS, *(_row(f"`{row['reduction']}`", row["choose"], row["because"]) for row in rows)])


def full_table(old: str) -> str:
    """Return the table of docs/methods.md, with the column that is edited by hand from the table `old`."""
    tokens = {cells[0]: cells[_TOKENS] for cells in _cells(old)}
    lines = [_FULL, _row("`None`", "keep every token", "", "", "", "N", *_gmacs(None))]
    for one in _ordered(old):
        file = f"{one.module.partition('.')[2]}.py"
        link = f"[{file}](../clca/{file})"
        cells = (f'`"{one.name}"`', one.idea, _arxiv(one), link, one.when, tokens.get(one.name) or one.rate)
        lines.append(_row(*cells, *_gmacs(one.name)))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"


def _gmacs(method: str | None) -> tuple[str, str]:
    return _giga(method, False), _giga(method, True)


def _giga(method: str | None, clca: bool) -> str:
    """Return the GMACs of ViT-B/16 at 448 px, keep rate 0.25, as counted by `ufgir profile`."""
    from clca import CLCAViTConfig
    from ufgir.cli.common import CLCA
    from ufgir.profiling.macs import macs_in_advance

    values = {"image_size": 448, "num_labels": 1000, "reduction": method, "keep_rate": 0.25 if method else 1.0}
    macs = macs_in_advance(CLCAViTConfig(**values | (CLCA if clca else {})))
    return "differs by image" if macs is None else f"{macs / 1e9:.2f}"


def updated(path: Path) -> str:
    """Return the text of README.md, docs/methods.md or docs/choosing.md with an updated table."""
    make = {README: short_table, GUIDE: full_table, CHOOSING: reason_table}[path]
    return _TABLE.sub(lambda match: f"{BEGIN}\n{make(match[1])}\n{END}", path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for page in (README, GUIDE, CHOOSING):
        page.write_text(updated(page), encoding="utf-8")
