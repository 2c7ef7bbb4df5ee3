"""Fixtures of several files of tests/data."""

import pytest

from tests.data.raw_layouts import draw_raw, miniature
from ufgir.data import synthetic_leaves as leaves


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    """Nothing that another run has left is taken for what is to be made."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture
def raw(tmp_path):
    """A function: set -> its miniature, the folder that was downloaded, and the root of the layout in it."""

    def draw(name):
        spec = miniature(name)
        return spec, tmp_path / "raw", draw_raw(tmp_path / "raw", spec)

    return draw


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return leaves.synthetic_leaves(3, (5, 2, 2), image_size=32, cache_dir=tmp_path_factory.mktemp("cache"))
