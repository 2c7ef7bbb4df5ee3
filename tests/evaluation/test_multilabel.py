"""Multi-label data: labels of every layout, and mAP and F1 against the original, scikit-learn and manual computation."""

import json
from pathlib import Path

import datasets
import evaluate
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score, f1_score
from transformers import EvalPrediction

from tests.image_layouts import save_image
from ufgir.data.load import DatasetError, load_ufgir_dataset, to_multi_hot
from ufgir.data.streams import StreamedImages
from ufgir.evaluation.metrics import (
    MeanAveragePrecision,
    MultiLabelF1,
    average_precision,
    compute_multilabel_metrics,
    mean_average_precision,
    multilabel_f1,
)
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor


GOLDEN = load_file(Path(__file__).parents[1] / "goldens_misc" / "map_metric.safetensors")
LABELS = [["cat", "dog"], ["dog"], [], ["bird", "cat"], ["dog", "dog"]]  # the third has no class, the last one class
NAMES = ["bird", "cat", "dog"]
INDICES = [[1, 2], [2], [], [0, 1], [2]]
FEATURE = datasets.List(datasets.ClassLabel(names=NAMES))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")


# Labels


def ids(row):
    return [NAMES.index(name) for name in row]


def write_listing(folder, suffix, cells, column="labels"):
    for number in range(len(cells)):
        save_image(folder / "images" / f"{number}.png", number)
    rows = [{"file": f"{number}.png", column: cell} for number, cell in enumerate(cells)]
    if suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        quoted = [str(row[column]).replace('"', '""') for row in rows]
        text = f"file,{column}\n" + "".join(f'{number}.png,"{cell}"\n' for number, cell in enumerate(quoted))
    (folder / f"train{suffix}").write_text(text)
    return folder


def check(loaded, indices=INDICES, names=NAMES):
    train = loaded["train"]
    assert train.column_names == ["image", "label"]
    assert train.features["label"] == datasets.List(datasets.ClassLabel(names=names))
    assert train[:]["label"] == indices
    assert [row["image"].getpixel((0, 0))[0] for row in train] == list(range(len(indices)))


@pytest.mark.parametrize(
    ("suffix", "cells", "separator"),
    [
        (".jsonl", LABELS, None),
        (".jsonl", [";".join(row) for row in LABELS], ";"),
        (".csv", ["; ".join(row) for row in LABELS], ";"),
        (".csv", [" | ".join(row) for row in LABELS], "|"),
        (".csv", [json.dumps(row) for row in LABELS], None),
    ],
    ids=["jsonl lists", "jsonl text", "csv semicolon", "csv bar", "csv lists"],
)
def test_listings_of_several_classes(tmp_path, suffix, cells, separator):
    write_listing(tmp_path, suffix, cells)
    check(load_ufgir_dataset(tmp_path, label_separator=separator, validation_fraction=0))


@pytest.mark.parametrize(
    ("suffix", "cells", "separator"),
    [
        (".jsonl", [ids(row) for row in LABELS], None),
        (".csv", [";".join(map(str, ids(row))) for row in LABELS], ";"),
        (".csv", [str(ids(row)) for row in LABELS], None),
    ],
    ids=["jsonl lists", "csv semicolon", "csv lists"],
)
def test_listings_of_several_class_ids(tmp_path, suffix, cells, separator):
    write_listing(tmp_path, suffix, cells, column="class_id")
    check(load_ufgir_dataset(tmp_path, label_separator=separator, validation_fraction=0), names=["0", "1", "2"])
    (tmp_path / "classid_classname.csv").write_text("class_id,class_name\n0,bird\n1,cat\n2,dog\n")
    check(load_ufgir_dataset(tmp_path, label_separator=separator, validation_fraction=0))


def table(kind):
    """Create a data set with labels of type `kind` in the column `tags`."""
    values, feature = {
        "class labels": (INDICES, FEATURE),
        "text": (LABELS, datasets.List(datasets.Value("string"))),
        "integers": (INDICES, datasets.List(datasets.Value("int64"))),
        "separated": ([",".join(row) for row in LABELS], datasets.Value("string")),
    }[kind]
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(len(values))]
    features = datasets.Features({"image": datasets.Image(), "tags": feature})
    return datasets.Dataset.from_dict({"image": images, "tags": values}, features=features)


