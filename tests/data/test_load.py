"""The loader: every layout, every refusal by name."""

import io
import logging
import shutil

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.image_layouts import make_csv, make_folder, save_image
from ufgir.data import synthetic_leaves as leaves
from ufgir.data.load import LISTED, DatasetError, load_images, load_ufgir_dataset, verify_images
from ufgir.transforms.images import to_rgb


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (5, 2, 2), image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


# Layouts


def check(loaded, sizes, names):
    assert {name: len(split) for name, split in loaded.items()} == sizes
    for split in loaded.values():
        assert split.column_names == ["image", "label"]
        assert split.features["image"] == datasets.Image()
        assert split.features["label"] == datasets.ClassLabel(names=names)
        assert split[0]["image"].mode == "RGB"


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


def test_images_of_any_mode_keep_what_they_show(tmp_path):
    """`to_rgb`, with which the transforms begin, lays them over white or scales them: a loader that converts cannot."""
    make_folder(tmp_path, ("train",), images=2)
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "train" / "a" / "0.png")
    Image.fromarray(np.full((8, 8), 257 * 9, np.uint16)).save(tmp_path / "train" / "a" / "1.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "train" / "b" / "0.png")
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert [to_rgb(row["image"]).getpixel((0, 0))[0] for row in loaded["train"]] == [255, 9, 7, 3]
    stream = load_ufgir_dataset(tmp_path, validation_fraction=0, streaming=True)
    assert [to_rgb(row["image"]).getpixel((0, 0))[0] for row in stream["train"]] == [255, 9, 7, 3]


def test_images_of_numbers_that_are_no_brightness_are_named(tmp_path):
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


def test_csv_train_val_is_split_in_order(tmp_path):
    make_csv(tmp_path, {"train_val": 3, "test": 1}, folder="pictures/deep")
    loaded = load_ufgir_dataset(tmp_path, csv_data_folder="pictures/deep")
    check(loaded, {"train": 4, "validation": 2, "test": 2}, ["0", "1"])
    assert [row["image"].getpixel((0, 0))[0] for row in loaded["validation"]] == [2, 12]


def test_csv_val_is_not_read_beside_the_train_val_that_holds_it(tmp_path):
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


# Classes that are given


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
    assert loaded["test"]["label"] == [2, 2] and "test has no image of 2 classes: a, b" in caplog.text
    loaded = load_ufgir_dataset(tmp_path, class_names=["a", "b", "c", "d"], validation_fraction=0)
    check(loaded, {"train": 6, "test": 2}, ["a", "b", "c", "d"])
    assert loaded["test"]["label"] == [2, 2]


@pytest.mark.parametrize("layout", ["folder", "csv", "save_to_disk", "text", "integers"])
def test_classes_that_the_model_does_not_know_are_named(tmp_path, drawn, layout):
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
    message = rf"not among the 3 known ones: {unknown}\. Known are cultivar_00, cultivar_02, 2"
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


def test_load_images_names_what_cannot_be_read(tmp_path, caplog):
    make_folder(tmp_path, ("",), ("a",), images=3)
    broken = tmp_path / "a" / "1.png"
    broken.write_text("not an image")
    with pytest.raises(DatasetError, match=r"1 of 3 images cannot be read:\n  .*1\.png"):
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


# Refusals


def test_missing_folder(tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        load_ufgir_dataset(tmp_path / "nowhere")


def test_a_file_is_no_folder(tmp_path):
    save_image(tmp_path / "leaf.png", 0)
    with pytest.raises(DatasetError, match=r"must be a folder, got the file .*leaf\.png"):
        load_ufgir_dataset(tmp_path / "leaf.png")


@pytest.mark.parametrize("inner", ["", "a", "train/a"])
def test_folder_without_images(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DatasetError, match="holds no images"):
        load_ufgir_dataset(tmp_path)


def test_pictures_without_a_class_folder_are_named(tmp_path, caplog):
    make_folder(tmp_path, ("train", "test"), images=1)
    for name in ("train/loose.png", "top.jpg", "train/.hidden.png"):
        save_image(tmp_path / name, 0)
    (tmp_path / "train" / "readme.txt").write_text("no image")
    with caplog.at_level(logging.WARNING, "ufgir"):
        assert len(load_ufgir_dataset(tmp_path)["train"]) == 2
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ufgir")]
    assert [m for m in messages if "belong to no class" in m] == [
        f"{tmp_path}: 1 images beside the folders belong to no class and are left out: top.jpg",
        f"{tmp_path / 'train'}: 1 images beside the folders belong to no class and are left out: loose.png",
    ]


@pytest.mark.parametrize("inner", ["", "test"])
def test_pictures_without_any_class_folder(tmp_path, inner):
    if inner:
        make_folder(tmp_path, ("train",))
    for index in range(3):
        save_image(tmp_path / inner / f"{index}.png", index)
    split, name = inner or "train", (tmp_path / inner).name
    message = rf"holds 3 images but no class folders.*\({name}/<class>/0\.png\).*{split}\.csv.*`load_images`"
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


def test_empty_class_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "barren").mkdir()
    (tmp_path / "train" / "barren" / "notes.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"without images: train.barren\."):
        load_ufgir_dataset(tmp_path)


def test_a_class_that_train_lacks(tmp_path):
    make_folder(tmp_path)
    save_image(tmp_path / "test" / "zeta" / "0.png", 0)
    with pytest.raises(DatasetError, match=r"test has zeta, which train lacks.*add some to train") as error:
        load_ufgir_dataset(tmp_path)
    assert "class_names" not in str(error.value)  # which is no option of the script


def test_a_listing_may_lack_classes(tmp_path, caplog):
    make_csv(tmp_path, {"train": 2, "test": 2}, classes=3)
    file = tmp_path / "test.csv"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("1,")))
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert loaded["test"]["label"] == [0, 0, 2, 2] and "test has no image of 1 classes: 1" in caplog.text


