"""The drawn leaves (determinism, difficulty, what varies) and the loader (every layout, every refusal by name)."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dataset_scripts import synthetic_leaves as leaves
from ufgir.data import DatasetError, load_ufgir_dataset, verify_images


ROOT = Path(__file__).parents[1]
HASHES = """
import hashlib, sys
from dataset_scripts.synthetic_leaves import SyntheticLeavesConfig
config = SyntheticLeavesConfig(num_classes=3, image_size=33, seed=5, difficulty="medium")
for split in ("train", "validation", "test"):
    sys.stdout.write(hashlib.sha256(config.draw(split, 2, 7).tobytes()).hexdigest() + "\\n")
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (5, 2, 2), image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


def pixels(image):
    return np.asarray(image, dtype=np.float64)


def save_image(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value % 256, 90, 30)).save(file)


def make_folder(root, splits=("train", "val", "test"), classes=("a", "b"), images=5):
    """split/class/0.png ...; an empty split name makes class/0.png. No two images are equal."""
    value = 0
    for split in splits:
        for name in classes:
            for index in range(images):
                save_image(root / split / name / f"{index}.png", value)
                value += 1
    return root


def make_csv(root, counts, classes=2, folder="images"):
    """`counts`: images of each class in each CSV file."""
    for stem, images in counts.items():
        lines = ["class_id,dir"]
        for class_id in range(classes):
            for index in range(images):
                save_image(root / folder / f"{stem}_{class_id}_{index}.png", 10 * class_id + index)
                lines.append(f"{class_id},{stem}_{class_id}_{index}.png")
        (root / f"{stem}.csv").write_text("\n".join(lines) + "\n")
    return root


# The drawing


def test_images_are_equal_in_separate_processes():
    outputs = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", HASHES], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.split())
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 3


def test_images_do_not_touch_or_read_the_global_generator():
    config = leaves.SyntheticLeavesConfig(num_classes=2, image_size=24)
    np.random.seed(0)
    first, state = config.draw("train", 0, 0), np.random.get_state()[1].copy()
    np.random.seed(1)
    assert config.draw("train", 0, 0).tobytes() == first.tobytes()
    np.random.seed(0)
    assert (np.random.get_state()[1] == state).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"difficulty": "hard"}, {"num_classes": 5}, {"image_size": 48}])
def test_every_argument_changes_the_images(change):
    base = leaves.SyntheticLeavesConfig(num_classes=4, image_size=32)
    changed = replace(base, **change)
    assert base.draw("train", 1, 0).tobytes() != changed.draw("train", 1, 0).tobytes()
    assert changed.draw("train", 1, 0).size == (changed.image_size, changed.image_size)


@pytest.mark.parametrize("image_size", [16, 17, 33, 400])
def test_any_size_draws_a_green_leaf_in_the_middle(image_size):
    traits = leaves.cultivar_traits(1)[0]
    image = pixels(leaves.draw_leaf(traits, np.random.default_rng(3), image_size))
    assert image.shape == (image_size, image_size, 3)
    third = image_size // 3
    middle = image[third:-third, third:-third]
    assert (middle[..., 1] > middle[..., 2] + 10).mean() > 0.8  # more green than blue


def test_the_same_photo_at_two_sizes():
    traits = leaves.cultivar_traits(1)[0]
    small, large = (leaves.draw_leaf(traits, np.random.default_rng(4), size) for size in (48, 96))
    other = leaves.draw_leaf(traits, np.random.default_rng(5), 48)
    gap = np.abs(pixels(small) - pixels(large.reduce(2))).mean()
    assert gap < 0.25 * np.abs(pixels(small) - pixels(other)).mean()


