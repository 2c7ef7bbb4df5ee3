"""`ufgir prepare` on miniatures of every raw layout, sound and spoiled in every way; interrupted and resumed."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from tests.data.raw_layouts import CLASSES, draw_raw, leaf, miniature
from ufgir.cli.entry import main
from ufgir.data.catalog import SETS
from ufgir.data.load import load_ufgir_dataset
from ufgir.data.prepare import parquet_folder, ultra_fgvc
from ufgir.data.prepare.parquet_folder import prepare
from ufgir.data.prepare.raw_layouts import FileNames
from ufgir.data.prepare.ultra_fgvc import UltraFGVC, UnsoundData, check, find_root
from ufgir.utils import locks as locking


LAYOUTS = (
    "cotton",
    "soylocal",
    "soyglobal",
    "soygene",
    "soyageing",
    "soyageing_r4",
)  # others differ by the name of a folder
LISTS = ("soygene", "soyageing", "soyageing_r4")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def drawn(tmp_path):
    """A function: set -> its miniature, the folder that was downloaded, and the root of the layout in it."""

    def draw(name):
        spec = miniature(name)
        return spec, tmp_path / "raw", draw_raw(tmp_path / "raw", spec)

    return draw


def files(folder):
    """Every file below `folder` with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_of(folder):
    """{split: [(path, label, SHA-256 of the bytes)]} as `datasets` reads it."""
    loaded = datasets.load_dataset(str(folder)).cast_column("image", datasets.Image(decode=False))
    return {
        split: [
            (row["image"]["path"], row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()) for row in rows
        ]
        for split, rows in loaded.items()
    }


def listed(spec, root):
    """What `rows_of` must give for a sound source, read off the raw folder in another way than the code does."""
    expected = {"train": [], "test": []}
    if isinstance(spec.layout, FileNames):
        names = sorted(file.name for file in root.iterdir())
        lines = [(name.split("_")[2].split(".")[0], name, int(name.split("_")[0])) for name in names]
    else:
        lines = []
        for part in spec.layout.parts:
            for split in ("train", "test"):
                for line in (root / part / "anno" / f"{split}.txt").read_text().splitlines():
                    name, number = line.split()
                    lines.append((split, f"{part}/images/{name}".lstrip("/"), int(number)))
    for split, name, number in lines:
        expected[split].append((name, number - 1, hashlib.sha256((root / name).read_bytes()).hexdigest()))
    return expected


def problems(spec, source, kind=None):
    """(kind, where) of everything that `check` finds."""
    return [(p.kind, p.where) for p in check(spec, source).problems if kind in (None, p.kind)]


# Published facts


def test_sets_are_the_published_ones():
    assert list(SETS) == [
        "cotton",
        "soylocal",
        "soygene",
        "soyageing",
        *(f"soyageing_r{stage}" for stage in (1, 3, 4, 5, 6)),
        "soyglobal",
    ]
    for spec in SETS.values():
        for split in ("train", "test"):
            fewest, most = getattr(spec, f"{split}_per_class")
            assert spec.classes * fewest <= getattr(spec, split) <= spec.classes * most
    totals = {name: (spec.classes, spec.train, spec.test) for name, spec in SETS.items()}
    assert totals["cotton"] == (80, 240, 240)
    assert totals["soylocal"] == (200, 600, 600)
    assert totals["soyglobal"] == (1938, 5814, 5814)
    assert totals["soygene"] == (1110, 12763, 11143)
    stages = [totals[f"soyageing_r{stage}"] for stage in (1, 3, 4, 5, 6)]
    assert totals["soyageing"] == (198, 4950, 4950) == (198, sum(s[1] for s in stages), sum(s[2] for s in stages))


# Sound sources


@pytest.mark.parametrize("name", LAYOUTS)
def test_sound_source_becomes_parquet(name, drawn, tmp_path):
    spec, source, root = drawn(name)
    text = prepare(spec, source, tmp_path / "out", num_workers=2)
    assert f"{spec.train} train, {spec.test} test images of {CLASSES} classes" in text

    found, expected = rows_of(tmp_path / "out"), listed(spec, root)
    assert list(found) == ["train", "test"]
    for split in found:
        assert sorted(found[split]) == sorted(expected[split])  # the bytes of the raw files, labels from 0
        if name in LISTS:
            assert found[split] == expected[split]  # in the order of the lists
    loaded = load_ufgir_dataset(tmp_path / "out", cache_dir=tmp_path / "cache")
    sizes = {split: len(rows) for split, rows in loaded.items()}
    assert sizes["train"] + sizes["validation"] == spec.train and sizes["test"] == spec.test
    names = {"soygene": "GDC00{}"}.get(name, "yd0{}" if name in LISTS else "{}")
    first = 0 if name in LISTS else 1
    assert loaded["train"].features["label"].names == [names.format(label + first) for label in range(CLASSES)]
    assert loaded["train"][0]["image"].tobytes() == Image.open(io.BytesIO(leaf("train", 0, 0))).tobytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing is left beside it


