"""Options of a model: name, type, default and help, read from the fields of `CLCAViTConfig` and its docstring.

Each documented field is an option of `run_ufgir.py` (`ufgir.training.arguments.ModelArguments`), and the `ufgir` commands take their
options from here as well (`ufgir.cli.common`). A new field becomes an option once it is documented.
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
# Fields that are set by the code, not by users; label smoothing, which `run_ufgir.py` applies to the labels; and fields of backbones
# for dense prediction.
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
# Defaults of new models that differ from `ViTConfig`, as text; see `ufgir.checkpoints.loading.new_config`.
OF_NEW_MODELS = {"layer_norm_eps": "1e-6", "intermediate_size": "4 x hidden_size"}


def layer(text: str) -> int | str:
    """Parse a value of `reduction_layers`: a number, or "all"."""
    return text if text == "all" else int(text)


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options that are configuration fields; None counts as not given."""
    given = {name: value for name, value in values.items() if value is not None and name in FIELDS}
    if given.get("reduction_layers") == ["all"]:  # as parsed from a command line
        given["reduction_layers"] = "all"
    return given


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, dict)}
_TYPES |= {"list[int]": list[int], "list[float]": list[float]}
# Registry named in the documentation -> its names.
_NAMES = {"clca.REDUCTIONS": sorted(REDUCTIONS), "clca.heads_clca.HEADS": list(HEADS)}
# `name (`type` or `type`, ...): text`; the text may continue on indented lines
_ENTRY = re.compile(r"^ {4}(\w+) \(([^)]*)\):(.*(?:\n {8}.*)*)", flags=re.MULTILINE)


class ConfigOption(NamedTuple):
    """Option of a model.

    Attributes:
        name: name of the field.
        type: bool, int, float, str, list[int], list[float] or dict, which is JSON on a command line.
        default: default of a new model, as text.
        help: first sentence of the documentation, and the default in brackets.
    """

    name: str
    type: Any
    default: str
    help: str


@cache
def config_options() -> dict[str, ConfigOption]:
    """Return the options by name, in the order of the docstring of `CLCAViTConfig`."""
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
                kind = GenericAlias(list, layer)  # its argument parses one word of a command line
            options[name] = ConfigOption(name, kind, default, f"{_summary(text)} [{default}]")
    return options


def _summary(text: str) -> str:
    """Return the first sentence as the help of an option."""
    sentence = re.split(r"\.\s+(?=[A-Z])", " ".join(text.replace("`", "").split()))[0].rstrip(".")
    for place, names in _NAMES.items():
        sentence = sentence.replace(f"a name of {place}", f"one of {', '.join(names)}")
    plain_word = re.match(r"[A-Z][a-z]+\b", sentence)  # not LayerNorm, CLS
    return sentence[0].lower() + sentence[1:] if plain_word else sentence


def _in_words(value: Any) -> str:
    """Format a default as the value of an option."""
    if isinstance(value, list | tuple):
        return " ".join(map(_in_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def changed_config(config: CLCAViTConfig, values: Mapping[str, Any]) -> CLCAViTConfig:
    """Return a checked configuration, overridden by `values`. `CLCAViTConfig.from_dict` documents which fields they reset.

    Args:
        config: configuration; it is not changed.
        values: fields by name, including `id2label`, `label2id` and `problem_type`.

    Raises:
        ValueError: if a value is out of range, or a name is not a field.
    """
    check_fields([name for name in values if name not in _CLASSES], "CLCAViTConfig")
    values = dict(values)
    if values.get("num_labels") == config.num_labels and "id2label" not in values:
        del values["num_labels"]  # keep the class names
    elif {"num_labels", "id2label"} & set(values):
        values = {"problem_type": None} | values
    changed = CLCAViTConfig.from_dict(config.to_dict(), **values)
    check_config(changed)
    return changed


def check_fields(names: Iterable[str], what: str) -> None:
    """Check that names are fields of a configuration, because transformers accepts other names, which have no effect.

    Args:
        names: names of fields.
        what: source of the names, for the message.

    Raises:
        ValueError: for the first unknown name, with a suggestion.
    """
    for name in names:
        if name not in FIELDS:
            close = get_close_matches(name, FIELDS, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " See the fields of CLCAViTConfig."
            raise ValueError(f"{what}: a configuration has no field `{name}`.{hint}")
