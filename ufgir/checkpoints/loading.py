"""Load configurations and models from CLCA and stock ViT checkpoints. Missing, mismatched or truncated weights are reported."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError

from clca import CLCAViTConfig, CLCAViTForImageClassification, TokenReduction
from clca.budget_clca import Budget
from clca.configuration_clca import check_config
from clca.heads_clca import SwitchableBatchNorm
from clca.reductions_clca import get_reduction

from ..utils.checksums import check_weights
from ..utils.options import Requirement, check_options
from ..utils.text import one_sentence


EVERYTHING = ("",)  # the beginning of every name, for `load_model(spare=...)`
HEAD = ("classifier.",)  # what a look at the tokens does not need
_NAMED = 3  # weights in a message


class Loaded(NamedTuple):
    """A model, and the names of its weights that the checkpoint lacks: they are random."""

    model: CLCAViTForImageClassification
    untrained: list[str]


def checkpoint_config(checkpoint: str, values: Mapping[str, Any], revision: str | None = None) -> CLCAViTConfig:
    """The configuration of a checkpoint with `values` in place of its own, checked.

    `CLCAViTConfig` lets counts of tokens give way to rates, and a method's options to another method. Several keep rates that it
    was trained for give way, too: to counts, to a method that has one rate only, and to none.

    Args:
        checkpoint: folder or Hub repository.
        values: fields of the configuration.
        revision: of the Hub repository.

    Raises:
        OSError: there is no such checkpoint, or its configuration cannot be read.
        ValueError: a value is out of range.
    """
    values = dict(values)
    if values.get("keep_tokens") is not None or ("reduction" in values and has_one_rate(values["reduction"])):
        values = {"train_keep_rates": None} | values
    config = CLCAViTConfig.from_pretrained(checkpoint, revision=revision, **values)
    check_config(config)
    return config


def load_model(
    checkpoint: str, config: CLCAViTConfig, revision: str | None = None, spare: Sequence[str] = (), **kwargs: Any
) -> Loaded:
    """A model that is to be used as it is, in evaluation mode, in float32. What a checkpoint may lack is drawn with a fixed seed.

    Args:
        checkpoint: folder or Hub repository.
        config: of the model wanted.
        revision: of the Hub repository.
        spare: beginnings of the names of weights that may be lacking, because nothing is asked of them.
        kwargs: more arguments of `from_pretrained`, such as `use_safetensors`.

    Raises:
        ValueError: weights that are lacking, cannot be read, or have other shapes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, untrained = load_with_report(checkpoint, config, revision, **kwargs)
    if needed := [name for name in untrained if not name.startswith(tuple(spare))]:
        of = f" of {config.reduction}" if any(".reduction." in name for name in needed) else ""
        raise ValueError(
            f"{checkpoint} is not trained for this network: it has no {some_of(needed)}{of}. They would be random: train it "
            "first."
        )
    return Loaded(model.eval(), untrained)


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def load_pretrained(
    checkpoint: str, config: CLCAViTConfig, revision: str | None = None, **kwargs: Any
) -> CLCAViTForImageClassification:
    """The weights of a checkpoint in a model that is to be trained, see `load_with_report`; weights that are lacking start as the
    model starts them.

    Raises:
        ValueError: weights that cannot be read, or of other shapes without `ignore_mismatched_sizes`.
    """
    return load_with_report(
        checkpoint,
        config,
        revision,
        advice="perhaps for another number of classes; `ignore_mismatched_sizes` starts those anew",
        **kwargs,
    ).model


def load_with_report(
    checkpoint: str,
    config: CLCAViTConfig,
    revision: str | None = None,
    *,
    ignore_mismatched_sizes: bool = False,
    advice: str = "load it with the options that it was trained with",
    **kwargs: Any,
) -> Loaded:
    """The weights of a CLCA or stock ViT checkpoint in a model made from `config`, in float32.

    Position embeddings and patch projection are resampled where `config` has another size, as `from_pretrained` does it; a token
    that is new to the checkpoint starts as the model starts it. A CLA head that was trained for several keep rates serves a
    `config` without `train_keep_rates` with its statistics at the rate of `config`.

    Args:
        checkpoint: folder or Hub repository.
        config: of the model wanted.
        revision: of the Hub repository.
        ignore_mismatched_sizes: start weights of other shapes anew.
        advice: what to do about such weights, for the message.
        kwargs: more arguments of `from_pretrained`, such as `attn_implementation`.

    Raises:
        ValueError: weights that cannot be read, are not as a training saved them, or have other shapes without
            `ignore_mismatched_sizes`.
    """
    check_weights(checkpoint)
    options = {"revision": revision, "dtype": torch.float32, **kwargs}
    saved = CLCAViTConfig.get_config_dict(checkpoint, revision=revision)[0]
    try:
        loaded = CLCAViTForImageClassification.from_pretrained(
            checkpoint, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **options
        )
        model, info = cast("tuple[CLCAViTForImageClassification, dict[str, Any]]", loaded)  # with that information
        untrained = set(info["missing_keys"])
        if rates := None if config.train_keep_rates else saved.get("train_keep_rates"):
            whole = CLCAViTForImageClassification.from_pretrained(checkpoint, **options).state_dict()
            settled = at_one_rate(whole, rates, rate_of(config))
            known = {name: settled[name] for name in untrained if name in settled}
            model.load_state_dict(known, strict=False)
            untrained -= known.keys()
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        text = one_sentence(error).removesuffix("For details look at the above report!").strip()
        raise ValueError(f"the weights of {checkpoint} cannot be read: {text}") from error
    if odd := sorted(info["mismatched_keys"]):
        if not ignore_mismatched_sizes:
            name, there, here = odd[0]
            resized = any(
                saved.get(key, getattr(config, key)) != getattr(config, key) for key in ("image_size", "patch_size")
            )
            if resized and all(".reduction." in name for name, *_ in odd):
                advice = "because of another `image_size` or `patch_size`"
            raise ValueError(
                f"weights of {checkpoint} have other shapes than the model's, {advice}: {name} is {tuple(there)} there and "
                f"{tuple(here)} here" + (f", and {len(odd) - 1} more." if len(odd) > 1 else ".")
            )
        untrained |= {name for name, *_ in odd}
    return Loaded(model, sorted(untrained))


