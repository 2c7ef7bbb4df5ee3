"""Imports inside the packages point one way: from the top floor down, at the top of a file, and never in a circle."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest


ROOT = Path(__file__).parents[2]

# From the lowest to the highest. A file imports from floors below its own; files of one floor do not know each other.
CLCA_FLOORS = (
    ("attention_clca", "budget_clca", "fast_paths_clca", "hooks_clca", "loss_clca"),
    ("gelu_clca", "linear_clca", "reduction_base", "resample_clca"),
    (
        "cache_clca",
        *sorted(path.stem for path in (ROOT / "clca").glob("reduction_*.py") if path.stem != "reduction_base"),
    ),
    ("heads_clca", "reductions_clca"),
    ("configuration_clca",),
    ("layers_clca",),
    ("modeling_clca",),
    ("__init__",),
)


class Import(NamedTuple):
    """One relative import of a sibling."""

    module: str
    in_function: bool


def relative_imports(source: str) -> list[Import]:
    """Siblings that a module imports at runtime, those inside functions, too; not those under `if TYPE_CHECKING:`."""
    return list(_walk(ast.parse(source), in_function=False))


def _walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.ImportFrom) and node.level:
        yield from (
            Import(name, in_function) for name in ([node.module] if node.module else [a.name for a in node.names])
        )
    if isinstance(node, ast.If) and _is_type_checking(node.test):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in children:
        yield from _walk(child, in_function)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_graph(package: Path) -> dict[str, list[Import]]:
    """What each module of a flat package imports of the others."""
    return {path.stem: relative_imports(path.read_text(encoding="utf-8")) for path in sorted(package.glob("*.py"))}


def circle(graph: dict[str, list[Import]]) -> list[str]:
    """Modules that import each other in a circle, function-level imports included; empty if there are none."""
    try:
        TopologicalSorter({name: {i.module for i in found} for name, found in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


GRAPH = import_graph(ROOT / "clca")


def test_there_is_no_circle() -> None:
    assert circle(GRAPH) == []


def test_no_function_imports_a_sibling() -> None:
    lazy = {name: [i.module for i in found if i.in_function] for name, found in GRAPH.items()}
    assert {name: found for name, found in lazy.items() if found} == {}


def test_every_module_stands_on_one_floor() -> None:
    names = [name for floor in CLCA_FLOORS for name in floor]
    assert sorted(names) == sorted(GRAPH)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_modules_import_from_lower_floors(name: str) -> None:
    level = {module: index for index, floor in enumerate(CLCA_FLOORS) for module in floor}
    wrong = [i.module for i in GRAPH[name] if level[i.module] >= level[name]]
    assert wrong == []


def test_the_finder_finds() -> None:
    """Also what hides in functions, and nothing that only type checkers see."""
    source = """
from typing import TYPE_CHECKING
import torch
from .a import x
from . import b
if TYPE_CHECKING:
    from .hidden import y
else:
    from .c import y
try:
    from .d import z
except ImportError:
    pass
def f():
    if True:
        from .e import z
class C:
    from .f import z
    def method(self):
        from .g import z
"""
    found = relative_imports(source)
    assert [i.module for i in found] == ["a", "b", "c", "d", "e", "f", "g"]
    assert [i.module for i in found if i.in_function] == ["e", "g"]
    graph = {"a": relative_imports("from .b import x"), "b": relative_imports("def f():\n    from .a import x")}
    assert sorted(set(circle(graph))) == ["a", "b"]
