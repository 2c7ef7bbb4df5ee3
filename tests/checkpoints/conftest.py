"""Fixtures shared by the tests of tests/checkpoints."""

from pathlib import Path

import pytest

from tests.checkpoints.original_checkpoints import EVIT_NAME, Golden, save


@pytest.fixture(scope="module")
def evit() -> Golden:
    return Golden("evit_clca")


@pytest.fixture
def evit_file(tmp_path: Path, evit: Golden) -> Path:
    return save(tmp_path / EVIT_NAME, evit.payload())