def test_a_table_may_lack_classes(tmp_path, drawn):
    fewer = drawn["test"].filter(lambda row: row["label"] != 1)
    names = [f"cultivar_0{label}" for label in fewer["label"]]
    fewer = fewer.remove_columns("label").add_column("label", names)
    fewer = fewer.cast_column("label", datasets.ClassLabel(names=["cultivar_02", "cultivar_00"]))
    datasets.DatasetDict({"train": drawn["train"], "test": fewer}).save_to_disk(tmp_path)
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert loaded["test"]["label"] == [0, 0, 2, 2] and loaded["test"].features["label"].names[1] == "cultivar_01"


def test_stray_and_repeated_split_folders(tmp_path):
    make_folder(tmp_path, ("train", "val", "extra"))
    with pytest.raises(DatasetError, match="split folders train, val, but extra is not one of"):
        load_ufgir_dataset(tmp_path)
    shutil.move(tmp_path / "extra", tmp_path / "valid")
    with pytest.raises(DatasetError, match="two folders for the validation split: val, valid"):
        load_ufgir_dataset(tmp_path)


def test_splits_do_not_become_classes(tmp_path):
    """Not even where no folder is called train."""
    make_folder(tmp_path, ("train_images", "validation", "test"))
    with pytest.raises(DatasetError, match="split folders test, validation, but train_images is not one of train, "):
        load_ufgir_dataset(tmp_path)


def test_a_split_with_a_picture_beside_its_classes_is_no_class(tmp_path):
    make_folder(tmp_path, ("train",))
    save_image(tmp_path / "train" / "preview.png", 100)
    save_image(tmp_path / "examples" / "0.png", 101)
    with pytest.raises(
        DatasetError, match=r"split folders train, but examples is not one of .* pictures and no folders"
    ):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("names", [("dev", "merlot", "test"), ("merlot", "train")], ids=str)
def test_a_class_may_be_called_as_a_split(tmp_path, names):
    make_folder(tmp_path, ("",), names, images=2)
    save_image(tmp_path / names[-1] / ".thumbnails" / "0.png", 100)  # hidden, so that it does not count
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    check(loaded, {"train": 2 * len(names)}, list(names))


