"""A grid of runs of `run_ufgir.py`: what it consists of, checked before anything runs (`ufgir sweep`)."""

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

# The paper's ablation: the cross-layer cache (CLC) with one register, the CLA head, both, neither.
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
        name: of its folder, such as `variant=clca,keep_rate=0.1,seed=1`.
        options: the options that the grid sets, as command-line arguments, but those without effect in this combination.
        settings: every option of the run that is given, by the recipe or the grid, with its value.
        training: its `TrainingArguments`.
    """

    name: str
    options: list[str]
    settings: dict[str, Any]
    training: Any


class Choice(NamedTuple):
    """One of the alternatives of an axis of the grid: how it is called, and option -> value as typed."""

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
    """`option=value` -> its two sides, the option spelt with `_`."""
    option, equals, value = text.partition("=")
    option = option.strip().removeprefix("--").replace("-", "_")
    if not equals or not option or not value.strip():
        raise ValueError(f"`{flag}` must be OPTION=VALUE, got {text!r}")
    return option, value.strip()


def parse_set(text: str) -> tuple[str, list[Choice]]:
    """`keep_rate=0.1,0.25` -> the axis `keep_rate` and its alternatives; ValueError if it is not of that form."""
    option, values = _assignment(text, "--set")
    choices = [Choice(value, {option: value}) for value in split_list(values)]
    if not all(choice.label for choice in choices):
        raise ValueError(f"`--set` {text!r} has an empty value: OPTION=VALUE,VALUE,..., without a comma too many")
    return option, choices


def parse_variant(text: str) -> Choice:
    """`clca`, one of `VARIANTS`, or `NAME:OPTION=VALUE,OPTION=VALUE` -> an alternative of the axis `variant`.

    Raises:
        ValueError: it is neither, or names an option twice.
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
    """Raises ValueError where RecipeParser ends the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class Grid:
    """Every combination of some alternatives, each a run of a recipe.

    Args:
        recipe: YAML or JSON file.
        sets: texts `OPTION=VALUE,VALUE,...`, an axis of the grid each. A value that is a list has blanks or brackets:
            `reduction_layers=3 6 9,2 5 8`.
        variants: texts as `parse_variant` takes them: alternatives that set several options together.

    Raises:
        ValueError: there is nothing to vary, an option is unknown, set twice or the sweep's own, or any combination is
            one that `run_ufgir.py` would refuse, its model included.
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
                raise ValueError(f"`--set` names `{option}` twice: put all values after one, {option}=A,B")
            self.axes[option] = choices
        if not self.axes:
            raise ValueError("there is nothing to sweep over: give `--set` OPTION=VALUE,VALUE or `--variant`")
        self._check_options()
        self.settings = self._parse([])[0]  # of the recipe itself

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
                    raise ValueError(f"`{option}` is set by the sweep for each run: leave it out")
                if option in setters:
                    raise ValueError(f"`{option}` is set by both `{setters[option]}` and `{axis}`")
                setters[option] = axis

    def _words(self, option: str, value: str) -> list[str]:
        """`--option=value`, or `--option value value ...` where the option takes several."""
        if getattr(self._parser.options[option].type, "__origin__", None) is not list:
            return [f"--{option}={value}"]
        return [f"--{option}", *(str(word) for word in re.split(r"[\s,]+", value.strip("[] ")))]

    def _all_words(self, values: dict[str, str]) -> list[str]:
        return [word for option, value in values.items() for word in self._words(option, value)]

    def _parse(self, words: list[str], output: str = "unused") -> tuple[dict[str, Any], Options, dict[str, str]]:
        """The options that are given, with their values; all of them; and those without effect, with what they need."""
        with collected() as without_effect:
            options = Options(*self._parser.parse([str(self.recipe), *words, f"--output_dir={output}"]))
            check_options(options, self._parser.given, REQUIREMENTS)
        settings = self._parser.settings(*vars(options).values(), leave_out=OWN)
        return as_read(settings), options, without_effect

    def runs(self, output: Path) -> list[Run]:
        """All combinations, the last axis changing fastest, each in a folder of its own below `output`; see `Grid`."""
        runs: list[Run] = []
        told: dict[tuple[str, str], list[str]] = {}  # option without effect, and what it needs -> runs
        for choices in itertools.product(*self.axes.values()):
            labels = dict(zip(self.axes, (choice.label for choice in choices), strict=True))
            name = run_name(labels)
            values = {option: value for choice in choices for option, value in choice.options.items()}
            try:
                settings, options, found = self._parse(self._all_words(values), str(output / name))
                while idle := {option: needs for option, needs in found.items() if option in values}:
                    for pair in idle.items():
                        told.setdefault(pair, []).append(name)
                    values = {option: value for option, value in values.items() if option not in idle}
                    # without these, another option may have no effect, too
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
        for (option, what), names in told.items():
            logger.warning(
                "`%s` has no effect in %d of %d runs, which are run without it: it needs %s. The first is %s",
                *(option, len(names), len(runs), what, names[0]),
            )
        return runs


def run_name(labels: dict[str, str]) -> str:
    """A folder's name for a combination, the same in whatever order its axes were given: variant first, seed last."""
    order = sorted(labels, key=lambda axis: (axis != "variant", axis == "seed", axis))
    name = ",".join(f"{axis}={slug(labels[axis])}" for axis in order)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def slug(text: str) -> str:
    """A value as a part of a folder's name: `[3, 6, 9]` and `3 6 9` are `3-6-9`, other odd characters `_`."""
    words = re.split(r"[\s,]+", text.strip("[]{} "))
    return re.sub(r"[^A-Za-z0-9._+-]", "_", "-".join(words))
