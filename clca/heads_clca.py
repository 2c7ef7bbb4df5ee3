"""Heads: what classifies, and what it reads of which layers.

CLA and IFA aggregate CLS tokens of several layers, Head2Toe (H2T) and Visual Query Tuning (VQT) take further features out of
the layers by a probe and classify all of them linearly.

Shapes: B batch, N tokens, M layers that are read, D width, Q queries, K classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .cache_clca import mean_rows
from .configuration_clca import CLCAViTConfig, as_pair
from .reduction_base import AttentionContext, TokenState


class SwitchableBatchNorm(nn.Module):
    """BatchNorm that keeps running statistics for each of several keep rates apart, since CLS is distributed otherwise
    after each; scale and shift are shared (as in https://huggingface.co/papers/1812.08928).

    Training at a rate moves the statistics of that rate only. Evaluation at a rate between two takes statistics between
    theirs, linear in the logarithm of the rate, and outside of all those of the nearest.

    Args:
        num_features: channels C.
        rates: R keep rates, ascending.
    """

    def __init__(self, num_features: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = list(rates)
        self.eps, self.momentum = 1e-5, 0.1  # those of `nn.BatchNorm1d`
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("rate_mean", torch.zeros(len(rates), num_features))
        self.register_buffer("rate_var", torch.ones(len(rates), num_features))

    def init_weights(self) -> None:
        for zeros, ones in ((self.bias, self.weight), (self.rate_mean, self.rate_var)):
            init.zeros_(zeros)
            init.ones_(ones)

    def forward(self, hidden: torch.Tensor, rate: float) -> torch.Tensor:
        """Normalise `hidden` (B, C, ...) at a keep rate.

        Raises:
            ValueError: training at a rate that is not one of the module's.
        """
        if self.training:
            if rate not in self.rates:
                raise ValueError(
                    f"`keep_rate` {rate} is none of `train_keep_rates` {self.rates}, whose statistics the head keeps. Pass "
                    "one of them to the forward of each training step (`ufgir.elastic.draw_keep_rate`)."
                )
            row = self.rates.index(rate)
            mean, var = self.rate_mean[row], self.rate_var[row]
        else:
            mean, var = self.at(rate, self.rate_mean), self.at(rate, self.rate_var)
        return nn.functional.batch_norm(
            hidden, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def at(self, rate: float, statistics: torch.Tensor) -> torch.Tensor:
        """Statistics (C,) at any rate, of those (R, C) at the module's rates."""
        above = sum(own < rate for own in self.rates)
        if above == 0 or above == len(self.rates):
            return statistics[min(above, len(self.rates) - 1)]
        low, high = self.rates[above - 1], self.rates[above]
        return statistics[above - 1].lerp(statistics[above], math.log(rate / low) / math.log(high / low))


class CLAHead(nn.Module):
    """Cross-layer aggregation (https://huggingface.co/papers/2501.00243): a depth-wise convolution over the layers mixes
    the CLS tokens channel by channel, a point-wise one classifies.

    BatchNorm -> depth-wise Conv1d, kernel M, `cla_multiplier` channels out per channel in -> BatchNorm -> GELU -> classes.
    With `config.train_keep_rates` each BatchNorm is a `SwitchableBatchNorm`.
    """

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size * config.cla_multiplier
        rates = config.train_keep_rates
        self.norm_in = SwitchableBatchNorm(width, rates) if rates else nn.BatchNorm1d(width)
        self.aggregate = nn.Conv1d(width, inner, kernel_size=len(config.aggregation_layers), groups=width)
        self.norm_out = SwitchableBatchNorm(inner, rates) if rates else nn.BatchNorm1d(inner)
        self.activation = nn.GELU()
        self.out_proj = nn.Conv1d(inner, num_labels, kernel_size=1)

    def forward(self, cls_tokens: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, that come from a backbone at a keep rate, to logits (B, K)."""
        if self.training and cls_tokens.shape[0] < 2:
            raise ValueError(
                "`pixel_values` must hold at least two images to train `head`='cla': its BatchNorm needs more than one. "
                "Use a larger batch, or drop the last incomplete one (`dataloader_drop_last`)."
            )
        at_rate = (rate,) if isinstance(self.norm_in, SwitchableBatchNorm) else ()
        hidden = self.norm_in(cls_tokens.transpose(1, 2), *at_rate)  # (B, D, M)
        hidden = self.activation(self.norm_out(self.aggregate(hidden), *at_rate))  # (B, D * multiplier, 1)
        return self.out_proj(hidden).squeeze(-1)


class IFAHead(nn.Module):
    """Intermediate feature aggregation: one learnt weighted sum over the layers, then a linear classifier.

    Linear(M, 1) over the layers -> ReLU -> LayerNorm -> classes.
    """

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__()
        self.aggregate = nn.Linear(len(config.aggregation_layers), 1)
        self.activation = nn.ReLU()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, to logits (B, K)."""
        hidden = self.aggregate(cls_tokens.transpose(1, 2)).squeeze(-1)  # (B, D)
        return self.out_proj(self.layernorm(self.activation(hidden)))


class SelectedLinear(nn.Module):
    """A linear classifier on some of the features, (B, F) to (B, K); which, is saved with it."""

    def __init__(self, num_features: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("selected", torch.arange(num_features))
        self.linear = nn.Linear(num_features, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features[:, self.selected])


def build_head(config: CLCAViTConfig) -> nn.Module:
    """The classifier that a configuration asks for. CLA and IFA take the CLS tokens (B, M, D), the others features (B, F)."""
    if config.num_labels == 0:
        return nn.Identity()
    if config.head == "cla":
        return CLAHead(config, config.num_labels)
    if config.head == "ifa":
        return IFAHead(config, config.num_labels)
    if config.num_selected_features is not None:
        return SelectedLinear(config.num_selected_features, config.num_labels)
    return nn.Linear(num_features(config), config.num_labels)


def num_features(config: CLCAViTConfig) -> int:
    """Width F of what a linear head reads."""
    width, layers = config.hidden_size, len(config.probe_layers)
    if config.head == "h2t":
        return layers * (3 * width + config.intermediate_size) + 2 * width
    if config.head == "vqt":
        return (layers * config.num_query_tokens + 1) * width
    return width


def head_weight(head: nn.Module) -> torch.Tensor:
    """Weight (K, features, ...) of the last layer of a head, which the group lasso acts on."""
    # By attribute, not by class: peft wraps the head.
    return getattr(head, "linear", getattr(head, "out_proj", head)).weight


def best_features(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """Indices, ascending, of the share of features whose weights (K, F) have the largest norms: Head2Toe's selection."""
    norms = weight.norm(dim=0)
    return norms.topk(max(1, round(fraction * len(norms)))).indices.sort().values


class LayerTrace(NamedTuple):
    """What a probe may look at in a layer. Rows may be fewer after a reduction inside the layer."""

    normed: torch.Tensor  # input of the attention, (B, N, D)
    attended: torch.Tensor  # what the attention adds, (B, N, D)
    inner: torch.Tensor | None  # hidden units of the MLP, (B, N, intermediate_size); for H2T only
    transformed: torch.Tensor  # what the MLP adds, (B, N, D)
    visible: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # of the first, second, other two
    context: AttentionContext
    state: TokenState  # of the rows that the context's keys belong to


class H2TProbe(nn.Module):
    """Head2Toe (https://huggingface.co/papers/2201.03529): the means over tokens of four tensors of a layer."""

    def forward(self, answer: Callable, trace: LayerTrace) -> torch.Tensor:
        """Features (B, 3 D + intermediate_size) of unit length."""
        before, between, after = trace.visible
        means = (
            mean_tokens(trace.normed, before),
            mean_tokens(trace.attended, between),
            mean_tokens(trace.inner, after),
            mean_tokens(trace.transformed, after),
        )
        return nn.functional.normalize(torch.cat(means, dim=-1), dim=-1)


class VQTProbe(nn.Module):
    """Visual Query Tuning (https://huggingface.co/papers/2212.03220): learnt queries look at a layer's tokens and pass
    through the layer, while the tokens do not see them."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.config = config
        self.queries = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def init_weights(self) -> None:
        patch_height, patch_width = as_pair(self.config.patch_size)
        bound = (6 / (3 * patch_height * patch_width + self.config.hidden_size)) ** 0.5
        init.uniform_(self.queries, -bound, bound)

    def forward(self, answer: Callable | None = None, trace: LayerTrace | None = None) -> torch.Tensor:
        """The queries (B, Q, D) after the layer, which `answer` takes them through; without it as they were learnt,
        (1, Q, D)."""
        if answer is None:
            return self.queries
        return answer(self.queries.expand(trace.normed.shape[0], -1, -1), trace.context, trace.state)


def mean_tokens(tokens: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Mean (B, D) over all rows of `tokens` (B, N, D) that may be averaged."""
    return mean_rows(tokens, 0, tokens.shape[1], visible).squeeze(1)