def test_every_format_that_pillow_reads_is_a_picture(tmp_path, caplog):
    make_folder(tmp_path, ("",), images=1)
    for suffix, kind in (
        (".jfif", "JPEG"),
        (".tga", "TGA"),
        (".JPE", "JPEG"),
        (".jp2", "JPEG2000"),
        (".avif", "AVIF"),
    ):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"leaf{suffix}", format=kind)
    (tmp_path / "b" / "notes.heic").write_text("no picture")
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert len(loaded["train"]) == 7
    assert "1 files in class folders are no pictures by their suffix: b/notes.heic" in caplog.text


def test_a_way_to_part_train_has_no_effect_where_it_is_not_parted(tmp_path, caplog):
    make_folder(tmp_path)
    loaded = load_ufgir_dataset(tmp_path, validation_split="random")
    assert "`validation_split`" in caplog.text and "without a validation split" in caplog.text
    assert {s: loaded[s]["label"] for s in loaded} == {s: d["label"] for s, d in load_ufgir_dataset(tmp_path).items()}


def break_images(root):
    (root / "train" / "a" / "0.png").write_text("not an image")
    (root / "train" / "b" / "1.png").write_bytes(b"")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(buffer, format="PNG")
    (root / "test" / "b" / "2.png").write_bytes(buffer.getvalue()[:-900])


def test_all_unreadable_images_are_named_at_once(tmp_path):
    make_folder(tmp_path)
    break_images(tmp_path)
    with pytest.raises(DatasetError, match="3 of 30 images cannot be read") as error:
        load_ufgir_dataset(tmp_path)
    for file in ("train/a/0.png", "train/b/1.png", "test/b/2.png"):
        assert str(tmp_path / file) in str(error.value)
    assert str(tmp_path / "train/a/1.png") not in str(error.value)
    loaded = load_ufgir_dataset(tmp_path, verify=False)
    (tmp_path / "val" / "a" / "4.png").unlink()
    with pytest.raises(DatasetError, match="4 of 30 images"):
        verify_images(loaded)


def test_many_unreadable_images_are_one_a_line_and_then_a_number(tmp_path):
    make_folder(tmp_path, ("train",), images=15)
    for file in tmp_path.rglob("*.png"):
        file.write_text("not an image")
    with pytest.raises(DatasetError) as error:
        load_ufgir_dataset(tmp_path)
    lines = str(error.value).split("\n")
    assert lines[0] == "30 of 30 images cannot be read:"
    assert len(lines) == 1 + LISTED + 1
    assert all("UnidentifiedImageError" in line for line in lines[1:-1])
    assert lines[-1].strip() == "and 10 more"


def test_verify_images_counts_good_ones(drawn):
    assert verify_images(drawn) == 27


def test_unknown_columns_are_listed(tmp_path, drawn):
    drawn.save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"`image_column` is 'photo'.*Available: image, label"):
        load_ufgir_dataset(tmp_path, image_column="photo")
    with pytest.raises(DatasetError, match=r"`label_column` is 'genus'.*Available: image, label"):
        load_ufgir_dataset(tmp_path, label_column="genus")
    with pytest.raises(DatasetError, match=r"column 'label'.*does not hold images"):
        load_ufgir_dataset(tmp_path, image_column="label", label_column="image")
    with pytest.raises(DatasetError, match="`image_column` and `label_column` are both 'image'"):
        load_ufgir_dataset(tmp_path, label_column="image")


def test_a_column_that_cannot_be_found(tmp_path, drawn):
    drawn["train"].rename_column("label", "first").add_column("second", drawn["train"]["label"]).cast_column(
        "second", drawn["train"].features["label"]
    ).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"No label column found.*`label_column`.*first, second"):
        load_ufgir_dataset(tmp_path)


