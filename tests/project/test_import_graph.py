"""Imports go in one direction and without a circle, function-level imports included."""

from pathlib import Path
from xml.etree import ElementTree

from tests.imports import Import, circle, imports_of


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
    "ufgir.web",
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


def graph() -> dict[str, list[Import]]:
    """Return module -> its imports of other modules."""
    packages = {m: m if file.name == "__init__.py" else m.rpartition(".")[0] for m, file in FILES.items()}
    return {m: imports_of(file.read_text(encoding="utf-8"), packages[m], FILES) for m, file in FILES.items()}


def part_of(module: str) -> str:
    """Return the part that a module belongs to: `ufgir.data` for `ufgir.data.load`."""
    return ".".join(module.split(".")[: 2 if module.startswith("ufgir") else 1])


def test_the_graph_sees_imports():
    """Relative, absolute and function-level imports of modules and names are found, which the other tests rely on."""
    code = "from ..utils import text\nimport clca\ndef f():\n    from .folders import x\n"
    code += "if TYPE_CHECKING:\n    from ..runs import records\n"
    found = dict(imports_of(code, "ufgir.data", FILES))
    assert found == {"ufgir.utils.text": False, "clca": False, "ufgir.data.folders": True}


def test_no_circle():
    arrows = graph()
    assert circle(arrows) == []
    assert len(arrows) > 100


def test_no_arrow_points_upwards():
    arrows = {(module, other) for module, others in graph().items() for other, _ in others}
    parts = {part for arrow in arrows for part in map(part_of, arrow)} - {"ufgir", "ufgir._moved", "modeling_clca"}
    assert parts <= set(FLOORS), f"say on which floor they are: {sorted(parts - set(FLOORS))}"
    upward = [
        f"{module} -> {other}"
        for module, other in sorted(arrows)
        if {part_of(module), part_of(other)} <= set(FLOORS)
        and FLOORS.index(part_of(other)) > FLOORS.index(part_of(module))
    ]
    assert upward == []


def test_figure_of_the_parts():
    """docs/figures/parts.svg has a group per part, in order; its dots are the parts that it imports."""
    svg = "{http://www.w3.org/2000/svg}"
    rows = [g for g in ElementTree.parse(ROOT / "docs/figures/parts.svg").iter(f"{svg}g") if g.get("data-part")]
    assert [row.get("data-part") for row in rows] == FLOORS
    arrows = graph()
    for row in rows:
        part = row.get("data-part")
        others = {part_of(other) for module, found in arrows.items() if part_of(module) == part for other, _ in found}
        expected = [floor for floor in FLOORS if floor in others - {part}]
        assert row.get("data-imports", "").split() == expected, part
        dots = [float(circle.get("cx", "nan")) for circle in row.findall(f"{svg}circle")]
        assert dots == [481 + 26 * FLOORS.index(other) for other in expected], f"{part}: dots are at 481 + 26 * column"


def test_utils_imports_no_other_part():
    others = {other for module, found in graph().items() if part_of(module) == "ufgir.utils" for other, _ in found}
    assert {part_of(other) for other in others} <= {"ufgir.utils"}
