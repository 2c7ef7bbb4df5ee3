"""Classification heads, and the probes that collect their features from the layers.

| head | features | classifier |
| --- | --- | --- |
| `linear` | the last tokens, pooled as `config.pooling` says | a linear layer |
| `cla` | CLS after several layers | a depth-wise and a point-wise convolution |
| `ifa` | CLS after several layers | a learned weighted sum, and a linear layer |
| `h2t` | means over the tokens of four tensors of each probed layer | a linear layer |
| `vqt` | learned queries that pass through each probed layer | a linear layer |

The configuration, the layers and the model ask the class of a head for everything they need, and `HEADS` lists all
heads. To add a head, write one class and add one entry.

Shapes: B batch, N tokens, M aggregated layers, D width, Q queries, F features, K classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .attention_clca import AttentionContext, as_dtype
from .budget_clca import as_pair
from .cache_clca import masked_mean
from .fast_paths_clca import fast_paths_enabled


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


# Probes: modules inside the layers that extract the features of a head.


class LayerTrace(NamedTuple):
    """Tensors of a layer that a probe may read. After a reduction inside the layer, later tensors have fewer
    tokens."""

    normed: torch.Tensor  # input of the attention, (B, N, D)
    attended: torch.Tensor  # what the attention adds to the residual stream, (B, N, D)
    inner: torch.Tensor | None  # hidden activations of the MLP, (B, N, intermediate_size); None unless `reads_tokens`
    transformed: torch.Tensor  # what the MLP adds to the residual stream, (B, N, D)
    key_masks: tuple[
        torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
    ]  # of `normed`, `attended`, the others
    context: AttentionContext


class Probe(nn.Module):
    """Base of the modules that a head places into each of `config.probe_layers`.

    Attributes:
        reads_tokens: whether the probe reads all tokens of the layer, including those removed in it, and the hidden
            activations of its MLP. The layer then computes all of them.

    Args:
        config: the model's configuration.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(self, config: "CLCAViTConfig") -> None:
        super().__init__()
        self.config = config

    def forward(self, transform: Callable, trace: LayerTrace) -> torch.Tensor:
        """Return the features (B, ...) of one layer.

        Args:
            transform: function `(queries, context) -> tokens` that passes additional tokens (B, Q, D) through the layer.
                They attend to the tokens of the layer, not to each other.
            trace: tensors of the layer.
        """
        raise NotImplementedError


class H2TProbe(Probe):
    """Head2Toe (https://huggingface.co/papers/2201.03529): means over the tokens of four tensors of a layer."""

    def forward(self, transform: Callable, trace: LayerTrace) -> torch.Tensor:
        """Return features (B, 3 D + intermediate_size) of unit length."""
        before, between, after = trace.key_masks
        assert trace.inner is not None  # because of `reads_tokens`
        means = (
            mean_tokens(trace.normed, before),
            mean_tokens(trace.attended, between),
            mean_tokens(trace.inner, after),
            mean_tokens(trace.transformed, after),
        )
        return nn.functional.normalize(torch.cat(means, dim=-1), dim=-1)


class VQTProbe(Probe):
    """Visual Query Tuning (https://huggingface.co/papers/2212.03220): learned queries that pass through a layer.

    The queries attend to the tokens of the layer; the tokens do not attend to the queries."""

    reads_tokens = False

    def __init__(self, config: "CLCAViTConfig") -> None:
        super().__init__(config)
        self.queries = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))

    def init_weights(self) -> None:
        """Draw the queries from a uniform distribution whose range depends on the patch size."""
        patch_height, patch_width = as_pair(self.config.patch_size)
        bound = (6 / (3 * patch_height * patch_width + self.config.hidden_size)) ** 0.5
        init.uniform_(self.queries, -bound, bound)

    def forward(self, transform: Callable | None = None, trace: LayerTrace | None = None) -> torch.Tensor:
        """Return the queries (B, Q, D) after the layer, or, without arguments, the learned queries (1, Q, D)."""
        if transform is None:
            return self.queries
        assert trace is not None  # passed together with `transform`
        return transform(self.queries.expand(trace.normed.shape[0], -1, -1), trace.context)


# Heads.


class NetworkEnds(NamedTuple):
    """Tensors at both ends of the network, besides the features from the probes."""

    embeddings: torch.Tensor  # input of the first layer, (B, N, D)
    hidden_states: torch.Tensor  # output of the last layer, (B, N, D)
    normalized: torch.Tensor  # the same after the final norm, (B, N, D)
    key_mask: torch.Tensor | None  # (B, N), True for the output tokens that may be averaged; None for all