def test_no_leaf_is_cut_by_the_box_it_is_drawn_in(monkeypatch):
    seen, halve = [], leaves._halve

    def record(image):
        if image.ndim == 2:  # the cover of leaf and petiole
            seen.append(image)
        return halve(image)

    monkeypatch.setattr(leaves, "_halve", record)
    level = replace(leaves.DIFFICULTIES["hard"], shift=0.0, length=(0.9, 0.9))  # away from the border of the photo
    monkeypatch.setitem(leaves.DIFFICULTIES, "hard", level)
    wide = replace(leaves.cultivar_traits(1)[0], tip=0.0, base=1.0, tooth_depth=0.05, tooth_sharpness=0.0)
    for seed in range(60):
        leaves.draw_leaf(wide, np.random.default_rng(seed), 40, "hard")
    assert len(seen) == 60
    for cover in seen:
        assert cover.max() > 0.99
        assert max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) == 0


def test_difficulty_narrows_the_traits():
    spread = {}
    for difficulty in leaves.DIFFICULTIES:
        values = np.array([astuple(traits) for traits in leaves.cultivar_traits(8, difficulty=difficulty)])
        low, high = np.array(list(leaves.TRAIT_RANGES.values())).T
        assert (values >= low).all() and (values <= high).all()
        spread[difficulty] = np.ptp(values, axis=0) / (high - low)
    assert (spread["easy"] > 0.8).all()  # 8 evenly spaced values span 7/8 of each range
    assert (spread["easy"] > spread["medium"] * 1.3).all()
    assert (spread["medium"] > spread["hard"] * 1.3).all()


def test_traits_are_evenly_spaced_and_no_two_cultivars_are_close():
    values = np.array([astuple(traits) for traits in leaves.cultivar_traits(10, seed=2)])
    low, high = np.array(list(leaves.TRAIT_RANGES.values())).T
    places = (values - low) / (high - low)
    np.testing.assert_allclose(
        np.sort(places, axis=0), np.repeat((np.arange(10)[:, None] + 0.5) / 10, places.shape[1], 1)
    )
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)[~np.eye(10, dtype=bool)]
    assert distances.min() > 0.6 * distances.mean()


@pytest.mark.parametrize("difficulty", sorted(leaves.DIFFICULTIES))
def test_photos_of_one_cultivar_differ_more_than_cultivars_in_one_photo(difficulty):
    """Pixels of two photos of a cultivar against those of two cultivars with all accidents equal."""
    traits = leaves.cultivar_traits(6, difficulty=difficulty)
    photos = np.array(
        [[pixels(leaves.draw_leaf(t, np.random.default_rng(i), 32, difficulty)) for i in range(6)] for t in traits]
    )
    within = np.abs(photos[:, :, None] - photos[:, None]).mean()
    between = np.abs(photos[:, None] - photos[None]).mean()
    assert 2 * between < within
    assert between > 1.0  # but the cultivars do differ


def test_splits_features_and_lossless_storage(drawn):
    assert {name: len(split) for name, split in drawn.items()} == {"train": 15, "validation": 6, "test": 6}
    for split in drawn.values():
        assert split.column_names == ["image", "label"]
        assert split.features["label"].names == ["cultivar_00", "cultivar_01", "cultivar_02"]
        assert split["label"] == sorted(split["label"])
    config = leaves.SyntheticLeavesConfig(num_classes=3, image_size=32)
    row = drawn["validation"][3]
    assert (row["image"].mode, row["image"].size, row["label"]) == ("RGB", (32, 32), 1)
    assert row["image"].tobytes() == config.draw("validation", 1, 1).tobytes()
    raw = drawn["train"].cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert raw["bytes"].startswith(b"\x89PNG")


def test_no_image_appears_twice(drawn):
    digests = [hashlib.sha256(row["image"].tobytes()).hexdigest() for split in drawn.values() for row in split]
    assert len(set(digests)) == len(digests) == 27


