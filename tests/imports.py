"""Imports between the modules of this project, from their source, for the tests of the import graphs."""

import ast
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple


class Import(NamedTuple):
    """One import of a module of this project."""

    module: str
    in_function: bool


def imports_of(source: str, package: str, modules: Collection[str]) -> list[Import]:
    """Return the `modules` that a module of `package` imports at runtime, including function-level imports but not those under `if
    TYPE_CHECKING:`."""
    return list(_walk(ast.parse(source), package, modules, in_function=False))


def _walk(node: ast.AST, package: str, modules: Collection[str], in_function: bool) -> Iterator[Import]:
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        above = parts[: len(parts) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        for alias in node.names:
            found = next((name for name in (f"{base}.{alias.name}", base) if name in modules), None)
            if found is not None:
                yield Import(found, in_function)
    elif isinstance(node, ast.Import):
        yield from (Import(alias.name, in_function) for alias in node.names if alias.name in modules)
    only_checked = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    in_function = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in node.orelse if only_checked else ast.iter_child_nodes(node):
        yield from _walk(child, package, modules, in_function)


def circle(graph: Mapping[str, Collection[Import]]) -> list[str]:
    """Return modules that import each other in a circle, function-level imports included; empty if there are none."""
    try:
        TopologicalSorter({name: {i.module for i in found} for name, found in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []
