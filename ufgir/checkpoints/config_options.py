"""The options of a model: name, type, default and help of each, read from the fields of `CLCAViTConfig` and its docstring.

A field that the docstring documents is an option of `run_ufgir.py` (`ufgir.training.arguments.ModelArguments`), and the commands of
`ufgir` take theirs from here, too (`ufgir.cli.common`). So a new field of the configuration is an option once it is documented.
"""

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from types import GenericAlias
from typing import Any, NamedTuple

from clca import REDUCTIONS, CLCAViTConfig
from clca.configuration_clca import check_config
from clca.heads_clca import HEADS


FIELDS = {*CLCAViTConfig.__dataclass_fields__, "num_labels"}
_CLASSES = ("id2label", "label2id", "problem_type")
# Fields that the code sets, and none that a model is trained with; label smoothing, which `run_ufgir.py` does to the labels; and
# what only backbones of dense predictions use.
NOT_OPTIONS = (
    "vqt_original_slicing",
    "first_patch_as_cls",
    "label_smoothing",
    "num_selected_features",
    "clca_version",
    "out_features",
    "out_indices",
    "feature_fill",
    "apply_layernorm",
)
# Defaults of a new model that differ from those of `ViTConfig`, in words; see `ufgir.checkpoints.loading.new_config`.
OF_NEW_MODELS = {"layer_norm_eps": "1e-6", "intermediate_size": "4 x hidden_size"}


def layer(text: str) -> int | str:
    """The type of a value of `reduction_layers`: a number, or "all" in place of all numbers."""
    return text if text == "all" else int(text)


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that were given, by name, as fields of a configuration: those that are none, and those unset, are left out."""
    given = {name: value for name, value in values.items() if value is not None and name in FIELDS}
    if given.get("reduction_layers") == ["all"]:  # as a command line has it
        given["reduction_layers"] = "all"
    return given


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, dict)}
_TYPES |= {"list[int]": list[int], "list[float]": list[float]}
# What the documentation calls a name of something -> the names.
_NAMES = {"clca.REDUCTIONS": sorted(REDUCTIONS), "clca.heads_clca.HEADS": list(HEADS)}
# `name (`type` or `type`, ...): text`, the text also on lines that are indented further
_ENTRY = re.compile(r"^ {4}(\w+) \(([^)]*)\):(.*(?:\n {8}.*)*)", flags=re.MULTILINE)


class ConfigOption(NamedTuple):
    """An option of the model.

    Attributes:
        name: of the field.
        type: bool, int, float, str, list[int], list[float] or dict, which a command line takes as JSON.
        default: of a new model, in words.
        help: the first sentence of the documentation, and the default in brackets.
    """

    name: str
    type: Any
    default: str
    help: str


@cache
def config_options() -> dict[str, ConfigOption]:
    """Name -> option, in the order of the docstring of `CLCAViTConfig`."""
    declared = {field.name: field for field in fields(CLCAViTConfig)}
    arguments = inspect.cleandoc(CLCAViTConfig.__doc__).partition("\nArgs")[2].partition("\n\n")[0]
    options = {}
    for name, types, text in _ENTRY.findall(arguments):
        if name not in NOT_OPTIONS:
            field = declared[name]
            value = field.default if field.default_factory is MISSING else field.default_factory()
            default = OF_NEW_MODELS.get(name) or _in_words(value)
            kind = _TYPES[re.findall(r"`([^`]+)`", types.partition(", defaults")[0])[-1]]
            if name == "reduction_layers":
                kind = GenericAlias(list, layer)  # whose argument reads a word of a command line
            options[name] = ConfigOption(name, kind, default, f"{_summary(text)} [{default}]")
    return options


def _summary(text: str) -> str:
    """The first sentence, as the help of an option begins."""
    sentence = re.split(r"\.\s+(?=[A-Z])", " ".join(text.replace("`", "").split()))[0].rstrip(".")
    for place, names in _NAMES.items():
        sentence = sentence.replace(f"a name of {place}", f"one of {', '.join(names)}")
    plain_word = re.match(r"[A-Z][a-z]+\b", sentence)  # not LayerNorm, CLS
    return sentence[0].lower() + sentence[1:] if plain_word else sentence


def _in_words(value: Any) -> str:
    """A default as an option would be given."""
    if isinstance(value, list | tuple):
        return " ".join(map(_in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def changed_config(config: CLCAViTConfig, values: Mapping[str, Any]) -> CLCAViTConfig:
    """A configuration with `values` in place of its own, checked. `CLCAViTConfig.from_dict` says what gives way to them.

    Args:
        config: stays as it is.
        values: fields by name; classes also as `id2label`, `label2id` and `problem_type`.

    Raises:
        ValueError: a value out of range, or a name that is no field.
    """
    check_fields([name for name in values if name not in _CLASSES], "CLCAViTConfig")
    values = dict(values)
    if values.get("num_labels") == config.num_labels and "id2label" not in values:
        del values["num_labels"]  # and the names of the classes stay
    elif {"num_labels", "id2label"} & set(values):
        values = {"problem_type": None} | values
    changed = CLCAViTConfig.from_dict(config.to_dict(), **values)
    check_config(changed)
    return changed


def check_fields(names: Iterable[str], what: str) -> None:
    """Refuse names that are no fields of a configuration: transformers would keep them, and nothing would read them.

    Args:
        names: of fields.
        what: where they come from, for the message.

    Raises:
        ValueError: naming the first, and what may be meant.
    """
    for name in names:
        if name not in FIELDS:
            close = get_close_matches(name, FIELDS, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " See the fields of CLCAViTConfig."
            raise ValueError(f"{what}: a configuration has no field `{name}`.{hint}")
