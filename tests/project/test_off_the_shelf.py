"""The measurements of methods off the shelf: the page shows the committed table, and the photographs are cut without overlap."""

import csv
from importlib import import_module
from pathlib import Path

import pytest

from clca import REDUCTIONS
from tests.helpers import tiny_config
from ufgir.profiling.targets import training_free_options


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    return import_module("off_the_shelf")


@pytest.fixture
def rows(script):
    with script.TABLE.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("images", ["photographs", "leaves", "time"])
def test_the_page_shows_the_committed_table(script, rows, images):
    assert script.table(rows, images) in (DOCS / "choosing.md").read_text(encoding="utf-8"), (
        "run docs/off_the_shelf.py"
    )


def test_every_method_without_parameters_is_measured(rows):
    free = {m for m in REDUCTIONS if training_free_options(tiny_config(reduction=m)) is not None} - {"heuristic"}
    assert {row["method"] for row in rows} == free | {"dense"}


def test_costs_are_at_most_the_targets(rows):
    """And near them: token counts are whole numbers."""
    for row in rows:
        if row["method"] not in ("dense", "ats"):  # ATS is counted on a blank image, its upper bound is the target
            assert 0.93 * float(row["target_gmacs"]) < float(row["gmacs"]) <= float(row["target_gmacs"]) + 5e-4


def test_rows_come_from_the_files_of_the_benchmark(script, tmp_path):
    folder = tmp_path / "leaves_all"
    folder.mkdir()
    head = "backend,batch_size,method,reduction_layers,keep_rate,target_gmacs,macs,cosine,same_neighbor,same_top1,accuracy"
    head += ",seconds_median"
    lines = [head, "eager,1,dense,,1,,2000000000,,,,0.5,", "eager,1,evit,0 1,0.5,1.1,1000000000,0.9,0.8,0.7,0.4,"]
    lines.append("onnx,1,evit,0 1,0.5,1.1,1000000000,,,,,0.02")  # its agreement is that of eager
    (folder / "benchmark.csv").write_text("\n".join(lines))
    dense, evit = script.collect([folder, folder])
    assert script.collect([folder], [dense, evit | {"cosine": "0.1"}]) == [dense, evit]
    other = evit | {"target_gmacs": "0.5"}
    assert script.collect([folder], [other]) == [dense, evit, other]
    assert (dense["images"], dense["method"], dense["accuracy"]) == ("leaves", "dense", "0.5")
    assert (evit["gmacs"], evit["of_dense"], evit["layers"]) == ("1.000", "0.5000", "0 1")
    assert script.table([dense, evit], "leaves").splitlines() == [
        "| method | 55 % |", "| --- | ---: |", "| evit | 0.900 / 70 / 40 |",
    ]  # fmt: skip
    times = tmp_path / "time_all"
    times.mkdir()
    lines = [head, "eager,4,dense,,1,,2e9,,,,,0.32", "eager,4,evit,0 1,0.5,1.1,1e9,,,,,0.18"]
    lines.append("eager,4,tome,0 1,0.5,1.1,1e9,0.9,,,,")  # without a time
    (times / "benchmark.csv").write_text("\n".join(lines))
    assert script.table(script.collect([times]), "time").splitlines()[2:] == ["| evit | 45.0 |"]
    with pytest.raises(ValueError, match="`folders`"):
        script.collect([tmp_path / "shelf"])


def test_a_new_column_and_a_new_table(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "TABLE", tmp_path / "table.csv")
    monkeypatch.setattr(script, "draw", lambda rows: None)
    monkeypatch.setattr(script, "read", lambda folder: iter([row | {"new": "1"}]))
    row = {"images": "time", "method": "dense", "layers": "", "target_gmacs": "", "gmacs": "2", "ms": "9"}
    other = row | {"method": "evit", "layers": "0 1", "target_gmacs": "1"}
    script.TABLE.write_text("\n".join([",".join(row), ",".join(row.values()), ",".join(other.values())]))
    script.main([tmp_path])
    assert script.TABLE.read_text().splitlines() == [
        "images,method,layers,target_gmacs,gmacs,ms,new",
        "time,dense,,,2,9,1",
        "time,evit,0 1,1,2,9,",
    ]
    script.TABLE.unlink()
    monkeypatch.setattr(script, "read", lambda folder: iter([row, other]))
    script.main([tmp_path])
    assert len(script.TABLE.read_text().splitlines()) == 3


@pytest.mark.parametrize(("size", "count"), [((640, 427), 1), ((4000, 2000), 2), ((1080, 1920), 2)])
def test_photographs_are_cut_into_squares_without_overlap(monkeypatch, size, count):
    monkeypatch.syspath_prepend(DOCS)
    boxes = import_module("cut_photographs").squares(*size)
    assert len(boxes) == count
    for left, top, right, bottom in boxes:
        assert right - left == bottom - top > 0 and left >= 0 and right <= size[0] and top >= 0 and bottom <= size[1]
    if count == 2:
        (_, _, right, bottom), (left, top, _, _) = boxes
        assert left >= right or top >= bottom
