"""The README's table of methods, and the pages of the site that are made of the methods."""

from importlib import import_module
from pathlib import Path

import pytest

from clca import REDUCTIONS, TokenReduction


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return import_module("method_table")


def test_the_readme_has_the_table_that_the_code_makes(table):
    """Every method with its idea, paper, file and GMACs."""
    text = table.README.read_text(encoding="utf-8")
    updated = table.updated(text)
    assert all(f"[reduction_{name}.py](clca/reduction_{name}.py)" in updated for name in REDUCTIONS)
    command = "python docs/_extensions/method_table.py"
    assert updated == text, f"the table is not up to date: run `make style`, or `{command}`"


def test_a_new_row_begins_with_what_the_class_says(table, monkeypatch):
    """Cells that people wrote stay, in their order."""
    row = '| `"evit"` | old | | | 2 + ⌈r(N−1)⌉ | 1 | 2 |'
    found = [method for method in table.methods() if method.name in ("evit", "topk", "ats")]
    monkeypatch.setattr(table, "methods", lambda: found)
    monkeypatch.setattr(table, "_giga", lambda method, clca: "1.00")
    lines = table.readme_table(f"| head |\n| --- |\n{row}").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`None`", '`"evit"`', '`"ats"`', '`"topk"`']
    assert (
        "keep the tokens CLS attends to most and fuse the others into one" in lines[3] and "2 + ⌈r(N−1)⌉" in lines[3]
    )
    assert "| The keep rate is a share of the current tokens |" in lines[5]


def test_a_file_without_a_title_is_named(table):
    with pytest.raises(ValueError, match=r"the first line of clca/reduction_base\.py must be `Title: idea\.`"):
        table.describe(TokenReduction)


def test_the_reference_has_every_method(table):
    text = import_module("from_code").expanded((DOCS / "api" / "reductions.md").read_text(encoding="utf-8"))
    assert all(f".. automodule:: clca.reduction_{name}\n" in text for name in REDUCTIONS)


def test_the_gallery_shows_what_was_just_added(table, monkeypatch):
    from_code = import_module("from_code")
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert "**ATS**: sample" not in from_code.expanded(page)  # it has a paragraph of its own
    fewer = page.replace("**ATS**", "ATS").replace("### Attention rollout", "### Something else")
    text = from_code.expanded(fewer)
    assert "**ATS**: sample tokens from the distribution of the CLS token's attention." in text
    assert "--reduction ats --side 160 --output docs/figures/gallery/method_ats.png" in text
    assert "### Attention rollout" in text and "--what rollout --side 160" in text
