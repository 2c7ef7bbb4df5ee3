"""Fixtures shared by the tests of tests/data."""

import pytest

from tests.data.raw_layouts import draw_raw, miniature
from ufgir.data import synthetic_leaves as leaves


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Isolate each test from the files of other runs."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def raw(tmp_path):
    """Return a function: set name -> its miniature, the download folder, and the root of the layout in it."""

    def draw(name):
        spec = miniature(name)
        return spec, tmp_path / "raw", draw_raw(tmp_path / "raw", spec)

    return draw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (5, 2, 2), image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))