def test_rows_of_file_names_are_in_the_order_of_class_and_number(tmp_path):
    folder = tmp_path / "cotton_square_new"
    folder.mkdir()
    numbers = [(label, n) for label in range(11) for n in (2, 10, 1)]
    for index, (label, n) in enumerate(numbers):
        Image.new("RGB", (4, 4), (index, 0, 0)).save(folder / f"{label + 1}_{n}_train.png")
        Image.new("RGB", (4, 4), (index, 9, 0)).save(folder / f"{label + 1}_{n}_test.png")
    spec = replace(SETS["cotton"], classes=11, train=33, test=33)
    rows = check(spec, tmp_path).rows
    assert [row.file for row in rows if row.split == "train"] == [
        f"{label}_{n}_train.png" for label in range(1, 12) for n in (1, 2, 10)
    ]


def test_classes_without_a_cultivar_of_their_own_keep_their_numbers(drawn):
    spec, source, root = drawn("soyageing_r4")
    file = root / "R4" / "images" / "yd01_R4_1_train.png"
    file.rename(file.with_name("yd00_R4_9_train.png"))  # the code of class 1 in class 2
    lines = root / "R4" / "anno" / "train.txt"
    lines.write_text(lines.read_text().replace("yd01_R4_1_train.png", "yd00_R4_9_train.png"))
    assert check(spec, source).class_names == ("1", "2", "3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_is_found(name, drawn, tmp_path):
    spec, source, root = drawn(name)
    assert find_root(spec, source) == find_root(spec, root) == root
    moved = tmp_path / "downloads" / "some_folder"
    moved.parent.mkdir()
    source.rename(moved)
    assert find_root(spec, moved.parent) == moved / root.relative_to(source)
    if name == "soyageing_r4":
        assert find_root(spec, moved / "R4") == moved
    if name == "cotton":  # renamed: only if it is the source itself
        renamed = (moved / "cotton_square_new").rename(moved / "leaves")
        assert find_root(spec, renamed) == renamed
        with pytest.raises(ValueError, match=r"does not hold cotton: expected cotton_square_new/"):
            find_root(spec, moved)


def test_all_sets_live_in_one_download(tmp_path):
    for name in ("cotton", "soylocal", "soyglobal", "soygene", "soyageing"):
        draw_raw(tmp_path / name, miniature(name))
    roots = {name: find_root(spec, tmp_path) for name, spec in SETS.items()}
    assert roots["soygene"] == tmp_path / "soygene"  # not a growth stage of soyageing, which is laid out alike
    assert {roots[name] for name in SETS if "ageing" in name} == {tmp_path / "soyageing"}
    draw_raw(tmp_path / "again", miniature("cotton"))
    with pytest.raises(ValueError, match=r"`source` .* holds cotton more than once: choose one of"):
        find_root(SETS["cotton"], tmp_path)


@pytest.mark.parametrize("name", ["cotton", "soygene"])
def test_builder_yields_the_same_rows(name, drawn, tmp_path):
    spec, source, root = drawn(name)
    builder = UltraFGVC(config_name=name, data_dir=source, spec=spec, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    built = builder.as_dataset()
    prepare(spec, source, tmp_path / "out")
    for split, rows in datasets.load_dataset(str(tmp_path / "out")).items():
        assert built[split].features == rows.features and built[split]["label"] == rows["label"]
        pairs = zip(built[split], rows, strict=True)
        assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in pairs)

    next(root.rglob("*_train.png")).write_bytes(b"no picture")
    spoiled = UltraFGVC(config_name=name, data_dir=source, spec=spec, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UnsoundData, match=r"problems \(1\)"):  # the cache does not hide the change
        spoiled.download_and_prepare()
    skipping = UltraFGVC(
        config_name=name, data_dir=source, spec=spec, skip_bad=True, cache_dir=str(tmp_path / "cache")
    )
    skipping.download_and_prepare()
    assert len(skipping.as_dataset(split="train")) == spec.train - 1
    with pytest.raises(ValueError, match="`data_dir` must be the folder of the raw download"):
        UltraFGVC(config_name=name)
    with pytest.raises(ValueError, match=r"BuilderConfig 'wheat' not found|`config_name` must be one of cotton"):
        UltraFGVC(config_name="wheat", data_dir=source)


# Spoiled sources


def spoil(name, root):
    """Spoils three images of train and one of test, in each way once: [(kind, file)] to be left out."""
    if name in LISTS:
        part = {"soygene": "", "soyageing": "R5/", "soyageing_r4": "R4/"}[name]
        lines = {split: (root / f"{part}anno/{split}.txt").read_text().split("\n") for split in ("train", "test")}
        at = {
            (split, label): [f"{part}images/{line.split()[0]}" for line in of if line.endswith(f" {label + 1}")]
            for split, of in lines.items()
            for label in range(CLASSES)
        }
    else:
        at = {
            (split, label): sorted(file.name for file in root.glob(f"{label + 1}_*_{split}.png"))
            for split in ("train", "test")
            for label in range(CLASSES)
        }
    cut = at["train", 0][0]
    (root / cut).write_bytes((root / cut).read_bytes()[:-40])
    duplicate, first = at["train", 1][1], at["train", 1][0]
    (root / duplicate).write_bytes((root / first).read_bytes())
    leaking, test = at["train", 2][0], at["test", 2][0]
    (root / leaking).write_bytes((root / test).read_bytes())
    missing = at["test", 0][0]
    (root / missing).unlink()
    return cut, duplicate, first, leaking, test, missing


@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_bad_is_reported_at_once_and_nothing_written(name, drawn, tmp_path):
    spec, source, root = drawn(name)
    cut, duplicate, first, leaking, test, missing = spoil(name, root)
    before = files(tmp_path)
    with pytest.raises(UnsoundData) as caught:
        prepare(spec, source, tmp_path / "out")
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    report = str(caught.value)
    for line in (
        f"  {cut}: OSError:",
        f"  {duplicate}: train, also {first} of train; this one is left out, the first stays",
        f"  {leaking}: also {test} of test; the train copy is left out, test stays as published",
    ):
        assert line in report
    bad = {("broken", cut), ("duplicate", duplicate), ("leaking", leaking)}
    if name in LISTS:
        bad.add(("missing", missing))
        assert f"  {missing}: there is no such file" in report
        assert set(problems(spec, source)) == bad  # counts are those of the lists: one line a problem
        assert len(check(spec, source).problems) == 4
    else:
        assert f"  test: {spec.test - 1} images, published are {spec.test}" in report
        assert "  test: 2 images, published are 3, in class 1" in report
        assert set(problems(spec, source)) == bad | {("count", "test")}

    expected = listed_without(spec, root, {cut, duplicate, leaking, missing}, name)
    text = prepare(spec, source, tmp_path / "out", skip_bad=True)
    found = rows_of(tmp_path / "out")
    assert {split: Counter(rows) for split, rows in found.items()} == expected
    assert "--skip-bad left the files out" in text and f"  {leaking}: also" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not the data as published" in card and f"- leaking: `{leaking}`" in card
    marker = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert {(entry["kind"], entry["where"]) for entry in marker["left_out"]} == set(problems(spec, source))


def listed_without(spec, root, gone, name):
    hidden = {}
    for file in gone:
        path = root / file
        if not path.exists() and name in LISTS:
            path.write_bytes(b"")
            hidden[path] = True
    rows = {split: Counter(r for r in rows if r[0] not in gone) for split, rows in listed(spec, root).items()}
    for path in hidden:
        path.unlink()
    return rows


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "UnidentifiedImageError"),
        (b"no picture at all", "UnidentifiedImageError"),
        (leaf("train", 0, 0)[:-20] + bytes(20), "Error"),
        (leaf("train", 0, 0)[: len(leaf("train", 0, 0)) // 2], "OSError"),
    ],
    ids=["empty", "text", "damaged", "half"],
)
@pytest.mark.parametrize("name", ["soylocal", "soygene"])
def test_broken_images(name, content, problem, drawn):
    spec, source, root = drawn(name)
    bad = sorted(root.rglob("*_train.png"))[:2]
    for file in bad:  # two broken files with the same bytes are broken, not duplicates
        file.write_bytes(content)
    found = check(spec, source).problems
    assert [(p.kind, p.where) for p in found] == [("broken", str(file.relative_to(root))) for file in bad]
    assert all(problem in p.text for p in found)


