"""Validation splits and few shots against the lists of the original, and their general properties."""

import json
import logging
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.image_layouts import make_folder, save_image
from ufgir.data.load import DatasetError, load_ufgir_dataset
from ufgir.data.splits import few_shots, split_rows


GOLDEN = json.loads((Path(__file__).parents[1] / "goldens_misc" / "data_split.json").read_text())
CLASSES = ["0", "1", "2", "3"]
RAW = datasets.Image(decode=False)


def write_rows(folder, text):
    (folder / "train.csv").write_text(text)
    for number, line in enumerate(text.split()[1:]):
        save_image(folder / line.split(",")[1], number)
    return folder


def listed(split):
    """(class, file) of every row, by class and in order, as the original writes them."""
    names = split.features["label"].names
    files = [Path(image["path"]).name for image in split.cast_column("image", RAW)["image"]]
    return sorted(
        ((names[label], file) for label, file in zip(split["label"], files, strict=True)), key=lambda r: r[0]
    )


def golden_rows(text):
    return [tuple(line.split(",")) for line in text.split()[1:]]


@pytest.mark.parametrize("run, fraction", [("default", 0.2), ("p50", 0.5)])
def test_last_is_the_originals_split(tmp_path, run, fraction):
    write_rows(tmp_path, GOLDEN["input"])
    loaded = load_ufgir_dataset(tmp_path, validation_fraction=fraction)
    files = GOLDEN["runs"][run]["files"]
    assert listed(loaded["train"]) == golden_rows(files["train.csv"])
    assert listed(loaded["validation"]) == golden_rows(files["val.csv"])


def test_shots_keep_the_validation_split_and_number_of_rows_of_the_original(tmp_path):
    """The original takes the first images of each class, we take random ones."""
    write_rows(tmp_path, GOLDEN["input"])
    loaded = load_ufgir_dataset(tmp_path, shots=2, seed=5)
    files = GOLDEN["runs"]["max2"]["files"]
    assert listed(loaded["validation"]) == golden_rows(files["val.csv"])
    assert Counter(c for c, _ in listed(loaded["train"])) == Counter(c for c, _ in golden_rows(files["train.csv"]))
    assert set(listed(loaded["train"])) < set(golden_rows(GOLDEN["runs"]["default"]["files"]["train.csv"]))


def test_no_class_is_lost_if_class_ids_have_a_gap(tmp_path):
    """The original drops the classes after the gap; here they raise, or are kept with given names."""
    write_rows(tmp_path, GOLDEN["gap_ids"]["input"])
    with pytest.raises(DatasetError, match="no image of train has 1"):
        load_ufgir_dataset(tmp_path)
    loaded = load_ufgir_dataset(tmp_path, class_names=CLASSES)
    good = golden_rows(GOLDEN["gap_ids"]["files"]["train.csv"])
    assert listed(loaded["train"]) == [*good[:4], ("2", "im3.jpg"), ("2", "im7.jpg"), ("3", "im12.jpg")]
    assert listed(loaded["validation"]) == [("0", "im11.jpg"), ("2", "im9.jpg"), ("3", "im13.jpg")]


def draw_labels(count=300, classes=7, seed=0):
    """Classes of very different sizes, the last of one image."""
    weights = np.geomspace(1, 40, classes - 1)
    labels = np.random.default_rng(seed).choice(classes - 1, count - 1, p=weights / weights.sum()).tolist()
    return [*labels, classes - 1]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_class_has_its_share_and_every_row_is_in_one_split(fraction, seed):
    labels = draw_labels()
    train, validation = split_rows(labels, fraction, seed)
    assert sorted(train + validation) == list(range(len(labels)))
    assert train == sorted(train) and validation == sorted(validation)
    kept = Counter(labels[row] for row in train)
    for class_id, count in Counter(labels).items():
        assert kept[class_id] == max(1, int(count * (1 - fraction) + 1e-9))


def test_a_random_split_depends_on_its_seed_only():
    labels = draw_labels()
    state = np.random.get_state()[1].copy()
    splits = [split_rows(labels, 0.2, seed) for seed in (0, 0, 1, None)]
    assert splits[0] == splits[1]
    assert len({tuple(validation) for _, validation in splits}) == 3
    assert (np.random.get_state()[1] == state).all()


