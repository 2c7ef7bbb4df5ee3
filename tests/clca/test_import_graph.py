"""Imports inside the packages point one way, are at the top of a file, and have no circles."""

from collections.abc import Collection
from pathlib import Path

import pytest

from tests.imports import Import, circle, imports_of


ROOT = Path(__file__).parents[2]

# From the lowest to the highest. A file imports from floors below its own; files of one floor do not know each other.
CLCA_FLOORS = (
    (
        "attention_clca",
        "budget_clca",
        "fast_paths_clca",
        "hooks_clca",
        "image_processing_clca",
        "loss_clca",
        "versions_clca",
    ),
    ("linear_clca", "reduction_base", "resample_clca"),
    (
        "cache_clca",
        *sorted(path.stem for path in (ROOT / "clca").glob("reduction_*.py") if path.stem != "reduction_base"),
    ),
    ("heads_clca", "reductions_clca"),
    ("configuration_clca",),
    ("dense_clca", "layers_clca"),
    ("modeling_clca",),
    ("__init__",),
)


def siblings_of(source: str, modules: Collection[str]) -> list[Import]:
    """Return the modules of a flat package that one of its modules imports."""
    found = imports_of(source, "clca", [f"clca.{name}" for name in modules])
    return [i._replace(module=i.module.removeprefix("clca.")) for i in found]


FILES = {path.stem: path for path in sorted((ROOT / "clca").glob("*.py"))}
GRAPH = {name: siblings_of(path.read_text(encoding="utf-8"), FILES) for name, path in FILES.items()}


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
    """It also finds imports inside functions, and ignores those for type checkers."""
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
    found = siblings_of(source, "abcdefg")
    assert [i.module for i in found] == ["a", "b", "c", "d", "e", "f", "g"]
    assert [i.module for i in found if i.in_function] == ["e", "g"]
    graph = {"a": siblings_of("from .b import x", "ab"), "b": siblings_of("def f():\n    from .a import x", "ab")}
    assert sorted(set(circle(graph))) == ["a", "b"]
