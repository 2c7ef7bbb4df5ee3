"""Report the contents of a data set: counts, sizes, colors, duplicates, leakage and broken images, in one pass over the images.

Memory is bounded: pixel statistics are accumulated, and only 16 bytes per image are kept, the checksum of its pixels.
"""

import base64
import hashlib
import html
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..transforms.images import to_rgb
from ..utils.files import whole_file, write_text_atomically
from .checks import file_of, problem_of
from .labels import class_feature
from .synthetic_leaves import contact_sheet


BATCH = 32  # images in memory at the same time
SHEET_SIDE = 96  # pixels
BINS = 10
LISTED = 200  # maximum number of entries per list on the page; the JSON file has all


@dataclass(frozen=True)
class _ImageInfo:
    """A decoded image and its properties."""

    problem: str | None
    num_bytes: int = 0
    size: tuple[int, int] = (0, 0)  # width, height
    mode: str = ""
    format: str = ""
    histogram: np.ndarray | None = None  # (3, 256) number of pixels per value
    checksum: bytes = b""
    thumbnail: Image.Image | None = None


def _inspect(image: Any, thumbnail: bool) -> _ImageInfo:
    if file_of(image) is None and (not isinstance(image, dict) or image["bytes"] is None):
        return _ImageInfo(problem_of(image))
    try:
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            mode, format_name = opened.mode, opened.format or "unknown"
            rgb = to_rgb(opened)
    except Exception as error:  # Pillow's decoders raise nearly everything for a broken file
        return _ImageInfo(f"{type(error).__name__}: {error}")
    checksum = hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()
    histogram = np.array(rgb.histogram(), dtype=np.int64).reshape(3, 256)
    size = rgb.size
    if thumbnail:
        rgb.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return _ImageInfo(None, len(content), size, mode, format_name, histogram, checksum, rgb if thumbnail else None)


@dataclass
class _Sums:
    """Statistics of a split, accumulated image by image."""

    images: int = 0
    sound: int = 0
    num_bytes: int = 0
    per_class: Counter = field(default_factory=Counter)
    widths: Counter = field(default_factory=Counter)
    heights: Counter = field(default_factory=Counter)
    modes: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    broken: list[dict[str, Any]] = field(default_factory=list)
    checksums: bytearray = field(default_factory=bytearray)

    def add(self, row: int, file: str | None, labels: Sequence[int], info: _ImageInfo) -> None:
        self.images += 1
        self.per_class.update(labels)
        if info.problem is not None:
            self.broken.append({"row": row, "file": file, "problem": info.problem})
            return
        self.sound += 1
        self.num_bytes += info.num_bytes
        self.widths[info.size[0]] += 1
        self.heights[info.size[1]] += 1
        self.modes[info.mode] += 1
        self.formats[info.format] += 1
        self.histogram += info.histogram
        self.checksums += info.checksum


@dataclass(frozen=True)
class DataReport:
    """All numbers, ready for JSON, and the contact sheet (None if no image can be read)."""

    numbers: dict[str, Any]
    sheet: Image.Image | None

    def write(self, folder: str | os.PathLike, page: bool = False) -> list[Path]:
        """Write `report.json`, `contact_sheet.png` and, with `page`, the page `report.html`, each atomically."""
        folder = Path(folder)
        text = json.dumps(self.numbers, indent=1, ensure_ascii=False)
        written = [write_text_atomically(folder / "report.json", text + "\n")]
        if self.sheet is not None:
            file = folder / "contact_sheet.png"
            with whole_file(file) as temporary:
                self.sheet.save(temporary, format="PNG")
            written.append(file)
        if page:
            written.append(write_text_atomically(folder / "report.html", html_page(self)))
        return written


def _labels(label: Any) -> list[int]:
    """Return the classes of an image: one, or several for multi-label data."""
    return [label] if isinstance(label, int) else list(label)


