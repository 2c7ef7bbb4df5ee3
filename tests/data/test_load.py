"""Load every layout, with given classes, and images without classes."""

import logging

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.data.loading import check
from tests.image_layouts import make_csv, make_folder, save_image
from ufgir.data import synthetic_leaves as leaves
from ufgir.data.load import DatasetError, load_images, load_ufgir_dataset
from ufgir.transforms.images import to_rgb


def labels_of(split):
    return [split.features["label"].names[label] for label in split["label"]]


def test_synthetic_by_name(tmp_path):
    loaded = load_ufgir_dataset(
        "synthetic_leaves", num_classes=2, images_per_class=(2, 1, 1), image_size=16, seed=3, cache_dir=tmp_path
    )
    check(loaded, {"train": 4, "validation": 2, "test": 2}, ["cultivar_00", "cultivar_01"])
    config = leaves.SyntheticLeavesConfig(num_classes=2, image_size=16, seed=3)
    assert loaded["test"][1]["image"].tobytes() == config.draw("test", 1, 0).tobytes()


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_image_folder_with_splits(tmp_path, validation):
    make_folder(tmp_path, ("train", validation, "test"), images=2)
    loaded = load_ufgir_dataset(tmp_path)
    check(loaded, {"train": 4, "validation": 4, "test": 4}, ["a", "b"])
    assert labels_of(loaded["train"]) == ["a", "a", "b", "b"]
    assert [row["image"].getpixel((0, 0))[0] for row in loaded["validation"]] == [4, 5, 6, 7]


def test_the_last_fifth_of_each_class_is_validation(tmp_path):
    make_folder(tmp_path, ("",), images=5)
    for index in range(3):
        save_image(tmp_path / "c" / f"{index}.png", 100 + index)
    save_image(tmp_path / "single" / "0.png", 200)
    loaded = load_ufgir_dataset(tmp_path)
    check(loaded, {"train": 11, "validation": 3}, ["a", "b", "c", "single"])
    reds = {name: [row["image"].getpixel((0, 0))[0] for row in split] for name, split in loaded.items()}
    assert reds == {"train": [0, 1, 2, 3, 5, 6, 7, 8, 100, 101, 200], "validation": [4, 9, 102]}
    assert len(load_ufgir_dataset(tmp_path, validation_fraction=0.5)["validation"]) == 3 + 3 + 2
    assert list(load_ufgir_dataset(tmp_path, validation_fraction=0)) == ["train"]


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_validation_fraction_is_checked(tmp_path, fraction):
    with pytest.raises(ValueError, match=rf"`validation_fraction` must be in \[0, 1\), got {fraction}"):
        load_ufgir_dataset(make_folder(tmp_path), validation_fraction=fraction)


def test_folder_with_a_test_split_only(tmp_path):
    check(load_ufgir_dataset(make_folder(tmp_path, ("test",))), {"test": 10}, ["a", "b"])


