"""Oldest supported version of transformers. It is checked when this file is imported, before all others of this
folder.
"""

import re

import transformers


OLDEST_TRANSFORMERS = "5.10"


def check_transformers(version: str) -> None:
    """Check that a version of transformers is recent enough.

    Args:
        version: as in `transformers.__version__`.

    Raises:
        ImportError: if it is older than `OLDEST_TRANSFORMERS`.
    """
    found, oldest = (
        tuple(int(part) for part in re.findall(r"\d+", text)[:2]) for text in (version, OLDEST_TRANSFORMERS)
    )
    if found < oldest:
        raise ImportError(
            f"CLCA models need transformers {OLDEST_TRANSFORMERS} or newer, but {version} is installed. "
            f'Upgrade it: pip install --upgrade "transformers>={OLDEST_TRANSFORMERS},<6"'
        )


check_transformers(transformers.__version__)
