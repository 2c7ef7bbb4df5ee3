"""The catalog is complete, equals the table in the guide, and its names load the right data."""

import json
import logging
import re
from dataclasses import FrozenInstanceError
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ufgir.cli.entry import main
from ufgir.data.catalog import FINE_GRAINED, HEADER, NOT_FOUND, SETS, markdown_table, table_rows
from ufgir.data.load import DatasetError, load_ufgir_dataset


ROOT = Path(__file__).parents[2]
LOADABLE = [name for name, row in FINE_GRAINED.items() if row.hub_id]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_the_table_has_every_set_of_the_original():
    assert list(FINE_GRAINED) == (
        [
            "aircraft",
            "cars",
            "cub",
            "dogs",
            "flowers",
            "food",
            "nabirds",
            "pets",
            "vegfru",
            "inat17",
            "moe",
            "dafb",
            "imagenet",
            "cifar10",
            "cifar100",
        ]
    )
    assert [row.num_classes for row in FINE_GRAINED.values()] == (
        [100, 196, 200, 120, 102, 101, 555, 37, 292, 5089, 173, 3263, 1000, 10, 100]
    )
    for row in FINE_GRAINED.values():
        assert row.num_classes < row.train and row.test > 0 and row.source
        if row.hub_id:
            assert re.fullmatch(r"[\w-]+/[\w.-]+", row.hub_id)
            assert (row.image_column is None) == (row.label_column is None)
        else:
            assert not (row.image_column or row.splits)
    with pytest.raises(FrozenInstanceError):
        FINE_GRAINED["cub"].test = 0


def test_the_guide_has_the_table_of_the_code():
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    found = re.findall(r"<!-- fine-grained table -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    assert found == [markdown_table()]


def test_every_row_of_the_markdown_has_every_column():
    lines = markdown_table().split("\n")
    assert len(lines) == 2 + len(FINE_GRAINED)
    assert all(line.startswith("| ") and line.endswith(" |") for line in lines)
    assert {line.count("|") for line in lines} == {len(HEADER) + 1}
    assert sum(NOT_FOUND in row for row in table_rows()) == len(FINE_GRAINED) - len(LOADABLE)


def miniature(row, splits=("train", "test"), images=2):
    """Write a small data set like `row.hub_id` on the Hub, with an additional column."""
    names = [f"class {index}" for index in range(row.num_classes)]
    feature = datasets.ClassLabel(names=names)
    columns = (row.image_column or "image", row.label_column or "label")
    features = {columns[0]: datasets.Image(), columns[1]: feature, "coarse": datasets.ClassLabel(names=["x"])}
    if row.image_column is None:
        features.pop("coarse")  # leave only one ClassLabel
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    count = row.num_classes * images
    values = {
        columns[0]: [image] * count,
        columns[1]: list(range(row.num_classes)) * images,
        "coarse": [0] * count,
    }
    values = {name: value for name, value in values.items() if name in features}
    split = datasets.Dataset.from_dict(values, features=datasets.Features(features))
    return datasets.DatasetDict(dict.fromkeys(splits, split))


@pytest.mark.parametrize("name", ["cub", "food", "pets", "cifar100"])
def test_short_names_load_the_id_with_its_columns_and_splits(monkeypatch, caplog, name):
    row, calls = FINE_GRAINED[name], []
    theirs = [split for split, _ in row.splits] or ["train", "test"]

    def load_dataset(hub_id, config_name, **options):
        calls.append((hub_id, config_name, options["revision"]))
        return miniature(row, (*theirs, "notes"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(name, revision="v1", validation_fraction=0)
    assert calls == [(row.hub_id, None, "v1")]
    assert list(loaded) == ["train", "test"]
    assert loaded["test"].column_names == ["image", "label"]
    assert loaded["test"].features["label"].num_classes == row.num_classes
    expected = (row.num_classes, row.train, row.test)
    found = (row.num_classes, 2 * row.num_classes, 2 * row.num_classes)
    assert (
        f"(classes, train + validation, test) = {found}, but the lists of the original have {expected}" in caplog.text
    )


def test_given_columns_override_the_catalog(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: miniature(FINE_GRAINED["cifar100"]))
    loaded = load_ufgir_dataset("cifar100", label_column="coarse", validation_fraction=0)
    assert loaded["train"].features["label"].names == ["x"]


def test_no_warning_if_the_numbers_match(monkeypatch, caplog):
    row = FINE_GRAINED["pets"]
    whole = miniature(row, images=100)
    sizes = {"train": row.train, "test": row.test}
    data = datasets.DatasetDict({name: whole[name].select(range(size)) for name, size in sizes.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: data)
    with caplog.at_level(logging.WARNING, "ufgir"):
        load_ufgir_dataset("pets")  # validation is a part of train + validation
    assert not caplog.text


def test_a_folder_of_that_name_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "cub" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "cub" / name / "0.png")
    assert load_ufgir_dataset("cub")["train"].features["label"].names == ["a", "b"]


@pytest.mark.parametrize("name", sorted(set(FINE_GRAINED) - set(LOADABLE)))
def test_errors_for_unavailable_names_give_the_source(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("something was loaded"))
    row = FINE_GRAINED[name]
    with pytest.raises(DatasetError) as error:
        load_ufgir_dataset(name)
    text = str(error.value)
    assert f"{name!r} ({row.title}, {row.num_classes:,} classes) cannot be loaded by its short name" in text
    assert row.source in text and row.note in text and "train_val.csv" in text


@pytest.mark.parametrize("name", sorted(SETS))
def test_errors_for_ultra_fgvc_names_give_the_command(name):
    with pytest.raises(DatasetError, match=f"run `ufgir prepare {name} --source RAW --output OUT`"):
        load_ufgir_dataset(name)


def test_command_prints_the_table(capsys):
    assert main(["datasets"]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.split()[0] for line in lines[1 : 1 + len(FINE_GRAINED)]] == list(FINE_GRAINED)
    assert lines[3].split()[:5] == ["cub", "200", "5,994", "5,794", FINE_GRAINED["cub"].hub_id]


def test_command_prints_markdown_json_and_one_row(capsys):
    main(["datasets", "--markdown"])
    assert capsys.readouterr().out == markdown_table() + "\n"
    main(["datasets", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [(row["name"], row["test"]) for row in rows] == [(row.name, row.test) for row in FINE_GRAINED.values()]
    main(["datasets", "food"])
    text = capsys.readouterr().out
    assert all(part in text for part in ("ethz/food101", "image, label", "25,250 test", "--dataset food"))
    main(["datasets", "moe"])
    assert "on the Hub: not found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["flower"], "got flower. Did you mean flowers?"),
        (["cub", "--markdown"], "`--markdown`"),
    ],
)
def test_wrong_arguments_of_the_command(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["datasets", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
