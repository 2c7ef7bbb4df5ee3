"""Faulty data raise an error that names the fault, or are loaded correctly; each random fault of `make faults` once."""

import os
import resource
import unicodedata

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.faults.data_faults import CASES, FAULTS, MEMORY, attempt, run
from tests.image_layouts import make_csv, make_folder, save_image
from ufgir.data import image_files, load_images, load_ufgir_dataset
from ufgir.data.checks import DatasetError
from ufgir.data.folders import find_images
from ufgir.data.labels import gaps_of, one_spelling
from ufgir.data.prepare.ultra_fgvc import check as check_raw
from ufgir.data.transformed import TransformedImages


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named_or_harmless(fault):
    kept, how = attempt(fault, fault.layouts[0], seed=0)
    assert kept, how


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_faults_in_every_layout(seed):
    lost = {(fault.name, layout): attempt(fault, layout, seed) for fault, layout in CASES}
    assert not {case: how for case, (kept, how) in lost.items() if not kept}


def test_lost_attempts_are_counted(monkeypatch):
    """The table of `make faults` counts failed attempts."""
    monkeypatch.setattr("tests.faults.data_faults.load_ufgir_dataset", lambda *_, **__: {}["traceback"])
    monkeypatch.setattr("tests.faults.data_faults.load_images", lambda *_: [])
    results = run(minutes=1, tries=5, seed=0)
    assert sum(result.tries for result in results) == 5 == sum(result.lost for result in results)
    assert all(result.survived + result.lost == result.tries and "seed 0" in result.notes for result in results)


# Which files are images


def test_images_are_known_by_suffix_else_by_content(tmp_path, monkeypatch):
    """A file is opened only if its suffix is unknown, and only once."""
    for suffix, kind in ((".png", "PNG"), ("", "JPEG"), (".mpo", "MPO"), (".scan", "TIFF"), (".avif", "AVIF")):
        Image.new("RGB", (16, 16)).save(tmp_path / f"leaf{suffix}", format=kind)
    Image.new("RGB", (16, 16)).save(tmp_path / "leaf.NEF", format="TIFF")  # raw files start like TIFF
    (tmp_path / "notes.xyz").write_text("BM no image")
    (tmp_path / "leaf.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    opened, plain_open = [], Image.open
    monkeypatch.setattr(image_files.Image, "open", lambda file, **o: opened.append(file.name) or plain_open(file, **o))
    found = find_images(tmp_path)
    assert sorted(map(os.path.basename, found.files)) == ["leaf", "leaf.avif", "leaf.mpo", "leaf.png", "leaf.scan"]
    assert sorted(opened) == sorted(set(opened)) and not {"leaf.png", "leaf.avif", "leaf.mpo", "leaf.NEF"} & set(
        opened
    )
    left_out = {os.path.basename(file): why for file, why in found.others.items()}
    assert (
        left_out.keys() == {"leaf.NEF", "notes.xyz", "leaf.HEIC"}
        and not left_out["notes.xyz"]
        and left_out["leaf.NEF"]
    )
    if ".heic" not in image_files.IMAGE_SUFFIXES:
        assert "pillow-heif" in left_out["leaf.HEIC"]
    assert all(name in "\n".join(found.describe()) for name in left_out)


def test_all_files_in_a_folder_are_accounted_for(tmp_path, caplog):
    save_image(tmp_path / "a" / "1.png", 1)
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DatasetError, match=r"`folder_or_files`.*\n.*gone\.png: a link to nowhere"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, skip_broken=True)) == 1
    assert "gone.png" in caplog.text and "b.txt" in caplog.text


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    """The error is simulated, because root may read every folder."""
    make_folder(tmp_path, ("",))
    plain = os.scandir

    def scandir(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(image_files.os, "scandir", scandir)
    with pytest.raises(DatasetError, match=r"\n  b: the folder cannot be read \(Permission denied\)"):
        load_ufgir_dataset(tmp_path)


def test_raw_downloads_name_the_files_left_out(raw):
    spec, source, root = raw("cotton")
    next(root.glob("*_train.png")).rename(root / "1_1_train.NEF")
    (root / "1_9_test.png").symlink_to("nowhere")
    checked = check_raw(spec, source)
    assert "1_9_test.png" in checked.report() and any("1_1_train.NEF" in note for note in checked.notes)


# Labels


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["0", "1", "2", "10"], None),  # plain integers are ids
        (["000", "001", "002", "010"], ["000", "001", "002", "010"]),
        (["7", "007", "x", "1.0"], ["007", "1.0", "7", "x"]),
        (["0.0", "1.0", "2.0", "3.0"], ["0", "1", "2", "3"]),
        (["01234567890123456789", "1", "2", "3"], ["01234567890123456789", "1", "2", "3"]),
    ],
    ids=["plain", "padded", "mixed", "fractions", "barcodes"],
)
def test_labels_stay_as_they_are_written(tmp_path, cells, names):
    lines = ["file,label"]
    for number, cell in enumerate(cells):
        save_image(tmp_path / "images" / f"{number}.png", number)
        lines.append(f"{number}.png,{cell}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    if names is None:
        with pytest.raises(DatasetError, match=r"no image of train has 3, 4, 5, 6, 7, 8, 9\."):
            load_ufgir_dataset(tmp_path)
        return
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)["train"]
    assert loaded.features["label"].names == names
    written = [names[label] for label in loaded["label"]]
    assert written == [cell.removesuffix(".0") if names[0] == "0" else cell for cell in cells]