@pytest.mark.parametrize("kind", ["class labels", "text", "integers", "separated"])
@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_several_classes(tmp_path, kind, streaming):
    table(kind).to_parquet(tmp_path / "train.parquet")
    options = {"label_column": "tags", "cache_dir": tmp_path / "cache", "validation_fraction": 0}
    options |= {"label_separator": ","} if kind == "separated" else {}
    names = NAMES if kind != "integers" else ["0", "1", "2"]
    if not streaming:
        check(load_ufgir_dataset(tmp_path, **options), names=names)
        return
    train = load_ufgir_dataset(tmp_path, streaming=True, class_names=names, **options)["train"]
    assert train.features["label"] == datasets.List(datasets.ClassLabel(names=names))
    assert [row["label"] for row in train] == INDICES
    assert [row["image"].getpixel((0, 0))[0] for row in train] == list(range(5))
    samples = list(StreamedImages(train, EvalTransform(make_image_processor(8, resize_size=8))))
    assert [sample["labels"].tolist() for sample in samples] == [[0, 1, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_a_list_of_class_labels_is_found_by_its_type(tmp_path):
    table("class labels").rename_column("tags", "anything").save_to_disk(tmp_path)
    check(load_ufgir_dataset(tmp_path, validation_fraction=0, class_names=NAMES))
    reordered = load_ufgir_dataset(tmp_path, validation_fraction=0, class_names=["dog", "cow", "bird", "cat"])
    check(reordered, [[3, 0], [0], [], [2, 3], [0]], ["dog", "cow", "bird", "cat"])
    with pytest.raises(DatasetError, match=r"not among the 2 .*: bird"):
        load_ufgir_dataset(tmp_path, class_names=["cat", "dog"])


def test_validation_of_several_classes(tmp_path):
    write_listing(tmp_path, ".jsonl", LABELS * 5)
    loaded = load_ufgir_dataset(tmp_path, validation_split="random")
    assert len(loaded["train"]) + len(loaded["validation"]) == 25
    assert {label for row in loaded["validation"]["label"] for label in row} == {0, 1, 2}
    with pytest.raises(DatasetError, match=r"`shots` requires one class per image, but .* is multi-label"):
        load_ufgir_dataset(tmp_path, shots=1)


def test_splits_of_one_and_of_several_classes_do_not_mix(tmp_path):
    one = table("text").remove_columns("tags").add_column("tags", ["cat"] * 5)
    datasets.DatasetDict({"train": table("text"), "test": one}).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match="labels are lists of text in train, but text in test"):
        load_ufgir_dataset(tmp_path, label_column="tags")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["cat"], None, [], [], []], "train has images whose list of labels is missing"),
        ([["cat"], [None], [], [], []], "train has images without a class: label None"),
        ([[0.5], [], [], [], []], "labels of train must be all integers or all text, got float"),
        ([[0, 2], [], [], [], []], "from 0 to 2 without a gap; no image of train has 1"),
    ],
)
def test_invalid_lists_of_classes(tmp_path, values, message):
    table("text").remove_columns("tags").add_column("tags", values).save_to_disk(tmp_path)
    with pytest.raises(DatasetError, match=message):
        load_ufgir_dataset(tmp_path, label_column="tags")


def test_images_without_any_class(tmp_path):
    write_listing(tmp_path, ".jsonl", [[], []])
    with pytest.raises(DatasetError, match="no image of train has a label"):
        load_ufgir_dataset(tmp_path)


@pytest.mark.parametrize("cells", [[0, 1], [["a"], ["b"]]], ids=["integers", "lists"])
def test_a_separator_without_text_raises(tmp_path, cells):
    with pytest.raises(DatasetError, match=r"`label_separator` requires text, but "):
        load_ufgir_dataset(write_listing(tmp_path, ".jsonl", cells), label_separator=";")
    (tmp_path / "table").mkdir()
    table("integers").save_to_disk(tmp_path / "table")
    with pytest.raises(DatasetError, match=r"`label_separator` requires text, but the labels of "):
        load_ufgir_dataset(tmp_path / "table", label_column="tags", label_separator=";")


def test_a_bad_list_in_a_cell_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"train\.csv: `labels` in row 3 is not a JSON list"):
        load_ufgir_dataset(write_listing(tmp_path, ".csv", ['["cat"]', "[dog]"]))


@pytest.mark.parametrize("labels", [[], [2], [0, 2], [2, 0, 2]])
def test_multi_hot(labels):
    target = to_multi_hot(labels, 4)
    assert target.dtype == torch.float32 and target.shape == (4,)
    assert target.nonzero().flatten().tolist() == sorted(set(labels))
    assert target.sum() == len(set(labels))


@pytest.mark.parametrize("label", [-1, 4])
def test_multi_hot_of_an_invalid_class(label):
    with pytest.raises(ValueError, match=rf"`labels` must lie in 0 \.\.\. 3, got {label}"):
        to_multi_hot([0, label], 4)


# Metrics


def draw(images, classes, seed=0, ties=False):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(images, classes))
    targets = generator.random((images, classes)) < generator.uniform(0.1, 0.9, classes)
    return (scores.round(0) if ties else scores), targets.astype(np.float32)


def test_map_is_the_originals():
    scores, targets = GOLDEN["preds"], GOLDEN["targets"]
    assert 100 * mean_average_precision(scores, targets) == pytest.approx(float(GOLDEN["mAP"]), abs=1e-6)
    assert average_precision(scores, targets)[0] == pytest.approx(float(GOLDEN["ap0"]), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("images, classes", [(1, 1), (7, 3), (60, 9), (200, 30)])
def test_average_precision_is_scikit_learns(images, classes, ties):
    scores, targets = draw(images, classes, ties=ties)
    targets[0] = 1  # scikit-learn warns of classes without images
    expected = average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(average_precision(scores, targets), np.atleast_1d(expected), atol=1e-12)
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(expected), abs=1e-12)


