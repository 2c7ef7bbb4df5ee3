"""Invalid data sets raise errors that name the problem."""

import io
import logging
import shutil

import datasets
import pytest
from PIL import Image

from tests.data.loading import check
from tests.image_layouts import make_csv, make_folder, save_image
from ufgir.data.load import LISTED, DatasetError, load_ufgir_dataset, verify_images


# Invalid data


def test_missing_folder(tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        load_ufgir_dataset(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path):
    save_image(tmp_path / "leaf.png", 0)
    with pytest.raises(DatasetError, match=r"must be a folder, got the file .*leaf\.png"):
        load_ufgir_dataset(tmp_path / "leaf.png")


@pytest.mark.parametrize("inner", ["", "a", "train/a"])
def test_folder_without_images(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DatasetError, match="contains no images"):
        load_ufgir_dataset(tmp_path)


def test_images_outside_class_folders_are_named(tmp_path, caplog):
    make_folder(tmp_path, ("train", "test"), images=1)
    for name in ("train/loose.png", "top.jpg", "train/.hidden.png"):
        save_image(tmp_path / name, 0)
    (tmp_path / "train" / "readme.txt").write_text("no image")
    with caplog.at_level(logging.WARNING, "ufgir"):
        assert len(load_ufgir_dataset(tmp_path)["train"]) == 2
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("ufgir")]
    assert [m for m in messages if "outside the class folders" in m] == [
        f"{tmp_path}: 1 images outside the class folders are left out: top.jpg",
        f"{tmp_path / 'train'}: 1 images outside the class folders are left out: loose.png",
    ]


@pytest.mark.parametrize("inner", ["", "test"])
def test_images_without_any_class_folder(tmp_path, inner):
    if inner:
        make_folder(tmp_path, ("train",))
    for index in range(3):
        save_image(tmp_path / inner / f"{index}.png", index)
    split, name = inner or "train", (tmp_path / inner).name
    message = rf"contains 3 images but no class folders.*\({name}/<class>/0\.png\).*{split}\.csv.*`ufgir predict MODEL FOLDER`"
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
    with pytest.raises(DatasetError, match=r"test has zeta, which train lacks") as error:
        load_ufgir_dataset(tmp_path)
    assert "class_names" not in str(error.value)  # not an option of the script


def test_a_listing_may_lack_classes(tmp_path, caplog):
    make_csv(tmp_path, {"train": 2, "test": 2}, classes=3)
    file = tmp_path / "test.csv"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("1,")))
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert loaded["test"]["label"] == [0, 0, 2, 2] and "test has no images of 1 classes: 1" in caplog.text


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
    """Not even if no folder is named train."""
    make_folder(tmp_path, ("train_images", "validation", "test"))
    with pytest.raises(DatasetError, match="split folders test, validation, but train_images is not one of train, "):
        load_ufgir_dataset(tmp_path)


def test_a_split_with_an_image_next_to_its_classes_is_not_a_class(tmp_path):
    make_folder(tmp_path, ("train",))
    save_image(tmp_path / "train" / "preview.png", 100)
    save_image(tmp_path / "examples" / "0.png", 101)
    with pytest.raises(
        DatasetError, match=r"split folders train, but examples is not one of .* images and no folders"
    ):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("names", [("dev", "merlot", "test"), ("merlot", "train")], ids=str)
def test_a_class_may_have_the_name_of_a_split(tmp_path, names):
    make_folder(tmp_path, ("",), names, images=2)
    save_image(tmp_path / names[-1] / ".thumbnails" / "0.png", 100)  # hidden, so that it does not count
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    check(loaded, {"train": 2 * len(names)}, list(names))


def test_every_format_that_pillow_decodes_is_an_image(tmp_path, caplog):
    make_folder(tmp_path, ("",), images=1)
    for suffix, kind in (
        (".jfif", "JPEG"),
        (".tga", "TGA"),
        (".JPE", "JPEG"),
        (".jp2", "JPEG2000"),
        (".avif", "AVIF"),
    ):
        Image.new("RGB", (16, 16)).save(tmp_path / "a" / f"leaf{suffix}", format=kind)
    (tmp_path / "b" / "notes.heic").write_text("not an image")
    with caplog.at_level(logging.WARNING, "ufgir"):
        loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert len(loaded["train"]) == 7
    assert "1 file in class folders" in caplog.text and "b/notes.heic" in caplog.text


def test_validation_split_has_no_effect_with_a_validation_split(tmp_path, caplog):
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


def test_many_unreadable_images_are_listed_one_per_line_with_a_limit(tmp_path):
    make_folder(tmp_path, ("train",), images=15)
    for file in tmp_path.rglob("*.png"):
        file.write_text("not an image")
    with pytest.raises(DatasetError) as error:
        load_ufgir_dataset(tmp_path)
    lines = str(error.value).split("\n")
    assert lines[0] == "30 of 30 images cannot be read. Delete or replace them:"
    assert len(lines) == 1 + LISTED + 1
    assert all("UnidentifiedImageError" in line for line in lines[1:-1])
    assert lines[-1].strip() == "and 10 more"


def test_verify_images_counts_good_ones(drawn):
    assert verify_images(drawn) == 27


def test_unknown_columns_are_listed(tmp_path, drawn):
    drawn.save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"`image_column` .* got 'photo'.*Available: image, label"):
        load_ufgir_dataset(tmp_path, image_column="photo")
    with pytest.raises(DatasetError, match=r"`label_column` .* got 'genus'.*Available: image, label"):
        load_ufgir_dataset(tmp_path, label_column="genus")
    with pytest.raises(DatasetError, match=r"column 'label'.*does not contain images"):
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
def test_invalid_labels(tmp_path, drawn, values, message):
    drawn["train"].select(range(3)).remove_columns("label").add_column("label", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


def test_label_columns_of_two_kinds(tmp_path, drawn):
    plain = drawn["test"].cast_column("label", datasets.Value("int64"))
    datasets.DatasetDict({"train": drawn["train"], "test": plain}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="labels are ClassLabel in train, but integers in test"):
        load_ufgir_dataset(tmp_path)


def test_unlabeled_test_split(tmp_path, drawn):
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
def test_csv_arguments_with_missing_files(tmp_path, argument, value, message):
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
