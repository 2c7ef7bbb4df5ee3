"""Parts of pages that are generated from the code:

    ```{modules}
    ufgir.data
    ```

inserts the docstrings of modules and their public objects; `{reductions}` those of the methods of token reduction; `{commands}` the help of
every subcommand of `ufgir`; and `{options}` the options of run_ufgir.py.

In the gallery, `<!-- other figures -->` becomes a section for each kind of figure without a heading on the page, and
`<!-- other methods -->` a paragraph for every method whose title is not on the page in **bold**. Both are comments, so that they are
invisible on GitHub.

Links to files of the repository outside docs/, such as `[text](../clca/modeling_clca.py)`, work on GitHub. The site does not contain these
files: a link to a module of `clca` leads to the reference, and any other becomes plain text.
"""

import argparse
import importlib
import re
from pathlib import Path
from typing import Any

from method_table import methods
from sphinx.application import Sphinx


_PLACE = re.compile(r"^```\{(modules|reductions|commands|options)\}\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


_OUTSIDE = re.compile(r"\[([^\]\n]+)\]\(\.\./([^)\s]+)\)")  # link to a file outside docs/


def _plain(text: str) -> str:
    """Escape a help message for Markdown, except `code`, and format names of options as code."""
    parts = re.split(r"(`[^`]+`)", re.sub(r"(?<![\w`-])--\w[\w-]*", r"`\g<0>`", text))
    return "".join(part if part[:1] == "`" else re.sub(r"([\\*_#<>\[\]|{}~$&])", r"\\\1", part) for part in parts)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    text = formatter._expand_help(action) if action.help else ""
    return _plain(" ".join(text.split())) or "-"


def _definitions(parser: argparse.ArgumentParser, heading: str) -> list[str]:
    """Return the groups of options with headings, and each option with its help."""
    lines = []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
        if actions:
            title, bracket, rest = group.title.partition(" (")
            lines += [heading.format(_plain(title[0].upper() + title[1:])), "", _plain(bracket.strip() + rest), ""]
        for action in actions:
            invocation = parser._get_formatter()._format_action_invocation(action)
            lines += [f"`{invocation}`", f": {_help(parser, action)}", ""]
    return lines


def modules(names: str) -> str:
    lines = []
    for name in names.split():
        lines += [f"## {name}", "", "```{eval-rst}", f".. automodule:: {name}", "```", ""]
    return "\n".join(lines)


def reductions(_: str) -> str:
    return modules(" ".join(sorted(method.module for method in methods())))


_DRAW = ".venv/bin/ufgir visualize outputs/demo outputs/spotted.png outputs/toothed.png"
_GALLERY = Path(__file__).parents[1] / "figures" / "gallery"


def _shown(title: str, command: str, file: str) -> list[str]:
    """Return a command, and its figure if there is one."""
    lines = ["", "```sh", f"{command} --side 160 --output docs/figures/gallery/{file}", "```", ""]
    return [*lines, *([f"![{title}](figures/gallery/{file})", ""] if (_GALLERY / file).is_file() else [])]


def other_figures(page: str) -> str:
    from ufgir.visualization.kinds import KINDS

    lines = []
    for name, kind in KINDS.items():
        if f"\n### {kind.title}\n" not in page:
            words = [f"--{option} {_words(value)}" for option, value in kind.example.items()]
            lines += [f"### {kind.title}", "", kind.caption]
            lines += _shown(kind.title, " ".join([_DRAW, f"--what {name}", *words]), f"{name}.png")
    return "\n".join(lines)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def other_methods(page: str) -> str:
    lines = []
    for method in methods():
        if f"**{method.title}**" not in page:
            lines.append(f"**{method.title}**: {method.idea}.")
            lines += _shown(method.title, f"{_DRAW} --reduction {method.name}", f"method_{method.name}.png")
    return "\n".join(["### Other methods", "", *lines] if lines else [])


def commands(_: str) -> str:
    from ufgir.cli.entry import COMMANDS

    lines = []
    for name, text in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"ufgir {name}", allow_abbrev=False)
        importlib.import_module(f"ufgir.cli.{name.replace('-', '_')}").configure(parser)
        lines += [f"## ufgir {name}", "", _plain(text[0].upper() + text[1:]) + ".", ""]
        lines += ["```text", parser.format_usage().removeprefix("usage: ").strip(), "```", ""]
        lines += _definitions(parser, "**{}**")
    return "\n".join(lines)


def options(_: str) -> str:
    from run_ufgir import GROUPS
    from ufgir.utils.arguments import RecipeParser

    return "\n".join(_definitions(RecipeParser(GROUPS, prog="run_ufgir.py"), "## {}"))


def _relinked(match: re.Match) -> str:
    """Convert a link to a file outside docs/ for the site."""
    text, target = match.groups()
    if re.fullmatch(r"clca/\w+\.py", target):
        return f"{{py:mod}}`{text} <{target.removesuffix('.py').replace('/', '.')}>`"
    return text if text.startswith("`") else f"`{text}`"


def expanded(page: str) -> str:
    """Insert the generated parts into a page."""
    page = _OUTSIDE.sub(_relinked, page)
    for mark, make in (("<!-- other figures -->", other_figures), ("<!-- other methods -->", other_methods)):
        if mark in page:
            page = page.replace(mark, make(page))
    return _PLACE.sub(lambda match: globals()[match[1]](match[2]), page)


def _expand(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = expanded(source[0])


def _no_way_back(app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Remove the links from source pages to the reference: viewcode assumes one module per object, and `clca` re-exports objects."""
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r'<a class="viewcode-back".*?</a>', "", context["body"], flags=re.DOTALL)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _expand)
    app.connect("html-page-context", _no_way_back)
    return {"parallel_read_safe": True}
