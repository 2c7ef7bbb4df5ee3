"""Fixtures shared by the tests of tests/evaluation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clca import CLCAViTForImageClassification
from tests.evaluation.helpers import make_model


@pytest.fixture(scope="module")
def model() -> CLCAViTForImageClassification:
    return make_model()


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> Path:
    """13 noisy images in folders."""
    root = tmp_path_factory.mktemp("leaves")
    for i in range(13):
        folder = root / ("a", "b/c")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"leaf{i}.png")
    return root
