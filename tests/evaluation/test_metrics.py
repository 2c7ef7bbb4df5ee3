"""Top-k accuracy and macro-F1 against scikit-learn, and edge cases that scikit-learn does not define."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score
from transformers import EvalPrediction

from ufgir.evaluation.metrics import (
    MacroF1,
    TopKAccuracy,
    compute_metrics,
    macro_f1,
    predicted_classes,
    top_k_accuracy,
)
from ufgir.runs.tables import summary_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path)


def draw(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(images, classes)).astype(np.float32), generator.integers(0, classes, images)


@pytest.mark.parametrize("images, classes", [(1, 3), (40, 7), (300, 20), (50, 200)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_scikit_learns(images, classes, k):
    scores, labels = draw(images, classes)
    expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(classes))
    assert top_k_accuracy(scores, labels, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "images, classes", [(1, 3), (40, 7), (300, 20), (50, 200)]
)  # the last: classes that never occur
def test_macro_f1_is_scikit_learns(images, classes):
    scores, labels = draw(images, classes, seed=1)
    scores[np.arange(images // 2), labels[: images // 2]] += 3  # make half of them correct, so that F1 is not zero
    expected = f1_score(labels, scores.argmax(axis=1), average="macro")
    assert macro_f1(scores.argmax(axis=1), labels) == pytest.approx(expected, abs=1e-12)


def test_top_k_with_k_classes_or_fewer_is_one():
    scores, labels = draw(30, 4)
    assert top_k_accuracy(scores, labels, 5) == top_k_accuracy(scores, labels, 4) == 1.0
    assert top_k_accuracy(scores, labels, 3) < 1.0


def test_ties_go_to_the_lower_index():
    scores = np.zeros((3, 3))
    assert top_k_accuracy(scores, [0, 1, 2], 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, [0, 1, 2], 2) == pytest.approx(2 / 3)
    assert predicted_classes(scores).tolist() == [0, 0, 0]


def test_nan_is_never_counted_as_correct():
    scores = np.array([[np.nan, 1.0, 0.0], [np.nan, np.nan, np.nan], [0.0, np.nan, 2.0]])
    assert top_k_accuracy(scores, [0, 1, 2], 3) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, [1, 1, 2], 1) == pytest.approx(2 / 3)
    assert predicted_classes(scores)[[0, 2]].tolist() == [1, 2]


@pytest.mark.parametrize("feed", ["at once", "batches", "one by one"])
def test_metric_classes_agree_with_the_functions_for_all_inputs(feed):
    scores, labels = draw(23, 6)
    top, f1 = TopKAccuracy(), MacroF1()
    whole = {"predictions": scores, "references": labels}
    given = whole if feed == "at once" else {}
    for metric in (top, f1):
        if feed == "batches":
            for part in np.array_split(np.arange(23), 4):
                metric.add_batch(predictions=scores[part], references=labels[part])
        elif feed == "one by one":
            for score, label in zip(scores, labels, strict=True):
                metric.add(prediction=score, reference=label)
    assert top.compute(**given, k=2) == {"top2": top_k_accuracy(scores, labels, 2)}
    assert f1.compute(**given) == {"macro_f1": macro_f1(predicted_classes(scores), labels)}


def test_added_batches_and_given_arrays_are_combined():
    scores, labels = draw(20, 6)
    metric = TopKAccuracy()
    metric.add_batch(predictions=scores[:12], references=labels[:12])
    both = metric.compute(predictions=scores[12:], references=labels[12:], k=2)
    assert both == {"top2": top_k_accuracy(scores, labels, 2)}
    only = metric.compute(predictions=scores[12:], references=labels[12:], k=2)
    assert only == {"top2": top_k_accuracy(scores[12:], labels[12:], 2)}


def test_macro_f1_takes_class_indices_too():
    scores, labels = draw(20, 6)
    classes = scores.argmax(axis=1)
    by_index = MacroF1().compute(predictions=classes, references=labels)
    assert by_index == MacroF1().compute(predictions=scores, references=labels)
    metric = MacroF1()
    metric.add_batch(predictions=classes, references=labels)
    assert metric.compute() == by_index


def test_combine():
    scores, labels = draw(30, 6)
    combined = evaluate.combine([TopKAccuracy(), MacroF1()])
    assert combined.compute(predictions=scores, references=labels) == {
        "top1": top_k_accuracy(scores, labels, 1),
        "macro_f1": macro_f1(scores.argmax(axis=1), labels),
    }


@pytest.mark.parametrize("wrap", [lambda logits: logits, lambda logits: (logits, np.zeros(3))])
def test_compute_metrics_for_trainer(wrap):
    logits, labels = draw(60, 9)
    results = compute_metrics(EvalPrediction(predictions=wrap(logits), label_ids=labels))
    assert results == {
        "top1": pytest.approx(np.mean(logits.argmax(axis=1) == labels)),
        "top5": pytest.approx(top_k_accuracy_score(labels, logits, k=5)),
        "macro_f1": pytest.approx(f1_score(labels, logits.argmax(axis=1), average="macro")),
    }
    assert all(type(value) is float for value in results.values())  # serializable as JSON


@pytest.mark.parametrize("classes", [2, 5, 6])
def test_top5_is_left_out_with_five_classes_or_fewer(classes):
    logits, labels = draw(20, classes)
    results = compute_metrics((logits, labels))
    assert set(results) == {"top1", "macro_f1"} | ({"top5"} if classes == 6 else set())
    table = summary_table([{"split": "test", "images": 20, "seconds": 1.0, **results}])
    assert ("top-5 %" in table) == (classes == 6)
    assert len({len(line) for line in table.split("\n")}) == 1


def test_summary_of_splits_with_different_metrics():
    rows = [
        {"split": "train", "images": 2_000, "seconds": 1.0},
        {"split": "test", "images": 20, "seconds": 2.0, "map": 0.5, "micro_f1": 0.25, "macro_f1": 1.0},
    ]
    lines = [line.split() for line in summary_table(rows).split("\n")]
    assert lines == [
        ["split", "images", "mAP", "%", "micro-F1", "%", "macro-F1", "%", "seconds"],
        ["train", "2,000", "-", "-", "-", "1.0"],
        ["test", "20", "50.00", "25.00", "100.00", "2.0"],
    ]
    assert summary_table(rows[:1]).split() == ["split", "images", "seconds", "train", "2,000", "1.0"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (([0.1, 0.2], [0, 1], 1), "`predictions`"),
        (([[0.1, 0.2]], [0, 1], 1), "`references`"),
        (([[0.1, 0.2]], [2], 1), "`references`"),
        (([[0.1, 0.2]], [-1], 1), "`references`"),
        ((np.zeros((0, 3)), [], 1), "`references`"),
        (([[0.1, 0.2]], [0], 0), "`k`"),
    ],
)
def test_invalid_input_raises(arguments, word):
    with pytest.raises(ValueError, match=word):
        top_k_accuracy(*arguments)


def test_macro_f1_of_lists_of_different_length_raises():
    with pytest.raises(ValueError, match="equal length"):
        macro_f1([0, 1], [0])
    with pytest.raises(ValueError, match="`references` must not be empty"):
        macro_f1([], [])
