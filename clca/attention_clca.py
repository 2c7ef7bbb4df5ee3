"""Attention of one layer as token reduction methods see it, and maps from old tokens to new ones.

Shapes: B batch, N tokens in, M tokens out, D width, H heads, d head width.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .layers_clca import CLCAViTAttention
    from .reduction_base import TokenState


_NO_CONTEXT = nullcontext()

ALL_TOKENS = slice(None)
FIRST_TOKEN = slice(0, 1)


class TokenMap:
    """Linear map from the N tokens of a sequence to the M tokens of a new one.

    The weights do not depend on the values that are mapped. So the output of the attention may be mapped before or
    after its projection.

    Attributes:
        selected: indices (B, M), or a slice, of the old tokens if every new token is an unchanged old one; else None.
        weight_sums: sum of the weights of each new token, (B, M, 1), or None if all sums are 1.
    """

    selected: torch.Tensor | slice | None = None
    weight_sums: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Map values (B, N, C) of the old tokens to values (B, M, C) of the new ones."""
        raise NotImplementedError


class SelectedTokens(TokenMap):
    """Select some of the tokens and leave them unchanged.

    Args:
        selected: indices (B, M), or a slice.
    """

    def __init__(self, selected: torch.Tensor | slice) -> None:
        self.selected = selected

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        assert self.selected is not None
        return values[:, self.selected] if isinstance(self.selected, slice) else gather_rows(values, self.selected)


