"""Faults in data sets: each must be reported before training, or the data must be loaded correctly.

A data set of small images, each of which encodes its number and its class in its color, is written in one of the
layouts, corrupted in one of the ways below, and loaded. The loaded images are then compared with the encoded numbers
and classes. A try is lost if there is a traceback, an error or warning that does not name the corrupted item, an image
with the class of another or in two splits, an image that is missing without a message, or if loading takes too long or
too much memory.
"""

import contextlib
import csv
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet
from PIL import Image

from tests.faults.results import Result
from ufgir.data import load_images, load_ufgir_dataset


CLASSES = ("Airén", "Merlot", "Syrah")
SPLITS = {"train": 4, "val": 2, "test": 2}  # images of each class
SECONDS = 30  # that loading may take
MEMORY = 400_000  # kB by which memory may grow

LISTINGS = ("csv", "jsonl", "parquet listing", "metadata")
FOLDERS = ("folders", "class folders", "prediction")
TABLES = ("parquet", "saved")
LAYOUTS = (*LISTINGS, *FOLDERS, *TABLES)


class Data:
    """A data set in one of `LAYOUTS`.

    Attributes:
        root: its folder.
        layout: its layout.
        rows: split -> rows with `file` (relative to `base`), `label` and `image` (the cell, for `parquet` and
            `saved`).
        base: the folder that files are relative to.
        delimiter: delimiter of CSV files.
        arguments: arguments of `load_ufgir_dataset`.
    """

    def __init__(self, root: Path, layout: str) -> None:
        self.root, self.layout, self.delimiter = root, layout, ","
        self.arguments: dict[str, Any] = {}
        self.base = root / "images" if layout in ("csv", "jsonl", "parquet listing") else root
        self.rows: dict[str, list[dict[str, Any]]] = {}
        number = 0
        for split, count in SPLITS.items():
            self.rows[split] = []
            for index, name in enumerate(CLASSES):
                for _ in range(count):
                    file = self._place(split, name, number)
                    self.paint(self.base / file, number, index)
                    self.rows[split].append({"file": file, "label": self._label(index)})
                    number += 1
        self.number = number
        self.write()

    def _place(self, split: str, name: str, number: int) -> str:
        if self.layout in ("folders", "prediction"):
            return f"{split}/{name}/{number}.png"
        if self.layout == "class folders":
            return f"{name}/{number}.png"
        return f"{split}/{number}.png"

    def _label(self, index: int) -> int | str:
        return index if self.layout in ("csv", "parquet listing", *TABLES) else CLASSES[index]

    @staticmethod
    def paint(file: Path, number: int, index: int) -> None:
        """Save the image that encodes a number and a class."""
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 50 * index, 7)).save(file)

    @property
    def images(self) -> list[Path]:
        """All image files."""
        return [self.base / row["file"] for rows in self.rows.values() for row in rows]

    def choose(self, generator: random.Random, split: str | None = None) -> dict[str, Any]:
        """Return a random row."""
        return generator.choice(self.rows[split or generator.choice(list(self.rows))])

    def table(self, split: str) -> Path:
        """Return the file that lists the images of a split."""
        suffix = {"csv": ".csv", "jsonl": ".jsonl", "parquet listing": ".parquet", "parquet": ".parquet"}
        return self.root / ("metadata.csv" if self.layout == "metadata" else f"{split}{suffix[self.layout]}")

    def write(self) -> None:
        """Write the tables again."""
        if self.layout == "metadata":
            self._write_csv(self.table(""), ["file_name", "label"], [r for rows in self.rows.values() for r in rows])
        for split, rows in self.rows.items():
            if self.layout == "csv":
                self._write_csv(self.table(split), ["dir", "class_id"], rows)
            elif self.layout == "jsonl":
                lines = [json.dumps({"file_name": row["file"], "label": row["label"]}) for row in rows]
                self.table(split).write_text("\n".join(lines) + "\n", encoding="utf-8")
            elif self.layout == "parquet listing":
                columns = {"file_name": [row["file"] for row in rows], "label": [row["label"] for row in rows]}
                pyarrow.parquet.write_table(pyarrow.table(columns), self.table(split))
        if self.layout in TABLES:
            self._write_tables()

    def _write_csv(self, file: Path, header: list[str], rows: list[dict[str, Any]]) -> None:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, delimiter=self.delimiter)
            writer.writerows([header, *([row["file"], row["label"]] for row in rows)])

    def _write_tables(self) -> None:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
        made = {}
        for split, rows in self.rows.items():
            cells = [self._cell(row) for row in rows]
            table = pyarrow.table(
                {
                    "image": pyarrow.array(cells, features.arrow_schema.field("image").type),
                    "label": pyarrow.array([row["label"] for row in rows], pyarrow.int64()),
                },
                schema=features.arrow_schema,
            )
            if self.layout == "parquet":
                pyarrow.parquet.write_table(table, self.table(split))
            else:
                made[split] = datasets.Dataset(table)
        if made:
            for name in ("train", "val", "test"):
                shutil.rmtree(self.root / "saved" / name, ignore_errors=True)
            datasets.DatasetDict(made).save_to_disk(self.root / "saved")

    def _cell(self, row: dict[str, Any]) -> Any:
        if "image" in row:
            return row["image"]
        return {"bytes": (self.base / row["file"]).read_bytes(), "path": row["file"]}

    def load(self) -> Iterator[tuple[str, Image.Image, str | None]]:
        """Yield (split, image, class) of all loaded images."""
        if self.layout == "prediction":
            for row in load_images(self.root):
                yield "images", row["image"], None
            return
        place = self.root / "saved" if self.layout == "saved" else self.root
        fraction = 0.25 if self.layout == "class folders" else 0
        cache = self.root.with_name("cache")
        loaded = load_ufgir_dataset(place, cache_dir=cache, validation_fraction=fraction, **self.arguments)
        for split, rows in loaded.items():
            names = rows.features["label"].names
            for row in rows:
                yield split, row["image"], names[row["label"]]