def test_class_names_that_differ_between_tables(tmp_path, drawn):
    other = drawn["test"].cast_column("label", datasets.ClassLabel(names=["cultivar_00", "cultivar_01", "impostor"]))
    datasets.DatasetDict({"train": drawn["train"], "test": other}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"test has impostor, which train lacks"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 1.0, 2.0], "labels of train must be all integers or all text, got float"),
        (["a", None, "b"], "train has images without a class: label None"),
        (["a", "", "b"], "train has images without a class: label"),
    ],
    ids=["floats", "missing", "empty"],
)
def test_labels_that_are_no_classes(tmp_path, drawn, values, message):
    drawn["train"].select(range(3)).remove_columns("label").add_column("label", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


def test_label_columns_of_two_kinds(tmp_path, drawn):
    plain = drawn["test"].cast_column("label", datasets.Value("int64"))
    datasets.DatasetDict({"train": drawn["train"], "test": plain}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="labels are ClassLabel in train, but integers in test"):
        load_ufgir_dataset(tmp_path)


def test_unlabelled_test_split(tmp_path, drawn):
    feature = drawn["test"].features["label"]
    hidden = drawn["test"].remove_columns("label").add_column("label", [-1] * 6).cast_column("label", feature)
    datasets.DatasetDict({"train": drawn["train"], "test": hidden}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="test has images without a class: label -1"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 2, 2], "from 0 to 2 without a gap; no image of train has 1"),
        ([-1, 0, 1], "from 0 to 1 without a gap; got -1"),
    ],
    ids=["gap", "negative"],
)
def test_integer_labels_of_tables(tmp_path, drawn, values, message):
    drawn["train"].select(range(3)).remove_columns("label").add_column("label", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.csv", "class_id,url\n0,x.png\n", r"train\.csv lacks the column dir .*Available: class_id, url"),
        ("train.csv", "kind,dir\n0,x.png\n", r"train\.csv lacks the column class_id .*Available: kind, dir"),
        ("train.csv", "", r"train\.csv lacks the column dir .*Available: no header"),
        ("train.csv", "class_id,dir\n", r"train\.csv lists no images"),
        (
            "train.csv",
            "class_id,dir\n-1,train_0_0.png\n",
            r"train\.csv: `class_id` in row 2 must be at least 0, got -1",
        ),
        ("train.csv", "class_id,dir\nsoy,train_0_0.png\n", r"`class_id` in row 2 must be an integer, got 'soy'"),
        ("train.csv", "class_id,dir\n0,train_0_0.png\n", "test has 1, which train lacks"),
        ("test.csv", "class_id,dir\n0,test_0_0.png\n1,gone.png\n", r"1 listed images are not in .*gone\.png"),
        ("test.csv", "class_id,dir\n0,test_0_0.png\n1,train_0_0.png\n", r"more than one split: train_0_0\.png"),
        ("classid_classname.csv", "class_id,class_name\n0,Syrah\n", "has no name for class 1"),
        ("classid_classname.csv", "class_id,class_name\n0,Syrah\n1,Syrah\n", "several classes the name Syrah"),
    ],
)
def test_bad_csv_files(tmp_path, file, text, message):
    make_csv(tmp_path, {"train": 2, "test": 2})
    (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


def test_csv_class_ids_with_a_gap(tmp_path):
    make_csv(tmp_path, {"train": 2, "test": 2})
    for name in ("train", "test"):
        file = tmp_path / f"{name}.csv"
        file.write_text(file.read_text().replace("\n1,", "\n3,"))
    with pytest.raises(DatasetError, match="from 0 to 3 without a gap; no image of train has 1, 2"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("csv_train", "train_R9.csv", r"`csv_train`: .*train_R9\.csv does not exist.*test\.csv, train\.csv"),
        ("csv_data_folder", "elsewhere", "`csv_data_folder`: .*elsewhere is not a folder"),
        ("csv_class_names", "names.csv", r"`csv_class_names`: .*names\.csv does not exist"),
    ],
)
def test_csv_arguments_that_name_nothing(tmp_path, argument, value, message):
    make_csv(tmp_path, {"train": 2, "test": 2})
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path, **{argument: value})


def test_misspelled_and_misplaced_arguments(tmp_path, caplog):
    with pytest.raises(DatasetError, match=r"Unknown argument `num_clases`. Did you mean `num_classes`"):
        load_ufgir_dataset("synthetic_leaves", num_clases=3)
    with pytest.raises(DatasetError, match=r"Unknown argument `label_colum`. Did you mean `label_column`"):
        load_ufgir_dataset(make_folder(tmp_path), label_colum="x")
    load_ufgir_dataset(tmp_path, num_classes=3)
    (warning,) = [r.getMessage() for r in caplog.records if "`num_classes`" in r.getMessage()]
    assert "`synthetic_leaves`" in warning