class Head:
    """Base of the heads: what a head reads from the network, and how its classifier is built.

    List subclasses in `HEADS` under the name that `config.head` uses. If the classifier is more than a linear layer,
    the subclass is also the module.

    If a module of the classifier or of a probe has its own parameters and a method `init_weights`, this method
    initializes it, after its submodules. (transformers does not call it on modules without their own parameters in
    code from the Hub.)

    Attributes:
        reads: input of the classifier.
            `pooled`: the last tokens, pooled as `config.pooling` says, (B, D).
            `cls_tokens`: CLS after each of `config.aggregation_layers`, before the final norm, (B, M, D).
            `probes`: the features that `collect` joins from the probes in `config.probe_layers`, (B, F).
        before_norm: whether the head reads CLS before the final norm and nothing after it. The unused norm stays in
            the checkpoint and is frozen.
        probe: class of the modules placed into layers with `reads="probes"`; None for the other heads.
    """

    reads: ClassVar[str] = "pooled"
    before_norm: ClassVar[bool] = False
    probe: ClassVar[type[Probe] | None] = None

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        """Refuse configurations that the head does not support, beyond those that its attributes exclude.

        Raises:
            ValueError: if a subclass refuses the configuration.
        """

    @classmethod
    def reads_layers(cls) -> bool:
        """Return whether the head reads more than the output of the last layer."""
        return cls.reads != "pooled"

    @classmethod
    def reads_only_cls(cls, config: "CLCAViTConfig") -> bool:
        """Return whether the head reads only CLS from the last layer."""
        return cls.before_norm or (cls.reads == "pooled" and config.pooling == "cls")

    @classmethod
    def takes_rate(cls, config: "CLCAViTConfig") -> bool:
        """Return whether the classifier takes the keep rate of the forward pass as its second argument."""
        return False

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        """Return the number of input features F of a linear classifier."""
        return config.hidden_size

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        """Return the features (B, ...) of a head with `reads="probes"`; they are joined along the last axis.

        Args:
            probed: output of the probe of each layer. The tensors may be on different devices.
            ends: tensors at both ends of the network.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, config: "CLCAViTConfig") -> nn.Module:
        """Build the classifier, which returns logits (B, K): by default a linear layer, or the identity with
        `num_labels=0`."""
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
    """BatchNorm with separate running statistics for each of several keep rates
    (https://huggingface.co/papers/1812.08928).

    The distribution of CLS depends on the keep rate. Scale and shift are shared between rates.

    Training at a rate updates the statistics of that rate only. Evaluation at a rate between two of them interpolates
    their statistics linearly in the logarithm of the rate; outside of their range it uses those of the nearest rate.

    Args:
        num_features: number of channels C.
        rates: R keep rates, ascending.
    """

    rate_mean: torch.Tensor  # (R, C)
    rate_var: torch.Tensor

    def __init__(self, num_features: int, rates: Sequence[float]) -> None:
        super().__init__()
        self.rates = list(rates)
        self.eps, self.momentum = 1e-5, 0.1  # the defaults of `nn.BatchNorm1d`
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("rate_mean", torch.zeros(len(rates), num_features))
        self.register_buffer("rate_var", torch.ones(len(rates), num_features))

    def init_weights(self) -> None:
        for zeros, ones in ((self.bias, self.weight), (self.rate_mean, self.rate_var)):
            init.zeros_(zeros)
            init.ones_(ones)

    def forward(self, hidden: torch.Tensor, rate: float) -> torch.Tensor:
        """Normalize `hidden` (B, C, ...) at a keep rate.

        Raises:
            ValueError: if the module trains at a rate that is not in `rates`.
        """
        if self.training:
            if rate not in self.rates:
                raise ValueError(
                    f"`keep_rate` must be one of `train_keep_rates` {self.rates} in training, got {rate}. Pass one of them to "
                    "`forward` in each training step, see `ufgir.training.draw_keep_rate`."
                )
            row = self.rates.index(rate)
            mean, var = self.rate_mean[row], self.rate_var[row]
        else:
            mean, var = self.at(rate, self.rate_mean), self.at(rate, self.rate_var)
        return nn.functional.batch_norm(
            hidden, mean, var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def at(self, rate: float, statistics: torch.Tensor) -> torch.Tensor:
        """Return statistics (C,) at any rate, interpolated between those (R, C) at the rates of the module."""
        above = sum(own < rate for own in self.rates)
        if above == 0 or above == len(self.rates):
            return statistics[min(above, len(self.rates) - 1)]
        low, high = self.rates[above - 1], self.rates[above]
        return statistics[above - 1].lerp(statistics[above], math.log(rate / low) / math.log(high / low))


class AggregationHead(Head, nn.Module):
    """Base of the heads that are modules on the CLS tokens of several layers. Subclasses define `__init__` and
    `forward`."""

    reads = "cls_tokens"
    before_norm = True

    @classmethod
    def build(cls, config: "CLCAViTConfig") -> nn.Module:
        return cls(config, config.num_labels)


class LayerConvolution(nn.Conv1d):
    """Depth-wise convolution over the layers, whose kernel covers all of them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, D, M) to (B, D * multiplier, 1).

        Convolutions of torch are optimized for long inputs. In inference, a batch of small products gives the same
        result faster: on one core of an Intel Xeon, 25 instead of 318 us for one image of width 768, and 3 instead of
        16 ms for 64. `set_fast_paths(False)` turns it off. In training the bits of earlier versions matter more."""
        if (
            self.bias is None
            or input.shape[-1] != self.kernel_size[0]
            or torch.is_grad_enabled()
            or torch.jit.is_tracing()  # torch.jit.trace checks a trace with gradients by one without
            or not fast_paths_enabled()
        ):
            return super().forward(input)
        kernels = self.weight.unflatten(0, (self.groups, -1)).squeeze(2)  # (D, multiplier, M)
        products = input.permute(1, 0, 2) @ kernels.transpose(1, 2)  # (D, B, multiplier)
        return (products.transpose(0, 1).flatten(1) + as_dtype(self.bias, products.dtype)).unsqueeze(2)

    def init_weights(self) -> None:
        """Draw the kernels from U(-1/sqrt(M), 1/sqrt(M)) for M layers. `initializer_range` is meant for
        wider inputs."""
        bound = self.kernel_size[0] ** -0.5
        init.uniform_(self.weight, -bound, bound)


class CLAHead(AggregationHead):
    """Cross-layer aggregation (https://huggingface.co/papers/2501.00243).

    A depth-wise convolution over the layers mixes the CLS tokens channel by channel; a point-wise convolution
    classifies:

    BatchNorm -> depth-wise Conv1d, kernel size M, `cla_multiplier` output channels per input channel -> BatchNorm ->
    GELU -> point-wise Conv1d.

    With `config.train_keep_rates` each BatchNorm is a `SwitchableBatchNorm`."""

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
        """Return logits (B, K).

        Args:
            cls_tokens: (B, M, D), before the final norm.
            rate: keep rate of the backbone in this forward pass.

        Raises:
            ValueError: if the head trains on a single image.
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

    Linear(M, 1) over the layers -> ReLU -> LayerNorm -> linear classifier."""

    def __init__(self, config: "CLCAViTConfig", num_labels: int) -> None:
        super().__init__()
        self.aggregate = nn.Linear(len(config.aggregation_layers), 1)
        self.activation = nn.ReLU()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K) of CLS tokens (B, M, D), which are not normalized."""
        hidden = self.aggregate(cls_tokens.transpose(1, 2)).squeeze(-1)  # (B, D)
        return self.out_proj(self.layernorm(self.activation(hidden)))


class H2THead(Head):
    """Head2Toe: a linear layer on the features of the probes and on the mean token at both ends, each of
    unit length."""

    reads = "probes"
    probe = H2TProbe

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        width = config.hidden_size
        return len(config.probe_layers) * (3 * width + config.intermediate_size) + 2 * width

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        first, last = ends.embeddings.mean(dim=1), mean_tokens(ends.normalized, ends.key_mask)
        return [nn.functional.normalize(first, dim=-1), *probed, nn.functional.normalize(last, dim=-1)]


class VQTHead(Head):
    """Visual Query Tuning: a linear layer on the queries of each layer and on the last CLS, each of unit length."""

    reads = "probes"
    before_norm = True
    probe = VQTProbe

    @classmethod
    def num_features(cls, config: "CLCAViTConfig") -> int:
        return (len(config.probe_layers) * config.num_query_tokens + 1) * config.hidden_size

    @classmethod
    def collect(cls, probed: Sequence[torch.Tensor], ends: NetworkEnds) -> Sequence[torch.Tensor]:
        parts = [*(queries.flatten(1) for queries in probed), ends.hidden_states[:, 0]]
        return [nn.functional.normalize(part, dim=-1) for part in parts]


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "cla": CLAHead,
    "ifa": IFAHead,
    "h2t": H2THead,
    "vqt": VQTHead,
}


def heads_reading(what: str) -> tuple[str, ...]:
    """Return the names of the heads whose `reads` is `pooled`, `cls_tokens` or `probes`."""
    return tuple(name for name, head in HEADS.items() if head.reads == what)


def head_weight(head: nn.Module) -> torch.Tensor:
    """Return the weight (K, features, ...) of the last layer of a head. The group lasso acts on it."""
    # By attribute, not by class, because peft wraps the head.
    last: Any = getattr(head, "linear", getattr(head, "out_proj", head))
    return last.weight


def best_features(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the ascending indices of the features whose weights (K, F) have the largest norms: Head2Toe's selection.

    Args:
        weight: (K, F).
        fraction: share of the features to select, in (0, 1].
    """
    norms = weight.norm(dim=0)
    return norms.topk(max(1, round(fraction * len(norms)))).indices.sort().values


def mean_tokens(tokens: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean (B, D) of `tokens` (B, N, D) over the tokens that the mask (B, N) admits."""
    return masked_mean(tokens, 0, tokens.shape[1], key_mask).squeeze(1)
