"""Images for training, and a trained model shared by many tests."""

import shutil
from pathlib import Path

import pytest

from tests.script.helpers import draw_leaves, recipe, run


@pytest.fixture(scope="session")
def leaves(tmp_path_factory) -> Path:
    return draw_leaves(tmp_path_factory.mktemp("leaves"))


@pytest.fixture
def own_leaves(leaves, tmp_path) -> Path:
    """Copy the data, so that a test may change it."""
    return shutil.copytree(leaves, tmp_path / "own leaves")


@pytest.fixture(scope="session")
def trained(leaves, tmp_path_factory) -> tuple[Path, dict]:
    """Return (folder, metrics) of a run with training, evaluation and prediction."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, run(recipe(out.parent, leaves, out, do_predict=True))
