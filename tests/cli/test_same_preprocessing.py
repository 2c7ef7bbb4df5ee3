"""The image processor, a pipeline and `ufgir predict` give the same pixels for every kind of image."""

import csv

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from tests.clca.test_image_processing import kinds_of_images
from tests.helpers import tiny_model
from ufgir.cli import entry as cli
from ufgir.transforms.preprocessing import make_image_processor


CLASSES = {i: f"cultivar_{i}" for i in range(3)}


def test_ten_leaves_get_one_answer(tmp_path):
    torch.manual_seed(0)
    model = tiny_model(reduction="evit", keep_rate=0.5, id2label=CLASSES).float()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)  # so that other pixels get another answer
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    (tmp_path / "leaves").mkdir()
    files = kinds_of_images(tmp_path / "leaves")

    table = tmp_path / "predictions.csv"
    args = ["predict", folder, tmp_path / "leaves", "--output", table, "--top", 3, "--device", "cpu"]
    assert cli.main([str(arg) for arg in args]) == 0
    with table.open() as stream:
        rows = {row["file"]: row for row in csv.DictReader(stream)}
    predicted = {name: probabilities(rows[str(file)]) for name, file in files.items()}

    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    classify = pipeline("image-classification", model=str(folder), trust_remote_code=True)
    assert type(classify.image_processor).__name__ == "CLCAImageProcessor"
    for name, file in files.items():
        with torch.no_grad(), Image.open(file) as image:
            logits = model(**processor(image, return_tensors="pt")).logits[0]
        by_hand = dict(zip(CLASSES.values(), logits.softmax(-1).tolist(), strict=True))
        opened = classify(processor.open_image(file), top_k=5)
        assert by_hand == pytest.approx(predicted[name], abs=2e-6), name
        assert {one["label"]: one["score"] for one in opened} == pytest.approx(predicted[name], abs=2e-6), name

    # A pipeline opens files itself. It turns them, but has no alpha channel and no 16 bits left for an image processor.
    itself = {
        name: {one["label"]: one["score"] for one in classify(str(file), top_k=5)} for name, file in files.items()
    }
    same = {name for name in files if itself[name] == pytest.approx(predicted[name], abs=2e-6)}
    assert same == {*files} - {
        "transparent.png",
        "grey_transparent.png",
        "turned_transparent.png",
        "deep.png",
        "deep.tif",
    }


def probabilities(row: dict[str, str]) -> dict[str, float]:
    return {row[f"class_{i}"]: float(row[f"probability_{i}"]) for i in range(1, 4)}
