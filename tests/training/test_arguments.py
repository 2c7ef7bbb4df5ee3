"""The options of `run_ufgir.py` and of the commands are the fields of the configuration."""

import argparse
from dataclasses import fields

import pytest

import run_ufgir
from clca import REDUCTIONS, CLCAViTConfig
from clca.heads_clca import HEADS
from ufgir.checkpoints.config_options import NOT_OPTIONS, config_options
from ufgir.cli.common import add_network_options, add_reduction_options
from ufgir.training.arguments import ModelArguments, Options
from ufgir.training.setup import make_config


OWN = [
    name.removeprefix("_")
    for name in CLCAViTConfig.__annotations__
    if name in {field.name for field in fields(CLCAViTConfig)}
]


def test_every_field_of_our_own_is_an_option_or_is_set_by_code():
    """A new field becomes an option once its docstring documents it."""
    assert set(OWN) - set(NOT_OPTIONS) <= set(config_options()) and set(NOT_OPTIONS) <= set(OWN)


@pytest.mark.parametrize("option", config_options().values(), ids=lambda option: option.name)
def test_help_says_what_an_option_is_and_its_default(option):
    text, _, default = option.help.removesuffix("]").rpartition(" [")
    assert len(text) > 10 and "`" not in text and not text.endswith(".")
    assert default == option.default
    changed_in_new_models = option.name in ("layer_norm_eps", "intermediate_size")
    new, stock = make_config(ModelArguments()), CLCAViTConfig()
    assert changed_in_new_models or getattr(new, option.name) == getattr(stock, option.name)


@pytest.mark.parametrize(("option", "names"), [("reduction", REDUCTIONS), ("head", HEADS)])
def test_help_names_methods_and_heads(option, names):
    assert all(name in config_options()[option].help for name in names)


def test_the_script_has_them_all():
    names = [field.name for field in fields(ModelArguments)]
    assert set(config_options()) <= set(names) and vars(ModelArguments()).items() >= dict.fromkeys(OWN[:3]).items()
    assert run_ufgir.ModelArguments is ModelArguments and run_ufgir.Options is Options


@pytest.mark.parametrize("with_defaults", [False, True])
def test_commands_take_theirs_from_the_same_table(with_defaults):
    """A command that always loads a checkpoint names no default that the checkpoint replaces."""
    parser = argparse.ArgumentParser()
    add_reduction_options(parser, with_defaults)
    reduction = {action.dest for action in parser._actions}
    add_network_options(parser)
    helps = {action.dest: action.help for action in parser._actions}
    shared = helps.keys() & config_options().keys()
    assert {"reduction", "keep_rate", "head", "image_size"} <= shared
    for name in shared:
        option = config_options()[name]
        end = f" [{option.default}]" if with_defaults or name not in reduction else ""
        assert helps[name] == option.help.removesuffix(f" [{option.default}]") + end
    args = parser.parse_args(
        ["--keep-rate", "0.5", "0.25", "--no-cross-layer-cache", "--image-size", "32", "--head", "cla"]
    )
    assert args.keep_rate == [0.5, 0.25] and args.cross_layer_cache is False and args.image_size == 32
    assert args.reduction is args.keep_tokens is args.num_clr_tokens is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--reduction-kwargs", "[1]"])