def test_cache_is_used_and_follows_the_drawing(tmp_path, monkeypatch):
    def build():
        return leaves.synthetic_leaves(1, (1, 0, 0), image_size=16, cache_dir=tmp_path)

    first = build()
    assert list(first) == ["train"]
    monkeypatch.setattr(leaves, "draw_leaf", lambda *args: Image.new("RGB", (16, 16), (1, 2, 3)))
    assert pixels(build()["train"][0]["image"]).std() > 5  # from the cache
    monkeypatch.setattr(leaves, "DRAWING_VERSION", "99.0.0")
    assert pixels(build()["train"][0]["image"]).std() < 1  # drawn anew


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 0},
        {"num_classes": 2.0},
        {"images_per_class": -1},
        {"images_per_class": (4, -2, 1)},
        {"images_per_class": (4, 2)},
        {"images_per_class": (0, 0, 0)},
        {"image_size": 15},
        {"seed": -1},
        {"difficulty": "trivial"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"`{name}` must") as error:
        leaves.synthetic_leaves(**arguments)
    assert any(str(v) in str(error.value) for v in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("call", [leaves.cultivar_traits, lambda n: leaves.contact_sheet(columns=n)])
def test_zero_is_refused_by_the_other_functions(call):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        call(0)


def test_contact_sheet_of_a_split_and_of_arguments(drawn):
    of_split = leaves.contact_sheet(drawn["test"], columns=2)
    of_arguments = leaves.contact_sheet(columns=2, num_classes=3, image_size=32)
    assert of_split.tobytes() == of_arguments.tobytes()
    first = pixels(drawn["test"][0]["image"])
    left = of_split.width - 2 * (32 + 2)
    np.testing.assert_array_equal(pixels(of_split)[:32, left : left + 32], first)
    assert pixels(of_split)[:32, :left].min() < 128  # the label
    assert leaves.contact_sheet(drawn["test"], rows=1, columns=2).height == 34
    with pytest.raises(TypeError, match="seed"):
        leaves.contact_sheet(drawn["test"], seed=1)


def test_command_line_writes_a_folder_that_loads_back(tmp_path, capsys):
    target, sheet = tmp_path / "leaves", tmp_path / "sheet.png"
    arguments = ["--num_classes", "2", "--images_per_class", "3", "1", "1", "--image_size", "16", "--columns", "2"]
    leaves.main(["--output", str(target), "--contact_sheet", str(sheet), *arguments])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["leaves", "sheet.png"]
    assert capsys.readouterr().out.split() == [str(sheet), str(target)]
    with Image.open(sheet) as image:
        assert image.height == 2 * 18
    loaded = load_ufgir_dataset(target)
    assert {name: len(split) for name, split in loaded.items()} == {"train": 6, "validation": 2, "test": 2}
    config = leaves.SyntheticLeavesConfig(num_classes=2, image_size=16)
    assert loaded["train"][5]["image"].tobytes() == config.draw("train", 1, 2).tobytes()

    with pytest.raises(SystemExit) as stop:
        leaves.main(["--output", str(target), *arguments])
    assert stop.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_an_interrupted_command_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(leaves, "draw_leaf", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        leaves.write_image_folder(tmp_path / "leaves", num_classes=1, images_per_class=1, image_size=16)
    assert not list(tmp_path.iterdir())


# The loader: layouts


def check(loaded, sizes, names):
    assert {name: len(split) for name, split in loaded.items()} == sizes
    for split in loaded.values():
        assert split.column_names == ["image", "label"]
        assert split.features["image"].mode == "RGB"
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


def test_grey_and_transparent_images_become_rgb(tmp_path):
    make_folder(tmp_path, ("train", "test"), images=2)
    Image.new("L", (8, 8), 7).save(tmp_path / "train" / "a" / "0.png")
    Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(tmp_path / "train" / "a" / "1.png")
    loaded = load_ufgir_dataset(tmp_path)
    assert [row["image"].mode for row in loaded["train"]] == ["RGB"] * 2  # one of each class is validation
    assert loaded["validation"][0]["image"].mode == "RGB"


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


def test_hub_ids_go_to_load_dataset(monkeypatch, drawn):
    calls = []

    def load_dataset(name, config_name, revision, cache_dir):
        calls.append((name, config_name, revision))
        return drawn

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_ufgir_dataset("someone/leaves", config_name="soy", revision="v1")
    assert calls == [("someone/leaves", "soy", "v1")]
    check(loaded, {"train": 15, "validation": 6, "test": 6}, drawn["train"].features["label"].names)


# The loader: refusals


def test_missing_folder(tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        load_ufgir_dataset(tmp_path / "nowhere")


def test_neither_folder_nor_hub(tmp_path):
    with pytest.raises(DatasetError, match="'nobody/nowhere': there is no such folder"):
        load_ufgir_dataset("nobody/nowhere", cache_dir=tmp_path)


def test_a_file_is_no_folder(tmp_path):
    save_image(tmp_path / "leaf.png", 0)
    with pytest.raises(DatasetError, match=r"must be a folder, got the file .*leaf\.png"):
        load_ufgir_dataset(tmp_path / "leaf.png")


@pytest.mark.parametrize("inner", ["", "a", "train/a"])
def test_folder_without_images(tmp_path, inner):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    with pytest.raises(DatasetError, match="holds no images"):
        load_ufgir_dataset(tmp_path)


def test_empty_class_is_named(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "barren").mkdir()
    (tmp_path / "train" / "barren" / "notes.txt").write_text("no image")
    with pytest.raises(DatasetError, match=r"without images: train.barren\."):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("split", "message"), [("train", "validation lacks zeta.*test lacks zeta"), ("test", "test has zeta")]
)
def test_classes_that_differ_between_folders(tmp_path, split, message):
    make_folder(tmp_path)
    save_image(tmp_path / split / "zeta" / "0.png", 0)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path)


def test_stray_and_repeated_split_folders(tmp_path):
    make_folder(tmp_path, ("train", "val", "extra"))
    with pytest.raises(DatasetError, match="extra is not one of"):
        load_ufgir_dataset(tmp_path)
    shutil.move(tmp_path / "extra", tmp_path / "valid")
    with pytest.raises(DatasetError, match="two folders for the validation split: val, valid"):
        load_ufgir_dataset(tmp_path)


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
    with pytest.raises(DatasetError, match=r"test has impostor.*test lacks cultivar_02"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("values", [[0.5, 1.0, 2.0], ["a", None, "b"]], ids=["floats", "missing"])
def test_labels_that_are_no_classes(tmp_path, drawn, values):
    drawn["train"].select(range(3)).remove_columns("label").add_column("label", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="labels of train must be all integers or all text, got"):
        load_ufgir_dataset(tmp_path)


def test_label_columns_of_two_kinds(tmp_path, drawn):
    plain = drawn["test"].cast_column("label", datasets.Value("int64"))
    datasets.DatasetDict({"train": drawn["train"], "test": plain}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=r"labels are ClassLabel.* in train, but Value.* in test"):
        load_ufgir_dataset(tmp_path)


def test_unlabelled_test_split(tmp_path, drawn):
    feature = drawn["test"].features["label"]
    hidden = drawn["test"].remove_columns("label").add_column("label", [-1] * 6).cast_column("label", feature)
    datasets.DatasetDict({"train": drawn["train"], "test": hidden}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="test has images without a class: label -1"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("values", [[0, 2, 2], [-1, 0, 1]], ids=["gap", "negative"])
def test_integer_labels_of_tables(tmp_path, drawn, values):
    drawn["train"].select(range(3)).remove_columns("label").add_column("label", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=f"without a gap, got {', '.join(map(str, sorted(set(values))))}"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.csv", "class_id,path\n0,x.png\n", r"train\.csv lacks the column dir\. Available: class_id, path"),
        ("train.csv", "", r"train\.csv lacks the column class_id, dir\. Available: no header"),
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
    with pytest.raises(DatasetError, match="from 0 to 3 without a gap; no image has 1, 2"):
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


def test_misspelled_and_misplaced_arguments(tmp_path):
    with pytest.raises(DatasetError, match=r"Unknown argument `num_clases`. Did you mean `num_classes`"):
        load_ufgir_dataset("synthetic_leaves", num_clases=3)
    with pytest.raises(DatasetError, match=r"Unknown argument `label_colum`. Did you mean `label_column`"):
        load_ufgir_dataset(make_folder(tmp_path), label_colum="x")
    with pytest.raises(DatasetError, match="`num_classes` applies to 'synthetic_leaves' only"):
        load_ufgir_dataset(tmp_path, num_classes=3)