def test_a_changed_class_order_is_logged(tmp_path, caplog):
    """Zero-padded numbers were once read as integers; their text order is the same if they have equal lengths."""
    for number in range(2):
        lines = ["file,label"]
        for label in range(12):
            save_image(tmp_path / str(number) / "images" / f"{label}.png", label)
            lines.append(f"{label}.png,{label:03d}" if number == 0 else f"{label}.png,{label or '00'}")
        (tmp_path / str(number) / "train.csv").write_text("\n".join(lines))
    names = load_ufgir_dataset(tmp_path / "0", validation_fraction=0)["train"].features["label"].names
    assert [int(name) for name in names] == list(range(12)) and "order" not in caplog.text
    load_ufgir_dataset(tmp_path / "1", validation_fraction=0)
    assert "earlier versions read them as numbers" in caplog.text
    known = [str(label) for label in range(12)]  # a model trained by an earlier version
    loaded = load_ufgir_dataset(tmp_path / "0", validation_fraction=0, class_names=known)["train"]
    assert loaded["label"] == list(range(12)) and loaded.features["label"].names == known


def test_names_of_zero_padded_class_ids(tmp_path):
    make_csv(tmp_path, {"train": 2})
    file = tmp_path / "train.csv"
    file.write_text(file.read_text().replace("\n0,", "\n00,").replace("\n1,", "\n01,"))
    (tmp_path / "classid_classname.csv").write_text("class_id,class_name\n00,Syrah\n01,Merlot\n")
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)["train"]
    assert [loaded.features["label"].names[label] for label in loaded["label"]] == ["Syrah"] * 2 + ["Merlot"] * 2
    (tmp_path / "classid_classname.csv").write_text("class_id,class_name\n0,Syrah\n1,Merlot\n")
    with pytest.raises(DatasetError, match="has no name for class 00, 01"):
        load_ufgir_dataset(tmp_path)


def test_gaps_are_counted_in_constant_memory():
    assert gaps_of([0, 1, 2]) == "" and gaps_of([1, 3]) == "0, 2"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = gaps_of([0, 2, 10**15])
    assert text.startswith("1, 3, 4, ") and text.endswith(f" and {10**15 - 2 - 20:,} more")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.mark.parametrize("count", [10**9, 2**40, 1.5, "x"])
def test_a_table_with_too_many_unnamed_classes(tmp_path, count):
    """`datasets` would create a name for each class."""
    table = pyarrow.table({"label": [0, 1]})
    about = f'{{"info": {{"features": {{"label": {{"_type": "ClassLabel", "num_classes": "{count}"}}}}}}}}'
    if not isinstance(count, str):
        about = about.replace(f'"{count}"', str(count))
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"train\.parquet: `num_classes`"):
        load_ufgir_dataset(tmp_path, cache_dir=tmp_path / "cache")


