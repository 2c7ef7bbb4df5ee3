"""Miniatures of the raw downloads of Ultra-FGVC, drawn with synthetic_leaves. No two images are equal."""

import io
from dataclasses import replace
from functools import cache
from pathlib import Path

from ufgir.data.catalog import SETS, UltraFGVCSet
from ufgir.data.prepare.raw_layouts import FileNames
from ufgir.data.synthetic_leaves import SyntheticLeavesConfig


CLASSES = 3
LEAVES = SyntheticLeavesConfig(num_classes=CLASSES, image_size=16)


@cache
def leaf(split: str, label: int, index: int) -> bytes:
    """Return the PNG bytes of one leaf."""
    stream = io.BytesIO()
    LEAVES.draw(split, label, index).save(stream, format="PNG")
    return stream.getvalue()


def miniature(name: str) -> UltraFGVCSet:
    """Return the published set of this name, reduced to three classes with a few images."""
    spec = SETS[name]
    if isinstance(spec.layout, FileNames):
        return replace(spec, classes=CLASSES, train=9, test=9)
    if name == "soygene":  # 3, 4 and 5 images of a class for train, 3 for test
        return replace(spec, classes=CLASSES, train=12, test=9, train_per_class=(3, 5), test_per_class=(3, 3))
    images = 2 * len(spec.layout.parts)
    span = (images, images)
    return replace(
        spec, classes=CLASSES, train=CLASSES * images, test=CLASSES * images, train_per_class=span, test_per_class=span
    )


def draw_raw(source: Path, spec: UltraFGVCSet) -> Path:
    """Write the raw layout of `spec` to the folder `source` and return the root of the layout."""
    if isinstance(spec.layout, FileNames):
        root = source / spec.layout.folder
        root.mkdir(parents=True)
        for label in range(spec.classes):
            for index in range(3):
                (root / f"{label + 1}_{index + 1}_train.png").write_bytes(leaf("train", label, index))
                (root / f"{label + 1}_{index + 4}_test.png").write_bytes(leaf("test", label, index))
        return root
    for number, part in enumerate(spec.layout.parts):
        (source / part / "images").mkdir(parents=True)
        (source / part / "anno").mkdir()
        for split in ("train", "test"):
            lines = []
            for label in range(spec.classes):
                images = 2 if part else 3 + label * (split == "train")
                for index in range(images):
                    name = f"GDC00{label}-1-00{index}_{label + 1}_{split}.png"
                    if part:
                        name = f"yd0{label}_{part}_{index + 1}_{split}.png"
                    (source / part / "images" / name).write_bytes(leaf(split, label, 2 * number + index))
                    lines.append(f"{name} {label + 1}\n")
            (source / part / "anno" / f"{split}.txt").write_text("".join(lines))
    return source
