"""Convert a raw download of Ultra-FGVC to checked parquet files; the same as `ufgir prepare`.

python -m dataset_scripts.ultra_fgvc cotton --source downloads/cotton --output data/cotton
"""

import sys

from ufgir.cli import main
from ufgir.data.catalog import *  # noqa: F403  re-exported for release 0.1.0
from ufgir.data.prepare.ultra_fgvc import *  # noqa: F403


if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