def test_images_of_any_mode_are_not_converted(tmp_path):
    """The loader must not convert images: `to_rgb`, the first step of the transforms, needs the original mode."""
    make_folder(tmp_path, ("train",), images=2)
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "train" / "a" / "0.png")
    Image.fromarray(np.full((8, 8), 257 * 9, np.uint16)).save(tmp_path / "train" / "a" / "1.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "train" / "b" / "0.png")
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert [to_rgb(row["image"]).getpixel((0, 0))[0] for row in loaded["train"]] == [255, 9, 7, 3]
    stream = load_ufgir_dataset(tmp_path, validation_fraction=0, streaming=True)
    assert [to_rgb(row["image"]).getpixel((0, 0))[0] for row in stream["train"]] == [255, 9, 7, 3]


def test_float_images_outside_the_allowed_range_are_named(tmp_path):
    make_folder(tmp_path, ("train",))
    Image.fromarray(np.full((8, 8), -1, np.float32)).save(tmp_path / "train" / "a" / "height.tif")
    with pytest.raises(DatasetError, match=r"height\.tif.*mode F"):
        load_ufgir_dataset(tmp_path)


def test_csv_layout(tmp_path):
    make_csv(tmp_path, {"train": 2, "val": 1, "test": 2})
    (tmp_path / "classid_classname.csv").write_text("class_id,class_name\n1,Merlot\n0,Syrah\n")
    loaded = load_ufgir_dataset(tmp_path)
    check(loaded, {"train": 4, "validation": 2, "test": 4}, ["Syrah", "Merlot"])
    assert labels_of(loaded["train"]) == ["Syrah", "Syrah", "Merlot", "Merlot"]
    assert [row["image"].getpixel((0, 0))[0] for row in loaded["train"]] == [0, 1, 10, 11]


@pytest.mark.parametrize("first", ["missing", "absolute"])
def test_the_folder_of_listed_images_does_not_depend_on_the_first_one(tmp_path, first):
    """It may be missing, or be given by an absolute path, which is found from every folder."""
    make_csv(tmp_path, {"train": 2})
    images = sorted(tmp_path.rglob("*.png"))
    assert images[0].parent.name == "images"
    file = tmp_path / "train.csv"
    text = file.read_text()
    name = images[0].name if first == "missing" else str(images[0])
    assert text.splitlines()[1].endswith(images[0].name)
    if first == "absolute":
        file.write_text(text.replace(images[0].name, name, 1))
        assert len(load_ufgir_dataset(tmp_path, validation_fraction=0)["train"]) == 4
    else:
        images[0].unlink()
        with pytest.raises(DatasetError, match=rf" 1 listed images are not in .*images .*: {name}\."):
            load_ufgir_dataset(tmp_path)


def test_csv_train_val_is_split_in_order(tmp_path):
    make_csv(tmp_path, {"train_val": 3, "test": 1}, folder="images/deep")
    loaded = load_ufgir_dataset(tmp_path, csv_data_folder="images/deep")
    check(loaded, {"train": 4, "validation": 2, "test": 2}, ["0", "1"])
    assert [row["image"].getpixel((0, 0))[0] for row in loaded["validation"]] == [2, 12]


def test_csv_val_is_not_read_together_with_train_val(tmp_path):
    make_csv(tmp_path, {"train_val": 5, "test": 1})
    (tmp_path / "val.csv").write_text("class_id,dir\n0,train_val_0_0.png\n1,train_val_1_0.png\n")
    loaded = load_ufgir_dataset(tmp_path)
    check(loaded, {"train": 8, "validation": 2, "test": 2}, ["0", "1"])
    assert [row["image"].getpixel((0, 0))[0] for row in loaded["validation"]] == [4, 14]


def test_named_csv_files_are_the_only_ones_read(tmp_path):
    make_csv(tmp_path, {"train": 1, "val": 1, "train_val": 4, "test": 1})
    everything = {"csv_train": "train_val.csv", "csv_test": "test.csv", "validation_fraction": 0}
    check(load_ufgir_dataset(tmp_path, **everything), {"train": 8, "test": 2}, ["0", "1"])
    check(load_ufgir_dataset(tmp_path), {"train": 2, "validation": 2, "test": 2}, ["0", "1"])


def test_save_to_disk(tmp_path, drawn):
    drawn.save_to_disk(tmp_path / "saved")
    loaded = load_ufgir_dataset(tmp_path / "saved")
    check(loaded, {"train": 15, "validation": 6, "test": 6}, drawn["train"].features["label"].names)
    drawn["train"].save_to_disk(tmp_path / "single")
    check(
        load_ufgir_dataset(tmp_path / "single"), {"train": 12, "validation": 3}, drawn["train"].features["label"].names
    )


@pytest.mark.parametrize("pattern", ["{}-00000-of-00001.parquet", "leaves-{}.parquet", "{}/0000.parquet"])
def test_parquet(tmp_path, drawn, pattern):
    for name in ("train", "test"):
        file = tmp_path / "data" / pattern.format(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn[name].to_parquet(file)
    loaded = load_ufgir_dataset(tmp_path / "data", cache_dir=tmp_path / "cache")
    check(loaded, {"train": 12, "validation": 3, "test": 6}, drawn["train"].features["label"].names)
    assert loaded["test"][4]["image"].tobytes() == drawn["test"][4]["image"].tobytes()


@pytest.mark.parametrize("values", [["red", "blue", "red"], [1, 0, 1]], ids=["text", "integers"])
def test_columns_by_name_and_plain_labels(tmp_path, drawn, values):
    split = drawn["train"].select(range(3)).remove_columns("label").rename_column("image", "scan")
    split.add_column("variety", values).save_to_disk(tmp_path)
    loaded = load_ufgir_dataset(tmp_path, label_column="variety", validation_fraction=0)
    check(loaded, {"train": 3}, sorted({str(value) for value in values}))
    assert labels_of(loaded["train"]) == [str(value) for value in values]


# Given class names


def test_a_subset_of_the_classes_keeps_the_ids_of_the_model(tmp_path):
    make_folder(tmp_path, ("test",), ("b", "d"), images=2)
    loaded = load_ufgir_dataset(tmp_path, class_names=["d", "c", "b", "a"])
    check(loaded, {"test": 4}, ["d", "c", "b", "a"])
    assert loaded["test"]["label"] == [2, 2, 0, 0]


def test_splits_may_have_different_subsets(tmp_path, caplog):
    make_folder(tmp_path, ("train",), ("a", "b", "c"), images=2)
    make_folder(tmp_path, ("test",), ("c",), images=2)
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    check(loaded, {"train": 6, "test": 2}, ["a", "b", "c"])
    assert loaded["test"]["label"] == [2, 2] and "test has no images of 2 classes: a, b" in caplog.text
    loaded = load_ufgir_dataset(tmp_path, class_names=["a", "b", "c", "d"], validation_fraction=0)
    check(loaded, {"train": 6, "test": 2}, ["a", "b", "c", "d"])
    assert loaded["test"]["label"] == [2, 2]


@pytest.mark.parametrize("layout", ["folder", "csv", "save_to_disk", "text", "integers"])
def test_unknown_classes_are_named(tmp_path, drawn, layout):
    known = ["cultivar_00", "cultivar_02", "2"]
    unknown = "cultivar_01"
    if layout == "folder":
        make_folder(tmp_path, ("test",), ("cultivar_00", "cultivar_01"), images=1)
    elif layout == "csv":
        make_csv(tmp_path, {"test": 1})
        unknown = "0, 1"
    else:
        split = drawn["test"]
        if layout != "save_to_disk":
            values = [f"cultivar_0{label}" if layout == "text" else label for label in split["label"]]
            split = split.remove_columns("label").add_column("label", values)
            unknown = unknown if layout == "text" else "0, 1"
        datasets.DatasetDict({"test": split}).save_to_disk(tmp_path)
    message = rf"not among the 3 known ones: {unknown}\. .*cultivar_00, cultivar_02, 2"
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path, class_names=known)


@pytest.mark.parametrize("kind", ["ClassLabel", "text", "integers"])
def test_tables_are_mapped_by_name(tmp_path, drawn, kind):
    split = drawn["train"]
    names = [f"cultivar_0{label}" for label in split["label"]]
    if kind != "ClassLabel":
        values = names if kind == "text" else split["label"]
        split = split.remove_columns("label").add_column("label", list(values))
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path)
    given = ["x", *(["cultivar_02", "cultivar_01", "cultivar_00"] if kind != "integers" else ["2", "1", "0"])]
    loaded = load_ufgir_dataset(tmp_path, class_names=given, validation_fraction=0)
    check(loaded, {"train": 15}, given)
    found = [given[label] for label in loaded["train"]["label"]]
    assert found == (names if kind != "integers" else [name[-1] for name in names])
    assert loaded["train"][4]["image"].tobytes() == drawn["train"][4]["image"].tobytes()


