"""Fixtures of several files of tests/data."""

import pytest

from tests.data.raw_layouts import draw_raw, miniature


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
