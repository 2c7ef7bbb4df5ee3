"""Imports point one way: floor by floor, without a circle, function-level imports included."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.cfg").is_file())

# Each part imports only parts of the lines above its own.
FLOORS = [
    "clca",
    "ufgir.utils",
    "ufgir.transforms",
    "ufgir.data",
    "ufgir.checkpoints",
    "ufgir.evaluation",
    "ufgir.interpret",
    "ufgir.visualization",
    "ufgir.analysis",
    "ufgir.export",
    "ufgir.quantization",
    "ufgir.profiling",
    "ufgir.training",
    "ufgir.runs",
    "ufgir.app",
    "ufgir.cli",
    "dataset_scripts",
    "run_ufgir",
]


def module_of(file: Path) -> str:
    path = file.relative_to(ROOT).with_suffix("")
    return ".".join(path.parent.parts if path.name == "__init__" else path.parts)


FILES = {
    module_of(file): file
    for place in ("clca", "ufgir", "dataset_scripts", "run_ufgir.py")
    for file in ([ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")))
}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, package: str, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Modules of this project that the code below a node imports, and in how many functions each import stands."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        inner = depth + isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            base = ".".join([*above, *filter(None, [child.module])])
            for alias in child.names:
                names = (f"{base}.{alias.name}", base)
                yield from ((name, depth) for name in names[: 1 + (names[0] not in FILES)] if name in FILES)
        elif isinstance(child, ast.Import):
            yield from ((alias.name, depth) for alias in child.names if alias.name in FILES)
        yield from imports(child, package, inner)


def graph() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports."""
    arrows = defaultdict(set)
    for module, file in FILES.items():
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        arrows[module] = {name for name, _ in imports(ast.parse(file.read_text(encoding="utf-8")), package)}
    return arrows


def part_of(module: str) -> str:
    """The part that a module belongs to: `ufgir.data` of `ufgir.data.load`."""
    return ".".join(module.split(".")[: 2 if module.startswith("ufgir") else 1])


def test_the_graph_sees_imports():
    """What the other tests rely on: relative, absolute and function-level imports, of modules and of names."""
    code = "from ..utils import text\nimport clca\ndef f():\n    from .folders import x\n"
    code += "if TYPE_CHECKING:\n    from ..runs import records\n"
    found = dict(imports(ast.parse(code), "ufgir.data"))
    assert found == {"ufgir.utils.text": 0, "clca": 0, "ufgir.data.folders": 1}


def test_no_circle():
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert len(order) > 100


def test_no_arrow_points_upwards():
    arrows = {(module, other) for module, others in graph().items() for other in others}
    parts = {part for arrow in arrows for part in map(part_of, arrow)} - {"ufgir", "ufgir._moved", "modeling_clca"}
    assert parts <= set(FLOORS), f"say on which floor they are: {sorted(parts - set(FLOORS))}"
    upward = [
        f"{module} -> {other}"
        for module, other in sorted(arrows)
        if {part_of(module), part_of(other)} <= set(FLOORS)
        and FLOORS.index(part_of(other)) > FLOORS.index(part_of(module))
    ]
    assert upward == []


def test_utils_imports_no_other_part():
    others = {other for module, found in graph().items() if part_of(module) == "ufgir.utils" for other in found}
    assert {part_of(other) for other in others} <= {"ufgir.utils"}
