"""Grids of runs of `run_ufgir.py`, checked before the first run starts (`ufgir sweep`)."""

import hashlib
import itertools
import logging
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..training.arguments import GROUPS, Options
from ..training.option_checks import REQUIREMENTS
from ..training.setup import make_config
from ..utils.arguments import RecipeParser
from ..utils.options import check_options, collected
from ..utils.provenance import as_read


logger = logging.getLogger(__name__)

# The paper's ablation: the cross-layer cache (CLC) with one CLR token, the CLA head, both, neither.
VARIANTS = {
    "base": "cross_layer_cache=false,num_clr_tokens=0,head=linear",
    "clc": "cross_layer_cache=true,num_clr_tokens=1,head=linear",
    "cla": "cross_layer_cache=false,num_clr_tokens=0,head=cla",
    "clca": "cross_layer_cache=true,num_clr_tokens=1,head=cla",
}
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name")  # options that the sweep sets
LONGEST_NAME = 160


class Run(NamedTuple):
    """One combination of a grid.

    Attributes:
        name: name of its folder, such as `variant=clca,keep_rate=0.1,seed=1`.
        options: the options that the grid sets, as command-line arguments, except those without effect in this
            combination.
        settings: every option set by the recipe or the grid, with its value.
        training: its `TrainingArguments`.
    """

    name: str
    options: list[str]
    settings: dict[str, Any]
    training: Any


class Choice(NamedTuple):
    """One value of an axis of the grid: its label, and option -> value as typed."""

    label: str
    options: dict[str, str]


def split_list(text: str) -> list[str]:
    """Split at commas, but not inside brackets, braces or double quotes: `1,[2, 3]` -> `1` and `[2, 3]`."""
    parts, depth, quoted = [""], 0, False
    for before, char in zip(" " + text, text, strict=False):
        quoted ^= char == '"' and before != "\\"
        depth += 0 if quoted else (char in "[{") - (char in "]}")
        if char == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _assignment(text: str, flag: str) -> tuple[str, str]:
    """Split `option=value`; replace `-` by `_` in the option."""
    option, equals, value = text.partition("=")
    option = option.strip().removeprefix("--").replace("-", "_")
    if not equals or not option or not value.strip():
        raise ValueError(f"`{flag}` must be OPTION=VALUE, got {text!r}")
    return option, value.strip()


def parse_set(text: str) -> tuple[str, list[Choice]]:
    """Parse `keep_rate=0.1,0.25`: return the axis `keep_rate` and its values.

    Raises:
        ValueError: if the text does not have this form.
    """
    option, values = _assignment(text, "--set")
    choices = [Choice(value, {option: value}) for value in split_list(values)]
    if not all(choice.label for choice in choices):
        raise ValueError(f"`--set` {text!r} has an empty value. Use OPTION=VALUE,VALUE,... without extra commas")
    return option, choices


def parse_variant(text: str) -> Choice:
    """Parse `clca`, one of `VARIANTS`, or `NAME:OPTION=VALUE,OPTION=VALUE`: return a value of the axis `variant`.

    Raises:
        ValueError: if it is neither, or lists an option twice.
    """
    name, colon, options = text.partition(":")
    if not colon and name not in VARIANTS:
        close = get_close_matches(name, VARIANTS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"`--variant` must be one of {', '.join(VARIANTS)}, or NAME:OPTION=VALUE,OPTION=VALUE, got {text!r}{hint}"
        )
    pairs = [_assignment(part, "--variant") for part in split_list(options if colon else VARIANTS[name])]
    if not name.strip() or len(dict(pairs)) < len(pairs):
        raise ValueError(f"`--variant` {text!r} must have a name and each option once")
    return Choice(name.strip(), dict(pairs))


