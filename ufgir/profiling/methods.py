"""What there is to know about methods of token reduction before one is chosen, asked of their classes and of small models.

Nothing here is written down by hand: a method that is registered has a row like all others.
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


# Where a method acts -> the places, see `clca.reduction_base`, that it overrides.
PLACES = {
    "before the layer": ("before_layer",),
    "in attention": ("choose_rows",),
    "before the MLP": ("merge_rows", "before_mlp"),
}
SMALL = {"image_size": 32, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "num_labels": 2, "initializer_range": 0.5}
RATE = 0.75  # of what is tried: few enough tokens go that all methods can do as they are told


class Facts(NamedTuple):
    """About a method in a network.

    Attributes:
        name: of the method.
        does: what becomes of tokens.
        place: where in a layer.
        training: whether a trained ViT needs more training before it can be used with the method, in words.
        parameters: that the method brings.
        share: what the keep rate is a share of.
        same_for_all: whether every image keeps as many tokens, in words.
        exports: whether a model becomes a file of ONNX or torch.export, in words.
        rate_later: whether a trained model can be used at another keep rate.
        keep_rate: in the network, of every stage.
        tokens: that the final norm sees, the most if they differ by image.
        macs: multiply-adds of an image, the most if they differ by image.
        dense_macs: of the network without reduction.
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


def facts_about(
    config: CLCAViTConfig, method: str, keep_rate: float | None, target_gmacs: float | None = None
) -> Facts:
    """Look at a method.

    Args:
        config: the network; its own reduction is not read, its `reduction_layers` are.
        method: name.
        keep_rate: of all stages; None with a `target_gmacs`.
        target_gmacs: to find the keep rate by, see `keep_rate_for`.

    Raises:
        ValueError: the network cannot have the method, or not at this rate or cost.
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
    most = cls.most_exported_patches
    with torch.random.fork_rng(devices=[]):
        macs, dense_macs = count_macs(on_meta(config)), count_macs(on_meta(dense))
    return Facts(
        name=method,
        does=what_it_does(small),
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
    """`good`, `good` with options, or `bad`."""
    if options is None:
        return bad
    told = ", ".join(f"{name}={value}" for name, value in options.items())
    return f"{good} with {told}" if told else good


def place_of(cls: type[TokenReduction]) -> str:
    """Where in a layer a class acts."""
    own = [n for n, hooks in PLACES.items() if any(_overrides(cls, hook) for hook in hooks)]
    return " and ".join(own) or "elsewhere"


def _overrides(cls: type[TokenReduction], hook: str) -> bool:
    return inspect.getattr_static(cls, hook) is not inspect.getattr_static(TokenReduction, hook)


def share_of(config: CLCAViTConfig) -> str:
    """What a keep rate is a share of: how the tokens after the second stage follow from those before it.

    Args:
        config: with a `reduction` in two layers or more.
    """
    method = get_reduction(config.reduction)
    state = initial_state(config, config.image_grid)
    fewer, more = config.num_patches, 2 * config.num_patches  # rows that might enter
    counts = [method.count(config, 1, rows, state) for rows in (fewer, more)]
    if counts == [fewer, more]:
        return "attended patches"
    slope = (counts[1] - counts[0]) / (more - fewer)
    if math.isclose(slope, 0, abs_tol=0.05) or math.isclose(slope, 1, abs_tol=0.05):  # as many stay, or go
        return "the image's patches"
    return "the current tokens"


def what_it_does(config: CLCAViTConfig) -> str:
    """What becomes of tokens, by what a random model reports of its stages."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLCAViTForImageClassification(config).eval()
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
        pixels = torch.randn(1, config.num_channels, *size)
        with torch.no_grad():
            assignments = model(pixels, output_assignments=True).assignments
    return ", then ".join(dict.fromkeys(_kind(assignment[0]) for assignment in assignments))


def _kind(assignment: torch.Tensor) -> str:
    """Of an assignment (M, N)."""
    if assignment.shape[0] == assignment.shape[1]:
        return "hides"
    made = assignment != 0
    several = made.sum(dim=1) > 1  # new rows that are made of more than one
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
    """One row a method."""
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
