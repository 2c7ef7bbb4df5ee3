"""Fixtures shared by the tests of tests/app."""

import pytest
from PIL import Image

from tests.app.helpers import save_checkpoint
from ufgir.app.viewer import (
    Viewer,
    make_leaf,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("evit"))


@pytest.fixture(scope="module")
def viewer():
    return Viewer()


@pytest.fixture(scope="module")
def leaf():
    return make_leaf(Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 40))
