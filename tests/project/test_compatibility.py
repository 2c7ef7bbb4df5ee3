"""`make compat` and `make clients`: their tables, and the clients that need only the development tools."""

import importlib
from pathlib import Path

import pytest

from tests.clients.__main__ import CLIENTS
from tests.clients.__main__ import main as run_clients
from tests.compat.__main__ import ROWS, TESTS, counts
from tests.compat.__main__ import main as run_rows
from tests.compat.environments import DOCUMENT, ROOT, update_table


QUICK = ["pipelines", "safetensors_load", "trainer", "accelerate_loop", "data_parallel"]
SLOW = ["auto_model", "onnx_runtime", "peft_adapters", "jit_trace"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_clients_work(name: str, tmp_path: Path) -> None:
    assert importlib.import_module(f"tests.clients.{name}").check(tmp_path)


def test_every_client_is_a_file() -> None:
    files = {path.stem for path in (ROOT / "tests" / "clients").glob("*.py")}
    assert files - {"__init__", "__main__", "common"} == set(CLIENTS)


@pytest.mark.parametrize(("name", "rows"), [("compat", ROWS), ("clients", CLIENTS)])
def test_the_document_has_a_row_of_each(name: str, rows: dict[str, object]) -> None:
    table = DOCUMENT.read_text(encoding="utf-8").split(f"<!-- {name}: begin -->\n")[1].split("<!--")[0]
    found = [line.split("`")[1] for line in table.splitlines()[2:]]
    assert found == list(rows)


def test_the_tests_of_the_rows_exist() -> None:
    for names in TESTS.values():
        for path, _, function in (name.partition("::") for name in names):
            text = "" if (ROOT / path).is_dir() else (ROOT / path).read_text(encoding="utf-8")
            assert f"def {function}" in text or not function


def test_a_partial_run_replaces_its_own_rows_only(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("above\n<!-- t: begin -->\n<!-- t: end -->\nbelow\n", encoding="utf-8")
    order = ["one", "two", "three"]
    update_table("t", ("row", "a", "b"), {"three": ["1", "x | y"], "one": ["2", "3"]}, order, document)
    update_table("t", ("row", "a", "b"), {"three": ["4", "5\n6"]}, order, document)
    lines = document.read_text(encoding="utf-8").splitlines()
    assert lines == [
        "above",
        "<!-- t: begin -->",
        "| row | a | b |",
        "| --- | --- | --- |",
        "| `one` | 2 | 3 |",
        "| `three` | 4 | 5 6 |",
        "<!-- t: end -->",
        "below",
    ]
    update_table("t", ("row", "a", "b"), {}, ["one"], document)  # a row that is no longer in the list
    assert "three" not in document.read_text(encoding="utf-8")


def test_counts_are_those_of_pytest(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" errors="1" failures="2" skipped="3"/></testsuites>')
    assert counts(report) == (3, 3, 3)


@pytest.mark.parametrize(("main", "name"), [(run_rows, "ROWS"), (run_clients, "CLIENTS")])
def test_unknown_rows_are_named(main: object, name: str) -> None:
    assert "nonsense" in main(["uv", "nonsense"]) and name in main(["uv", "nonsense"])