def test_unreadable_file_is_broken(drawn, monkeypatch):
    spec, source, _ = drawn("cotton")

    def refuse(file):
        raise PermissionError(13, "Permission denied")

    found = check(spec, source, inspect=refuse).problems
    assert Counter(p.kind for p in found) == {"broken": 18}
    assert found[0].text == "PermissionError: Permission denied"


@pytest.mark.parametrize("split", ["train", "test"])
def test_same_bytes_under_two_classes_are_left_out_both(split, drawn):
    spec, source, root = drawn("cotton")
    number = 1 if split == "train" else 4
    one, two = root / f"1_{number}_{split}.png", root / f"3_{number}_{split}.png"
    two.write_bytes(one.read_bytes())
    checked = check(spec, source)
    assert [p.where for p in checked.problems] == [one.name, two.name]
    assert f"{split}, class 1, also {two.name} of {split}, class 3; both are left out" in checked.problems[0].text
    assert not {one.name, two.name} & {row.file for row in checked.rows}


def test_leak_stays_in_test_whatever_its_class(drawn):
    spec, source, root = drawn("soygene")
    for index, file in enumerate(sorted((root / "images").glob("GDC002*_train.png"))[:2]):
        file.write_bytes(leaf("test", index, 0))  # of class 1 and 2 in test
    checked = check(spec, source)
    assert [p.kind for p in checked.problems] == ["leaking", "leaking"]
    assert Counter(row.split for row in checked.rows) == {"train": spec.train - 2, "test": spec.test}