def test_spellings_of_a_class():
    composed, decomposed = (unicodedata.normalize(form, "Airén") for form in ("NFC", "NFD"))
    assert one_spelling({"train": [decomposed], "test": [composed]}, "x") == dict.fromkeys(
        (composed, decomposed), decomposed
    )
    assert one_spelling({"train": [decomposed, composed]}, "x") == dict.fromkeys((composed, decomposed), composed)
    assert one_spelling({"train": [composed]}, "x", known=[decomposed]) == {composed: decomposed}


def test_classes_that_look_alike_are_named(tmp_path, caplog):
    make_folder(tmp_path, ("",), ("Merlot", "merlot", "01", "1"), images=1)
    assert load_ufgir_dataset(tmp_path)["train"].features["label"].num_classes == 4
    assert "'Merlot' and 'merlot'" in caplog.text and "'01' and '1'" in caplog.text


# Listings


@pytest.mark.parametrize("place", ["top", "splits"])
def test_metadata_as_datasets_writes_them(tmp_path, place):
    classes = {}
    lines = {"train": [], "test": []}
    for number in range(8):
        split = "train" if number < 6 else "test"
        save_image(tmp_path / split / "deep" / f"{number}.png", number)
        classes[f"{number}.png"] = "ab"[number % 2]
        lines[split].append(f"deep/{number}.png,{'ab'[number % 2]}")
    if place == "top":
        rows = [f"{split}/{line}" for split, found in lines.items() for line in found]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    else:
        for split, found in lines.items():
            (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,label", *found]))
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=0)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 6, "test": 2}
    for rows in loaded.values():
        files = rows.cast_column("image", datasets.Image(decode=False))["image"]
        assert {os.path.basename(f["path"]): "ab"[k] for f, k in zip(files, rows["label"], strict=True)}.items() <= (
            classes.items()
        )


def test_the_error_for_a_table_next_to_class_folders_says_how_to_use_it(tmp_path):
    make_folder(tmp_path, ("",), ("2023", "2024"))
    rows = [f"{year}/{i}.png,{'ab'[i % 2]}" for year in (2023, 2024) for i in range(5)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,cultivar", *rows]))
    with pytest.raises(DatasetError, match=r"labels\.csv seems to list images \(`path`\).*`csv_train` labels\.csv"):
        load_ufgir_dataset(tmp_path)
    loaded = load_ufgir_dataset(tmp_path, csv_train="labels.csv")
    assert loaded["train"].features["label"].names == ["a", "b"]


# Images that become unreadable after loading


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_deleted_while_training_is_named(tmp_path, workers):
    make_folder(tmp_path, ("",), images=3)
    rows = load_ufgir_dataset(tmp_path, validation_fraction=0)["train"]
    images = TransformedImages(rows, lambda image, _: torch.from_numpy(np.asarray(image).copy()))
    (tmp_path / "b" / "0.png").unlink()
    loader = torch.utils.data.DataLoader(images, batch_size=2, num_workers=workers)
    with pytest.raises(DatasetError) as caught:
        list(loader)
    assert str(caught.value) == f"{tmp_path / 'b' / '0.png'} cannot be read: the file does not exist."


def test_broken_images_of_a_divided_table_are_named_by_their_file(tmp_path):
    """Validation is a part of train, but the message gives the row number in the file."""
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    content = (make_folder(tmp_path / "files", ("",), images=1) / "a" / "0.png").read_bytes()
    cells = [{"bytes": content, "path": None} for _ in range(10)]
    cells[4] = None
    table = {"image": cells, "label": [0] * 5 + [1] * 5}
    pyarrow.parquet.write_table(pyarrow.table(table, schema=kind.arrow_schema), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match=r"1 of 10 images cannot be read.*:\n  .*train\.parquet, row 5: .*null"):
        load_ufgir_dataset(tmp_path, cache_dir=tmp_path / "cache")
