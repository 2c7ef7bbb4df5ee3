"""Pipelines of transformers for both tasks, with more images in a batch than the model has layers."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from tests.clients.common import NAMES, logits_of, main, save


def check(folder: Path) -> str:
    model = save(folder)
    pictures = [Image.effect_noise((40, 50), 90 + n).convert("RGB") for n in range(40)]
    values = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(
        pictures, return_tensors="pt"
    ).pixel_values
    best = logits_of(model, values).softmax(-1).max(-1)
    found = pipeline("image-classification", str(folder), trust_remote_code=True)(pictures, batch_size=40, top_k=1)
    assert [answer["label"] for (answer,) in found] == [NAMES[int(index)] for index in best.indices]
    scores = torch.tensor([answer["score"] for (answer,) in found])
    assert (scores - best.values).abs().max() <= 1e-5
    features = pipeline("image-feature-extraction", str(folder), trust_remote_code=True)(pictures, batch_size=40)
    with torch.no_grad():
        expected = model.vit(values).last_hidden_state
    assert (torch.tensor(features).squeeze(1) - expected).abs().max() <= 1e-4
    return "image-classification and image-feature-extraction, 40 images in a batch"


if __name__ == "__main__":
    main(check)
