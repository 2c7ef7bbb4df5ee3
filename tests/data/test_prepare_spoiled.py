"""`ufgir prepare` lists all problems of a damaged source at once, and writes nothing."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from tests.data.preparing import LAYOUTS, LISTS, files, listed, rows_of
from tests.data.raw_layouts import CLASSES, leaf
from ufgir.data.catalog import SETS
from ufgir.data.prepare.parquet_folder import prepare
from ufgir.data.prepare.ultra_fgvc import UnsoundData, check, find_root


pytestmark = pytest.mark.usefixtures("own_cache")


def problems(spec, source, kind=None):
    """Return (kind, where) of all problems that `check` finds."""
    return [(p.kind, p.where) for p in check(spec, source).problems if kind in (None, p.kind)]


# Damaged sources


def spoil(name, root):
    """Damage three images of train and one of test, each in another way, and return the files."""
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
def test_all_problems_are_reported_at_once_and_nothing_is_written(name, raw, tmp_path):
    spec, source, root = raw(name)
    cut, duplicate, first, leaking, test, missing = spoil(name, root)
    before = files(tmp_path)
    with pytest.raises(UnsoundData) as caught:
        prepare(spec, source, tmp_path / "out")
    assert files(tmp_path) == before and not (tmp_path / "out").exists()
    report = str(caught.value)
    for line in (
        f"  {cut}: OSError:",
        f"  {duplicate}: train, also {first} of train; only the first is kept",
        f"  {leaking}: also {test} of test; the train copy is left out, the test copy is kept",
    ):
        assert line in report
    bad = {("broken", cut), ("duplicate", duplicate), ("leaking", leaking)}
    if name in LISTS:
        bad.add(("missing", missing))
        assert f"  {missing}: the file does not exist" in report
        assert set(problems(spec, source)) == bad  # counts are those of the lists
        assert len(check(spec, source).problems) == 4
    else:
        assert f"  test: {spec.test - 1} images, expected {spec.test}" in report
        assert "  test: 2 images, expected 3, in class 1" in report
        assert set(problems(spec, source)) == bad | {("count", "test")}

    expected = listed_without(spec, root, {cut, duplicate, leaking, missing}, name)
    text = prepare(spec, source, tmp_path / "out", skip_bad=True)
    found = rows_of(tmp_path / "out")
    assert {split: Counter(rows) for split, rows in found.items()} == expected
    assert "left out by --skip-bad" in text and f"  {leaking}: also" in text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "differ from the published ones" in card and f"- leaking: `{leaking}`" in card
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
        (b"not an image", "UnidentifiedImageError"),
        (leaf("train", 0, 0)[:-20] + bytes(20), "Error"),
        (leaf("train", 0, 0)[: len(leaf("train", 0, 0)) // 2], "OSError"),
    ],
    ids=["empty", "text", "damaged", "half"],
)
@pytest.mark.parametrize("name", ["soylocal", "soygene"])
def test_broken_images(name, content, problem, raw):
    spec, source, root = raw(name)
    bad = sorted(root.rglob("*_train.png"))[:2]
    for file in bad:  # two broken files with the same bytes are broken, not duplicates
        file.write_bytes(content)
    found = check(spec, source).problems
    assert [(p.kind, p.where) for p in found] == [("broken", str(file.relative_to(root))) for file in bad]
    assert all(problem in p.text for p in found)


def test_unreadable_file_is_broken(raw, monkeypatch):
    spec, source, _ = raw("cotton")

    def refuse(file):
        raise PermissionError(13, "Permission denied")

    found = check(spec, source, inspect=refuse).problems
    assert Counter(p.kind for p in found) == {"broken": 18}
    assert found[0].text == "PermissionError: Permission denied"


@pytest.mark.parametrize("split", ["train", "test"])
def test_both_images_with_the_same_bytes_in_two_classes_are_left_out(split, raw):
    spec, source, root = raw("cotton")
    number = 1 if split == "train" else 4
    one, two = root / f"1_{number}_{split}.png", root / f"3_{number}_{split}.png"
    two.write_bytes(one.read_bytes())
    checked = check(spec, source)
    assert [p.where for p in checked.problems] == [one.name, two.name]
    assert f"{split}, class 1, also {two.name} of {split}, class 3; both are left out" in checked.problems[0].text
    assert not {one.name, two.name} & {row.file for row in checked.rows}


def test_leaking_images_stay_in_test_for_any_class(raw):
    spec, source, root = raw("soygene")
    for index, file in enumerate(sorted((root / "images").glob("GDC002*_train.png"))[:2]):
        file.write_bytes(leaf("test", index, 0))  # of class 1 and 2 in test
    checked = check(spec, source)
    assert [p.kind for p in checked.problems] == ["leaking", "leaking"]
    assert Counter(row.split for row in checked.rows) == {"train": spec.train - 2, "test": spec.test}


def test_copy_in_another_growth_stage_is_a_duplicate(raw):
    spec, source, root = raw("soyageing")
    (root / "R6/images/yd01_R6_1_train.png").write_bytes(leaf("train", 1, 0))  # that of R1
    assert problems(spec, source) == [("duplicate", "R6/images/yd01_R6_1_train.png")]


def test_invalid_file_names(raw):
    spec, source, root = raw("cotton")
    for name in ("4_1_train.png", "0_1_test.png", "one_1_train.png", "1_1_val.png", "1_train.png"):
        (root / name).write_bytes(leaf("validation", 0, 0))
    for name in ("Thumbs.db", ".DS_Store", "._1_1_train.png", "readme.txt"):
        (root / name).write_bytes(b"ignored")
    found = check(spec, source).problems
    assert {p.where: p.text for p in found} == {
        "0_1_test.png": "class 0 is not one of 1 to 3",
        "4_1_train.png": "class 4 is not one of 1 to 3",
        **dict.fromkeys(("1_1_val.png", "1_train.png", "one_1_train.png"), "expected <class>_<number>_<train|test>"),
    }


@pytest.mark.parametrize("name", LISTS)
def test_invalid_lines_of_lists(name, raw):
    spec, source, root = raw(name)
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
    assert texts[f"{at}{start + 4}"] == "../x.png is outside of images/"
    assert texts[f"{at}{start + 5}"] == "/etc/x.png is outside of images/"
    assert texts[f"{at}{start + 6}"] == f"the name of {test[0].split()[0]} contains test"
    assert texts[f"{part}anno/test.txt line {len(test) + 1}"] == f"the name of {train[1].split()[0]} contains train"
    assert texts[f"{part}images/{first}"] == "train, also listed twice; only the first is kept"
    assert texts[f"{part}images/gone.png"] == "the file does not exist"
    assert f"  train: {spec.train + 2} images, expected {spec.train}" in checked.report().splitlines()
    assert any(
        f"1 images are not in any list and are left out: {part}images/extra.png" in note for note in checked.notes
    )
    assert Counter(row.split for row in checked.rows) == {"train": spec.train, "test": spec.test}


def test_file_listed_in_both_splits_leaks(raw):
    spec, source, root = raw("soygene")
    old = root / "images" / "GDC000-1-000_1_train.png"
    old.rename(old.with_name("GDC000-1-000.png"))  # a name without a split
    for split in ("train", "test"):
        file = root / "anno" / f"{split}.txt"
        lines = [line for line in file.read_text().splitlines() if line.split()[0] != old.name]
        file.write_text("\n".join([*lines, "GDC000-1-000.png 1"]))
    checked = check(spec, source)
    assert ("leaking", "images/GDC000-1-000.png") in [(p.kind, p.where) for p in checked.problems]
    assert "also listed in test; the train copy is left out" in checked.report()
    assert [row.split for row in checked.rows if row.file == "images/GDC000-1-000.png"] == ["test"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_and_classes_are_compared_with_the_published_ones(name, raw):
    spec, source, _ = raw(name)
    more = replace(spec, classes=7, train=spec.train + 1, test_per_class=(4, 4))
    report = check(more, source).report()
    least = spec.train_per_class[0] if spec.train_per_class[0] == spec.train_per_class[1] else "3 to 5"
    assert f"  train: {spec.train} images, expected {spec.train + 1}" in report
    assert f"  train: 0 images, expected {least}, in class 4-7" in report
    if spec.test_per_class != (4, 4):
        assert f"  test: {spec.test_per_class[0]} images, expected 4, in class 1-3" in report
    assert "  test: 0 images, expected 4, in class 4-7" in report


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_images_is_never_written(split, raw, tmp_path):
    spec, source, root = raw("cotton")
    for file in root.glob(f"*_{split}.png"):
        file.write_bytes(b"broken")
    with pytest.raises(UnsoundData, match=f"cotton: no images are left in {split}\ncannot be decoded .9.:"):
        prepare(spec, source, tmp_path / "out", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("name", LISTS)
def test_missing_lists_and_folders_are_named(name, raw):
    spec, source, root = raw(name)
    part = spec.layout.parts[-1]
    (root / part / "images").rename(root / part / "photos")
    with pytest.raises(ValueError, match=r"images is not a folder: expected .*anno/train.txt"):
        check(spec, source)
    (root / part / "anno" / "test.txt").write_bytes(b"\xff\xfe\xff 1")
    with pytest.raises(ValueError, match=r"anno/test.txt is not UTF-8 text"):
        check(spec, source)
    (root / part / "anno" / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"anno/test.txt is missing: it lists the test images"):
        check(spec, source)


def test_empty_sources(tmp_path):
    with pytest.raises(ValueError, match=r"`source` must be the folder of the raw download, got .*nowhere"):
        find_root(SETS["cotton"], tmp_path / "nowhere")
    for spec in SETS.values():
        with pytest.raises(ValueError, match=f"does not contain {spec.name}: expected "):
            find_root(spec, tmp_path)
    for folder in ("anno", "images"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test"):
        (tmp_path / "anno" / f"{split}.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="lists no images of soygene"):
        check(SETS["soygene"], tmp_path)
