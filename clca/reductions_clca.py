"""Registry of reduction methods, and the token counts of each layer that follow from a configuration.

To add a method, write a file `reduction_<name>.py`, and add an import and an entry of `REDUCTIONS` here.
"""

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

from .budget_clca import Budget, check_rates
from .cache_clca import recovery_layers, tokens_per_entry
from .reduction_atc import ATCReduction
from .reduction_ats import ATSReduction
from .reduction_base import TokenReduction, TokenState
from .reduction_dmaws import DMAWSReduction
from .reduction_dpcknn import DPCKNNReduction
from .reduction_dyvit import DyViTReduction
from .reduction_edar import EDARReduction
from .reduction_evit import EViTReduction
from .reduction_glsf import GLSFReduction
from .reduction_heuristic import HeuristicReduction
from .reduction_kmedoids import KMedoidsReduction
from .reduction_maws import MAWSReduction
from .reduction_mctf import MCTFReduction
from .reduction_nfedar import NFEDARReduction
from .reduction_patchmerger import PatchMergerReduction
from .reduction_pitome import PiToMeReduction
from .reduction_sinkhorn import SinkhornReduction
from .reduction_sit import SiTReduction
from .reduction_tofu import ToFuReduction
from .reduction_tome import ToMeReduction
from .reduction_topk import TopKReduction


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


REDUCTIONS: dict[str, type[TokenReduction]] = {
    "atc": ATCReduction,
    "ats": ATSReduction,
    "dmaws": DMAWSReduction,
    "dpcknn": DPCKNNReduction,
    "dyvit": DyViTReduction,
    "edar": EDARReduction,
    "evit": EViTReduction,
    "glsf": GLSFReduction,
    "heuristic": HeuristicReduction,
    "kmedoids": KMedoidsReduction,
    "maws": MAWSReduction,
    "mctf": MCTFReduction,
    "nfedar": NFEDARReduction,
    "patchmerger": PatchMergerReduction,
    "pitome": PiToMeReduction,
    "sinkhorn": SinkhornReduction,
    "sit": SiTReduction,
    "tofu": ToFuReduction,
    "tome": ToMeReduction,
    "topk": TopKReduction,
}


def get_reduction(name: str | None) -> type[TokenReduction]:
    """Return the class of a method by name, or `TokenReduction`, which does nothing, for None.

    Raises:
        ValueError: if the name is unknown.
    """
    if name is None:
        return TokenReduction
    if name in REDUCTIONS:
        return REDUCTIONS[name]
    available = ", ".join(sorted(REDUCTIONS))
    raise ValueError(
        f"Unknown `reduction` {name!r}. Available: {available}. Register your own methods with "
        "`clca.register_reduction` before you create or load a configuration that uses them."
    )


def register_reduction(cls: type[TokenReduction]) -> type[TokenReduction]:
    """Register your own method under its `name`. Can be used as a class decorator.

    If the same class is defined again, for example because a notebook cell runs twice, it replaces the previous one.

    Raises:
        ValueError: if `cls` is not a subclass of `TokenReduction`, its `name` is not a lower-case identifier, or the
            name is taken.
    """
    if not (isinstance(cls, type) and issubclass(cls, TokenReduction)):
        raise ValueError(f"`cls` must be a subclass of `TokenReduction`, got {cls!r}.")
    if not isinstance(cls.name, str) or not cls.name.isidentifier() or cls.name != cls.name.lower():
        raise ValueError(f"`name` of {cls.__name__} must be a lower-case identifier, got {cls.name!r}.")
    taken = REDUCTIONS.get(cls.name)
    again = taken is not None and (taken.__module__, taken.__qualname__) == (cls.__module__, cls.__qualname__)
    if taken is not None and not again:
        raise ValueError(f"`name` {cls.name!r} is taken. Choose another one.")
    REDUCTIONS[cls.name] = cls
    return cls