def data_report(
    dataset: Mapping[str, datasets.Dataset],
    name: str = "",
    num_workers: int | None = None,
    sheet_classes: int = 24,
    sheet_images: int = 8,
) -> DataReport:
    """Read every image once and report counts, statistics, duplicates, leakage and broken images.

    Args:
        dataset: splits with the columns `image` and `label`, from `ufgir.data.load_ufgir_dataset(..., verify=False)`.
        name: name of the data, for the title.
        num_workers: number of decoding threads; by default the number of cores, at most 8.
        sheet_classes: rows of the contact sheet, evenly spaced over the classes.
        sheet_images: images per row, the first ones of the first split.

    Returns:
        Per split: images per class, widths and heights (pixels), bytes, modes, formats, mean and standard deviation over all
        pixels (RGB, 0 to 1), broken images. Over all splits: images with the same pixels within a split (duplicates) and in
        several splits (leakage), with their classes.

    Raises:
        ValueError: if a number is below 1, or there is no split.
    """
    for argument, value in {
        "num_workers": num_workers,
        "sheet_classes": sheet_classes,
        "sheet_images": sheet_images,
    }.items():
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    if not dataset:
        raise ValueError("`dataset` must have at least one split, got none.")
    first = next(iter(dataset))
    class_names = list(class_feature(dataset[first].features["label"]).names)
    shown = np.linspace(0, len(class_names) - 1, min(len(class_names), sheet_classes)).round().astype(int).tolist()
    sheet_rows = {label: row for row, label in enumerate(dict.fromkeys(shown))}
    wanted = Counter(dict.fromkeys(sheet_rows, sheet_images))
    thumbnails: list[tuple[int, Image.Image]] = []
    raw = {
        split: rows.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))
        for split, rows in dataset.items()
    }
    sums = {split: _Sums() for split in dataset}
    with (
        ThreadPoolExecutor(num_workers or min(8, os.cpu_count() or 1)) as pool,
        tqdm(total=sum(map(len, raw.values())), desc="Reading images", unit="image") as bar,
    ):
        for split, rows in raw.items():
            row = 0
            for batch in rows.iter(batch_size=BATCH):
                labels = [_labels(label) for label in batch["label"]]
                takers = [next((k for k in ks if wanted[k] > 0), None) if split == first else None for ks in labels]
                infos = pool.map(_inspect, batch["image"], [taker is not None for taker in takers])
                for image, ks, taker, info in zip(batch["image"], labels, takers, infos, strict=True):
                    sums[split].add(row, file_of(image), ks, info)
                    if info.thumbnail is not None and wanted[taker] > 0:
                        wanted[taker] -= 1
                        thumbnails.append((sheet_rows[taker], info.thumbnail))
                    row += 1
                    bar.update()

    numbers = {
        "dataset": name,
        "images": sum(s.images for s in sums.values()),
        "classes": len(class_names),
        "class_names": class_names,
        "splits": {split: _split_numbers(s, class_names) for split, s in sums.items()},
    }
    numbers |= _mean_std(sum(s.histogram for s in sums.values()))
    numbers |= _copies(raw, sums, class_names)
    return DataReport(numbers, _sheet(thumbnails, [class_names[k] for k in sheet_rows]))


