"""`ufgir prepare` on miniatures of every raw layout: rows, splits, shards, the card, and the command."""

import io
from collections import Counter
from dataclasses import replace

import datasets
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from tests.data.preparing import LAYOUTS, LISTS, Counting, listed, rows_of
from tests.data.raw_layouts import CLASSES, draw_raw, leaf, miniature
from ufgir.cli.entry import main
from ufgir.data.catalog import SETS
from ufgir.data.load import load_ufgir_dataset
from ufgir.data.prepare.parquet_folder import prepare
from ufgir.data.prepare.ultra_fgvc import UltraFGVC, UnsoundData, check, find_root


pytestmark = pytest.mark.usefixtures("own_cache")


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


# Valid sources


@pytest.mark.parametrize("name", LAYOUTS)
def test_valid_source_is_converted_to_parquet(name, raw, tmp_path):
    spec, source, root = raw(name)
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
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary files are left


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


def test_classes_without_a_unique_cultivar_keep_their_numbers(raw):
    spec, source, root = raw("soyageing_r4")
    file = root / "R4" / "images" / "yd01_R4_1_train.png"
    file.rename(file.with_name("yd00_R4_9_train.png"))  # the code of class 1 in class 2
    lines = root / "R4" / "anno" / "train.txt"
    lines.write_text(lines.read_text().replace("yd01_R4_1_train.png", "yd00_R4_9_train.png"))
    assert check(spec, source).class_names == ("1", "2", "3")


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_is_found(name, raw, tmp_path):
    spec, source, root = raw(name)
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
        with pytest.raises(ValueError, match=r"does not contain cotton: expected cotton_square_new/"):
            find_root(spec, moved)


def test_all_sets_are_found_in_one_download(tmp_path):
    for name in ("cotton", "soylocal", "soyglobal", "soygene", "soyageing"):
        draw_raw(tmp_path / name, miniature(name))
    roots = {name: find_root(spec, tmp_path) for name, spec in SETS.items()}
    assert roots["soygene"] == tmp_path / "soygene"  # not a growth stage of soyageing, which has the same layout
    assert {roots[name] for name in SETS if "ageing" in name} == {tmp_path / "soyageing"}
    draw_raw(tmp_path / "again", miniature("cotton"))
    with pytest.raises(ValueError, match=r"`source` .* contains cotton more than once"):
        find_root(SETS["cotton"], tmp_path)


@pytest.mark.parametrize("name", ["cotton", "soygene"])
def test_builder_yields_the_same_rows(name, raw, tmp_path):
    spec, source, root = raw(name)
    builder = UltraFGVC(config_name=name, data_dir=source, spec=spec, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    built = builder.as_dataset()
    prepare(spec, source, tmp_path / "out")
    for split, rows in datasets.load_dataset(str(tmp_path / "out")).items():
        assert built[split].features == rows.features and built[split]["label"] == rows["label"]
        pairs = zip(built[split], rows, strict=True)
        assert all(a["image"].tobytes() == b["image"].tobytes() for a, b in pairs)

    next(root.rglob("*_train.png")).write_bytes(b"not an image")
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


# Splits, shards, card


def test_validation_is_the_last_part_of_each_class(raw, tmp_path):
    spec, source, root = raw("soygene")  # 3, 4, 5 images
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

    prepare(spec, source, tmp_path / "plain")  # the loader makes the same split
    for split, rows in load_ufgir_dataset(tmp_path / "plain", cache_dir=tmp_path / "cache").items():
        assert rows["label"] == loaded[split]["label"]
        assert [i.tobytes() for i in rows["image"]] == [i.tobytes() for i in loaded[split]["image"]]


def test_validation_of_soyageing_is_its_last_stage_unless_drawn(raw, tmp_path):
    spec, source, _ = raw("soyageing")
    text = prepare(spec, source, tmp_path / "last", validation="last")
    assert "the last images of each class, which the loader uses for validation, come from R6" in text
    assert {path[:2] for path, *_ in rows_of(tmp_path / "last")["validation"]} == {"R6"}
    prepare(spec, source, tmp_path / "random", validation="random")
    assert len({path[:2] for path, *_ in rows_of(tmp_path / "random")["validation"]}) > 1


def test_random_validation_and_shots_are_stratified_and_seeded(raw, tmp_path):
    spec, source, root = raw("soyageing")
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


def test_random_splits_are_those_of_the_loader(raw, tmp_path):
    spec, source, _ = raw("soyageing")
    prepare(spec, source, tmp_path / "plain")
    prepare(spec, source, tmp_path / "chosen", validation="random", seed=3, shots=4)
    options = {"validation_split": "random", "seed": 3, "shots": 4, "cache_dir": tmp_path / "cache"}
    loaded = load_ufgir_dataset(tmp_path / "plain", **options)
    for split, rows in rows_of(tmp_path / "chosen").items():
        raw = loaded[split].cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["path"] for row in raw] == [path for path, *_ in rows]


def test_too_many_shots_keep_all_images_with_a_note(raw, tmp_path):
    spec, source, _ = raw("soygene")
    text = prepare(spec, source, tmp_path / "out", shots=4)
    assert "note: 1 classes have fewer than 4 images for train" in text
    assert Counter(label for _, label, _ in rows_of(tmp_path / "out")["train"]) == {0: 3, 1: 4, 2: 4}


def test_shards_have_the_rows_in_order_and_the_maximum_size(raw, tmp_path):
    spec, source, root = raw("soygene")
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


def test_card(raw, tmp_path):
    spec, source, _ = raw("soygene")
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
    assert "https://github.com/XiaohanYu-GU/Ultra-FGVC" in text and "No license was found" in text
    assert "| train | 9 | 2 to 4 |" in text and "No file was left out" in text
    assert str(tmp_path) not in text and "`validation` last" in text
    next(path for path in (tmp_path / "out" / "data").glob("train-*")).unlink()
    with pytest.raises(Exception, match="train"):  # a missing shard is detected
        datasets.load_dataset(str(tmp_path / "out"))


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
def test_invalid_arguments_raise_before_reading(options, message, raw, tmp_path, monkeypatch):
    spec, source, _ = raw("cotton")
    counting = Counting(monkeypatch)
    with pytest.raises(ValueError, match=message):
        prepare(spec, **{"source": source, "output": tmp_path / "out"} | options)
    assert counting.files == [] and [path.name for path in tmp_path.iterdir()] == ["raw"]


# The command


def test_command(raw, tmp_path, monkeypatch, capsys):
    spec, source, root = raw("soygene")
    output = str(tmp_path / "out")
    command = ["prepare", "soygene", "--source", str(source), "--output", output]
    assert main(command) == 1  # the miniature differs from the published set
    text = capsys.readouterr().out
    assert "train: 12 images, expected 12763" in text and "in class 4-1110" in text
    assert "--skip-bad" in text and not (tmp_path / "out").exists()

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
def test_errors_of_the_command_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
