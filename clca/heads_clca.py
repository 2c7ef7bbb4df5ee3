"""Heads: what classifies, and what it reads of which layers.

| head | reads | classifies by |
| --- | --- | --- |
| `linear` | what `config.pooling` makes of the last tokens | a linear layer |
| `cla` | CLS after several layers | a depth-wise and a point-wise convolution |
| `ifa` | CLS after several layers | a learned weighted sum, and a linear layer |
| `h2t` | means over the tokens of four tensors of each probed layer | a linear layer |
| `vqt` | learned queries that pass through each probed layer | a linear layer |

Everything that the configuration, the layers and the model have to know of a head stands in its class, and `HEADS` lists
them all: another head is one class more, and one line there.

Shapes: B batch, N tokens, M layers that are read, D width, Q queries, F features, K classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .attention_clca import AttentionContext
from .budget_clca import as_pair
from .cache_clca import mean_rows


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


# Probes: modules in the layers, which take out of them what a head reads.


class LayerTrace(NamedTuple):
    """What a probe may look at in a layer. Tokens may be fewer after a reduction inside the layer."""

    normed: torch.Tensor  # input of the attention, (B, N, D)
    attended: torch.Tensor  # what the attention adds, (B, N, D)
    inner: torch.Tensor | None  # hidden units of the MLP, (B, N, intermediate_size), for probes that read tokens
    transformed: torch.Tensor  # what the MLP adds, (B, N, D)
    visible: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]  # of the first, second, other two
    context: AttentionContext


class Probe(nn.Module):
    """What a head puts into each of `config.probe_layers`.

    Attributes:
        reads_tokens: it looks at all tokens of the layer, those that leave in it too, and at the hidden units of its MLP. The
            layer then computes them all.

    Args:
        config: the model's configuration.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(self, config: "CLCAViTConfig") -> None:
        super().__init__()
        self.config = config

    def forward(self, answer: Callable, trace: LayerTrace) -> torch.Tensor:
        """Features (B, ...) of one layer, of what is seen there. `answer(queries, context)` takes tokens (B, Q, D) of the
        probe's own through the layer: they attend to its tokens, not to each other."""
        raise NotImplementedError


class H2TProbe(Probe):
    """Head2Toe (https://huggingface.co/papers/2201.03529): the means over tokens of four tensors of a layer."""

    def forward(self, answer: Callable, trace: LayerTrace) -> torch.Tensor:
        """Features (B, 3 D + intermediate_size) of unit length."""
        before, between, after = trace.visible
        assert trace.inner is not None  # since it reads tokens
        means = (
            mean_tokens(trace.normed, before),
            mean_tokens(trace.attended, between),
            mean_tokens(trace.inner, after),
            mean_tokens(trace.transformed, after),
        )
        return nn.functional.normalize(torch.cat(means, dim=-1), dim=-1)


class VQTProbe(Probe):
    """Visual Query Tuning (https://huggingface.co/papers/2212.03220): learned queries look at a layer's tokens and pass
    through the layer, while the tokens do not see them."""

    reads_tokens = False

    def __init__(self, config: "CLCAViTConfig") -> None:
        super().__init__(config)
        self.queries = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def init_weights(self) -> None:
        """Draw the queries from a uniform distribution that depends on the patch size."""
        patch_height, patch_width = as_pair(self.config.patch_size)
        bound = (6 / (3 * patch_height * patch_width + self.config.hidden_size)) ** 0.5
        init.uniform_(self.queries, -bound, bound)

    def forward(self, answer: Callable | None = None, trace: LayerTrace | None = None) -> torch.Tensor:
        """The queries (B, Q, D) after the layer, which `answer` takes them through; without it as they were learned,
        (1, Q, D)."""
        if answer is None:
            return self.queries
        assert trace is not None  # comes with `answer`
        return answer(self.queries.expand(trace.normed.shape[0], -1, -1), trace.context)


# Heads.


class NetworkEnds(NamedTuple):
    """The two ends of a network, beside what probes took out of its layers."""

    embeddings: torch.Tensor  # that enter the first layer, (B, N, D)
    hidden_states: torch.Tensor  # that leave the last layer, (B, N, D)
    normalised: torch.Tensor  # the same after the final norm, (B, N, D)
    visible: torch.Tensor | None  # which of these may be averaged, (B, N); None for all


