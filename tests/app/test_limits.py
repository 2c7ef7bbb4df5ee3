"""The limits of the web page are in one module, and docs/app.md lists those that affect visitors."""

import re
from pathlib import Path

from ufgir.app import limits


ROOT = Path(__file__).parents[2]


def test_every_limit_has_its_reason():
    source = Path(limits.__file__).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if re.match(r"[A-Z_]+ = [^(]", line)]
    assert len(lines) > 20 and all("  # " in line for line in lines)


def test_the_guide_names_the_limits():
    text = " ".join((ROOT / "docs" / "app.md").read_text(encoding="utf-8").split())
    for words in (
        f"at most {limits.MOST_PARAMETERS // 10**6} million parameters",
        f"{limits.MAX_UPLOAD.removesuffix('mb')} MB",
        f"{limits.MOST_LAYERS} layers",
        f"{limits.MOST_PATCHES} patches",
        f"{limits.MOST_CLASSES:,} classes",
        f"{limits.MOST_INPUT_PIXELS // 10**6} million input pixels",
        f"ratio of sides above {limits.MOST_ELONGATED}",
        f"at most {limits.LONGEST_SIDE} pixels",
        f"more than {limits.MOST_PIXELS // 10**6} million pixels",
    ):
        assert words in text


def test_no_limit_is_anywhere_else():
    """Sizes of caches, queues and uploads are in `limits`."""
    for name in ("page", "viewer", "html", "visitors"):
        source = (ROOT / "ufgir" / "app" / f"{name}.py").read_text(encoding="utf-8")
        assert re.findall(r"^_?[A-Z_]+(?:, _?[A-Z_]+)* = [(\d].*", source, re.MULTILINE) == []
        assert re.findall(r"(?:lru_cache\(|max_size=|max_file_size=|capacity=)[\d\"].*", source) == []
