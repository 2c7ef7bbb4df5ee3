"""Images to train on, and one training that many tests look at."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.script.helpers import CLASSES, recipe, run


@pytest.fixture(scope="session")
def leaves(tmp_path_factory) -> Path:
    """Three classes of noisy colours: 6 images a class to train on, 3 to validate, 2 to test."""
    root, generator = tmp_path_factory.mktemp("leaves"), np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3), ("test", 2)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (20, 24, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{name}{i}.png")
    return root


@pytest.fixture
def own_leaves(leaves, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(leaves, tmp_path / "own leaves")


@pytest.fixture(scope="session")
def trained(leaves, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, metrics) of one run with training, evaluation and prediction."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, run(recipe(out.parent, leaves, out, do_predict=True))
