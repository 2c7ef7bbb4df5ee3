"""Options of a script: dataclasses filled from a recipe file and the command line, both checked in the same way."""

import json
import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .text import one_sentence


TAKES_FALSE = ("resume_from_checkpoint",)  # options of text that may be false


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """A dataclass field that is an option; a default that is not a plain value is told in [brackets] in `help`."""
    return field(default=default, metadata={"help": help, **metadata})


def switch(help: str) -> Any:
    """A yes/no field that may also be left unset (None); the bare flag means yes."""
    return option(help, nargs="?", const=True)


class RecipeParser(HfArgumentParser):
    """HfArgumentParser for `script.py [recipe.yaml] [--option value ...]`.

    A recipe is a YAML or JSON mapping of option to value. It becomes command-line arguments placed before the real
    ones: types are checked once, in one way, and the command line wins. An empty value (`option:` or null) leaves the
    default. Unknown options, in the file or on the command line, end the program with a suggestion and status 2, as
    all other mistakes do.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        super().__init__(
            dataclass_types,
            usage="%(prog)s [RECIPE.yaml|.json] [--option value ...]   (--help lists all options)",
            formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=36, width=119),
            allow_abbrev=False,
            **kwargs,
        )
        for action in self._actions:
            if any(spelling.startswith("--no_") for spelling in action.option_strings):
                action.help = SUPPRESS  # `--option false` says the same
        self.options = {f.name: f for kind in self.dataclass_types for f in fields(kind) if f.init}
        self.given: list[str] = []

    def settings(self, *groups: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
        """Every option that the last `parse` was given, with its value: a recipe for the same run.

        Args:
            groups: the dataclass instances that `parse` returned.
            leave_out: names of options that do not matter.
        """
        values = {k: v for g in groups for k, v in (g.to_dict() if hasattr(g, "to_dict") else vars(g)).items()}
        return {name: values[name] for name in self.given if name in values and name not in leave_out}

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """`sys.argv[1:]` -> one instance of each dataclass. Ends the program with status 2 on a mistake."""
        from_recipe, given = [], list(argv)
        try:
            if given and not given[0].startswith("-"):
                from_recipe = self.recipe_arguments(Path(given.pop(0)))
            _, unknown = self.parse_known_args(from_recipe + given)
            if unknown:
                flag = unknown[0].split("=")[0]
                if not flag.startswith("-"):
                    raise ValueError(f"unexpected argument {flag!r}; a recipe comes first, options have a leading --")
                raise ValueError(f"unknown option {flag}{self.suggestion(flag.lstrip('-'), '--')}")
            self.given = self._names(from_recipe + given)
            return self.parse_args_into_dataclasses(from_recipe + given, look_for_args_file=False)
        except (ValueError, OSError) as error:
            self.error(one_sentence(error))

    def _names(self, words: Sequence[str]) -> list[str]:
        """The options among the words of a command line, each once."""
        flags = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        return list(dict.fromkeys(flag if flag in self.options else flag.removeprefix("no_") for flag in flags))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def recipe_arguments(self, path: Path) -> list[str]:
        """The contents of a recipe as command-line arguments; ValueError if it is not a recipe."""
        if not path.is_file():
            raise ValueError(f"there is no recipe {path}")
        try:  # YAML contains JSON
            recipe = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML or JSON file: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"{path} must hold lines of `option: value`")
        arguments = []
        for key, value in recipe.items():
            if key not in self.options:
                raise ValueError(f"unknown option `{key}` in {path}{self.suggestion(str(key))}")
            takes_list = getattr(self.options[key].type, "__origin__", None) is list
            if isinstance(value, list) and not takes_list:
                raise ValueError(f"`{key}` in {path} takes one value, got {value}")
            if value is False and self.options[key].type is str and key not in TAKES_FALSE:
                raise ValueError(f'`{key}` in {path} is false, which YAML takes no and off for: write {key}: "no"')
            if takes_list and value is not None:
                arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
            elif value is not None:
                arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return arguments

    def suggestion(self, name: str, prefix: str = "") -> str:
        """`; did you mean ...?`, or nothing."""
        close = get_close_matches(name.replace("-", "_"), self.options, n=1)
        return f"; did you mean {prefix}{close[0]}?" if close else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once: the parser itself would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"`{key}` stands in it more than once")
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for text (it wants 1.0e-3), and JSON, which we read as YAML, for a number
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with one spelling of each option, its type, and its default unless the text tells it in [brackets]."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default in (None, [], "") or (action.help and action.help.endswith("]")):
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        return {int: "INTEGER", float: "NUMBER", string_to_bool: "true|false"}.get(action.type, "TEXT")

    def _format_action_invocation(self, action: Action) -> str:
        if len(action.choices or ()) > 8:
            action.metavar = "NAME"
        elif action.choices is None and action.nargs == "?":
            return f"{action.option_strings[0]} [{self._get_default_metavar_for_optional(action)}]"
        values = (
            ""
            if action.nargs == 0
            else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
        )
        return action.option_strings[0] + values
