"""`ufgir data-report`: all numbers against independent counts, and damaged data."""

import base64
import io
import itertools
import json
import re
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.data.raw_layouts import draw_raw, miniature
from ufgir.cli.entry import main
from ufgir.data import report as module
from ufgir.data.load import load_ufgir_dataset
from ufgir.data.prepare.parquet_folder import prepare
from ufgir.data.report import data_report, describe, findings
from ufgir.data.synthetic_leaves import synthetic_leaves, write_image_folder
from ufgir.transforms.images import to_rgb


CLASSES = ["a<b>", "b", "c", "d"]


pytestmark = pytest.mark.usefixtures("own_cache")


def encoded_image(rng, width, height, mode="RGB", kind="PNG"):
    stream = io.BytesIO()
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(stream, format=kind)
    return stream.getvalue()


def dataset_of(rows, names=CLASSES):
    """{split: [(bytes, label)]} -> DatasetDict; a list of labels makes multi-label data."""
    many = any(isinstance(label, list) for split in rows.values() for _, label in split)
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(label) if many else label})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": content, "path": f"{split}{i}.png"} for i, (content, _) in enumerate(of)],
                    "label": [label for _, label in of],
                },
                features=features,
            )
            for split, of in rows.items()
        }
    )


@pytest.fixture
def mixed():
    """Two splits of images of various sizes, formats and modes; class d has none in test."""
    rng = np.random.default_rng(0)
    kinds = [(5, 7, "RGB", "PNG"), (9, 4, "L", "PNG"), (6, 6, "RGB", "JPEG"), (31, 8, "RGBA", "PNG")]
    train = [(encoded_image(rng, *kinds[i % 4]), label) for i, label in enumerate([0, 0, 0, 0, 0, 1, 1, 2, 3])]
    test = [(encoded_image(rng, *kinds[i % 3]), label) for i, label in enumerate([0, 1, 2])]
    return {"train": train, "test": test}


def test_numbers_are_those_of_the_pixels(mixed):
    numbers = data_report(dataset_of(mixed), "mixed", num_workers=2).numbers
    assert numbers["dataset"] == "mixed" and numbers["images"] == 12 and numbers["classes"] == 4
    assert numbers["class_names"] == CLASSES
    every = []
    for split, rows in mixed.items():
        found = numbers["splits"][split]
        opened = [Image.open(io.BytesIO(content)) for content, _ in rows]
        pixels = np.concatenate([np.asarray(to_rgb(image), np.float64).reshape(-1, 3) for image in opened]) / 255
        every.append(pixels)
        np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-12)
        assert found["images"] == len(rows) and found["bytes"] == sum(len(content) for content, _ in rows)
        for axis, side in enumerate(("width", "height")):
            values = [image.size[axis] for image in opened]
            assert found[side] == {"min": min(values), "median": np.median(values), "max": max(values)}
        for name in ("mode", "format"):
            values = [getattr(image, name) for image in opened]
            assert found[f"{name}s"] == {value: values.count(value) for value in set(values)}
        counts = [sum(label == k for _, label in rows) for k in range(4)]
        per_class = found["images_per_class"]
        assert list(per_class["counts"].values()) == counts and list(per_class["counts"]) == CLASSES
        assert {key: per_class[key] for key in ("min", "median", "max")} == {
            "min": min(counts),
            "median": np.median(counts),
            "max": max(counts),
        }
        assert per_class["without_images"] == counts.count(0)
        assert found["broken"] == []
    pixels = np.concatenate(every)
    np.testing.assert_allclose(numbers["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(numbers["std"], pixels.std(0), rtol=1e-12)
    assert numbers["duplicates"] == numbers["leakage"] == []


@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 2], [0, 5, 10, 11], list(range(40)), [1, 1000]])
def test_histogram_counts_every_class_once(counts):
    bins = module._histogram(counts)
    assert len(bins) <= module.BINS and sum(b["classes"] for b in bins) == len(counts)
    assert bins[0]["from"] == min(counts) and bins[-1]["to"] == max(counts)
    for b in bins:
        assert b["classes"] == sum(b["from"] <= count <= b["to"] for count in counts)
    assert all(a["to"] + 1 == b["from"] for a, b in itertools.pairwise(bins))