def test_copy_in_another_growth_stage_is_a_duplicate(drawn):
    spec, source, root = drawn("soyageing")
    (root / "R6/images/yd01_R6_1_train.png").write_bytes(leaf("train", 1, 0))  # that of R1
    assert problems(spec, source) == [("duplicate", "R6/images/yd01_R6_1_train.png")]


def test_file_names_that_tell_nothing(drawn):
    spec, source, root = drawn("cotton")
    for name in ("4_1_train.png", "0_1_test.png", "one_1_train.png", "1_1_val.png", "1_train.png"):
        (root / name).write_bytes(leaf("validation", 0, 0))
    for name in ("Thumbs.db", ".DS_Store", "._1_1_train.png", "readme.txt"):
        (root / name).write_bytes(b"of no interest")
    found = check(spec, source).problems
    assert {p.where: p.text for p in found} == {
        "0_1_test.png": "class 0 is not one of 1 to 3",
        "4_1_train.png": "class 4 is not one of 1 to 3",
        **dict.fromkeys(("1_1_val.png", "1_train.png", "one_1_train.png"), "expected <class>_<number>_<train|test>"),
    }


@pytest.mark.parametrize("name", LISTS)
def test_lines_of_lists_that_cannot_be_used(name, drawn):
    spec, source, root = drawn(name)
    part = {"soygene": "", "soyageing": "R3/", "soyageing_r4": "R4/"}[name]
    lists = {split: root / f"{part}anno/{split}.txt" for split in ("train", "test")}
    train, test = (file.read_text().splitlines() for file in lists.values())
    first = train[0].split()[0]
    wrong = ["no_class.png", "x.png one", "x.png 0", "x.png 4", "../x.png 1", "/etc/x.png 1", test[0]]
    lists["train"].write_text("\ufeff" + "\r\n".join([*train, "", *wrong, train[0], "gone.png\t1"]) + "\r\n", "utf-8")
    lists["test"].write_text("\n".join([*test, train[1]]))
    (root / f"{part}images/extra.png").write_bytes(leaf("validation", 0, 0))
    checked = check(spec, source)
    start = len(train) + 2
    texts = {p.where: p.text for p in checked.problems}
    at = f"{part}anno/train.txt line "
    assert texts[f"{at}{start}"] == "expected `file class`, got 'no_class.png'"
    assert texts[f"{at}{start + 1}"] == "expected `file class`, got 'x.png one'"
    assert texts[f"{at}{start + 2}"] == "class 0 of x.png is not one of 1 to 3"
    assert texts[f"{at}{start + 3}"] == "class 4 of x.png is not one of 1 to 3"
    assert texts[f"{at}{start + 4}"] == "../x.png lies outside of images/"
    assert texts[f"{at}{start + 5}"] == "/etc/x.png lies outside of images/"
    assert texts[f"{at}{start + 6}"] == f"the name of {test[0].split()[0]} says test"
    assert texts[f"{part}anno/test.txt line {len(test) + 1}"] == f"the name of {train[1].split()[0]} says train"
    assert texts[f"{part}images/{first}"] == "train, also listed once more; this one is left out, the first stays"
    assert texts[f"{part}images/gone.png"] == "there is no such file"
    assert f"  train: {spec.train + 2} images, published are {spec.train}" in checked.report().splitlines()
    assert any(f"1 images are in no list and left out: {part}images/extra.png" in note for note in checked.notes)
    assert Counter(row.split for row in checked.rows) == {"train": spec.train, "test": spec.test}