class Head:
    """What a head reads of the network, and the classifier that it puts on that. A subclass is listed in `HEADS`, under the
    name that `config.head` knows it by; it is a module itself where its classifier is more than a linear layer.

    A module of a classifier or a probe that has parameters of its own and a method `init_weights` is initialised by that,
    after its parts. (In code from the Hub transformers passes over modules without parameters of their own.)

    Attributes:
        reads: what the classifier is called with.
            `pooled`: what `config.pooling` makes of the last tokens, (B, D).
            `cls_tokens`: CLS after each of `config.aggregation_layers`, before the final norm, (B, M, D).
            `probes`: what `collect` makes of what a `probe` in each of `config.probe_layers` has taken out, (B, F).
        before_norm: it reads CLS before the final norm, and nothing behind that. The norm stays in the checkpoint, frozen.
        probe: the module that `reads="probes"` puts into layers. None for the other heads.
    """

    reads: ClassVar[str] = "pooled"
    before_norm: ClassVar[bool] = False
    probe: ClassVar[type[Probe] | None] = None

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        """Refuse configurations that the head cannot serve, beyond what follows from its attributes.

        Raises:
            ValueError: whatever a subclass refuses.
        """

    @classmethod
    def reads_layers(cls) -> bool:
        """Whether it reads more of the network than its end."""
        return cls.reads != "pooled"

    @classmethod
    def reads_only_cls(cls, config: "CLCAViTConfig") -> bool:
        """Whether CLS is all that it reads of the last layer."""
        return cls.before_norm or (cls.reads == "pooled" and config.pooling == "cls")

    @classmethod
    def takes_rate(cls, config: "CLCAViTConfig") -> bool:
        """Whether the classifier's second argument is the keep rate of the forward."""
        return False

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        """Width F of what a linear classifier reads."""
        return config.hidden_size

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        """Features (B, ...), to be joined along their last axis, of what the probes took out of the layers, one tensor for
        each, and of the ends of the network. The tensors may lie on different devices."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: "CLCAViTConfig") -> nn.Module:
        """The classifier, to logits (B, K). By default a linear layer; with `num_labels=0` what is read, as it is."""
        if config.num_labels == 0:
            return nn.Identity()
        if config.num_selected_features is not None:
            return SelectedLinear(config.num_selected_features, config.num_labels)
        return nn.Linear(cls.num_features(config), config.num_labels)


class SelectedLinear(nn.Module):
    """A linear classifier on a subset of the features, (B, F) to (B, K); their indices are saved as a buffer."""

    selected: torch.Tensor

    def __init__(self, num_features: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("selected", torch.arange(num_features))
        self.linear = nn.Linear(num_features, num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features[:, self.selected])


class LinearHead(Head):
    """A linear layer on pooled features."""


class SwitchableBatchNorm(nn.Module):
    """BatchNorm that keeps running statistics for each of several keep rates apart, since CLS is distributed otherwise
    after each; scale and shift are shared (as in https://huggingface.co/papers/1812.08928).

    Training at a rate moves the statistics of that rate only. Evaluation at a rate between two takes statistics between
    theirs, linear in the logarithm of the rate, and outside of all those of the nearest.

    Args:
        num_features: channels C.
        rates: R keep rates, ascending.
    """

    rate_mean: torch.Tensor  # (R, C)
    rate_var: torch.Tensor

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
                    "one of them to the forward of each training step (`ufgir.training.draw_keep_rate`)."
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


class AggregationHead(Head, nn.Module):
    """Base of the heads that are modules on the CLS tokens of several layers."""

    reads = "cls_tokens"
    before_norm = True

    @classmethod
    def build(cls, config: "CLCAViTConfig") -> nn.Module:
        return cls(config, config.num_labels)


class LayerConvolution(nn.Conv1d):
    """A depth-wise convolution over the layers."""

    def init_weights(self) -> None:
        """Draw the kernels: a few numbers per channel need more than the range meant for wide layers."""
        bound = self.kernel_size[0] ** -0.5
        init.uniform_(self.weight, -bound, bound)


class CLAHead(AggregationHead):
    """Cross-layer aggregation (https://huggingface.co/papers/2501.00243): a depth-wise convolution over the layers mixes
    the CLS tokens channel by channel, a point-wise one classifies.

    BatchNorm -> depth-wise Conv1d, kernel M, `cla_multiplier` channels out per channel in -> BatchNorm -> GELU -> classes.
    With `config.train_keep_rates` each BatchNorm is a `SwitchableBatchNorm`.
    """

    def __init__(self, config: "CLCAViTConfig", num_labels: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size * config.cla_multiplier
        rates = config.train_keep_rates
        self.norm_in = SwitchableBatchNorm(width, rates) if rates else nn.BatchNorm1d(width)
        self.aggregate = LayerConvolution(width, inner, kernel_size=len(config.aggregation_layers), groups=width)
        self.norm_out = SwitchableBatchNorm(inner, rates) if rates else nn.BatchNorm1d(inner)
        self.activation = nn.GELU()
        self.out_proj = nn.Conv1d(inner, num_labels, kernel_size=1)

    @classmethod
    def takes_rate(cls, config: "CLCAViTConfig") -> bool:
        return bool(config.train_keep_rates)

    def forward(self, cls_tokens: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, that come from a backbone at a keep rate, to logits (B, K).

        Raises:
            ValueError: training with a single image.
        """
        if self.training and cls_tokens.shape[0] < 2:
            raise ValueError(
                "`pixel_values` must hold at least two images to train `head`='cla': its BatchNorm needs more than one. "
                "Use a larger batch, or drop the last incomplete one (`dataloader_drop_last`)."
            )
        at_rate = (rate,) if isinstance(self.norm_in, SwitchableBatchNorm) else ()
        hidden = self.norm_in(cls_tokens.transpose(1, 2), *at_rate)  # (B, D, M)
        hidden = self.activation(self.norm_out(self.aggregate(hidden), *at_rate))  # (B, D * multiplier, 1)
        return self.out_proj(hidden).squeeze(-1)


class IFAHead(AggregationHead):
    """Intermediate feature aggregation: one learned weighted sum over the layers, then a linear classifier.

    Linear(M, 1) over the layers -> ReLU -> LayerNorm -> classes.
    """

    def __init__(self, config: "CLCAViTConfig", num_labels: int) -> None:
        super().__init__()
        self.aggregate = nn.Linear(len(config.aggregation_layers), 1)
        self.activation = nn.ReLU()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, to logits (B, K)."""
        hidden = self.aggregate(cls_tokens.transpose(1, 2)).squeeze(-1)  # (B, D)
        return self.out_proj(self.layernorm(self.activation(hidden)))


class H2THead(Head):
    """Head2Toe: a linear layer on what its probes take out, and on the mean token at both ends, each of unit length."""

    reads = "probes"
    probe = H2TProbe

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        width = config.hidden_size
        return len(config.probe_layers) * (3 * width + config.intermediate_size) + 2 * width

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        first, last = ends.embeddings.mean(dim=1), mean_tokens(ends.normalised, ends.visible)
        return [nn.functional.normalize(first, dim=-1), *probed, nn.functional.normalize(last, dim=-1)]


class VQTHead(Head):
    """Visual Query Tuning: a linear layer on the queries of each layer and on the last CLS, each part of unit length."""

    reads = "probes"
    before_norm = True
    probe = VQTProbe

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        return (len(config.probe_layers) * config.num_query_tokens + 1) * config.hidden_size

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        parts = [*(answers.flatten(1) for answers in probed), ends.hidden_states[:, 0]]
        return [nn.functional.normalize(part, dim=-1) for part in parts]


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "cla": CLAHead,
    "ifa": IFAHead,
    "h2t": H2THead,
    "vqt": VQTHead,
}


def heads_reading(what: str) -> tuple[str, ...]:
    """Names of the heads whose `reads` is `pooled`, `cls_tokens` or `probes`."""
    return tuple(name for name, head in HEADS.items() if head.reads == what)


def head_weight(head: nn.Module) -> torch.Tensor:
    """Weight (K, features, ...) of the last layer of a head, which the group lasso acts on."""
    # By attribute, not by class: peft wraps the head.
    last: Any = getattr(head, "linear", getattr(head, "out_proj", head))
    return last.weight


def best_features(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """Indices, ascending, of the share of features whose weights (K, F) have the largest norms: Head2Toe's selection."""
    norms = weight.norm(dim=0)
    return norms.topk(max(1, round(fraction * len(norms)))).indices.sort().values


def mean_tokens(tokens: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Mean (B, D) over all `tokens` (B, N, D) that may be averaged."""
    return mean_rows(tokens, 0, tokens.shape[1], visible).squeeze(1)
