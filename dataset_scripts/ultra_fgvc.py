"""Turn a raw download of Ultra-FGVC into checked parquet files: what `ufgir prepare` does, as a script.

python -m dataset_scripts.ultra_fgvc cotton --source downloads/cotton --output data/cotton
"""

import sys

from ufgir.cli import main
from ufgir.data.catalog import *  # noqa: F403  their names of release 0.1.0 were here
from ufgir.data.prepare.ultra_fgvc import *  # noqa: F403


if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