def test_average_precision_by_hand():
    scores = np.array([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]])
    targets = np.array([[1, 0], [0, 1], [1, 0]])
    # first class: 1/1 and 2/3; second: all scores are equal, a third of them right
    np.testing.assert_allclose(average_precision(scores, targets), [5 / 6, 1 / 3])


def test_a_class_without_images_does_not_count():
    scores, targets = draw(20, 3)
    targets[:, 1] = 0
    values = average_precision(scores, targets)
    assert np.isnan(values).tolist() == [False, True, False]
    assert mean_average_precision(scores, targets) == pytest.approx(np.mean(values[[0, 2]]))
    with pytest.raises(ValueError, match="`references` must have at least one 1"):
        mean_average_precision(scores, np.zeros_like(targets))


def test_map_does_not_depend_on_order_and_scale_and_nan_is_last():
    scores, targets = draw(50, 4, ties=True)
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_allclose(average_precision(scores[order], targets[order]), average_precision(scores, targets))
    np.testing.assert_allclose(average_precision(np.exp(scores), targets), average_precision(scores, targets))
    scores[0, 0], targets[0, 0] = np.nan, 1
    worst = scores.copy()
    worst[0, 0] = -1e30
    np.testing.assert_allclose(average_precision(scores, targets), average_precision(worst, targets))


@pytest.mark.parametrize("images, classes", [(1, 1), (40, 7), (200, 30)])
def test_f1_is_scikit_learns(images, classes):
    scores, targets = draw(images, classes)
    targets[0] = 1  # every class occurs
    predicted = scores > 0
    micro, macro = multilabel_f1(predicted, targets)
    assert micro == pytest.approx(f1_score(targets, predicted, average="micro"), abs=1e-12)
    assert macro == pytest.approx(f1_score(targets, predicted, average="macro"), abs=1e-12)


def test_f1_over_the_classes_that_occur():
    targets = np.array([[1, 0, 0], [1, 0, 0]])
    assert multilabel_f1(np.array([[1, 0, 0], [0, 0, 0]]), targets) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert multilabel_f1(np.array([[1, 0, 1], [1, 0, 0]]), targets) == (pytest.approx(0.8), pytest.approx(0.5))
    assert multilabel_f1(np.zeros((2, 3)), np.zeros((2, 3))) == (0.0, 0.0)


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, np.zeros(3))])
def test_metrics_for_trainer(wrap):
    logits, targets = draw(60, 9)
    results = compute_multilabel_metrics(EvalPrediction(predictions=wrap(logits), label_ids=targets))
    assert results == {
        "map": pytest.approx(average_precision_score(targets, logits, average="macro")),
        "micro_f1": pytest.approx(f1_score(targets, 1 / (1 + np.exp(-logits)) > 0.5, average="micro")),
        "macro_f1": pytest.approx(f1_score(targets, 1 / (1 + np.exp(-logits)) > 0.5, average="macro")),
    }
    assert all(type(value) is float for value in results.values())  # serializable as JSON


@pytest.mark.parametrize("feed", ["at once", "batches"])
def test_metric_classes_for_all_inputs(feed):
    logits, targets = draw(23, 6)
    metrics = (MeanAveragePrecision(), MultiLabelF1())
    given = {"predictions": logits, "references": targets} if feed == "at once" else {}
    if feed == "batches":
        for metric in metrics:
            for part in np.array_split(np.arange(23), 4):
                metric.add_batch(predictions=logits[part], references=targets[part])
    assert metrics[0].compute(**given) == {"map": mean_average_precision(logits, targets)}
    micro, macro = multilabel_f1(logits > 0.7, targets)
    assert metrics[1].compute(**given, threshold=0.7) == {"micro_f1": micro, "macro_f1": macro}


def test_combined_with_evaluate():
    logits, targets = draw(23, 6)
    combined = evaluate.combine([MeanAveragePrecision(), MultiLabelF1()]).compute(
        predictions=logits, references=targets
    )
    assert combined == compute_multilabel_metrics((logits, targets))


@pytest.mark.parametrize(
    "scores, targets, word",
    [
        ([0.1, 0.2], [0, 1], "`predictions` and `references` must both have the shape"),
        ([[0.1, 0.2]], [[1]], "`predictions` and `references` must both have the shape"),
        (np.zeros((0, 3)), np.zeros((0, 3)), "`references` must not be empty"),
        ([[0.1, 0.2]], [[0, 2]], "`references` must be 1 for the classes of an image and 0 for the others, got 2"),
        ([[0.1, 0.2]], [[0.5, 0]], "`references` must be 1 for the classes of an image and 0 for the others, got 0.5"),
    ],
)
@pytest.mark.parametrize("function", [mean_average_precision, multilabel_f1])
def test_invalid_input_raises(function, scores, targets, word):
    with pytest.raises(ValueError, match=word):
        function(np.asarray(scores), np.asarray(targets))
