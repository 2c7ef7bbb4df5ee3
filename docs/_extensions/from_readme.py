"""Sections of the README as parts of pages, so that nothing is told twice.

    ```{readme} ## Use it
    ```

is replaced by the section "Use it", its heading of the level given; `{readme} top` by what stands before the first section.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


README = Path(__file__).parents[2] / "README.md"
_FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
_PLACE = re.compile(r"^```\{readme\} (.+)\n```$", flags=re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Heading -> text of each section of level 2; `top` -> what stands between the title and the first."""
    masked = _FENCED.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # a comment in code is no heading
    starts = [(match.start(), match.end(), match[1]) for match in re.finditer(r"^## (.+)$", masked, re.MULTILINE)]
    ends = [start for start, *_ in starts[1:]] + [len(text)]
    found = {name: text[end:stop].strip() for (_, end, name), stop in zip(starts, ends, strict=True)}
    return {"top": text[: starts[0][0]].partition("\n")[2].strip()} | found


def _relinked(match: re.Match) -> str:
    """A link that is right on a page of docs/: to another page, to a module's part of the API, or no link at all."""
    image, text, target = match.groups()
    if "://" in target or target.startswith("#"):
        return match[0]
    if target.startswith("docs/"):
        text = "" if text == target else text  # a page's title says more than its path
        return f"{image}[{text}]({target.removeprefix('docs/')})"
    if re.fullmatch(r"clca/\w+\.py", target):
        return f"{{py:mod}}`{text} <{target.removesuffix('.py').replace('/', '.')}>`"
    return f"`{text}`"


def section(name: str, level: int) -> str:
    """A section of the README with its heading at a level."""
    found = sections(README.read_text(encoding="utf-8"))
    if name not in found:
        raise ExtensionError(f"README.md has no section {name!r}; it has {', '.join(found)}.")
    text = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", _relinked, found[name])
    if name == "top":
        return text
    masked = _FENCED.sub(lambda match: match[0].replace("#", "\0"), text)
    shifted = re.sub(r"^##(#+)", lambda match: "#" * (len(match[1]) + level), masked, flags=re.MULTILINE)
    return f"{'#' * level} {name}\n\n" + shifted.replace("\0", "#")


def _place(match: re.Match) -> str:
    marks, _, name = match[1].rpartition("# ")
    return section(name, len(marks) + 1)


def _expand(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = _PLACE.sub(_place, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _expand)
    return {"parallel_read_safe": True}
