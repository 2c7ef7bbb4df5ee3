"""CSV, JSONL and parquet listings load the same data; errors name the file and row."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.image_layouts import make_csv, make_folder, save_image
from ufgir.data.load import DatasetError, load_ufgir_dataset


SPLITS = {"train": ["a0.png", "a1.png", "b0.png", "b1.png"], "test": ["a2.png", "b2.png"]}
RAW = datasets.Image(decode=False)


def rows_of(split, label, path="dir", kind="class_id"):
    """{path, kind} of each image; `label` turns the letter a or b into a label."""
    return [{path: f"images/{name}", kind: label(name[0])} for name in SPLITS[split]]


def write(folder, suffix, label=lambda letter: "ab".index(letter), path="dir", kind="class_id"):
    for number, name in enumerate(name for names in SPLITS.values() for name in names):
        save_image(folder / "images" / name, number)
    for split in SPLITS:
        rows = rows_of(split, label, path, kind)
        file = folder / f"{split}{suffix}"
        if suffix == ".csv":
            cells = [[row[path], str(row[kind])] for row in rows]
            file.write_text("\n".join(f'{p},"{k}"' for p, k in [(path, kind), *cells]) + "\n")
        elif suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return folder


def content(loaded):
    """split -> [(file, class name)]"""
    found = {}
    for name, split in loaded.items():
        files = [image["path"].rsplit("/", 1)[1] for image in split.cast_column("image", RAW)["image"]]
        found[name] = [(f, split.features["label"].names[c]) for f, c in zip(files, split["label"], strict=True)]
    return found


def expected(names):
    return {split: [(file, names["ab".index(file[0])]) for file in files] for split, files in SPLITS.items()}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("labels", ["integers", "named integers", "text"])
def test_all_formats_load_the_same(tmp_path, suffix, labels):
    if labels == "text":
        write(tmp_path, suffix, lambda letter: {"a": "Merlot", "b": "Syrah"}[letter], kind="label")
        names = ["Merlot", "Syrah"]
    else:
        write(tmp_path, suffix)
        names = ["0", "1"]
    if labels == "named integers":
        (tmp_path / "classid_classname.csv").write_text("class_id,class_name\n0,Zinfandel\n1,Airén\n")
        names = ["Zinfandel", "Airén"]
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert content(loaded) == expected(names)
    assert loaded["test"].features["label"].names == names
    assert loaded["test"][0]["image"].getpixel((0, 0)) == (4, 90, 30)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_by_name(tmp_path, suffix):
    write(tmp_path, suffix, path="scan", kind="variety")
    if suffix == ".parquet":  # without a column name, the files are expected to contain images
        with pytest.raises(DatasetError, match=r"No image column found.*`image_column`"):
            load_ufgir_dataset(tmp_path, label_column="variety", cache_dir=tmp_path / "cache")
    else:
        with pytest.raises(DatasetError, match=r"lacks the column dir .*`image_column`\. Available: scan, variety"):
            load_ufgir_dataset(tmp_path, label_column="variety")
        with pytest.raises(DatasetError, match=r"lacks the column kind\. Available: scan, variety"):
            load_ufgir_dataset(tmp_path, image_column="scan", label_column="kind")
        with pytest.raises(DatasetError, match="`image_column` and `label_column` are both 'scan'"):
            load_ufgir_dataset(tmp_path, image_column="scan", label_column="scan")
    loaded = load_ufgir_dataset(tmp_path, image_column="scan", label_column="variety", validation_fraction=0)
    assert content(loaded) == expected(["0", "1"])


def test_named_jsonl_files_relative_to_a_folder(tmp_path):
    write(tmp_path, ".jsonl")
    text = (tmp_path / "train.jsonl").read_text().replace("images/", "")
    (tmp_path / "mine.jsonl").write_text(text + "\n")  # empty lines are ignored
    loaded = load_ufgir_dataset(tmp_path, csv_train="mine.jsonl", csv_data_folder="images", validation_fraction=0)
    assert content(loaded) == {"train": expected(["0", "1"])["train"]}


def test_train_val_as_jsonl(tmp_path):
    write(tmp_path, ".jsonl")
    (tmp_path / "train.jsonl").rename(tmp_path / "train_val.jsonl")
    sizes = {name: len(split) for name, split in load_ufgir_dataset(tmp_path).items()}
    assert sizes == {"train": 2, "validation": 2, "test": 2}


def test_parquet_shards_that_list_files(tmp_path):
    write(tmp_path, ".parquet")
    rows = rows_of("train", lambda letter: "ab".index(letter))
    (tmp_path / "train.parquet").unlink()
    for number, part in enumerate((rows[:1], rows[1:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"train-0000{number}-of-00002.parquet")
    assert content(load_ufgir_dataset(tmp_path, validation_fraction=0)) == expected(["0", "1"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'dir': 1}", r"train\.jsonl: line 5 is not JSON"),
        ('["a.png", 0]', r"train\.jsonl: line 5 must be a JSON object, got"),
        ('{"dir": "images/a0.png"}', r"train\.jsonl: line 5 lacks class_id"),
        ('{"dir": null, "class_id": 0}', r"`dir` in row 5 must name a file, got None"),
        ('{"dir": "x.png", "class_id": 0.5}', r"`class_id` in row 5 must be an integer, a text, or a list of these"),
        ('{"dir": "x.png", "class_id": null}', r"`class_id` in row 5 must be an integer, a text, or a list of these"),
        ('{"dir": "x.png", "class_id": true}', r"`class_id` in row 5 must be an integer, a text, or a list of these"),
        (
            '{"dir": "x.png", "class_id": "0"}',
            r"`class_id` in row 5 is '0': integers, texts and lists must not be mixed",
        ),
        ('{"dir": "x.png", "class_id": [0]}', r"`class_id` in row 5 is \[0\]: integers, texts and lists must not be"),
        ('{"dir": "x.png", "class_id": []}', r"`class_id` in row 5 is \[\]: integers, texts and lists must not be"),
        ('{"dir": "x.png", "class_id": 0}', r"1 listed images are not in .*: x\.png"),
        ('{"dir": "images/a2.png", "class_id": 0}', r"listed in more than one split: images/a2\.png"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, message):
    write(tmp_path, ".jsonl")
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_text_that_is_not_utf_8(tmp_path, suffix):
    write(tmp_path, suffix)
    (tmp_path / f"test{suffix}").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=rf"test\{suffix} is not .*UTF-8"):
        load_ufgir_dataset(tmp_path)


def test_files_that_are_not_listings(tmp_path):
    write(tmp_path, ".csv")
    with pytest.raises(DatasetError, match=r"`csv_train`: .*gone\.jsonl does not exist.*test\.csv, train\.csv"):
        load_ufgir_dataset(tmp_path, csv_train="gone.jsonl")
    (tmp_path / "train.txt").write_text("a.png 0\n")
    with pytest.raises(
        DatasetError, match=r"`csv_train` must end in \.csv, \.tsv, \.jsonl, \.parquet, got train\.txt"
    ):
        load_ufgir_dataset(tmp_path, csv_train="train.txt")
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(DatasetError, match=r"train\.parquet is not a parquet file"):
        load_ufgir_dataset(tmp_path, csv_train="train.parquet")
    with pytest.raises(DatasetError, match=r"got the file .*train\.csv\..*`csv_train`"):
        load_ufgir_dataset(tmp_path / "train.csv")


def test_names_of_integers_only(tmp_path):
    write(tmp_path, ".csv", str.upper, kind="label")
    with pytest.raises(DatasetError, match="`csv_class_names` requires integer classes"):
        load_ufgir_dataset(tmp_path, csv_class_names="names.csv")


@pytest.mark.parametrize(
    ("argument", "value"), [("csv_test", "x.csv"), ("csv_data_folder", "x"), ("csv_class_names", "x.csv")]
)
def test_arguments_of_listings_without_listings(tmp_path, caplog, argument, value):
    """They have no effect; a warning names each."""
    sources = [("synthetic_leaves", {"num_classes": 1, "images_per_class": 1, "image_size": 16})]
    if argument != "csv_test":
        sources.append((make_folder(tmp_path), {}))
    for source, arguments in sources:
        caplog.clear()
        load_ufgir_dataset(source, **arguments, **{argument: value})
        (warning,) = [r.getMessage() for r in caplog.records if f"`{argument}`" in r.getMessage()]
        assert "list images" in warning


@pytest.mark.parametrize("argument", ["config_name", "revision"])
def test_arguments_of_the_hub_for_a_folder(tmp_path, caplog, argument):
    load_ufgir_dataset(make_csv(tmp_path, {"train": 1}), **{argument: "x"})
    (warning,) = [r.getMessage() for r in caplog.records if f"`{argument}`" in r.getMessage()]
    assert "the Hub" in warning
