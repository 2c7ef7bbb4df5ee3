"""Convert models trained for several keep rates to one of them."""

from collections.abc import Mapping, Sequence

import torch

from clca import CLCAViTConfig, TokenReduction
from clca.budget_clca import Budget
from clca.heads_clca import SwitchableBatchNorm
from clca.reductions_clca import get_reduction


def has_one_rate(reduction: str | None) -> bool:
    """Return whether trained models of a method (or of no method) have a single keep rate and cannot have `train_keep_rates`."""
    if reduction is None:
        return True
    return get_reduction(reduction).fixed_rate.__func__ is not TokenReduction.fixed_rate.__func__


def rate_of(config: CLCAViTConfig) -> float:
    """Return the keep rate per stage that gives the final number of tokens of a model; 1 without a reduction."""
    if config.reduction is None:
        return 1.0
    if config.keep_tokens is None:
        return Budget.of(config).mean_rate
    return (config.keep_tokens[-1] / config.num_patches) ** (1 / len(config.reduction_layers))


def at_one_rate(weights: Mapping[str, torch.Tensor], rates: Sequence[float], rate: float) -> dict[str, torch.Tensor]:
    """Convert the weights of a model with `train_keep_rates` to one without: batch norms get the statistics of one rate.

    Args:
        weights: state dict.
        rates: its `train_keep_rates`.
        rate: keep rate in (0, 1]; 1 for a model without a reduction.
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