class AttentionContext:
    """Keys and values of one layer, and statistics of its attention that methods can ask for.

    Each statistic is computed when it is first asked for. None of them needs the full map (B, H, N, N), so fast
    attention kernels stay in use: a row of the map is one query against all keys, and column sums are accumulated over
    chunks of queries.

    Attributes:
        hidden_states: normalized input of the attention, (B, N, D).
        key, value: (B, H, N, d). The key is taken after its norm, if the layer has one.
        mask: boolean or additive, (B, 1, 1, N), or None.
        state: the state of the tokens that the keys belong to.
        output: output of the attention for all tokens, (B, N, H, d), if it was computed together with a statistic;
            else None.
        keeps_output: whether to store `output` when a statistic computes it.
        layer_input: tokens that enter the layer, before its norm, (B, N, D). Equal to `hidden_states` until the layer
            sets it.
    """

    def __init__(
        self,
        attention: "CLCAViTAttention",
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        state: "TokenState",
    ) -> None:
        self.attention = attention
        self.hidden_states = hidden_states
        self.key = key
        self.value = value
        self.mask = mask
        self.state = state
        self.output: torch.Tensor | None = None
        self.keeps_output = False
        self.layer_input = hidden_states
        self._query: torch.Tensor | None = None
        self._comparable_key: torch.Tensor | None = None
        self._records_gradients = torch.is_grad_enabled()

    def query(self, tokens: slice = ALL_TOKENS) -> torch.Tensor:
        """Return the queries (B, H, n, d) of a slice of tokens.

        Token 0 alone is projected separately. Any other slice projects all tokens and keeps the result."""
        if self._query is None and tokens == FIRST_TOKEN:
            return self.attention.project_query(self.hidden_states[:, tokens])
        if self._query is None:
            with self._recording():  # even if the caller does not: the attention itself reuses these queries
                self._query = self.attention.project_query(self.hidden_states)
        return self._query if tokens == ALL_TOKENS else self._query[:, :, tokens]

    def _recording(self) -> AbstractContextManager:
        """Return a context in which gradients are recorded if they were when the layer began."""
        return torch.enable_grad() if self._records_gradients else _NO_CONTEXT

    def attention_logits(self, queries: slice) -> torch.Tensor:
        """Return the logits (B, H, n, N) of a slice of queries, before any mask, in float32 or float64."""
        if self._comparable_key is None:
            with self._recording():
                self._comparable_key = at_least_float32(self.key)
        with full_precision(self.key):
            query, key = at_least_float32(self.query(queries)), self._comparable_key
            return query * self.attention.scaling @ key.transpose(-1, -2)

    def attention_rows(self, queries: slice) -> torch.Tensor:
        """Return the attention weights (B, H, n, N) of a slice of queries, before dropout, in float32 or float64.

        Half precision is not enough: methods rank tokens by these weights, and rounding would create ties."""
        return attention_softmax(self.attention_logits(queries), self.mask)

    def cls_attention(self) -> torch.Tensor:
        """Return the attention from token 0 to each token, (B, N), averaged over heads."""
        return self.attention_rows(FIRST_TOKEN).mean(dim=1).squeeze(1)

    def mutual_attention(self) -> torch.Tensor:
        """Return the logarithm (B, N) of the mutual attention between token 0 and each token.

        This is the product of two factors. The first is the attention from token 0 to the token, averaged over heads.
        The second is a softmax over queries of the logits to key 0, averaged over heads before the softmax: how much
        the token attends to token 0, compared with the other tokens.

        Only one row and one column of the attention map are computed. The result is a logarithm because such small
        products underflow in float32. Masks are not applied."""
        given = (
            self.attention_logits(FIRST_TOKEN).squeeze(2).log_softmax(dim=-1).logsumexp(dim=1)
        )  # (B, N), summed over heads
        return given - math.log(self.key.shape[1]) + self.first_key_logits().log_softmax(dim=1)

    def first_key_logits(self) -> torch.Tensor:
        """Return the logits (B, N) from each query to key 0, averaged over heads, in float32 or float64.

        If the queries do not exist yet, the logits are computed from the weights of the projection where possible."""
        # key: (B, D). The sum over heads of the products equals one product over the width of all heads.
        key = at_least_float32(self.key[:, :, 0]).flatten(1)
        with full_precision(key):
            logits = self.attention.query_products(self.hidden_states, key) if self._query is None else None
            if logits is None:
                query = at_least_float32(self.query()).transpose(1, 2).flatten(2)  # (B, N, D)
                logits = (query @ key.unsqueeze(2)).squeeze(2)
        return logits * (self.attention.scaling / self.key.shape[1])

    def received_attention(self) -> torch.Tensor:
        """Return the attention that each token receives, summed over heads and queries, (B, N)."""
        return torch.stack(self._of_chunks(lambda weights: weights.sum(dim=(1, 2)))).sum(dim=0)

    def mean_attention(self) -> torch.Tensor:
        """Return the attention weights averaged over heads, (B, N, N), without storing those of all heads at once."""
        return torch.cat(self._of_chunks(lambda weights: weights.mean(dim=1)), dim=1)

    def _of_chunks(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """Apply `reduce` to the weights (B, H, n, N) of each chunk of queries and return the results.

        These are all weights of the attention. So its output is computed with them, if allowed, and no kernel has to
        compute them again."""
        num_tokens, with_output = self.key.shape[2], self._may_give_output()
        results: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        # Chunks fit into the cache of a CPU. Compilers and GPUs are faster with fewer, larger chunks.
        chunk = 64 if self.key.device.type == "cpu" and not torch.compiler.is_compiling() else 256
        for start in range(0, num_tokens, chunk):
            weights = self.attention_rows(slice(start, start + chunk))
            results.append(reduce(weights))
            if with_output:
                with full_precision(self.value):
                    outputs.append((as_dtype(weights, self.value.dtype) @ self.value).transpose(1, 2))
        if with_output:
            self.output = torch.cat(outputs, dim=1)
        return results

    def _may_give_output(self) -> bool:
        """Return whether the output may be computed together with the weights.

        This requires softmax attention with a standard kernel, no dropout, no gradients, and one query per key."""
        attention = self.attention
        return (
            self.keeps_output
            and attention.config._attn_implementation in (None, "sdpa", "eager")
            and not (attention.training and attention.config.attention_probs_dropout_prob > 0)
            and not any(tensor.requires_grad for tensor in (self.query(), self.key, self.value))
            and self.hidden_states.shape[1] == self.key.shape[2]
        )


def attention_softmax(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the softmax of attention logits (B, H, n, N) under a mask, in the dtype of the logits.

    Args:
        logits: (B, H, n, N). The softmax is computed in float32 or float64.
        mask: boolean (True: attend) or additive, broadcast to the logits, or None.
    """
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
        )
    if logits.dtype in (torch.float32, torch.float64):
        return logits.softmax(dim=-1)
    # Converts row by row, without a copy of the map.
    return logits.softmax(dim=-1, dtype=torch.float32).to(logits.dtype)


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert a tensor, without a call of torch if it has the dtype already."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor, without a call of torch if it is on the device already."""
    return tensor if tensor.device == device else tensor.to(device)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert half precision to float32; leave float32 and float64 unchanged. Scores in half precision are too coarse
    to compare."""
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# In earlier versions `torch.compiler.is_exporting` is true under torch.compile, too. `torch.__version__` compares as a version.
_TELLS_EXPORT = torch.__version__ >= "2.13"


def is_exporting() -> bool:
    """Return whether operators are recorded by `torch.export`, as for ONNX. With torch before 2.13 strict export counts as compiling."""
    return torch.compiler.is_exporting() and (_TELLS_EXPORT or not torch.compiler.is_dynamo_compiling())


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context in which autocast does not run matrix products on the device of `tensor` in half precision."""
    kind = tensor.device.type
    if kind == "meta":  # autocast does not support it
        return _NO_CONTEXT
    # A traced or exported program may be called under autocast later.
    if torch.is_autocast_enabled(kind) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.autocast(device_type=kind, enabled=False)
    return _NO_CONTEXT


def gather_rows(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Gather rows of `values` (B, N, ...) at `indices` (B, M) of dimension 1: (B, M, ...)."""
    index = indices
    for _ in values.shape[2:]:
        index = index.unsqueeze(-1)
    return values.gather(1, index.expand(-1, -1, *values.shape[2:]))