def has_one_rate(reduction: str | None) -> bool:
    """Whether a method, or no method, may have no `train_keep_rates`: its trained models have one keep rate."""
    if reduction is None:
        return True
    return get_reduction(reduction).fixed_rate.__func__ is not TokenReduction.fixed_rate.__func__


def rate_of(config: CLCAViTConfig) -> float:
    """The keep rate of all stages that comes closest to what a model keeps in the end: 1 without a reduction."""
    if config.reduction is None:
        return 1.0
    if config.keep_tokens is None:
        return Budget.of(config).mean_rate
    return (config.keep_tokens[-1] / config.num_patches) ** (1 / len(config.reduction_layers))


def at_one_rate(weights: Mapping[str, torch.Tensor], rates: Sequence[float], rate: float) -> dict[str, torch.Tensor]:
    """Weights of a model with `train_keep_rates` as those of a model without: its batch norms have the statistics of a rate.

    Args:
        weights: a state dict.
        rates: its `train_keep_rates`.
        rate: in (0, 1]; 1 for a model without a reduction.
    """
    settled = {}
    for name, value in weights.items():
        place, _, kind = name.rpartition(".")
        if kind not in ("rate_mean", "rate_var"):
            settled[name] = value
            continue
        norm = SwitchableBatchNorm(value.shape[1], sorted(rates))
        settled[f"{place}.running_{kind.removeprefix('rate_')}"] = norm.at(rate, value)
        settled[f"{place}.num_batches_tracked"] = torch.tensor(0)
    return settled


def new_config(values: Mapping[str, Any]) -> CLCAViTConfig:
    """The configuration of a new model: `values`, and defaults as ViT-B/16 is trained with."""
    width = values.get("hidden_size", CLCAViTConfig.hidden_size)
    return CLCAViTConfig(**{"layer_norm_eps": 1e-6, "intermediate_size": 4 * width, **values})


def load_config(model: str | None, values: dict[str, Any]) -> CLCAViTConfig:
    """The configuration of a checkpoint, or of ViT-B/16, with `values` in place of its own; checked. Values without effect are
    named in a warning.

    Raises:
        ValueError: there is no such checkpoint, or a value is out of range.
    """
    config = read_config(model, values)
    check_meaning(values, [config])
    return config


def read_config(model: str | None, values: dict[str, Any]) -> CLCAViTConfig:
    """As `load_config`, without the warning: of several configurations, values may have an effect on others."""
    if model is None:
        return new_config({"num_labels": 1000, **values})
    if not Path(model).is_dir() and Path(model).exists():
        raise ValueError(f"`MODEL` must be a folder or a Hub repository, got the file {model}.")
    if Path(model).is_dir() and not Path(model, "config.json").is_file():  # transformers would take its defaults
        raise ValueError(f"there is no checkpoint in the folder {model}: it has no config.json.")
    try:
        return checkpoint_config(model, values)
    except OSError as error:
        if Path(model).is_dir():
            raise ValueError(f"the config.json of {model} cannot be read: {one_sentence(error)}") from error
        raise ValueError(
            f"there is no checkpoint {model}: neither a folder with config.json nor on the Hub."
        ) from error


REQUIREMENTS = (  # of the fields of a configuration
    Requirement(
        ("keep_rate", "keep_tokens", "reduction_kwargs"), "a `reduction`", lambda config: config.reduction is not None
    ),
    Requirement(
        ("reduction_layers",),
        "a `reduction`, a `cross_layer_cache` or another `head` than linear",
        lambda config: config.uses_reduction_layers,
    ),
    Requirement(
        ("cache_gap", "cache_pool_cls", "cache_pool_clr", "cache_recover_at_last"),
        "a `cross_layer_cache`",
        lambda config: config.cross_layer_cache,
    ),
)


def check_meaning(values: Mapping[str, Any], configs: Sequence[CLCAViTConfig]) -> None:
    """Warn of fields that have no effect on any of some configurations, such as a keep rate where nothing is reduced.

    Args:
        values: fields; None is as if it were not there.
        configs: that came of them.
    """
    given = [name for name, value in values.items() if value is not None]
    of_any = [r._replace(holds=lambda configs, holds=r.holds: any(map(holds, configs))) for r in REQUIREMENTS]
    check_options(configs, given, of_any)
