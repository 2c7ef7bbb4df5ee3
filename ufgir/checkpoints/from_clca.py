"""Load CLCA checkpoints, and ViTs and DeiTs of transformers, which have the same weights, through `from_pretrained`."""

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
    """Return the checked configuration of a checkpoint, overridden by `values`.

    `CLCAViTConfig` resets token counts if rates are given, and a method's options for another method. `train_keep_rates` is reset by
    token counts, by a method with a single keep rate, and by no method.

    Args:
        path: folder or Hub repository.
        values: configuration fields.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        OSError: if there is no such checkpoint, or its configuration cannot be read.
        ValueError: if a value is out of range.
    """
    values = dict(values)
    if values.get("keep_tokens") is not None or ("reduction" in values and has_one_rate(values["reduction"])):
        values = {"train_keep_rates": None} | values
    config = CLCAViTConfig.from_pretrained(path, revision=revision, **values)
    check_config(config)
    return config


def load_clca(path: str, config: CLCAViTConfig, revision: str | None = None, **options: Any) -> Found:
    """Load the weights of a checkpoint into a model of `config`, in float32.

    Position embeddings and patch projection are resampled for another size; new tokens are initialized. If `config` has no
    `train_keep_rates`, a CLA head trained for several keep rates uses its batch norm statistics at the rate of `config`.

    Args:
        path: folder or Hub repository.
        config: configuration of the model.
        revision: branch, tag or commit of the Hub repository.
        options: further arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        OSError: if there are no weights.
        ValueError: if weights cannot be read.
    """
    options = {"revision": revision, "dtype": torch.float32, **options}
    saved = CLCAViTConfig.get_config_dict(path, revision=revision)[0]
    try:
        loaded = CLCAViTForImageClassification.from_pretrained(
            path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        model, info = cast(
            "tuple[CLCAViTForImageClassification, dict[str, Any]]", loaded
        )  # because of `output_loading_info`
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
