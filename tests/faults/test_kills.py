"""Run a few tries of `make faults`; all of them would take too long for a test."""

import json
from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.__main__ import table
from tests.faults.results import Result


def test_a_table_of_results() -> None:
    lines = table([Result("a", 3, 2, 1, "why"), Result("b", 4, 4, 0), Result("not tried", 0, 0, 0)]).splitlines()
    assert lines[2:] == ["| a | 3 | 2 | 1 |", "| b | 4 | 4 | 0 |", "| all | 7 | 6 | 1 |"]


def test_difference_lists_what_differs() -> None:
    expected = {"weights": "1", "run.json": [1], "log": "x"}
    assert kills._difference(expected, expected) == ""
    difference = kills._difference({"weights": "2", "log": "x", "_run.json.a.tmp": "there"}, expected)
    assert difference == "left behind: _run.json.a.tmp; missing: run.json; different: weights"


@pytest.mark.slow
def test_some_kills(tmp_path: Path) -> None:
    """One try of each kind survives, and tries in the record are not repeated."""
    record = tmp_path / "record.jsonl"
    results = kills.run(30, 28, 7, tmp_path / "work", record)
    assert [(r.tries, r.survived) for r in results] == [(1, 1)] * len(results), results
    before = record.read_text()
    assert kills.run(30, len(results), 7, tmp_path / "repeated", record) == results and record.read_text() == before
    kinds = {"evit, cache and CLA head", "two processes", "ufgir predict", "ufgir export", "saved on a signal"}
    assert kinds <= {r.kind.removeprefix("killed: ") for r in results}


@pytest.mark.slow
def test_two_processes_share_the_tries_of_a_record(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    for k in (1, 2):
        kills.run(30, 3, 7, tmp_path / f"work{k}", record, "ufgir data-report", (k, 2))
        numbers = [json.loads(line)["try"] for line in record.read_text().splitlines()]
        assert numbers == [0, 2, 1][: 3 - (k == 1)]
    (result,) = kills.run(0, 3, 7, tmp_path / "all", record, "ufgir data-report")
    assert (result.tries, result.survived) == (3, 3)