def _sheet(thumbnails: Sequence[tuple[int, Image.Image]], names: Sequence[str]) -> Image.Image | None:
    if not thumbnails:
        return None
    longest = max(Counter(row for row, _ in thumbnails).values())
    columns = {"image": [image for _, image in thumbnails], "label": [row for row, _ in thumbnails]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    return contact_sheet(datasets.Dataset.from_dict(columns, features=features), columns=longest)


def _mean_std(histogram: np.ndarray) -> dict[str, Any]:
    """Compute the exact mean and standard deviation from (3, 256) pixel counts, with integer sums."""
    values = np.arange(256, dtype=np.int64)
    pixels = int(histogram[0].sum())
    if not pixels:
        return {"mean": None, "std": None}
    sums = [int(channel @ values) for channel in histogram]
    squares = [int(channel @ values**2) for channel in histogram]
    variances = [(pixels * q - s * s) / pixels**2 for s, q in zip(sums, squares, strict=True)]
    return {"mean": [s / pixels / 255 for s in sums], "std": [v**0.5 / 255 for v in variances]}


def _spread(counts: Counter) -> dict[str, float] | None:
    """Compute the minimum, median and maximum from counts of values."""
    if not counts:
        return None
    values, times = map(np.array, zip(*sorted(counts.items()), strict=True))
    ends, total = np.cumsum(times), int(np.sum(times))
    middle = [values[np.searchsorted(ends, rank, side="right")] for rank in ((total - 1) // 2, total // 2)]
    return {"min": int(values[0]), "median": float(sum(middle)) / 2, "max": int(values[-1])}


def _histogram(counts: Sequence[int]) -> list[dict[str, int]]:
    """Count classes by their number of images, in at most BINS equal steps."""
    low, high = min(counts), max(counts)
    step = -(-(high - low + 1) // BINS)
    starts = range(low, high + 1, step)
    return [
        {"from": a, "to": min(a + step - 1, high), "classes": sum(a <= c < a + step for c in counts)} for a in starts
    ]


def _split_numbers(sums: _Sums, class_names: Sequence[str]) -> dict[str, Any]:
    counts = [sums.per_class[label] for label in range(len(class_names))]
    return {
        "images": sums.images,
        "images_per_class": {
            **_spread(Counter(counts)),
            "without_images": counts.count(0),
            "counts": dict(zip(class_names, counts, strict=True)),
            "histogram": _histogram(counts),
        },
        "width": _spread(sums.widths),
        "height": _spread(sums.heights),
        "bytes": sums.num_bytes,
        "modes": dict(sums.modes.most_common()),
        "formats": dict(sums.formats.most_common()),
        **_mean_std(sums.histogram),
        "broken": sums.broken,
    }


def _copies(
    raw: Mapping[str, datasets.Dataset], sums: Mapping[str, _Sums], class_names: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Find groups of images with the same pixels, within a split and across splits."""
    rows: list[tuple[str, np.ndarray]] = []
    for split, s in sums.items():
        broken = {entry["row"] for entry in s.broken}
        rows.append((split, np.array([row for row in range(s.images) if row not in broken], dtype=np.int64)))
    checksums = np.frombuffer(b"".join(bytes(s.checksums) for s in sums.values()), dtype="V16")
    ends = np.cumsum([len(indices) for _, indices in rows])
    found: dict[str, list[dict[str, Any]]] = {"duplicates": [], "leakage": []}
    for members in _equal(checksums):
        images = []
        for member in members:
            part = int(np.searchsorted(ends, member, side="right"))
            split, indices = rows[part]
            row = int(indices[member - (ends[part] - len(indices))])
            entry = raw[split][row]
            names = [class_names[label] for label in _labels(entry["label"])]
            images.append({"split": split, "row": row, "file": file_of(entry["image"]), "class": ", ".join(names)})
        group = {"images": images, "classes_differ": len({image["class"] for image in images}) > 1}
        found["leakage" if len({image["split"] for image in images}) > 1 else "duplicates"].append(group)
    return found


def _equal(values: np.ndarray) -> Iterator[np.ndarray]:
    """Return the indices of each value that occurs more than once, in the order of first occurrence."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    groups = [order[start : start + count] for start, count in zip(starts, counts, strict=True) if count > 1]
    return iter(sorted(groups, key=lambda members: members[0]))


# The page


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; }
.bar { background: #3a7d44; height: .9rem; display: inline-block; } .bad { color: #a31515; }
"""


def describe(numbers: Mapping[str, Any]) -> list[list[str]]:
    """Return a table with one row per property and one column per split."""
    splits = numbers["splits"].values()

    def spread(values: Mapping[str, float] | None) -> str:
        return "-" if values is None else f"{values['min']} / {values['median']:g} / {values['max']}"

    def color_values(values: Sequence[float] | None) -> str:
        return "-" if values is None else " ".join(f"{v:.4f}" for v in values)

    within = Counter(group["images"][0]["split"] for group in numbers["duplicates"])
    across = Counter(split for group in numbers["leakage"] for split in {i["split"] for i in group["images"]})
    return [
        ["", *numbers["splits"]],
        ["images", *(str(s["images"]) for s in splits)],
        ["images per class: min / median / max", *(spread(s["images_per_class"]) for s in splits)],
        ["classes without images", *(str(s["images_per_class"]["without_images"]) for s in splits)],
        ["width in px: min / median / max", *(spread(s["width"]) for s in splits)],
        ["height in px: min / median / max", *(spread(s["height"]) for s in splits)],
        ["MB", *(f"{s['bytes'] / 1e6:.1f}" for s in splits)],
        ["formats", *(", ".join(f"{k} {n}" for k, n in s["formats"].items()) or "-" for s in splits)],
        ["modes", *(", ".join(f"{k} {n}" for k, n in s["modes"].items()) or "-" for s in splits)],
        ["mean of R, G, B (0 to 1)", *(color_values(s["mean"]) for s in splits)],
        ["std of R, G, B", *(color_values(s["std"]) for s in splits)],
        ["broken images", *(str(len(s["broken"])) for s in splits)],
        ["groups of duplicates", *(str(within[split]) for split in numbers["splits"])],
        ["groups shared with another split", *(str(across[split]) for split in numbers["splits"])],
    ]


def bin_name(step: Mapping[str, int]) -> str:
    """Return the label of a bin: "3" or "3 to 5"."""
    return str(step["from"]) if step["from"] == step["to"] else f"{step['from']} to {step['to']}"


def findings(numbers: Mapping[str, Any]) -> dict[str, list[str]]:
    """List broken images, duplicates and leakage, one per line."""

    def label(split: str, image: Mapping[str, Any]) -> str:
        place = f"{split} row {image['row']}"
        return f"{image['file']}, {place}" if image["file"] else place

    def group(entry: Mapping[str, Any]) -> str:
        images = (f"{label(i['split'], i)} ({i['class']})" for i in entry["images"])
        return " = ".join(images) + (": classes differ" if entry["classes_differ"] else "")

    broken = [
        f"{label(split, entry)}: {entry['problem']}" for split, s in numbers["splits"].items() for entry in s["broken"]
    ]
    return {
        "broken images": broken,
        "duplicates (same pixels within a split)": [group(entry) for entry in numbers["duplicates"]],
        "leakage (same pixels in several splits)": [group(entry) for entry in numbers["leakage"]],
    }


def html_page(report: DataReport) -> str:
    """Return the report as a single self-contained HTML page."""
    numbers = report.numbers
    title = html.escape(f"Data report: {numbers['dataset']}")
    head, *rows = ([html.escape(cell) for cell in row] for row in describe(numbers))
    table = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    parts = [
        f"<h1>{title}</h1><p>{numbers['images']} images of {numbers['classes']} classes.</p>",
        f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{table}</table>",
    ]
    for heading, lines in findings(numbers).items():
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines[:LISTED])
        more = f"<li>and {len(lines) - LISTED} more, see report.json</li>" if len(lines) > LISTED else ""
        css = ' class="bad"' if lines else ""
        parts.append(f"<h2{css}>{heading[0].upper()}{heading[1:]}: {len(lines)}</h2><ul>{items}{more}</ul>")
    for split, s in numbers["splits"].items():
        bins = s["images_per_class"]["histogram"]
        most = max(b["classes"] for b in bins)
        bars = "".join(
            f"<tr><td>{bin_name(b)}</td><td>{b['classes']}</td>"
            f'<td style="text-align: left"><span class="bar" style="width: {20 * b["classes"] / most:.2f}rem"></span></td></tr>'
            for b in bins
        )
        counts = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{n}</td></tr>" for k, n in s["images_per_class"]["counts"].items()
        )
        parts.append(
            f"<h2>{split}: images per class</h2><table><tr><th>images</th><th>classes</th><th></th></tr>{bars}</table>"
            f"<details><summary>all classes</summary><table>{counts}</table></details>"
        )
    if report.sheet is not None:
        stream = io.BytesIO()
        report.sheet.save(stream, format="PNG")
        encoded = base64.b64encode(stream.getvalue()).decode()
        parts.append(f'<h2>Contact sheet</h2><img alt="images of some classes" src="data:image/png;base64,{encoded}">')
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
