"""CLCA checkpoints, and ViTs and DeiTs of transformers, which hold the same weights: loaded by `from_pretrained`."""

import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch
from safetensors import SafetensorError

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import check_config

from ..utils.text import one_sentence
from .keep_rates import at_one_rate, has_one_rate, rate_of
from .state_dicts import Found


MODEL_TYPES = (CLCAViTConfig.model_type, "vit", "deit")


def clca_config(path: str, values: Mapping[str, Any], revision: str | None = None) -> CLCAViTConfig:
    """The configuration of a checkpoint with `values` in place of its own, checked.

    `CLCAViTConfig` lets counts of tokens give way to rates, and a method's options to another method. Several keep rates that it
    was trained for give way, too: to counts, to a method that has one rate only, and to none.

    Args:
        path: folder or Hub repository.
        values: fields of the configuration.
        revision: of the Hub repository.

    Raises:
        OSError: there is no such checkpoint, or its configuration cannot be read.
        ValueError: a value is out of range.
    """
    values = dict(values)
    if values.get("keep_tokens") is not None or ("reduction" in values and has_one_rate(values["reduction"])):
        values = {"train_keep_rates": None} | values
    config = CLCAViTConfig.from_pretrained(path, revision=revision, **values)
    check_config(config)
    return config


def load_clca(path: str, config: CLCAViTConfig, revision: str | None = None, **options: Any) -> Found:
    """A model made from `config` with the weights of a checkpoint, in float32.

    Position embeddings and patch projection are resampled where `config` has another size; a token that is new to the checkpoint
    starts as the model starts it. A CLA head that was trained for several keep rates serves a `config` without `train_keep_rates`
    with its statistics at the rate of `config`.

    Args:
        path: folder or Hub repository.
        config: of the model wanted.
        revision: of the Hub repository.
        options: more arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        OSError: there are no weights.
        ValueError: weights that cannot be read.
    """
    options = {"revision": revision, "dtype": torch.float32, **options}
    saved = CLCAViTConfig.get_config_dict(path, revision=revision)[0]
    try:
        loaded = CLCAViTForImageClassification.from_pretrained(
            path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        model, info = cast("tuple[CLCAViTForImageClassification, dict[str, Any]]", loaded)  # with that information
        missing = set(info["missing_keys"])
        if rates := None if config.train_keep_rates else saved.get("train_keep_rates"):
            whole = CLCAViTForImageClassification.from_pretrained(path, **options).state_dict()
            settled = at_one_rate(whole, rates, rate_of(config))
            known = {name: settled[name] for name in missing if name in settled}
            model.load_state_dict(known, strict=False)
            missing -= known.keys()
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        text = one_sentence(error).removesuffix("For details look at the above report!").strip()
        raise ValueError(f"the weights of {path} cannot be read: {text}") from error
    mismatched = [(name, tuple(there), tuple(here)) for name, there, here in sorted(info["mismatched_keys"])]
    return Found(model, sorted(missing), mismatched)
