"""The drawn leaves: determinism, difficulty, variation, and the command."""

import hashlib
import os
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from dataset_scripts import synthetic_leaves as command
from ufgir.data import synthetic_leaves as leaves
from ufgir.data.load import load_ufgir_dataset


ROOT = Path(__file__).parents[2]
HASHES = """
import hashlib, sys
from ufgir.data.synthetic_leaves import SyntheticLeavesConfig
config = SyntheticLeavesConfig(num_classes=3, image_size=33, seed=5, difficulty="medium")
for split in ("train", "validation", "test"):
    sys.stdout.write(hashlib.sha256(config.draw(split, 2, 7).tobytes()).hexdigest() + "\\n")
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (5, 2, 2), image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))


def pixels(image):
    return np.asarray(image, dtype=np.float64)


@pytest.mark.slow
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


def test_no_leaf_exceeds_its_box(monkeypatch):
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
    """Compare two photos of a cultivar with photos of two cultivars that differ only in their traits."""
    traits = leaves.cultivar_traits(6, difficulty=difficulty)
    photos = np.array(
        [[pixels(leaves.draw_leaf(t, np.random.default_rng(i), 32, difficulty)) for i in range(6)] for t in traits]
    )
    within = np.abs(photos[:, :, None] - photos[:, None]).mean()
    between = np.abs(photos[:, None] - photos[None]).mean()
    assert 2 * between < within
    assert between > 1.0  # the cultivars differ


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
    hashes = [hashlib.sha256(row["image"].tobytes()).hexdigest() for split in drawn.values() for row in split]
    assert len(set(hashes)) == len(hashes) == 27


def test_cache_is_used_and_depends_on_the_drawing_code(tmp_path, monkeypatch):
    def build():
        return leaves.synthetic_leaves(1, (1, 0, 0), image_size=16, cache_dir=tmp_path)

    first = build()
    assert list(first) == ["train"]
    monkeypatch.setattr(leaves, "draw_leaf", lambda *args: Image.new("RGB", (16, 16), (1, 2, 3)))
    assert pixels(build()["train"][0]["image"]).std() > 5  # from the cache
    monkeypatch.setattr(leaves, "DRAWING_VERSION", "99.0.0")
    assert pixels(build()["train"][0]["image"]).std() < 1  # drawn again


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
def test_invalid_arguments_are_named(arguments):
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=f"`{name}` must") as error:
        leaves.synthetic_leaves(**arguments)
    assert any(str(v) in str(error.value) for v in (value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("call", [leaves.cultivar_traits, lambda n: leaves.contact_sheet(columns=n)])
def test_zero_raises_in_the_other_functions(call):
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
    command.main(["--output", str(target), "--contact_sheet", str(sheet), *arguments])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["leaves", "sheet.png"]
    assert capsys.readouterr().out.split() == [str(sheet), str(target)]
    with Image.open(sheet) as image:
        assert image.height == 2 * 18
    loaded = load_ufgir_dataset(target)
    assert {name: len(split) for name, split in loaded.items()} == {"train": 6, "validation": 2, "test": 2}
    config = leaves.SyntheticLeavesConfig(num_classes=2, image_size=16)
    assert loaded["train"][5]["image"].tobytes() == config.draw("train", 1, 2).tobytes()

    with pytest.raises(SystemExit) as stop:
        command.main(["--output", str(target), *arguments])
    assert stop.value.code == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_an_interrupted_command_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(leaves, "draw_leaf", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        leaves.write_image_folder(tmp_path / "leaves", num_classes=1, images_per_class=1, image_size=16)
    assert not list(tmp_path.iterdir())
