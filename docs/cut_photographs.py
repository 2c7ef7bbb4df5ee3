"""Cut the photographs of docs/data/photographs.csv into square images, for the comparison of methods off the shelf.

    python docs/cut_photographs.py FOLDER outputs/photographs

FOLDER holds the unpacked packages that the table names; docs/data/README.md says how to get them. Photographs of at least 1000 pixels
become two images that do not overlap, smaller ones become one.
"""

import csv
import sys
from pathlib import Path

from PIL import Image


LIST = Path(__file__).parent / "data" / "photographs.csv"
LARGE = 1000  # pixels of the shorter side
SIDE = 256  # pixels of the images, at most


def squares(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Return boxes (left, top, right, bottom): both ends of a large photograph, or the center of a small one."""
    side = min(width, height)
    if side < LARGE:
        left, top = (width - side) // 2, (height - side) // 2
        return [(left, top, left + side, top + side)]
    side = min(side, max(width, height) // 2)
    return [(0, 0, side, side), (width - side, height - side, width, height)]


def main(source: Path, output: Path) -> None:
    """Write the images."""
    output.mkdir(parents=True)
    with LIST.open(encoding="utf-8") as table:
        files = [source / row["file"] for row in csv.DictReader(table)]
    for number, file in enumerate(files):
        with Image.open(file) as photograph:
            image = photograph.convert("RGB")
        for part, box in enumerate(squares(*image.size)):
            cut = image.crop(box)
            cut.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
            cut.save(output / f"{number:02d}_{part}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
