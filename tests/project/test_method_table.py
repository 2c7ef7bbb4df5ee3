"""The tables of methods, and the pages of the site that are generated from the methods."""

from importlib import import_module
from pathlib import Path

import pytest

from clca import REDUCTIONS, TokenReduction


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    return import_module("method_table")


@pytest.mark.parametrize("page", ["README", "GUIDE", "CHOOSING"])
def test_documents_have_the_tables_that_the_code_makes(table, page):
    """Every method is listed with its idea, paper, file and requirements, in the guide also with GMACs."""
    path = getattr(table, page)
    updated = table.updated(path)
    assert all(
        (f"| `{name}` |" if page == "CHOOSING" else f"clca/reduction_{name}.py)") in updated for name in REDUCTIONS
    )
    command = "python docs/_extensions/method_table.py"
    assert updated == path.read_text(encoding="utf-8"), f"the table is old: run `make style`, or `{command}`"


def test_a_new_row_begins_with_what_the_class_says(table, monkeypatch):
    """Cells edited by hand are kept, in order."""
    row = '| `"evit"` | old | | | | 2 + ⌈r(N−1)⌉ | 1 | 2 |'
    found = [method for method in table.methods() if method.name in ("evit", "topk", "ats")]
    monkeypatch.setattr(table, "methods", lambda: found)
    monkeypatch.setattr(table, "_giga", lambda method, clca: "1.00")
    lines = table.full_table(f"| head |\n| --- |\n{row}").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`None`", '`"evit"`', '`"ats"`', '`"topk"`']
    assert (
        "keep the tokens CLS attends to most and fuse the others into one" in lines[3] and "2 + ⌈r(N−1)⌉" in lines[3]
    )
    assert "| The keep rate is a share of the current tokens |" in lines[5]
    short = table.short_table('| head |\n| --- |\n| [`"evit"`](clca/old.py) | old | | |').splitlines()
    assert [line.split("]")[0] for line in short[2:]] == ['| [`"evit"`', '| [`"ats"`', '| [`"topk"`']


def test_every_reason_to_choose_a_method_names_its_number(table, monkeypatch):
    """With a link to the place of the number; a method that is not listed has facts only."""
    known = table.reasons()
    assert set(known) == set(REDUCTIONS)
    assert all("](" in row["because"] and row["choose"] and "|" not in "".join(row.values()) for row in known.values())
    evit, topk = (next(one for one in table.methods() if one.name == name) for name in ("evit", "topk"))
    monkeypatch.setattr(table, "methods", lambda: [evit, topk])
    monkeypatch.setattr(
        table, "reasons", lambda: {"evit": {"reduction": "evit", "choose": "first", "because": "[x](y)"}}
    )
    assert [line.split("|")[4].strip() for line in table.short_table("").splitlines()[2:]] == [
        "first; no training needed",
        "no training needed",
    ]
    assert table.reason_table("").splitlines()[2:] == ["| `evit` | first | [x](y) |"]


@pytest.mark.parametrize(
    "name, when",
    [
        ("evit", "no training needed"),
        ("tome", "no training needed; removes at most half per stage"),
        ("sit", "needs training; one model per keep rate"),
        ("ats", "no training needed; token counts differ by image"),
        ("atc", "no training needed; exports up to 256 patches"),
        ("heuristic", "no training needed; a baseline that hides tokens and saves no time"),
    ],
)
def test_when_to_use_a_method(table, name, when):
    assert table.when(REDUCTIONS[name]) == when


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
