"""Script options: dataclasses filled from a recipe file and the command line, with the same checks for both."""

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


TAKES_FALSE = ("resume_from_checkpoint",)  # text options that may be false


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """Return a dataclass field for an option. If the default is not a plain value, `help` ends with it in [brackets]."""
    return field(default=default, metadata={"help": help, **metadata})


def switch(help: str) -> Any:
    """Return a field for a yes/no option that may be unset (None); the flag without a value means yes."""
    return option(help, nargs="?", const=True)


class RecipeParser(HfArgumentParser):
    """HfArgumentParser for `script.py [recipe.yaml] [--option value ...]`.

    A recipe is a YAML or JSON mapping of options to values. It is converted to command-line arguments that precede the actual ones, so
    types are checked in one place and the command line takes precedence. An empty value (`option:` or null) keeps the default. Unknown
    options, in the file or on the command line, end the program with a suggestion and status 2, as all other errors do.
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
                action.help = SUPPRESS  # same as `--option false`
        self.options = {f.name: f for kind in self.dataclass_types for f in fields(kind) if f.init}
        self.given: list[str] = []

    def settings(self, *groups: Any, leave_out: Iterable[str] = ()) -> dict[str, Any]:
        """Return the options that were given to the last `parse`, with their values: a recipe for the same run.

        Args:
            groups: the dataclass instances returned by `parse`.
            leave_out: names of options to omit.
        """
        values = {k: v for g in groups for k, v in (g.to_dict() if hasattr(g, "to_dict") else vars(g)).items()}
        return {name: values[name] for name in self.given if name in values and name not in leave_out}

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Parse `sys.argv[1:]` into one instance of each dataclass. Ends the program with status 2 on an error."""
        from_recipe, given = [], list(argv)
        try:
            if given and not given[0].startswith("-"):
                from_recipe = self.recipe_arguments(Path(given.pop(0)))
            _, unknown = self.parse_known_args(from_recipe + given)
            if unknown:
                flag = unknown[0].split("=")[0]
                if not flag.startswith("-"):
                    raise ValueError(
                        f"unexpected argument {flag!r}; a recipe comes first, options have a leading --, and a path with blanks "
                        "must be in quotes"
                    )
                raise ValueError(f"unknown option {flag}{self.suggestion(flag.lstrip('-'), '--')}")
            self.given = self._names(from_recipe + given)
            return self.parse_args_into_dataclasses(from_recipe + given, look_for_args_file=False)
        except (ValueError, OSError) as error:
            self.error(one_sentence(error))

    def _names(self, words: Sequence[str]) -> list[str]:
        """Return the distinct options among the words of a command line."""
        flags = [word[2:].split("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        return list(dict.fromkeys(flag if flag in self.options else flag.removeprefix("no_") for flag in flags))

    def error(self, message: str) -> NoReturn:
        """Print an error in one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def recipe_arguments(self, path: Path) -> list[str]:
        """Convert a recipe to command-line arguments.

        Raises:
            ValueError: if the file is not a valid recipe.
        """
        if not path.is_file():
            raise ValueError(f"there is no recipe {path}")
        try:  # YAML contains JSON
            recipe = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML or JSON file: {error}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"{path} must contain lines of `option: value`")
        arguments = []
        for key, value in recipe.items():
            if key not in self.options:
                raise ValueError(f"unknown option `{key}` in {path}{self.suggestion(str(key))}")
            takes_list = getattr(self.options[key].type, "__origin__", None) is list
            if isinstance(value, list) and not takes_list:
                raise ValueError(f"`{key}` in {path} takes one value, got {value}")
            if value is False and self.options[key].type is str and key not in TAKES_FALSE:
                raise ValueError(
                    f'`{key}` in {path} must be text, got false (YAML parses no and off as false): write {key}: "no"'
                )
            if takes_list and value is not None:
                arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
            elif value is not None:
                arguments.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
        return arguments

    def suggestion(self, name: str, prefix: str = "") -> str:
        """Return `; did you mean ...?` for a similar option, or an empty string."""
        close = get_close_matches(name.replace("-", "_"), self.options, n=1)
        return f"; did you mean {prefix}{close[0]}?" if close else ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys, of which the default loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"duplicate key `{key}`")
        return super().construct_mapping(node, deep)


# YAML 1.1 parses 1e-3 as text (a number is 1.0e-3), whereas JSON, which is parsed as YAML here, has it as a number
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with one spelling per option, its type, and its default unless the text ends with it in [brackets]."""

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
