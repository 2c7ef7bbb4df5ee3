"""Helpers to read prepared miniatures of the raw sets."""

import hashlib

import datasets

from ufgir.data.prepare import parquet_folder, ultra_fgvc
from ufgir.data.prepare.raw_layouts import FileNames


LAYOUTS = (
    "cotton",
    "soylocal",
    "soyglobal",
    "soygene",
    "soyageing",
    "soyageing_r4",
)  # other sets differ only in the name of a folder
LISTS = ("soygene", "soyageing", "soyageing_r4")


def files(folder):
    """Return every file below `folder` with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows_of(folder):
    """Return {split: [(path, label, SHA-256 of the bytes)]} as read by `datasets`."""
    loaded = datasets.load_dataset(str(folder)).cast_column("image", datasets.Image(decode=False))
    return {
        split: [
            (row["image"]["path"], row["label"], hashlib.sha256(row["image"]["bytes"]).hexdigest()) for row in rows
        ]
        for split, rows in loaded.items()
    }


def listed(spec, root):
    """Return the expected `rows_of` for a valid source, read from the raw folder independently of the code."""
    expected = {"train": [], "test": []}
    if isinstance(spec.layout, FileNames):
        names = sorted(file.name for file in root.iterdir())
        lines = [(name.split("_")[2].split(".")[0], name, int(name.split("_")[0])) for name in names]
    else:
        lines = []
        for part in spec.layout.parts:
            for split in ("train", "test"):
                for line in (root / part / "anno" / f"{split}.txt").read_text().splitlines():
                    name, number = line.split()
                    lines.append((split, f"{part}/images/{name}".lstrip("/"), int(number)))
    for split, name, number in lines:
        expected[split].append((name, number - 1, hashlib.sha256((root / name).read_bytes()).hexdigest()))
    return expected


class Counting:
    """`inspect_file` that counts its calls."""

    def __init__(self, monkeypatch):
        self.files = []
        self.original = ultra_fgvc.inspect_file
        monkeypatch.setattr(parquet_folder, "inspect_file", self)

    def __call__(self, file):
        self.files.append(file.name)
        return self.original(file)
