"""Linear probes: they fit what is linearly separable, and the model that is written has the new classes."""

import json

import numpy as np
import pytest
import torch

from clca import CLCAViTForImageClassification
from tests.analysis.helpers import PROCESSOR, picture
from tests.helpers import tiny_config
from ufgir.analysis.probe import fit_probe
from ufgir.checkpoints.classifiers import set_classifier
from ufgir.checkpoints.loading import load
from ufgir.cli.entry import main


def separable(num_classes: int, per_class: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 5) around a center of each class, of very different scales, and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_classes), per_class)
    features = 8 * rng.normal(size=(num_classes, 5))[labels] + rng.normal(size=(len(labels), 5))
    return (features * [1e-3, 1, 1, 1e3, 1] + 7).astype(np.float32), labels


@pytest.mark.parametrize("num_classes", [2, 4])
def test_separable_classes_are_told_apart(num_classes):
    features, labels = separable(num_classes, 4)
    probe = fit_probe(features, labels, num_classes)
    assert probe.weight.shape == (num_classes, 5) and probe.bias.shape == (num_classes,)
    assert ((features @ probe.weight.T + probe.bias).argmax(axis=1) == labels).all()
    assert probe.accuracy > 0.7


def test_a_single_image_per_class_suffices():
    probe = fit_probe(*separable(3, 1), 3)
    assert probe.accuracy is None and np.isfinite(probe.weight).all()


def test_a_class_without_images_is_refused():
    features, labels = separable(3, 2)
    with pytest.raises(ValueError, match="`labels` must contain every class; 2 have no image, the first is 3"):
        fit_probe(features, labels, 5)
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        fit_probe(features[:2], labels[:2], 1)


def test_set_classifier_gives_other_classes():
    model = CLCAViTForImageClassification(tiny_config()).eval()
    weight, bias = np.random.default_rng(0).normal(size=(4, 16)), np.arange(4.0)
    set_classifier(model, weight, bias, ["a", "b", "c", "d"])
    pixels = torch.randn(2, 3, 32, 32)
    expected = model.vit(pixels).pooler_output @ torch.tensor(weight, dtype=torch.float32).T + torch.arange(4.0)
    assert torch.allclose(model(pixels).logits, expected, atol=1e-5)
    assert model.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3} and model.num_labels == 4
    with pytest.raises(ValueError, match=r"`weight` and `bias` must have the shapes \(3, 16\)"):
        set_classifier(model, weight, bias, ["a", "b", "c"])
    aggregating = CLCAViTForImageClassification(tiny_config(reduction="evit", keep_rate=0.5, head="cla"))
    with pytest.raises(ValueError, match="`head` must be linear"):
        set_classifier(aggregating, weight, bias, ["a", "b", "c", "d"])


def test_probe_command(tmp_path, capsys):
    """The head of the checkpoint is replaced; the rest of the model is unchanged."""
    torch.manual_seed(0)
    source = CLCAViTForImageClassification(tiny_config(reduction="evit", keep_rate=0.5, head="cla"))
    source.save_pretrained(tmp_path / "source")
    PROCESSOR.save_pretrained(tmp_path / "source")
    for i in range(12):
        place = tmp_path / "leaves" / "train" / ("oak", "ash", "elm")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i}.png")
    argv = [
        "probe",
        str(tmp_path / "source"),
        "--dataset",
        str(tmp_path / "leaves"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    assert "12 images, 3 classes, cross-validated accuracy" in capsys.readouterr().out
    model = load(tmp_path / "out")
    assert model.config.id2label == {0: "ash", 1: "elm", 2: "oak"} and model.config.head == "linear"
    theirs = source.vit.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.vit.state_dict().items())
    record = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert record["data"]["images"] == 12 and record["strength"] > 0
    with pytest.raises(SystemExit):
        main([*argv, "--split", "test"])
    assert "has no test images" in capsys.readouterr().err