class _StrictParser(RecipeParser):
    """A `RecipeParser` that raises ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Grid:
    """All combinations of the values of some options, each a run of a recipe.

    Args:
        recipe: YAML or JSON file.
        sets: texts `OPTION=VALUE,VALUE,...`, one per axis of the grid. Values that are lists use blanks or brackets:
            `reduction_layers=3 6 9,2 5 8`.
        variants: texts for `parse_variant`: values that set several options together.

    Raises:
        ValueError: if nothing varies, if an option is unknown, set twice or reserved for the sweep, or if
            `run_ufgir.py` would reject any combination, including its model.
    """

    def __init__(self, recipe: Path, sets: Sequence[str], variants: Sequence[str] = ()) -> None:
        self.recipe = recipe
        self._parser = _StrictParser(GROUPS)
        self.axes: dict[str, list[Choice]] = {}
        if variants:
            self.axes["variant"] = [parse_variant(text) for text in variants]
        for text in sets:
            option, choices = parse_set(text)
            if option in self.axes:
                raise ValueError(f"`--set` lists `{option}` twice. Combine the values: {option}=A,B")
            self.axes[option] = choices
        if not self.axes:
            raise ValueError("nothing to sweep over. Pass `--set` OPTION=VALUE,VALUE or `--variant`")
        self._check_options()
        self.settings = self._parse([])[0]  # options of the recipe

    def _check_options(self) -> None:
        setters: dict[str, str] = {}
        for axis, choices in self.axes.items():
            labels = [choice.label for choice in choices]
            if len(set(labels)) < len(labels):
                raise ValueError(f"`{axis}` has a value more than once: {', '.join(labels)}")
            for option in dict.fromkeys(name for choice in choices for name in choice.options):
                if option not in self._parser.options:
                    raise ValueError(f"unknown option `{option}`{self._parser.suggestion(option)}")
                if option in OWN:
                    raise ValueError(f"`{option}` is set by the sweep for each run. Omit it")
                if option in setters:
                    raise ValueError(f"`{option}` is set by both `{setters[option]}` and `{axis}`")
                setters[option] = axis

    def _words(self, option: str, value: str) -> list[str]:
        """Return `--option=value`, or `--option value value ...` if the option takes several values."""
        if getattr(self._parser.options[option].type, "__origin__", None) is not list:
            return [f"--{option}={value}"]
        return [f"--{option}", *(str(word) for word in re.split(r"[\s,]+", value.strip("[] ")))]

    def _all_words(self, values: dict[str, str]) -> list[str]:
        return [word for option, value in values.items() for word in self._words(option, value)]

    def _parse(self, words: list[str], output: str = "unused") -> tuple[dict[str, Any], Options, dict[str, str]]:
        """Return the given options with their values, all options, and options without effect -> requirements."""
        with collected() as without_effect:
            options = Options(*self._parser.parse([str(self.recipe), *words, f"--output_dir={output}"]))
            check_options(options, self._parser.given, REQUIREMENTS)
        settings = self._parser.settings(*vars(options).values(), leave_out=OWN)
        return as_read(settings), options, without_effect

    def runs(self, output: Path) -> list[Run]:
        """Return all combinations, the last axis changing fastest, each with a folder in `output`; see `Grid`."""
        runs: list[Run] = []
        ineffective: dict[tuple[str, str], list[str]] = {}  # (option without effect, its requirement) -> runs
        for choices in itertools.product(*self.axes.values()):
            labels = dict(zip(self.axes, (choice.label for choice in choices), strict=True))
            name = run_name(labels)
            values = {option: value for choice in choices for option, value in choice.options.items()}
            try:
                settings, options, found = self._parse(self._all_words(values), str(output / name))
                while unused := {option: needs for option, needs in found.items() if option in values}:
                    for pair in unused.items():
                        ineffective.setdefault(pair, []).append(name)
                    values = {option: value for option, value in values.items() if option not in unused}
                    # removing these may leave another option without effect
                    _, options, found = self._parse(self._all_words(values), str(output / name))
                training = options.training
                if not (training.do_train or training.do_eval or training.do_predict):
                    raise ValueError("nothing to do: set `do_train`, `do_eval` or `do_predict` in the recipe")
                make_config(options.model)
            except (ValueError, OSError) as error:
                raise ValueError(f"{name}: {error}") from error
            for other in runs:
                if name == other.name or settings == other.settings:
                    raise ValueError(f"{name} and {other.name} are the same run")
            runs.append(Run(name, self._all_words(values), settings, training))
        for (option, what), names in ineffective.items():
            logger.warning(
                "`%s` has no effect in %d of %d runs, which omit it: it needs %s. The first is %s",
                *(option, len(names), len(runs), what, names[0]),
            )
        return runs


def run_name(labels: dict[str, str]) -> str:
    """Return the folder name of a combination, independent of the order of its axes: variant first, seed last."""
    order = sorted(labels, key=lambda axis: (axis != "variant", axis == "seed", axis))
    name = ",".join(f"{axis}={slug(labels[axis])}" for axis in order)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def slug(text: str) -> str:
    """Return a value as part of a folder name: `[3, 6, 9]` becomes `3-6-9`, other special characters `_`."""
    words = re.split(r"[\s,]+", text.strip("[]{} "))
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(words))