def test_broken_images_are_reported_and_the_others_counted(mixed):
    rows = {split: list(of) for split, of in mixed.items()}
    rows["train"][1] = (b"not an image", 0)
    rows["train"][4] = (rows["train"][4][0][:-30], 0)
    rows["test"] = [(b"", label) for _, label in rows["test"]]  # no readable image in this split
    report = data_report(dataset_of(rows))
    train, test = report.numbers["splits"]["train"], report.numbers["splits"]["test"]
    assert [(entry["row"], entry["file"]) for entry in train["broken"]] == [(1, "train1.png"), (4, "train4.png")]
    assert train["broken"][0]["problem"].startswith("UnidentifiedImageError")
    assert train["broken"][1]["problem"].startswith("OSError")
    assert train["images"] == 9 and train["images_per_class"]["counts"]["a<b>"] == 5
    sound = [np.asarray(to_rgb(Image.open(io.BytesIO(c)))).reshape(-1, 3) for c, _ in rows["train"][:1]]
    sound += [
        np.asarray(to_rgb(Image.open(io.BytesIO(rows["train"][i][0])))).reshape(-1, 3) for i in (2, 3, 5, 6, 7, 8)
    ]
    np.testing.assert_allclose(train["mean"], np.concatenate(sound).mean(0) / 255, rtol=1e-12)
    assert [test[key] for key in ("mean", "std", "width", "height")] == [None] * 4 and len(test["broken"]) == 3
    assert "-" in describe(report.numbers)[3 + 1]
    assert findings(report.numbers)["broken images"][0].startswith("train1.png, train row 1: UnidentifiedImageError")


def test_nothing_but_broken_images(tmp_path):
    report = data_report(dataset_of({"train": [(b"", 0), (b"x", 1)]}))
    assert report.sheet is None and report.numbers["mean"] is None
    assert [file.name for file in report.write(tmp_path, page=True)] == ["report.json", "report.html"]


def test_missing_file_is_broken(tmp_path):
    rows = dataset_of({"train": [(encoded_image(np.random.default_rng(0), 4, 4), 0)]})["train"].to_list()
    rows[0]["image"] = {"bytes": None, "path": str(tmp_path / "gone.png")}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    split = datasets.Dataset.from_list(rows, features=features)
    [entry] = data_report({"train": split}).numbers["splits"]["train"]["broken"]
    assert entry["problem"].startswith("FileNotFoundError") and entry["file"].endswith("gone.png")


def test_copies_within_and_between_splits(mixed):
    rng = np.random.default_rng(1)
    shared = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    streams = []
    for kind in ("PNG", "BMP"):  # other bytes, same pixels
        streams.append(io.BytesIO())
        shared.save(streams[-1], format=kind)
    png, bmp = (stream.getvalue() for stream in streams)
    rows = {split: list(of) for split, of in mixed.items()}
    rows["train"].insert(0, (b"broken", 0))  # rows are counted with the broken ones
    rows["train"] += [(rows["train"][1][0], 3), (rows["train"][1][0], 0), (png, 2), (rows["train"][6][0], 1)]
    rows["test"] += [(bmp, 1), (b"broken", 0), (bmp, 1)]
    numbers = data_report(dataset_of(rows)).numbers

    def where(groups):
        return [
            ([(i["split"], i["row"], i["file"], i["class"]) for i in group["images"]], group["classes_differ"])
            for group in groups
        ]

    assert where(numbers["duplicates"]) == [
        (
            [
                ("train", 1, "train1.png", "a<b>"),
                ("train", 10, "train10.png", "d"),
                ("train", 11, "train11.png", "a<b>"),
            ],
            True,
        ),
        ([("train", 6, "train6.png", "b"), ("train", 13, "train13.png", "b")], False),
    ]
    assert where(numbers["leakage"]) == [
        (
            [("train", 12, "train12.png", "c"), ("test", 3, "test3.png", "b"), ("test", 5, "test5.png", "b")],
            True,
        )
    ]
    table = {row[0]: row[1:] for row in describe(numbers)}
    assert table["groups of duplicates"] == ["2", "0"] and table["groups shared with another split"] == ["1", "1"]
    assert table["broken images"] == ["1", "1"]
    [line] = findings(numbers)["leakage (same pixels in several splits)"]
    assert line.endswith("test5.png, test row 5 (b): classes differ")