def test_file_listed_in_both_splits_leaks(drawn):
    spec, source, root = drawn("soygene")
    old = root / "images" / "GDC000-1-000_1_train.png"
    old.rename(old.with_name("GDC000-1-000.png"))  # a name that tells no split
    for split in ("train", "test"):
        file = root / "anno" / f"{split}.txt"
        lines = [line for line in file.read_text().splitlines() if line.split()[0] != old.name]
        file.write_text("\n".join([*lines, "GDC000-1-000.png 1"]))
    checked = check(spec, source)
    assert ("leaking", "images/GDC000-1-000.png") in [(p.kind, p.where) for p in checked.problems]
    assert "also listed in test; the train copy is left out" in checked.report()
    assert [row.split for row in checked.rows if row.file == "images/GDC000-1-000.png"] == ["test"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_and_classes_are_compared_with_the_published_ones(name, drawn):
    spec, source, _ = drawn(name)
    more = replace(spec, classes=7, train=spec.train + 1, test_per_class=(4, 4))
    report = check(more, source).report()
    least = spec.train_per_class[0] if spec.train_per_class[0] == spec.train_per_class[1] else "3 to 5"
    assert f"  train: {spec.train} images, published are {spec.train + 1}" in report
    assert f"  train: 0 images, published are {least}, in class 4-7" in report
    if spec.test_per_class != (4, 4):
        assert f"  test: {spec.test_per_class[0]} images, published are 4, in class 1-3" in report
    assert "  test: 0 images, published are 4, in class 4-7" in report


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_images_is_never_written(split, drawn, tmp_path):
    spec, source, root = drawn("cotton")
    for file in root.glob(f"*_{split}.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UnsoundData, match=f"cotton: no sound image is left in {split}\ncannot be decoded .9.:"):
        prepare(spec, source, tmp_path / "out", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("name", LISTS)
def test_missing_lists_and_folders_are_named(name, drawn):
    spec, source, root = drawn(name)
    part = spec.layout.parts[-1]
    (root / part / "images").rename(root / part / "pictures")
    with pytest.raises(ValueError, match=r"images is not a folder: expected .*anno/train.txt"):
        check(spec, source)
    (root / part / "anno" / "test.txt").write_bytes(b"\xff\xfe\xff 1")
    with pytest.raises(ValueError, match=r"anno/test.txt is not UTF-8 text"):
        check(spec, source)
    (root / part / "anno" / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"anno/test.txt is missing: it lists the test images"):
        check(spec, source)


def test_empty_sources(tmp_path):
    with pytest.raises(ValueError, match=r"`source` must be the folder of the raw download, but .* is not a folder"):
        find_root(SETS["cotton"], tmp_path / "nowhere")
    for spec in SETS.values():
        with pytest.raises(ValueError, match=f"does not hold {spec.name}: expected "):
            find_root(spec, tmp_path)
    for folder in ("anno", "images"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test"):
        (tmp_path / "anno" / f"{split}.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="lists no image of soygene"):
        check(SETS["soygene"], tmp_path)


# Splits, shards, card


def test_validation_is_the_last_part_of_each_class(drawn, tmp_path):
    spec, source, root = drawn("soygene")  # 3, 4, 5 images
    prepare(spec, source, tmp_path / "out", validation="last")
    found = rows_of(tmp_path / "out")
    train = listed(spec, root)["train"]
    kept = {0: 2, 1: 3, 2: 4}  # int(n * 0.8)
    of_class = {label: [row for row in train if row[1] == label] for label in range(CLASSES)}
    assert found["train"] == [row for label in of_class for row in of_class[label][: kept[label]]]
    assert found["validation"] == [row for label in of_class for row in of_class[label][kept[label] :]]
    assert found["test"] == listed(spec, root)["test"]
    loaded = load_ufgir_dataset(tmp_path / "out", cache_dir=tmp_path / "cache")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 9, "validation": 3, "test": 9}

    prepare(spec, source, tmp_path / "plain")  # where the loader splits it off, it is the same
    for split, rows in load_ufgir_dataset(tmp_path / "plain", cache_dir=tmp_path / "cache").items():
        assert rows["label"] == loaded[split]["label"]
        assert [i.tobytes() for i in rows["image"]] == [i.tobytes() for i in loaded[split]["image"]]


def test_validation_of_soyageing_is_its_last_stage_unless_drawn(drawn, tmp_path):
    spec, source, _ = drawn("soyageing")
    text = prepare(spec, source, tmp_path / "last", validation="last")
    assert "the last images of each class, which the loader takes for validation, come from R6" in text
    assert {path[:2] for path, *_ in rows_of(tmp_path / "last")["validation"]} == {"R6"}
    prepare(spec, source, tmp_path / "random", validation="random")
    assert len({path[:2] for path, *_ in rows_of(tmp_path / "random")["validation"]}) > 1


def test_random_validation_and_shots_are_stratified_and_seeded(drawn, tmp_path):
    spec, source, root = drawn("soyageing")
    folders = {}
    for name, seed in {"default": None, "zero": 0, "one": 1}.items():
        prepare(spec, source, tmp_path / name, validation="random", validation_fraction=0.3, seed=seed, shots=4)
        folders[name] = rows_of(tmp_path / name)
    for found in folders.values():
        assert Counter(label for _, label, _ in found["validation"]) == {0: 3, 1: 3, 2: 3}
        assert Counter(label for _, label, _ in found["train"]) == {0: 4, 1: 4, 2: 4}
        assert not {row[2] for row in found["train"]} & {row[2] for row in found["validation"]}
        assert set(found["train"] + found["validation"]) <= set(listed(spec, root)["train"])
    assert folders["default"] == folders["zero"] != folders["one"]


def test_random_choices_are_those_of_the_loader(drawn, tmp_path):
    spec, source, _ = drawn("soyageing")
    prepare(spec, source, tmp_path / "plain")
    prepare(spec, source, tmp_path / "chosen", validation="random", seed=3, shots=4)
    options = {"validation_split": "random", "seed": 3, "shots": 4, "cache_dir": tmp_path / "cache"}
    loaded = load_ufgir_dataset(tmp_path / "plain", **options)
    for split, rows in rows_of(tmp_path / "chosen").items():
        raw = loaded[split].cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["path"] for row in raw] == [path for path, *_ in rows]


def test_too_many_shots_keep_all_and_say_so(drawn, tmp_path):
    spec, source, _ = drawn("soygene")
    text = prepare(spec, source, tmp_path / "out", shots=4)
    assert "note: 1 classes have fewer than 4 images for train" in text
    assert Counter(label for _, label, _ in rows_of(tmp_path / "out")["train"]) == {0: 3, 1: 4, 2: 4}


def test_shards_hold_the_rows_in_order_and_obey_their_size(drawn, tmp_path):
    spec, source, root = drawn("soygene")
    prepare(spec, source, tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "one" / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]
    sizes = {file.name: file.stat().st_size for file in (root / "images").iterdir()}
    limit = 2 * max(sizes.values())
    prepare(spec, source, tmp_path / "many", shard_size=limit)
    shards = sorted((tmp_path / "many" / "data").glob("train-*"))
    assert len(shards) > 3
    for file in shards:
        rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
        paths = [i["path"] for i in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        assert sum(sizes[path.split("/")[-1]] for path in paths) <= limit
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "many")
    prepare(spec, source, tmp_path / "single", shard_size="1KB" if min(sizes.values()) > 1000 else 1)
    assert len(list((tmp_path / "single" / "data").iterdir())) == spec.train + spec.test  # at least one image each


def test_card(drawn, tmp_path):
    spec, source, _ = drawn("soygene")
    prepare(spec, source, tmp_path / "out", validation="last")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    header = card.data.to_dict()
    assert header["license"] == "unknown" and header["task_categories"] == ["image-classification"]
    assert header["configs"][0]["data_files"] == [
        {"split": split, "path": f"data/{split}-*.parquet"} for split in ("train", "validation", "test")
    ]
    counts = {split["name"]: split["num_examples"] for split in header["dataset_info"]["splits"]}
    assert counts == {"train": 9, "validation": 3, "test": 9}
    text = card.text
    assert "https://github.com/XiaohanYu-GU/Ultra-FGVC" in text and "No licence was found" in text
    assert "| train | 9 | 2 to 4 |" in text and "Nothing was left out" in text
    assert str(tmp_path) not in text and "`validation` last" in text
    next(path for path in (tmp_path / "out" / "data").glob("train-*")).unlink()
    with pytest.raises(Exception, match="train"):  # a lost shard is noticed
        datasets.load_dataset(str(tmp_path / "out"))


# Interruptions


class Counting:
    """`inspect_file` that counts its calls."""

    def __init__(self, monkeypatch):
        self.files = []
        self.original = ultra_fgvc.inspect_file
        monkeypatch.setattr(parquet_folder, "inspect_file", self)

    def __call__(self, file):
        self.files.append(file.name)
        return self.original(file)


def killed_at(what, calls, *arguments, **options):
    """Runs `prepare` in another process, which gets SIGKILL in the call number `calls` of `parquet_folder.what`."""

    def run():
        original, left = getattr(parquet_folder, what), [calls]

        def kill(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                if what == "_write_shard":  # with half a file on the disk
                    args[0].with_name(f".{args[0].name}.tmp").write_bytes(b"PAR1 half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(parquet_folder, what, kill)
        prepare(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["soyglobal", "soygene"])
def test_killed_while_writing_goes_on(name, drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn(name)
    prepare(spec, source, tmp_path / "whole", shard_size="2KB")
    killed_at("_write_shard", 4, spec, source, tmp_path / "out", shard_size="2KB", num_workers=2)
    work = tmp_path / ".out.preparing"
    assert not (tmp_path / "out").exists()
    finished = {file.name: file.stat().st_ino for file in (work / "data").glob("[!.]*")}
    assert len(finished) == 3

    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", shard_size="2KB")
    assert counting.files == []  # nothing is decoded twice
    assert {name: (tmp_path / "out" / "data" / name).stat().st_ino for name in finished} == finished
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw", "whole"]


def test_killed_while_checking_goes_on(drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn("cotton")
    killed_at("inspect_file", 8, spec, source, tmp_path / "out", num_workers=1)
    journal = tmp_path / ".out.preparing" / "checked.jsonl"
    text = journal.read_text()
    journal.write_text(text[:-30])  # the last line was cut off
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out")
    assert len(counting.files) == 18 - 7 + 1
    assert len(rows_of(tmp_path / "out")["train"]) == 9


def interrupted(spec, source, output, monkeypatch, shards=3):
    original, left = parquet_folder._write_shard, [shards]

    def stop(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parquet_folder, "_write_shard", stop)
        prepare(spec, source, output, shard_size="2KB")
    assert not output.exists()


def test_shards_of_another_source_are_written_anew(drawn, tmp_path, monkeypatch):
    spec, source, root = drawn("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    changed = root / "images" / "GDC000-1-000_1_train.png"
    changed.write_bytes(leaf("validation", 0, 0))
    shard = tmp_path / ".out.preparing" / "data" / "train-00001-of-00005.parquet"
    assert shard.exists()
    shard.write_bytes(shard.read_bytes()[:-9])  # cut off
    (tmp_path / ".out.preparing" / "data" / "train-00000-of-00099.parquet").write_bytes(b"of another plan")
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", shard_size="2KB")
    assert counting.files == [changed.name]
    found = rows_of(tmp_path / "out")
    assert found == listed(spec, root)
    prepare(spec, source, tmp_path / "whole", shard_size="2KB")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_damage_of_the_same_size_is_seen_after_an_interruption(drawn, tmp_path, monkeypatch):
    spec, source, root = drawn("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    file = root / "images" / "GDC000-1-000_1_train.png"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UnsoundData, match="GDC000-1-000_1_train"):
        prepare(spec, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_other_options_take_up_the_check_but_not_the_shards(drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", validation="last", shard_size="4KB")
    assert counting.files == []
    prepare(spec, source, tmp_path / "whole", validation="last", shard_size="4KB")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_that_changes_between_check_and_copy_stops_the_run(drawn, tmp_path, monkeypatch):
    spec, source, root = drawn("cotton")
    original = parquet_folder.plan_shards

    def change(*arguments):
        (root / "2_2_train.png").write_bytes(leaf("validation", 1, 0))
        return original(*arguments)

    monkeypatch.setattr(parquet_folder, "plan_shards", change)
    with pytest.raises(ValueError, match=r"2_2_train.png changed after it was checked: start again"):
        prepare(spec, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prepare(spec, source, tmp_path / "out")
    row = next(row for row in rows_of(tmp_path / "out")["train"] if row[0] == "2_2_train.png")
    assert row[2] == hashlib.sha256(leaf("validation", 1, 0)).hexdigest()


def test_full_disk_leaves_no_output_and_the_next_run_goes_on(drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn("cotton")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(parquet_folder.pq, "write_table", full)
        prepare(spec, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(spec, source, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")["test"]) == 9


def test_done_is_done_and_others_are_not_overwritten(drawn, tmp_path, monkeypatch):
    spec, source, root = drawn("cotton")
    (tmp_path / "out").mkdir()  # an empty folder is fine
    prepare(spec, source, tmp_path / "out")
    before = files(tmp_path / "out")
    counting = Counting(monkeypatch)
    assert "is already there, made of the same source" in prepare(spec, source, tmp_path / "out")
    assert counting.files == []
    for change in ({"shots": 1}, {"validation": "last"}, {"shard_size": "1MB"}):
        with pytest.raises(ValueError, match=r"`output` .* was not made of this source in this way: choose another"):
            prepare(spec, source, tmp_path / "out", **change)
    (root / "1_1_train.png").write_bytes(leaf("validation", 0, 0))
    with pytest.raises(ValueError, match="choose another place"):
        prepare(spec, source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for output in ("precious", "file"):
        with pytest.raises(ValueError, match="choose another place"):
            prepare(spec, source, tmp_path / output)
    assert files(tmp_path / "precious") == {"thesis.txt": b"years of work"}


def test_two_at_a_time_are_refused(drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn("cotton")
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    with (
        locking.only_one(tmp_path / "out", ""),
        pytest.raises(ValueError, match=r"`output` .* is being prepared by another process"),
    ):
        prepare(spec, source, tmp_path / "out")
    prepare(spec, source, tmp_path / "out")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation": "first"}, "`validation` must be one of none, last, random, got 'first'"),
        ({"validation": "last", "validation_fraction": 1.0}, "`validation_fraction` must be in"),
        ({"validation": "last", "validation_fraction": 0.0}, "`validation_fraction` must be in .0, 1., got 0"),
        ({"validation_fraction": 0.2}, "`validation_fraction` applies only with `validation` last or random"),
        ({"seed": 1}, "`seed` applies only with `validation` random or with `shots`"),
        ({"seed": -1, "shots": 1}, "`seed` must be at least 0, got -1"),
        ({"shots": 0}, "`shots` must be"),
        ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
        ({"shard_size": "big"}, "`shard_size` must be a number of bytes up to 2GB, such as 256MB, got 'big'"),
        ({"shard_size": "3GB"}, "`shard_size` must be a number of bytes up to 2GB"),
        ({"shard_size": 0}, "`shard_size` must be"),
        ({"source": "nowhere"}, "`source` must be the folder of the raw download"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(options, message, drawn, tmp_path, monkeypatch):
    spec, source, _ = drawn("cotton")
    counting = Counting(monkeypatch)
    with pytest.raises(ValueError, match=message):
        prepare(spec, **{"source": source, "output": tmp_path / "out"} | options)
    assert counting.files == [] and [path.name for path in tmp_path.iterdir()] == ["raw"]


# The command


def test_command(drawn, tmp_path, monkeypatch, capsys):
    spec, source, root = drawn("soygene")
    output = str(tmp_path / "out")
    command = ["prepare", "soygene", "--source", str(source), "--output", output]
    assert main(command) == 1  # the miniature is not the published set
    text = capsys.readouterr().out
    assert "train: 12 images, published are 12763" in text and "in class 4-1110" in text
    assert text.endswith("nothing was written; --skip-bad leaves bad files out\n") and not (tmp_path / "out").exists()

    monkeypatch.setitem(SETS, "soygene", spec)
    broken = root / "images" / "GDC002-1-000_3_train.png"
    broken.write_bytes(b"")
    assert main([*command, "--num_workers", "1"]) == 1
    assert "images/GDC002-1-000_3_train.png: UnidentifiedImageError" in capsys.readouterr().out
    assert main([*command, "--skip-bad", "--validation", "last", "--shard-size", "2KB"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert {split: len(rows) for split, rows in rows_of(tmp_path / "out").items()} == {
        "train": 8,
        "validation": 3,
        "test": 9,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["wheat", "--source", "a", "--output", "b"], "invalid choice: 'wheat'"),
        (["cotton", "--output", "b"], "required: --source"),
        (["cotton", "--source", "nowhere", "--output", "b"], "`source` must be the folder of the raw download"),
        (["cotton", "--source", "a", "--output", "b", "--shot", "1"], "unrecognized arguments: --shot 1"),
        (["cotton", "--source", "a", "--output", "b", "--seed", "1"], "`seed` applies only with"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