class Expect(NamedTuple):
    """The expected result of a fault.

    Attributes:
        named: an error or a warning must contain one of these words.
        right: loading everything correctly without a message is also accepted.
        missing: numbers of images that may be missing if a warning names the corrupted item.
    """

    named: tuple[str, ...]
    right: bool = False
    missing: tuple[int, ...] = ()


Corrupt = Callable[[Data, random.Random], Expect]


class Fault(NamedTuple):
    """A way to corrupt data.

    Attributes:
        kind: its row of the table.
        name: name of the function.
        layouts: layouts it applies to.
        corrupt: the function.
    """

    kind: str
    name: str
    layouts: tuple[str, ...]
    corrupt: Corrupt


FAULTS: list[Fault] = []


def fault(kind: str, *layouts: str) -> Callable[[Corrupt], Corrupt]:
    """Add the decorated function to `FAULTS`."""

    def add(corrupt: Corrupt) -> Corrupt:
        FAULTS.append(Fault(kind, corrupt.__name__, layouts, corrupt))
        return corrupt

    return add


# Files that are missing, or not images

UNREADABLE = "files that are missing or cannot be read"
WITH_FILES = (*LISTINGS, *FOLDERS)


def _name(row: dict[str, Any]) -> str:
    return Path(row["file"]).name


@fault(UNREADABLE, *LISTINGS)
def deleted(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    (data.base / row["file"]).unlink()
    return Expect((row["file"],))


@fault(UNREADABLE, *WITH_FILES)
def dangling_link(data: Data, generator: random.Random) -> Expect:
    file = data.base / data.choose(generator)["file"]
    file.unlink()
    file.symlink_to(generator.choice(["gone.png", "/nowhere/gone.png", file.name]))
    return Expect((file.name,))


@fault(UNREADABLE, *WITH_FILES)
def cut_off(data: Data, generator: random.Random) -> Expect:
    file = data.base / data.choose(generator)["file"]
    content = file.read_bytes()
    file.write_bytes(content[: generator.randrange(len(content) - 24)])  # the rest is a checksum and the end marker
    return Expect((file.name,))


@fault(UNREADABLE, *WITH_FILES)
def a_byte_changed(data: Data, generator: random.Random) -> Expect:
    file = data.base / data.choose(generator)["file"]
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content) - 12)] ^= 1 << generator.randrange(8)
    file.write_bytes(content)
    return Expect((file.name,), right=True)  # Pillow does not check every byte


