"""Texts use one word per thing, as CONTRIBUTING.md asks. Ruff's rule D401 checks that docstrings begin with an imperative."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PLACES = (
    "*.md",
    "run_ufgir.py",
    "recipes/**/*",
    "clca/*.py",
    "ufgir/**/*",
    "dataset_scripts/*.py",
    "spaces/*",
    "hf_tests/*.py",
)
PLACES += ("docs/**/*.md", "docs/**/*.py", "docs/**/*.ipynb", "docs/figures/*.svg", "docs/_static/*", "tests/**/*.py")
SUFFIXES = {".md", ".py", ".yaml", ".ipynb", ".svg", ".js", ".css", ".html"}
GENERATED = ("docs/_build/", "tests/fixtures/", "tests/goldens")

# Phrase that must not occur (regular expression) -> what to write instead
PHRASES = {
    r"learnt": "learned",
    r"recalled|recalls": "retrieved from the cache",
    r"digests?": "hash or checksum",
    r"anew": "again; re-initialize",
    r"course of the learning rate": "learning rate schedule",
    r"elastic": "variable keep rate",
    r"growth": "scaling (with size)",
    r"(in|of) a race|races?": "interleaved timing",
    r"(?<!standard )deviation": "std, standard deviation",
    r"idle options?|typed in vain|in vain": "option without effect",
    r"at work": "in use",
    r"(cannot|not to|could not) be had": "could not be loaded",
    r"means? nothing": "has no effect without",
    r"visible rows?": "key mask",
    r"rows? of the sequence": "token",
    r"(is|are|was|were) told (in|by)|tells? apart": "is logged, is reported",
    r"none of (its|our|your|their) business": "does not concern",
    r"looks? like it likes|what it likes": "unpredictable",
    r"stumbles?": "fail",
    r"(a|the) stranger's|of strangers": "untrusted",
}
# Where such a phrase has another meaning -> reason
EXCEPTIONS = {
    r"\.(hex)?digest\(|digest_size": "names of hashlib",
    r"outputs/elastic|ufgir\.elastic|`?--growth`?|ufgir\.growth|clca\.elastic": "names of earlier releases and folders",
    r"growth stages?|once per growth$": "of plants",
    r"vel_growth|growth habit": "of plants",
}


def files():
    found = {file for place in PLACES for file in ROOT.glob(place) if file.suffix in SUFFIXES}
    return sorted(f for f in found if not f.relative_to(ROOT).as_posix().startswith(GENERATED) and f != Path(__file__))


def without_outputs(text):
    """Remove the outputs from a notebook's JSON."""
    return re.sub(r'"outputs": \[\n.*?\n   \]', "", text, flags=re.DOTALL)


def unwanted(text):
    """Return the lines of a text with a phrase of `PHRASES`."""
    text = re.sub("|".join(EXCEPTIONS), "", without_outputs(text))
    phrase = re.compile(rf"(?<![\w./-])(?:{'|'.join(PHRASES)})(?![\w/]|\.\w|-\w)", re.IGNORECASE)
    return [line.strip() for line in text.splitlines() if phrase.search(line)]


def test_phrases_of_the_glossary():
    everything = files()
    assert len(everything) > 300
    found = {str(file.relative_to(ROOT)): lines for file in everything if (lines := unwanted(file.read_text("utf-8")))}
    assert found == {}, "see PHRASES for what to write instead, and EXCEPTIONS for words with another meaning"


def test_links_have_texts():
    """GitHub does not show a link without a text, which Sphinx would fill with the title of the page."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    empty = re.compile(r"(?<!!)\[\]\(")
    found = [str(page.relative_to(ROOT)) for page in pages if empty.search(page.read_text(encoding="utf-8"))]
    assert found == [], "write the title of the page as the text of the link"


@pytest.mark.parametrize(
    "text", ["A learnt token.", "weights are started anew", "the mean and deviation", "`digest` of a file"]
)
def test_phrases_are_found(text):
    assert unwanted(f"Fine.\n{text}\n") == [text]
    assert unwanted("hasher.hexdigest() and the standard deviation of learned tokens") == []
