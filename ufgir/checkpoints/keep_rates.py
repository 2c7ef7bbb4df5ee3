"""Models trained for several keep rates, at one of them."""

from collections.abc import Mapping, Sequence

import torch

from clca import CLCAViTConfig, TokenReduction
from clca.budget_clca import Budget
from clca.heads_clca import SwitchableBatchNorm
from clca.reductions_clca import get_reduction


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