@fault(UNREADABLE, *WITH_FILES)
def text_as_image(data: Data, generator: random.Random) -> Expect:
    file = data.base / data.choose(generator)["file"]
    file.write_text(generator.choice(["", "<html>404</html>", "version https://git-lfs.github.com/spec/v1"]))
    return Expect((file.name,))


@fault(UNREADABLE, *LISTINGS)
def a_folder_as_image(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    (data.base / row["file"]).unlink()
    (data.base / row["file"]).mkdir()
    return Expect((row["file"],))


@fault(UNREADABLE, *WITH_FILES)
def a_pipe_as_image(data: Data, generator: random.Random) -> Expect:
    file = data.base / data.choose(generator)["file"]
    file.unlink()
    os.mkfifo(file)
    return Expect((file.name,))


@fault(UNREADABLE, *LISTINGS)
def names_that_cannot_be(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    row["file"] = generator.choice(
        ["x" * 300 + ".png", "C:\\leaves\\1.png", "http://leaves.org/1.png", "~/1.png", "/"]
    )
    data.write()
    return Expect((row["file"],))


@fault(UNREADABLE, *TABLES)
def an_image_that_is_null(data: Data, generator: random.Random) -> Expect:
    split = generator.choice(list(SPLITS))
    row = data.choose(generator, split)
    # `save_to_disk` reads files itself and rejects cells with neither
    row["image"] = generator.choice([None, {"bytes": None, "path": None}]) if data.layout == "parquet" else None
    data.write()
    return Expect(("null", "neither bytes nor a file"))


@fault(UNREADABLE, *TABLES)
def bytes_that_are_no_image(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    content = data._cell(row)["bytes"]
    row["image"] = {"bytes": generator.choice([b"", content[:30], b"GIF"]), "path": row["file"]}
    data.write()
    return Expect((_name(row),))  # `save_to_disk` does not keep folders


@fault(UNREADABLE, "parquet")
def a_path_instead_of_bytes(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    row["image"] = {"bytes": None, "path": "/nowhere/gone.png"}
    data.write()
    return Expect(("/nowhere/gone.png",))


# One file in two places

DUPLICATES = "a file listed twice"


def _other_names(data: Data, row: dict[str, Any], generator: random.Random) -> str:
    """Return another path to the file of a row, relative to the same folder."""
    file, way = row["file"], generator.randrange(6)
    if way < 4:
        folder, name = os.path.split(file)
        return [file, f"./{file}", f"{folder}/../{file}", str(data.base / folder / name)][way]
    other = f"{Path(file).parent}/again.png"
    if way == 4:
        (data.base / other).symlink_to((data.base / file).absolute())
    else:
        os.link(data.base / file, data.base / other)
    return other


def _list_again(data: Data, generator: random.Random, first: str, second: str, other_label: bool = False) -> Expect:
    """List a row of the split `first` in `second`, under another path to its file, and with another label if requested."""
    row = data.choose(generator, first)
    labels = [r["label"] for r in data.rows[first] if (r["label"] != row["label"]) == other_label]
    data.rows[second].append({"file": _other_names(data, row, generator), "label": labels[0]})
    generator.shuffle(data.rows[second])
    data.write()
    return Expect((row["file"], "again.png"))


@fault(DUPLICATES, "csv", "jsonl", "parquet listing")
def in_two_splits(data: Data, generator: random.Random) -> Expect:
    return _list_again(data, generator, *generator.sample(list(SPLITS), 2))


@fault(DUPLICATES, *LISTINGS)
def with_two_labels(data: Data, generator: random.Random) -> Expect:
    split = generator.choice(list(SPLITS))
    return _list_again(data, generator, split, split, other_label=True)


@fault(DUPLICATES, *LISTINGS)
def with_the_same_label(data: Data, generator: random.Random) -> Expect:
    split = generator.choice(list(SPLITS))
    return _list_again(data, generator, split, split)


@fault(DUPLICATES, "folders", "class folders")
def linked_into_another_folder(data: Data, generator: random.Random) -> Expect:
    one, other = generator.sample(data.images, 2)
    while one.parent == other.parent:
        one, other = generator.sample(data.images, 2)
    target = other.with_name(f"again{one.name}")
    os.link(one, target) if generator.random() < 0.5 else target.symlink_to(one.absolute())
    return Expect((one.name,))


# Labels

LABELS = "labels"


def _set_labels(data: Data, label: Callable[[Any], Any]) -> None:
    for rows in data.rows.values():
        for row in rows:
            row["label"] = label(row["label"])
    data.write()


@fault(LABELS, "csv")
def zeros_in_front(data: Data, generator: random.Random) -> Expect:
    width = generator.randrange(2, 5)
    _set_labels(data, lambda label: f"{label:0{width}d}")
    return Expect((), right=True)


@fault(LABELS, "csv")
def zeros_in_front_of_some(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator, "train")
    row["label"] = f"0{row['label']}"
    data.write()
    return Expect((row["label"], "0"))


@fault(LABELS, "csv", "parquet listing")
def fractions_of_zero(data: Data, generator: random.Random) -> Expect:
    _set_labels(data, float)
    return Expect((), right=True)


@fault(LABELS, "csv", "jsonl", "parquet listing")
def an_enormous_id(data: Data, generator: random.Random) -> Expect:
    _set_labels(data, lambda label: CLASSES.index(label) if isinstance(label, str) else label)
    values = [10_000_000, 2**31, 2**32, 2**62]
    values += [] if data.layout == "parquet listing" else [2**63, 10**30]
    row = data.choose(generator)
    row["label"] = generator.choice(values)
    data.write()
    return Expect((str(row["label"]),))


@fault(LABELS, "csv", "jsonl")
def thousands_of_digits(data: Data, generator: random.Random) -> Expect:
    split = generator.choice(list(SPLITS))
    row = data.choose(generator, split)
    row["label"] = "DIGITS"
    data.write()
    file = data.table(split)
    file.write_text(file.read_text(encoding="utf-8").replace('"DIGITS"', "DIGITS").replace("DIGITS", "9" * 5000))
    return Expect((file.name,))


@fault(LABELS, "csv", "jsonl", "parquet listing", *TABLES)
def negative_or_absent(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    value = generator.choice([-1, None]) if data.layout != "csv" else generator.choice([-1, ""])
    if data.layout == "jsonl":
        value = None
    row["label"] = value
    data.write()
    return Expect((str(value) if value else "label", "class_id", "without a class"))


@fault(LABELS, "csv", "parquet listing")
def a_gap(data: Data, generator: random.Random) -> Expect:
    step = generator.randrange(2, 5)
    _set_labels(data, lambda label: label * step)
    return Expect(("without a gap",))


@fault(LABELS, "jsonl")
def mixed_types(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator)
    row["label"] = generator.choice([0, 1.5, True, ["Merlot"], [], {}, "", [[]], float("nan"), "\udcff"])
    data.write()
    return Expect(("`label` in row",))


@fault(LABELS, "jsonl", "metadata", "folders")
def unicode_forms(data: Data, generator: random.Random) -> Expect:
    """One class is spelled in two Unicode forms."""
    split = generator.choice(list(SPLITS))
    written = unicodedata.normalize("NFD", CLASSES[0])
    if data.layout == "folders":
        (data.root / split / CLASSES[0]).rename(data.root / split / written)
    else:
        for row in data.rows[split]:
            row["label"] = unicodedata.normalize("NFD", row["label"])
        data.write()
    return Expect(("Unicode form",))


@fault(LABELS, "jsonl", "metadata", "csv")
def a_class_that_train_lacks(data: Data, generator: random.Random) -> Expect:
    row = data.choose(generator, generator.choice(["val", "test"]))
    row["label"] = 3 if data.layout == "csv" else "Riesling"
    data.write()
    return Expect((str(row["label"]),))


@fault(LABELS, "parquet", "saved")
def a_number_of_classes_without_names(data: Data, generator: random.Random) -> Expect:
    number = generator.choice([10**8, 10**9, 2**40])
    if data.layout == "saved":
        file = data.root / "saved" / generator.choice(list(SPLITS)) / "dataset_info.json"
        about = json.loads(file.read_text())
        about["features"]["label"] = {"num_classes": number, "_type": "ClassLabel"}
        file.write_text(json.dumps(about))
    else:
        file = data.table(generator.choice(list(SPLITS)))
        table = pyarrow.parquet.read_table(file)
        about = json.loads(table.schema.metadata[b"huggingface"])
        about["info"]["features"]["label"] = {"num_classes": number, "_type": "ClassLabel"}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
        pyarrow.parquet.write_table(table, file)
    return Expect((str(file),))


# Tables

TEXT = "tables that list images"


@fault(TEXT, "csv", "metadata")
def other_delimiters(data: Data, generator: random.Random) -> Expect:
    data.delimiter = generator.choice([";", "\t"])
    data.write()
    return Expect((), right=True)


@fault(TEXT, *LISTINGS)
def backslashes(data: Data, generator: random.Random) -> Expect:
    for rows in data.rows.values():
        for row in rows:
            row["file"] = row["file"].replace("/", "\\")
    data.write()
    return Expect((), right=True)


@fault(TEXT, "csv", "metadata")
def cells_too_many_or_few(data: Data, generator: random.Random) -> Expect:
    file = data.table(generator.choice(list(SPLITS)))
    lines = file.read_text(encoding="utf-8").splitlines()
    number = generator.randrange(1, len(lines))
    lines[number] = generator.choice(
        [lines[number] + ",more", lines[number].split(",")[0], ",", "a, b.png," + "x" * 9]
    )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Expect((f"row {number + 1}",))


@fault(TEXT, "csv", "metadata")
def headers(data: Data, generator: random.Random) -> Expect:
    file = data.table(generator.choice(list(SPLITS)))
    header, rest = file.read_text(encoding="utf-8").split("\n", 1)
    first, second = header.strip().split(",")
    new = generator.choice(["", f"{first},{first}", f"{first},kind", "scan,kind", f"{first},{second},{second}", None])
    file.write_text(rest if new is None else f"{new}\n{rest}", encoding="utf-8")
    return Expect((file.name,))


@fault(TEXT, "csv", "jsonl", "metadata")
def encodings(data: Data, generator: random.Random) -> Expect:
    file = data.table(generator.choice(list(SPLITS)))
    text = file.read_text(encoding="utf-8")
    kind = generator.choice(["utf-8-sig", "crlf", "utf-16", "nul", "latin"])
    if kind in ("utf-8-sig", "utf-16"):
        file.write_bytes(text.encode(kind))
    elif kind == "crlf":
        file.write_bytes(text.replace("\n", "\r\n").encode())
    else:
        file.write_bytes(text.encode() + (b"a\0b.png,0\n" if kind == "nul" else "é.png,0\n".encode("latin-1")))
    return Expect((file.name,), right=kind in ("utf-8-sig", "crlf"))


@fault(TEXT, "jsonl")
def lines_that_are_no_objects(data: Data, generator: random.Random) -> Expect:
    file = data.table(generator.choice(list(SPLITS)))
    lines = file.read_text().splitlines()
    number = generator.randrange(len(lines))
    lines[number] = generator.choice(["[1]", "null", "{", "[" * 100_000, '"x"', "{}", '{"label": 0}', "NaN"])
    file.write_text("\n".join(lines))
    return Expect((file.name,))


@fault(TEXT, "csv", "jsonl", "parquet listing")
def empty_or_a_folder(data: Data, generator: random.Random) -> Expect:
    file = data.table("train")
    file.unlink()
    if data.layout != "parquet listing" and generator.random() < 0.5:
        file.mkdir()
    else:
        file.write_bytes(b"")
    return Expect((file.name,))


@fault(TEXT, "folders", "class folders")
def under_another_name(data: Data, generator: random.Random) -> Expect:
    """Class folders next to a table with other classes."""
    name = generator.choice(["labels.csv", "annotations.tsv", "Train.csv", "list.txt", "all.jsonl", "index.parquet"])
    rows = [(str(image.relative_to(data.root)), generator.choice("xy")) for image in data.images]
    delimiter = "\t" if name.endswith((".tsv", ".txt")) else ","
    file = data.root / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join(json.dumps({"file": f, "label": k}) for f, k in rows))
    elif name.endswith(".parquet"):
        file.write_text("no parquet")
    else:
        file.write_text("\n".join(delimiter.join(row) for row in [("file", "label"), *rows]))
    return Expect((name,))


@fault(TEXT, *LAYOUTS)
def other_text_beside(data: Data, generator: random.Random) -> Expect:
    """Unused files are named and have no effect."""
    if data.layout in TABLES or data.layout == "prediction":
        (data.root / "README.md").write_text("leaves")
        return Expect((), right=True)
    name = generator.choice(["notes.txt", "sizes.csv", "sheet.xlsx", "coco.json"])
    (data.root / name).write_text("width,height\n3,4\n")
    return Expect((name,))


BINARY = "parquet files and save_to_disk folders"


@fault(BINARY, "parquet", "saved", "parquet listing")
def cut_short(data: Data, generator: random.Random) -> Expect:
    folder = data.root / "saved" if data.layout == "saved" else data.root
    files = sorted(file for file in folder.rglob("*") if file.suffix in (".parquet", ".arrow", ".json"))
    file = generator.choice(files)
    content = file.read_bytes()
    file.write_bytes(content[: generator.randrange(len(content) * 9 // 10)])
    return Expect((file.name, file.parent.name), right=file.name == "state.json")


@fault(BINARY, "saved")
def a_file_missing(data: Data, generator: random.Random) -> Expect:
    files = sorted(file for file in (data.root / "saved").rglob("*") if file.is_file())
    file = generator.choice(files)
    file.unlink()
    return Expect((str(data.root),))


@fault(BINARY, "saved")
def json_of_another_shape(data: Data, generator: random.Random) -> Expect:
    file = generator.choice(sorted((data.root / "saved").rglob("*.json")))
    file.write_text(generator.choice(["[]", "null", "{}", "1", "[" * 100_000]))
    return Expect((str(data.root),), right=True)


@fault(BINARY, "parquet")
def other_columns(data: Data, generator: random.Random) -> Expect:
    file = data.table(generator.choice(list(SPLITS)))
    table = pyarrow.parquet.read_table(file)
    column = generator.choice(["image", "label"])
    if generator.random() < 0.5:
        table = table.drop_columns([column])
    else:
        table = table.set_column(0 if column == "image" else 1, column, pyarrow.array([1.5] * len(table)))
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), file)
    return Expect((column, file.name))


# Other files in folders

OTHER_FILES = "other files in folders"


@fault(OTHER_FILES, *FOLDERS)
def left_by_systems(data: Data, generator: random.Random) -> Expect:
    image = generator.choice(data.images)
    for name in generator.sample(
        ["__MACOSX/Merlot/._1.png", ".DS_Store", "@eaDir/1.png", ".git/1.png", "Thumbs.db"], 3
    ):
        file = generator.choice([data.root, image.parent]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"left behind")
    return Expect((), right=True)


@fault(OTHER_FILES, *FOLDERS)
def names_of_another_encoding(data: Data, generator: random.Random) -> Expect:
    image = generator.choice(data.images)
    os.rename(image, os.path.join(os.fsencode(image.parent), b"leaf\xe9.png"))
    return Expect(("leaf\\xe9.png",))


@fault(OTHER_FILES, "folders", "class folders", "prediction")
def photos_that_pillow_does_not_open(data: Data, generator: random.Random) -> Expect:
    image = generator.choice(data.images)
    image.rename(image.with_suffix(generator.choice([".NEF", ".cr2", ".ARW", ".dng"])))
    return Expect((image.stem,), missing=(int(image.stem),))


@fault(OTHER_FILES, *FOLDERS)
def images_by_content(data: Data, generator: random.Random) -> Expect:
    """Pillow detects the format by content, not by the file name."""
    for image in generator.sample(data.images, 3):
        image.rename(image.with_suffix(generator.choice(["", ".img", ".mpo", ".scan", ".PNG"])))
    return Expect((), right=True)


@fault(OTHER_FILES, *FOLDERS)
def links_to_folders(data: Data, generator: random.Random) -> Expect:
    """Replace a class folder by a link, which is followed, or add a link to a parent folder, which is reported."""
    folder = generator.choice(data.images).parent
    if generator.random() < 0.5:
        (folder / "circle").symlink_to(folder.absolute())
        return Expect(("circle",))
    elsewhere = data.root.with_name("elsewhere") / folder.name
    elsewhere.parent.mkdir()
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)
    return Expect((), right=True)


@fault(OTHER_FILES, "folders")
def folders_of_other_names(data: Data, generator: random.Random) -> Expect:
    way, split = generator.randrange(4), generator.choice(["val", "test"])
    if way == 0:
        (data.root / split).rename(data.root / "holdout")
        return Expect(("holdout",))
    if way == 1:
        (data.root / "train" / "Empty").mkdir()
        return Expect(("Empty",))
    if way == 2:
        shutil.move(data.root / "train" / "Merlot", data.root / "Merlot")
        return Expect(("Merlot",))
    image = data.images[generator.randrange(12)]
    shutil.move(image, data.root / "train" / image.name)
    return Expect((image.name,), missing=(int(image.stem),))


# The tries


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.text += record.getMessage() + "\n"


@contextlib.contextmanager
def _captured_log() -> Iterator[_Log]:
    """Capture warnings, hide progress bars, and raise TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    log, loggers = _Log(), [logging.getLogger(name) for name in ("ufgir", "datasets")]
    states = [(each, each.propagate) for each in loggers]
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        for each in loggers:
            each.addHandler(log)
            each.propagate = False
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield log
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        for each, propagate in states:
            each.removeHandler(log)
            each.propagate = propagate


def _problem(found: list[tuple[str, tuple[int, ...], str | None]], expect: Expect, total: int) -> str:
    """Compare the loaded images with the numbers and classes in their colors; return the problem, or an empty string."""
    seen: dict[int, str] = {}
    for split, (number, shade, _), name in found:
        if number in seen:
            return f"image {number} is in both {seen[number]} and {split}"
        seen[number] = split
        if name is not None:
            expected = CLASSES[round(shade / 50)]
            loaded_name = unicodedata.normalize("NFC", name)
            if loaded_name != expected and not (
                loaded_name.isdecimal() and int(loaded_name) == CLASSES.index(expected)
            ):
                return f"image {number} of {expected} has the class {name}"
    if missing := set(range(total)) - set(seen) - set(expect.missing):
        return f"images {sorted(missing)} are missing"
    return ""


def attempt(fault: Fault, layout: str, seed: int) -> tuple[bool, str]:
    """Corrupt a data set and load it.

    Returns:
        whether the result is as expected, and which: `named`, `right`, or the problem.
    """
    generator = random.Random(f"{fault.name} {layout} {seed}")
    with tempfile.TemporaryDirectory() as folder, _captured_log() as log:
        root = Path(folder) / "leaves"
        root.mkdir()
        data = Data(root, layout)
        expect = fault.corrupt(data, generator)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            found = [(split, image.convert("RGB").getpixel((0, 0)), name) for split, image, name in data.load()]
        except ValueError as error:
            text = str(error)
            if type(error).__name__ not in ("DatasetError", "ValueError") or "Traceback" in text:
                return False, f"{type(error).__name__}: {text[:200]}"
            if not any(word in text + log.text for word in expect.named):
                return False, f"the error contains none of {expect.named}: {text[:200]}"
            outcome = "named"
        except Exception as error:
            return False, f"{type(error).__name__}: {str(error)[:200]}"
        else:
            if problem := _problem(found, expect, data.number):
                return False, problem
            named = any(word in log.text for word in expect.named)
            if not expect.right and not named:
                return False, f"loaded without a message that contains {expect.named}"
            outcome = "named" if named else "right"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return (grown < MEMORY, outcome if grown < MEMORY else f"{grown / 1000:.0f} MB more memory")


CASES = [(each, layout) for each in FAULTS for layout in each.layouts]


def run(minutes: float, tries: int, seed: int) -> list[Result]:
    """Corrupt data at random, in every way in turn, and count the results.

    Args:
        minutes: no try starts after this time.
        tries: maximum number of tries.
        seed: seed of the corruption and of the order.

    Returns:
        one result per kind of fault.
    """
    datasets.disable_progress_bars()
    until = time.monotonic() + 60 * minutes
    counts: dict[str, list[int]] = {each.kind: [0, 0, 0] for each in FAULTS}
    notes: dict[str, list[str]] = {each.kind: [] for each in FAULTS}
    order = random.Random(seed).sample(CASES, len(CASES))
    for number in range(tries):
        if time.monotonic() > until:
            break
        each, layout = order[number % len(order)]
        own = seed + number // len(order)
        kept, how = attempt(each, layout, own)
        count = counts[each.kind]
        count[0] += 1
        count[1] += kept
        count[2] += how == "named"
        if not kept:
            notes[each.kind].append(f"{each.name}, {layout}, seed {own}: {how}")
    return [
        Result(kind, n, kept, n - kept, "; ".join([f"{named} named, {kept - named} loaded right", *notes[kind]]))
        for kind, (n, kept, named) in counts.items()
        if n
    ]
