"""The notebooks of docs/ run from the first cell to the last, and what they show is what is stored in them. Here their models
learn from fewer images in fewer steps; `make notebooks` runs them as they are."""

import copy
import importlib.util
import shutil
from pathlib import Path

import nbformat
import pytest

from tests.helpers import slow_unless


ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
# What stands in a notebook once -> what is run instead.
SHORTER = {
    "quick_start": {
        "--synthetic_images_per_class 40 0 4": "--synthetic_images_per_class 8 0 4",
        "--disable_tqdm true": "--disable_tqdm true --num_train_epochs 2",
    },
    "your_own_leaves": {"images_per_class=[40, 8, 8]": "images_per_class=[16, 8, 8]", "epochs 16": "epochs 2"},
    "your_own_method": {"steps=80": "steps=4"},
}


@pytest.fixture(scope="module")
def execute():
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "docs" / "run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute


@pytest.fixture
def folder(tmp_path):
    """Create a folder in a copy of the repository, in the place of the notebooks' folder, for their files."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "demo.yaml", tmp_path / "recipes")
    folder = tmp_path / "docs" / "notebooks"
    folder.mkdir(parents=True)
    return folder


def kinds(cell):
    """Return the kind of a cell's output: the name of a stream, or the formats of a result."""
    return [output.get("name") or sorted(output.get("data", {})) for output in cell.outputs]


def texts(cell):
    return [output.get("text") or output.data["text/plain"] for output in cell.outputs]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["quick_start", "your_own_leaves", "your_own_method"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored(path):
    """A notebook is valid, was run in order without errors, and has no progress bars and a small size."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" and output.get("name") != "stderr" for c in code for output in c.outputs)
    assert path.stat().st_size < 400_000
    assert str(ROOT) not in path.read_text(encoding="utf-8")


# What the others show is also tested elsewhere, so they run only with the slow tests.
@pytest.mark.parametrize(
    "path", slow_unless(lambda path: path.stem == "quick_start", NOTEBOOKS), ids=lambda path: path.stem
)
def test_runs(path, folder, execute, monkeypatch):
    """Every cell runs and gives the same kinds of output as stored; cells tagged `exact` give the same text."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    stored = nbformat.read(path, as_version=4)
    shortened = copy.deepcopy(stored)
    for long, short in SHORTER[path.stem].items():
        (cell,) = [cell for cell in shortened.cells if cell.cell_type == "code" and long in cell.source]
        cell.source = cell.source.replace(long, short)
    nbformat.write(shortened, folder / path.name)
    ran = execute(folder / path.name, folder)
    pairs = [pair for pair in zip(stored.cells, ran.cells, strict=True) if pair[0].cell_type == "code"]
    for before, now in pairs:
        assert kinds(now) == kinds(before), before.source
        if "exact" in before.metadata.get("tags", []):
            assert texts(now) == texts(before), before.source