def test_same_pixels_in_another_shape_are_not_duplicates():
    image = Image.new("RGB", (6, 4), (1, 2, 3))
    streams = [io.BytesIO(), io.BytesIO()]
    image.save(streams[0], format="PNG")
    image.resize((4, 6)).save(streams[1], format="PNG")
    assert data_report(dataset_of({"train": [(s.getvalue(), 0) for s in streams]})).numbers["duplicates"] == []


def test_zeros_at_the_end_of_checksums_count():
    values = np.frombuffer(b"\1" + bytes(15) + b"\1" + bytes(14) + b"\2" + b"\1" + bytes(15), dtype="V16")
    assert [group.tolist() for group in module._equal(values)] == [[0, 2]]


def test_several_classes_per_image(mixed):
    rows = {"train": [(mixed["train"][i][0], labels) for i, labels in enumerate([[0, 1], [1], [], [1, 3]])]}
    rows["train"].append((mixed["train"][0][0], [2]))
    report = data_report(dataset_of(rows))
    assert report.numbers["splits"]["train"]["images_per_class"]["counts"] == {"a<b>": 1, "b": 3, "c": 1, "d": 1}
    assert [i["class"] for i in report.numbers["duplicates"][0]["images"]] == ["a<b>, b", "c"]
    assert report.sheet is not None


def test_contact_sheet_shows_classes_spread_evenly():
    names = [f"{k:02d}" for k in range(10)]
    leaves = [Image.new("RGB", (200, 100), (20 * k, 0, 255 - 20 * k)) for k in range(10)]
    rows = []
    for k, leaf in enumerate(leaves):
        stream = io.BytesIO()
        leaf.save(stream, format="PNG")
        rows += [(stream.getvalue(), k)] * 3
    sheet = data_report(dataset_of({"train": rows, "test": rows}, names), sheet_classes=4, sheet_images=2).sheet
    colors = {color for _, color in sheet.getcolors(maxcolors=100_000)}
    assert {k for k in range(10) if (20 * k, 0, 255 - 20 * k) in colors} == {0, 3, 6, 9}
    side = module.SHEET_SIDE
    assert sheet.height == 4 * (side + 2)
    reds = np.asarray(sheet)[..., 0] == 0
    assert (reds & (np.asarray(sheet)[..., 2] == 255)).sum() == 2 * side * side // 2  # class 00, two images, 2 to 1
    assert sheet.width < data_report(dataset_of({"train": rows}, names), sheet_images=9).sheet.width < 5 * side
    one = data_report(dataset_of({"train": rows}, names), sheet_classes=1, sheet_images=1).sheet
    assert one.height == side + 2


def test_memory_does_not_grow_with_the_images(mixed, monkeypatch):
    held = []

    class Probe(module._Sums):
        def add(self, *arguments):
            super().add(*arguments)
            held.append(len(self.checksums) + self.histogram.nbytes)

    monkeypatch.setattr(module, "_Sums", Probe)
    data_report(dataset_of({"train": mixed["train"] * 30}))
    assert held[-1] - held[0] == 16 * (len(held) - 1)  # only the checksum is kept per image


@pytest.mark.parametrize("argument", ["num_workers", "sheet_classes", "sheet_images"])
def test_numbers_below_one_raise(argument, mixed):
    with pytest.raises(ValueError, match=f"`{argument}` must be at least 1, got 0"):
        data_report(dataset_of(mixed), **{argument: 0})


