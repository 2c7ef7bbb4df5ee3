"""The layouts recognize their sources, and a new layout needs only one record."""

from pathlib import Path

import datasets
import pytest
from PIL import Image

from ufgir.data import load
from ufgir.data.load import LAYOUTS, DatasetError, Layout, load_ufgir_dataset
from ufgir.data.sources import Opened, Source
from ufgir.utils.options import called


def save_png(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16)).save(path)
    return path


def images(folder: Path) -> datasets.Dataset:
    rows = {"image": [str(save_png(folder / f"{name}.png")) for name in "ab"], "label": ["a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    return datasets.Dataset.from_dict(rows, features)


def saved(folder: Path) -> None:
    images(folder / "files").save_to_disk(folder / "set")


def parquet(folder: Path) -> None:
    (folder / "set").mkdir()
    images(folder / "files").to_parquet(folder / "set" / "train.parquet")


def listing(folder: Path) -> None:
    save_png(folder / "set" / "a.png")
    (folder / "set" / "train.csv").write_text("class_id,dir\n0,a.png\n")


def listing_in_parquet(folder: Path) -> None:
    save_png(folder / "set" / "a.png")
    datasets.Dataset.from_dict({"file_name": ["a.png"], "label": ["a"]}).to_parquet(folder / "set" / "train.parquet")


def classes(folder: Path) -> None:
    save_png(folder / "set" / "a" / "1.png")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (saved, "save_to_disk"),
        (parquet, "parquet files that contain images"),
        (listing, "list images"),
        (listing_in_parquet, "list images"),
        (classes, "class folders"),
    ],
)
def test_each_layout_is_recognized(tmp_path, make, words):
    make(tmp_path)
    layout = load._layout_of(Source("set", tmp_path / "set"))
    assert words in layout.title
    assert load_ufgir_dataset(tmp_path / "set", validation_fraction=0)["train"].num_rows in (1, 2)


@pytest.mark.parametrize(("name", "place"), [("synthetic_leaves", 0), ("cub", -2), ("soylocal", -2), ("a/b", -1)])
def test_names_that_are_not_folders(name, place):
    assert load._layout_of(Source(name, Path(name))) is LAYOUTS[place]


def test_a_new_layout_is_one_record(tmp_path, monkeypatch):
    mine = Layout(
        "one image",
        lambda source: source.name.endswith(".one"),
        lambda source: Opened(images(tmp_path).select([0]), source.columns),
    )
    monkeypatch.setattr(load, "LAYOUTS", (mine, *LAYOUTS))
    assert load_ufgir_dataset("leaf.one", validation_fraction=0)["train"].features["label"].names == ["a"]


def test_errors_use_the_argument_names_of_the_caller(tmp_path):
    file = save_png(tmp_path / "leaf.png")
    with pytest.raises(DatasetError, match="`name_or_path`"):
        load_ufgir_dataset(file)
    with called({"name_or_path": "dataset"}), pytest.raises(DatasetError, match="`dataset`"):
        load_ufgir_dataset(file)