# Images without classes


def test_load_images_of_a_folder_in_natural_order(tmp_path):
    for number, name in enumerate(
        ["leaf10.png", "leaf2.png", "Leaf1.PNG", "b/leaf1.png", "b/.hidden/x.png", ".y.png"]
    ):
        save_image(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(tmp_path)
    assert images.column_names == ["image", "path"]
    assert images["path"] == [str(tmp_path / name) for name in ("b/leaf1.png", "Leaf1.PNG", "leaf2.png", "leaf10.png")]
    assert [row["image"].getpixel((0, 0))[0] for row in images] == [3, 2, 1, 0]
    assert images[0]["image"].mode == "RGB"


def test_load_images_of_files_keeps_their_order(tmp_path):
    make_folder(tmp_path, ("",), ("a",), images=3)
    files = [tmp_path / "a" / f"{index}.png" for index in (2, 0)]
    assert load_images(files)["path"] == [str(file) for file in files]
    assert load_images([*files, tmp_path / "a"])["path"][2:] == [str(tmp_path / "a" / f"{i}.png") for i in range(3)]
    assert load_images(str(files[0]))["path"] == [str(files[0])]


def test_load_images_names_unreadable_images(tmp_path, caplog):
    make_folder(tmp_path, ("",), ("a",), images=3)
    broken = tmp_path / "a" / "1.png"
    broken.write_text("not an image")
    with pytest.raises(DatasetError, match=r"1 of 3 images cannot be read.*:\n  .*1\.png"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, verify=False)) == 3
    with caplog.at_level(logging.WARNING, "ufgir"):
        kept = load_images(tmp_path, skip_broken=True)
    assert [path[-5:] for path in kept["path"]] == ["0.png", "2.png"]
    assert "1 of 3 images cannot be read and are left out" in caplog.text and str(broken) in caplog.text
    with pytest.raises(DatasetError, match="none of 1 images can be read"):
        load_images(broken, skip_broken=True)


def test_load_images_without_images(tmp_path):
    with pytest.raises(DatasetError, match=r"`folder_or_files`: 1 of 2 do not exist: .*gone\.png"):
        load_images([tmp_path, tmp_path / "gone.png"])
    with pytest.raises(DatasetError, match=r"`folder_or_files`: no image in .*\(suffixes \.bmp"):
        load_images(tmp_path)
    with pytest.raises(DatasetError, match="no image in an empty list"):
        load_images([])
