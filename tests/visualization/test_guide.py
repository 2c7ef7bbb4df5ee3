"""The code of the guides to a new figure and a new head runs."""

import re
from pathlib import Path

import pytest

from clca.heads_clca import HEADS
from ufgir.visualization.kinds import KINDS


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("guide", "table", "names", "count"),
    [("adding-a-picture.md", KINDS, {"norms"}, 2), ("adding-a-head.md", HEADS, {"max", "mlp"}, 2)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_code_of_the_guide(guide, table, names, count):
    before = dict(table)
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / guide).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == count
    for name in names:
        table.pop(name, None)
    try:
        others = set(table)
        exec("\n".join(blocks), {})
        assert set(table) - others == names
    finally:
        table.clear()
        table.update(before)
