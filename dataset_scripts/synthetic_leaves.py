"""Draw synthetic leaves, see `ufgir.data.synthetic_leaves`.

python -m dataset_scripts.synthetic_leaves --output leaves --num_classes 10 --image_size 112
python -m dataset_scripts.synthetic_leaves --contact_sheet leaves.png --num_classes 6 --columns 8
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ufgir.data.synthetic_leaves import *  # noqa: F403  re-exported for release 0.1.0
from ufgir.data.synthetic_leaves import DIFFICULTIES, contact_sheet, write_image_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Write an image folder, a contact sheet, or both."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_scripts.synthetic_leaves", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, help="write split/class/*.png into this new folder")
    parser.add_argument(
        "--contact_sheet", type=Path, metavar="FILE.png", help="write one figure with images of all classes"
    )
    parser.add_argument("--num_classes", type=int, default=10, help="number of cultivars [%(default)s]")
    parser.add_argument(
        "--images_per_class",
        type=int,
        nargs=3,
        default=(80, 20, 20),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="images per class [80 20 20]",
    )
    parser.add_argument("--image_size", type=int, default=112, help="side of an image in pixels [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    parser.add_argument("--difficulty", default="easy", help=f"{', '.join(DIFFICULTIES)} [%(default)s]")
    parser.add_argument("--rows", type=int, help="number of classes on the contact sheet [all]")
    parser.add_argument("--columns", type=int, default=8, help="images per class on the contact sheet [%(default)s]")
    options = parser.parse_args(argv)
    if options.output is None and options.contact_sheet is None:
        parser.error("--output, --contact_sheet or both are required")
    shared = {name: getattr(options, name) for name in ("num_classes", "image_size", "seed", "difficulty")}
    try:
        if options.contact_sheet is not None:
            # 256 colors: a third of the size, and sufficient for viewing
            sheet = contact_sheet(rows=options.rows, columns=options.columns, **shared).quantize(256)
            scratch = options.contact_sheet.with_name(f".{options.contact_sheet.name}.{os.getpid()}")
            try:
                sheet.save(scratch, format="PNG", optimize=True)
                os.replace(scratch, options.contact_sheet)
            finally:
                scratch.unlink(missing_ok=True)
            sys.stdout.write(f"{options.contact_sheet}\n")
        if options.output is not None:
            folder = write_image_folder(options.output, images_per_class=options.images_per_class, **shared)
            sys.stdout.write(f"{folder}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
