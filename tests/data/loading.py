"""Checks of loaded data."""

import datasets


def check(loaded, sizes, names):
    assert {name: len(split) for name, split in loaded.items()} == sizes
    for split in loaded.values():
        assert split.column_names == ["image", "label"]
        assert split.features["image"] == datasets.Image()
        assert split.features["label"] == datasets.ClassLabel(names=names)
        assert split[0]["image"].mode == "RGB"