def test_random_validation_through_the_loader(tmp_path):
    make_folder(tmp_path, ("",), images=10)
    last = load_ufgir_dataset(tmp_path, verify=False)
    random = [
        load_ufgir_dataset(tmp_path, validation_split="random", verify=False, **seeds)
        for seeds in ({"seed": 3}, {"split_seed": 3}, {"seed": 4})
    ]
    assert all(Counter(split["validation"]["label"]) == {0: 2, 1: 2} for split in (last, *random))
    rows = [listed(split["validation"]) for split in (last, *random)]
    assert rows[1] == rows[2]
    assert rows[0] != rows[1] != rows[3]


@pytest.mark.parametrize("shots", [1, 3, 1000])
def test_shots_are_at_most_k_of_each_class(shots):
    labels = draw_labels()
    rows = few_shots(labels, shots, seed=2)
    assert len(set(rows)) == len(rows)
    assert Counter(labels[row] for row in rows) == {c: min(n, shots) for c, n in Counter(labels).items()}
    assert rows == few_shots(labels, shots, seed=2)


def test_fewer_shots_are_a_subset_of_more():
    labels = draw_labels()
    rows = [set(few_shots(labels, shots, seed=2)) for shots in (1, 2, 5, 9)]
    assert rows[0] < rows[1] < rows[2] < rows[3]
    assert set(few_shots(labels, 2, seed=3)) != rows[1]


def test_shots_do_not_change_validation_and_small_classes_are_logged(tmp_path, caplog):
    make_folder(tmp_path, ("",), images=10)
    save_image(tmp_path / "rare" / "0.png", 99)
    whole = load_ufgir_dataset(tmp_path)
    with caplog.at_level(logging.INFO, "ufgir"):
        few = load_ufgir_dataset(tmp_path, shots=4)
    assert "1 classes have fewer than 4 images and keep all of them" in caplog.text
    assert listed(few["validation"]) == listed(whole["validation"])
    assert Counter(few["train"]["label"]) == {0: 4, 1: 4, 2: 1}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"validation_split": "first"}, "`validation_split` must be last or random, got 'first'"),
        ({"shots": 0}, "`shots` must be .* at least 1, got 0"),
        ({"shots": 2.0}, "`shots` must be .* at least 1, got 2.0"),
        ({"shots": True}, "`shots` must be .* at least 1, got True"),
        ({"class_names": []}, r"`class_names` must be a list of at least one name, got \[\]"),
        ({"class_names": "a"}, "`class_names` must be a list of at least one name, got 'a'"),
        ({"class_names": ["a", "b", "a"]}, "`class_names` must be distinct.*: a"),
        ({"label_separator": ""}, "`label_separator` must be at least one character"),
    ],
    ids=str,
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_ufgir_dataset(tmp_path, **arguments)


def test_shots_without_training_images(tmp_path):
    with pytest.raises(DatasetError, match=r"`shots` requires a train split.* test"):
        load_ufgir_dataset(make_folder(tmp_path, ("test",)), shots=1)


# Multi-label data


def draw_lists(count=400, classes=6, seed=0):
    generator = np.random.default_rng(seed)
    chances = np.geomspace(0.02, 0.5, classes)
    return [np.flatnonzero(generator.random(classes) < chances).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", [None, 0])
def test_lists_of_one_class_are_split_like_single_classes(seed):
    labels = draw_labels()
    assert split_rows([[label] for label in labels], 0.2, seed) == split_rows(labels, 0.2, seed)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_multi_label_data_are_stratified(seed):
    labels = draw_lists()
    train, validation = split_rows(labels, 0.25, seed)
    assert sorted(train + validation) == list(range(len(labels)))
    whole = Counter(c for row in labels for c in row)
    held_out = Counter(c for row in validation for c in labels[row])
    for class_id, count in whole.items():
        assert 0.15 <= held_out[class_id] / count <= 0.35
    assert abs(len(validation) / len(labels) - 0.25) < 0.03
    empty = [row for row, label in enumerate(labels) if not label]
    assert empty and abs(sum(row in validation for row in empty) / len(empty) - 0.25) < 0.05


def test_rarer_classes_do_not_remove_a_class_from_train():
    # each of the classes 1 and 2 would put the image shared with class 0 in validation
    labels = [[1], [2], [1, 0], [2, 0]]
    train, validation = split_rows(labels, 0.5)
    assert {c for row in train for c in labels[row]} == {0, 1, 2}
    assert sorted(train + validation) == [0, 1, 2, 3]
