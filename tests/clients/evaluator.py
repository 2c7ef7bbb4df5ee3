"""evaluate.evaluator on a pipeline of ours, with a metric that needs no download."""

from pathlib import Path
from typing import Any

import datasets
import evaluate
from PIL import Image
from transformers import pipeline

from tests.clients.common import NAMES, main, save


class Accuracy(evaluate.Metric):
    """Share of correct predictions."""

    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        features = datasets.Features({"predictions": whole, "references": whole})
        return evaluate.MetricInfo(description="accuracy", citation="", features=features)

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, Any]:
        right = sum(a == b for a, b in zip(predictions, references, strict=True))
        return {"accuracy": right / len(references)}


def check(folder: Path) -> str:
    save(folder)
    values = {"image": [Image.effect_noise((40, 50), 90 + n).convert("RGB") for n in range(6)], "label": [0, 1, 2] * 2}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    found = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=pipeline("image-classification", str(folder), trust_remote_code=True),
        data=datasets.Dataset.from_dict(values, features=features),
        metric=Accuracy(cache_dir=str(folder / "cache")),
        label_mapping={name: index for index, name in NAMES.items()},
    )
    return f"accuracy {found['accuracy']:.2f} on six images"


if __name__ == "__main__":
    main(check)
