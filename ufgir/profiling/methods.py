"""Collect facts about methods of token reduction that help to choose one.

All facts come from the classes and from small models, so a registered method appears without further work.
"""

import inspect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from clca import CLCAViTConfig, CLCAViTForImageClassification, TokenReduction, token_schedule
from clca.reductions_clca import get_reduction, initial_state

from .macs import count_macs, dense_config, on_meta
from .targets import (
    GIGA,
    at_rate,
    bounded,
    changed,
    keep_rate_for,
    own_parameters,
    static_options,
    training_free_options,
)


# Position in the layer -> the hooks of `TokenReduction` that a method overrides there.
PLACES = {
    "before the layer": ("before_layer",),
    "in attention": ("choose_tokens",),
    "before the MLP": ("merge_tokens", "before_mlp"),
}
SMALL = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "num_labels": 2, "initializer_range": 0.5}
RATE = 0.75  # high enough that every method can keep exactly this share


class Facts(NamedTuple):
    """Facts about a method in a network.

    Attributes:
        name: name of the method.
        does: what happens to tokens.
        place: position in the layer.
        training: whether a trained ViT needs training with the method before use, in words.
        parameters: number of parameters that the method adds.
        share: what the keep rate is a share of.
        same_for_all: whether every image keeps the same number of tokens, in words.
        exports: whether ONNX and torch.export support it, in words.
        rate_later: whether a trained model can be used at another keep rate.
        keep_rate: keep rate of every stage.
        tokens: tokens at the final norm; the upper bound if they differ by image.
        macs: multiply-adds per image; the upper bound if they differ by image.
        dense_macs: multiply-adds without reduction.
    """

    name: str
    does: str
    place: str
    training: str
    parameters: int
    share: str
    same_for_all: str
    exports: str
    rate_later: bool
    keep_rate: float
    tokens: int
    macs: int
    dense_macs: int


def collect_facts(
    config: CLCAViTConfig, method: str, keep_rate: float | None, target_gmacs: float | None = None
) -> Facts:
    """Collect the facts about a method.

    Args:
        config: the network. Only its `reduction_layers` are used of its reduction.
        method: name of the method.
        keep_rate: keep rate of all stages; None with `target_gmacs`.
        target_gmacs: cost that determines the keep rate, see `keep_rate_for`.

    Raises:
        ValueError: if the network cannot use the method, or not at this rate or cost.
    """
    cls = get_reduction(method)
    dense = dense_config(config)
    plain = changed(dense, reduction=method)
    small = changed(CLCAViTConfig(**SMALL), reduction=method, reduction_layers=[3, 6, 9], keep_rate=[RATE])
    rate = keep_rate_for(plain, target_gmacs) if target_gmacs is not None else keep_rate
    assert rate is not None
    config = bounded(at_rate(plain, rate))
    fixed = cls.fixed_rate(config) is not None
    same_for_all = _with_options(static_options(small), "yes", "no")
    most = cls.max_exported_patches
    with torch.random.fork_rng(devices=[]):
        macs, dense_macs = count_macs(on_meta(config)), count_macs(on_meta(dense))
    return Facts(
        name=method,
        does=describe_effect(small),
        place=place_of(cls),
        training=_with_options(training_free_options(small), "no", "yes"),
        parameters=own_parameters(config),
        share=share_of(small),
        same_for_all=same_for_all,
        exports=same_for_all if most is None else f"up to {most} patches",
        rate_later=not fixed,
        keep_rate=rate,
        tokens=token_schedule(config).before[-1],
        macs=macs,
        dense_macs=dense_macs,
    )


def _with_options(options: dict | None, good: str, bad: str) -> str:
    """Return `good`, `good` with the options, or `bad` if there are no options."""
    if options is None:
        return bad
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{good} with {words}" if words else good


def place_of(cls: type[TokenReduction]) -> str:
    """Return the position in a layer at which a method acts."""
    own = [n for n, hooks in PLACES.items() if any(_overrides(cls, hook) for hook in hooks)]
    return " and ".join(own) or "elsewhere"


def _overrides(cls: type[TokenReduction], hook: str) -> bool:
    return inspect.getattr_static(cls, hook) is not inspect.getattr_static(TokenReduction, hook)


def share_of(config: CLCAViTConfig) -> str:
    """Return what the keep rate is a share of, from how token counts after the second stage depend on those before it.

    Args:
        config: a configuration with a `reduction` in at least two layers.
    """
    method = get_reduction(config.reduction)
    state = initial_state(config, config.image_grid)
    fewer, more = config.num_patches, 2 * config.num_patches  # numbers of tokens that might enter
    counts = [method.count(config, 1, tokens, state) for tokens in (fewer, more)]
    if counts == [fewer, more]:
        return "attended patches"
    slope = (counts[1] - counts[0]) / (more - fewer)
    if math.isclose(slope, 0, abs_tol=0.05) or math.isclose(slope, 1, abs_tol=0.05):  # a constant number stays or goes
        return "the image's patches"
    return "the current tokens"


def describe_effect(config: CLCAViTConfig) -> str:
    """Return what happens to tokens, from the assignments of a random model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLCAViTForImageClassification(config).eval()
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        pixels = torch.randn(1, config.num_channels, *size)
        with torch.no_grad():
            assignments = model(pixels, output_assignments=True).assignments
    return ", then ".join(dict.fromkeys(_kind(assignment[0]) for assignment in assignments))


def _kind(assignment: torch.Tensor) -> str:
    """Classify an assignment (M, N)."""
    if assignment.shape[0] == assignment.shape[1]:
        return "hides"
    made = assignment != 0
    several = made.sum(dim=1) > 1  # new tokens that are made of more than one
    if not several.any():
        return "drops"
    if several.sum() == 1 and several[-1]:
        return "drops, fuses the rest"
    if (made.sum(dim=0) <= 1).all():
        return "merges"
    return "mixes all"


HEAD = [
    "method",
    "tokens",
    "acts",
    "training",
    "parameters",
    "rate is of",
    "same counts",
    "exports",
    "rate later",
    "keep rate",
]
HEAD += ["in the end", "GMACs", "of dense"]


def facts_table(facts: Sequence[Facts]) -> list[list[str]]:
    """Return one table row per method."""
    rows = [HEAD]
    for one in facts:
        most = "" if one.same_for_all == "yes" else "<= "
        rows.append(
            [
                one.name,
                one.does,
                one.place,
                one.training,
                f"{one.parameters:,}",
                one.share,
                one.same_for_all,
                one.exports,
                "yes" if one.rate_later else "no",
                f"{one.keep_rate:g}",
                f"{most}{one.tokens}",
                f"{most}{one.macs / GIGA:.3f}",
                f"{one.macs / one.dense_macs:.1%}",
            ]
        )
    return rows