def checked_budget(config: "CLCAViTConfig", keep_rate: float | Sequence[float] | None) -> Budget:
    """Return the budget of a model: of its configuration, or of a `keep_rate` that replaces it, after checking the
    latter.

    Args:
        config: the configuration.
        keep_rate: one rate for all stages or one per stage; None for the configuration's budget.

    Raises:
        ValueError: if a rate is not in (0, 1], the number of rates is wrong, there is no reduction, or its keep rate
            is fixed.
    """
    if keep_rate is None:
        return Budget.of(config)
    if config.reduction is None:
        raise ValueError(f"`keep_rate` {keep_rate} has no effect without a `reduction`. Remove it, or set a method.")
    method = get_reduction(config.reduction)
    reason = method.fixed_rate(config)
    if reason is not None:
        raise ValueError(
            f"`keep_rate` of `reduction`={config.reduction!r} cannot be changed: {reason}. Train a model for each rate."
        )
    rates = (keep_rate,) if isinstance(keep_rate, Real) else keep_rate
    if not isinstance(rates, Sequence):
        raise ValueError(f"`keep_rate` must be a number or a list of them, got {keep_rate!r}.")
    rates = [float(rate) if isinstance(rate, Real) and not isinstance(rate, bool) else rate for rate in rates]
    check_rates(rates)
    stages = len(method.layers(config))
    if len(rates) not in (1, stages):
        raise ValueError(
            f"`keep_rate` must hold one value for all stages or one per stage, {stages} of them, got {list(rates)}."
        )
    return Budget(tuple(rates))


class TokenSchedule(NamedTuple):
    """Token counts of one image, including CLS and all other tokens.

    Attributes:
        before: number of tokens that enter each layer, and of those that enter the final norm.
        after: number of tokens that leave each layer, before cached tokens are appended.
    """

    before: list[int]
    after: list[int]


def token_schedule(
    config: "CLCAViTConfig", num_patches: int | None = None, keep_rate: float | Sequence[float] | None = None
) -> TokenSchedule:
    """Compute the number of tokens in each layer from the configuration alone.

    At 448 px, ViT-B/16, EViT at keep rate 0.1 in layers 3, 6, 9, with a cache of GAP and one CLR: 786 tokens enter the
    layers 0-3; layer 3 keeps CLS, ceil(0.1 * 785) = 79 others and one fused token, 81, and 3 * 2 cached tokens are
    retrieved, 87; layer 6 leaves 1 + 9 + 1 = 11, and 17 with the cache; layer 9 leaves 4, and 10; layer 10 retrieves 2
    more: 12.

    Args:
        config: the configuration.
        num_patches: number of patches of the image, if it differs from `config.image_size`.
        keep_rate: keep rate of the forward pass, if it differs from the configuration's.

    Raises:
        ValueError: if the forward pass would refuse the keep rate.
    """
    method = get_reduction(config.reduction)
    stages = {layer: stage for stage, layer in enumerate(method.layers(config))} if config.reduction else {}
    recovery = recovery_layers(config)
    grid = config.image_grid if num_patches is None else (1, num_patches)
    state = initial_state(config, grid, budget=checked_budget(config, keep_rate))
    tokens = config.num_prefix_tokens + state.num_patches + config.num_clr_tokens
    cached = 0
    before, after = [], []
    for index in range(config.num_hidden_layers):
        before.append(tokens)
        if index in stages:
            tokens = method.count(config, stages[index], tokens, state)
        after.append(tokens)
        if index in recovery:
            tokens += cached
            state = state._replace(suffix=state.suffix + cached)
            cached = 0
        if recovery and index < recovery[-1]:
            cached += tokens_per_entry(config)
    return TokenSchedule([*before, tokens], after)


def initial_state(
    config: "CLCAViTConfig", grid: tuple[int, int], record_assignments: bool = False, budget: Budget | None = None
) -> TokenState:
    """Return the state of a newly embedded sequence.

    Args:
        config: the configuration.
        grid: (rows, columns) of patches.
        record_assignments: whether stages report their assignments.
        budget: what the stages keep; by default the configuration's budget.
    """
    num_tokens = config.num_prefix_tokens + grid[0] * grid[1] + config.num_clr_tokens
    return TokenState(
        budget=budget or Budget.of(config),
        grid=grid,
        prefix=config.num_prefix_tokens,
        suffix=config.num_clr_tokens,
        pool_len=num_tokens if config.cache_pool_clr else num_tokens - config.num_clr_tokens,
        record_assignments=record_assignments,
    )
