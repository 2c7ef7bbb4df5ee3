"""Fixtures shared by the tests of tests/training."""

from pathlib import Path

import pytest

from tests.training.resuming import train


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Run a training without interruption, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, save_total_limit=None)
    return folder
