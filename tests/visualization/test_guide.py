"""The guide to a picture of one's own."""

import re
from pathlib import Path

from ufgir.visualization.kinds import KINDS


DOCS = Path(__file__).parents[2] / "docs"


def test_code_of_the_guide_to_pictures(monkeypatch):
    """Its Python blocks run, and leave no picture behind."""
    kinds = dict(KINDS)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "adding-a-picture.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    try:
        exec("\n".join(blocks), {})
        assert set(KINDS) - set(kinds) == {"norms"}
    finally:
        KINDS.clear()
        KINDS.update(kinds)