def test_no_split_raises():
    with pytest.raises(ValueError, match="`dataset` must have at least one split"):
        data_report({})


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_needs_no_other_file_and_escapes_names(mixed, tmp_path):
    mixed["train"].append((b"<script>alert(1)</script>", 0))
    report = data_report(dataset_of(mixed), "<b>leaves</b>")
    files = report.write(tmp_path / "new" / "folder", page=True)
    assert [file.name for file in files] == ["report.json", "contact_sheet.png", "report.html"]
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(f.name for f in files)
    assert json.loads(files[0].read_text(encoding="utf-8")) == report.numbers
    page = Page(files[2].read_text(encoding="utf-8"))
    assert page.open == [] and not {"script", "link", "b"} & {tag for tag, _ in page.tags}
    [source] = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    embedded = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(embedded)).tobytes() == Image.open(files[1]).tobytes() == report.sheet.tobytes()
    text = " ".join(page.text)
    assert "Data report: <b>leaves</b>" in text and "a<b>" in text and "Broken images: 1" in text
    assert "train9.png, train row 9: UnidentifiedImageError" in text


def test_long_lists_are_cut_on_the_page_not_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LISTED", 3)
    report = data_report(dataset_of({"train": [(b"", 0)] * 5}))
    report.write(tmp_path, page=True)
    page = (tmp_path / "report.html").read_text()
    assert page.count("UnidentifiedImageError") == 3 and "and 2 more, see report.json" in page
    assert (tmp_path / "report.json").read_text().count("UnidentifiedImageError") == 5


# All layouts of load_ufgir_dataset


def test_prepared_data(tmp_path):
    spec = miniature("soygene")
    draw_raw(tmp_path / "raw", spec)
    prepare(spec, tmp_path / "raw", tmp_path / "out")
    loaded = load_ufgir_dataset(tmp_path / "out", validation_fraction=0, verify=False, cache_dir=tmp_path / "cache")
    numbers = data_report(loaded).numbers
    assert {split: s["images"] for split, s in numbers["splits"].items()} == {"train": 12, "test": 9}
    assert numbers["splits"]["train"]["images_per_class"]["counts"] == {"GDC000": 3, "GDC001": 4, "GDC002": 5}
    assert numbers["splits"]["train"]["width"] == {"min": 16, "median": 16.0, "max": 16}
    assert numbers["duplicates"] == numbers["leakage"] == [] and numbers["splits"]["train"]["formats"] == {"PNG": 12}


def test_drawn_leaves(tmp_path):
    loaded = synthetic_leaves(2, (3, 1, 2), image_size=16, cache_dir=tmp_path)
    numbers = data_report(loaded, "synthetic_leaves").numbers
    assert [s["images"] for s in numbers["splits"].values()] == [6, 2, 4]
    assert numbers["duplicates"] == numbers["leakage"] == []


def test_command(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "leaves", num_classes=2, images_per_class=(5, 0, 2), image_size=16)
    (folder / "train" / "cultivar_00" / "00001.png").write_bytes(b"not an image")
    copy = (folder / "test" / "cultivar_01" / "00000.png").read_bytes()
    (folder / "train" / "cultivar_01" / "00002.png").write_bytes(copy)
    assert main(["data-report", str(folder)]) == 0  # broken images are reported without an error
    text = capsys.readouterr().out
    assert f"{folder}: 14 images of 2 classes" in text and "validation" not in text and "wrote" not in text
    assert "train row 1: " in text and "leakage (same pixels in several splits): 1" in text
    assert re.search(r"train: images per class\nimages +classes\n5 +2  #{40}\n", text)
    assert re.search(r"images per class: min / median / max +5 / 5 / 5 +2 / 2 / 2\n", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leaves"]

    output = tmp_path / "report"
    arguments = ["--output", str(output), "--html", "--validation-fraction", "0.2", "--sheet-images", "2"]
    assert main(["data-report", str(folder), *arguments]) == 0
    assert capsys.readouterr().out.count("wrote ") == 3
    numbers = json.loads((output / "report.json").read_text())
    assert {split: s["images"] for split, s in numbers["splits"].items()} == {"train": 8, "validation": 2, "test": 4}
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet.png", "report.html", "report.json"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere/at/all"], "does not exist"),
        (["synthetic_leaves", "--html"], "`--html` requires `--output`"),
        (["synthetic_leaves", "--htlm"], "unrecognized arguments: --htlm"),
        ([], "required: DATASET"),
    ],
)
def test_errors_of_the_command_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["data-report", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
