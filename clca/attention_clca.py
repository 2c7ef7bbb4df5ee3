"""What a reduction may ask about the attention of a layer, and what it may answer: which rows become which.

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


FIRST_ROW = slice(0, 1)


class RowMap:
    """How the M rows of a new sequence are made of the N rows of the old one: as weighted sums of them, whatever the rows
    hold. So it does not matter whether attention's output is projected before or after.

    Attributes:
        rows: where each new row is an old one as it was, which: indices (B, M), or a slice. Else None.
        weight_sums: what the weights of each new row add up to, (B, M, 1), or None if that is one for all.
    """

    rows: torch.Tensor | slice | None = None
    weight_sums: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Values (B, N, C) of the old rows to those of the new ones, (B, M, C)."""
        raise NotImplementedError


class TakenRows(RowMap):
    """Some of the rows as they are."""

    def __init__(self, rows: torch.Tensor | slice) -> None:
        self.rows = rows

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        assert self.rows is not None
        return values[:, self.rows] if isinstance(self.rows, slice) else gather_rows(values, self.rows)


class AttentionContext:
    """Answers a method's questions about the attention of one layer, each computed only when asked for.

    The full map (B, H, N, N) is never needed for them, so the fast kernels stay in use: a row is one query against all
    keys, column sums are taken over chunks of query rows.

    Attributes:
        hidden_states: normalised input of the attention, (B, N, D).
        key, value: (B, H, N, d), the key after its norm if it has one.
        mask: boolean or additive, (B, 1, 1, N), or None.
        state: what belongs to the tokens that the keys are of.
        output: what the attention gives all rows, (B, N, H, d), where an answer has brought it about. None otherwise.
        keeps_output: whether `output` would be of use.
        layer_input: the tokens as they enter the layer, before its norm, (B, N, D); `hidden_states` until the layer sets it.
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

    def query(self, rows: slice = slice(None)) -> torch.Tensor:
        """Queries (B, H, n, d) of a slice of rows. Row 0 alone is projected alone; whoever asks for more has all of them
        projected, once."""
        if self._query is None and rows == FIRST_ROW:
            return self.attention.project_query(self.hidden_states[:, rows])
        if self._query is None:
            # Also where the question is asked without gradients: the attention itself needs them.
            with torch.set_grad_enabled(self._records_gradients):
                self._query = self.attention.project_query(self.hidden_states)
        return self._query[:, :, rows]

    def attention_logits(self, rows: slice) -> torch.Tensor:
        """Logits (B, H, n, N) of a slice of query rows, before any mask, in float32 at least."""
        if self._comparable_key is None:
            with torch.set_grad_enabled(self._records_gradients):
                self._comparable_key = at_least_float32(self.key)
        with full_precision(self.key):
            query, key = at_least_float32(self.query(rows)), self._comparable_key
            return query * self.attention.scaling @ key.transpose(-1, -2)

    def attention_rows(self, rows: slice) -> torch.Tensor:
        """Attention weights (B, H, n, N) of a slice of query rows, before dropout, in float32 at least: rows are compared
        by them, and half precision would make ties."""
        return attention_softmax(self.attention_logits(rows), self.mask)

    def cls_attention(self) -> torch.Tensor:
        """What row 0 attends to: (B, N), averaged over heads."""
        return self.attention_rows(FIRST_ROW).mean(dim=1).squeeze(1)

    def mutual_attention(self) -> torch.Tensor:
        """Logarithm (B, N) of what token 0 gives to each token, averaged over heads, times what that token gives to token 0
        compared with the other tokens: a softmax over queries of the logits to key 0, these averaged over heads before.

        One row and one column of the attention. A logarithm, since products of such small numbers would vanish in float32.
        For methods without a mask."""
        given = self.attention_logits(FIRST_ROW).squeeze(2).log_softmax(dim=-1).logsumexp(dim=1)  # (B, N), of H heads
        return given - math.log(self.key.shape[1]) + self.first_key_logits().log_softmax(dim=1)

    def first_key_logits(self) -> torch.Tensor:
        """Logits (B, N) that the query of each token gives to key 0, averaged over heads, in float32 at least. No queries
        are projected for them where none exist yet and the projection's weights tell as much."""
        # (B, D): the sum over heads of their products is one product of all their widths.
        key = at_least_float32(self.key[:, :, 0]).flatten(1)
        with full_precision(key):
            logits = self.attention.query_products(self.hidden_states, key) if self._query is None else None
            if logits is None:
                query = at_least_float32(self.query()).transpose(1, 2).flatten(2)  # (B, N, D)
                logits = (query @ key.unsqueeze(2)).squeeze(2)
        return logits * (self.attention.scaling / self.key.shape[1])

    def received_attention(self) -> torch.Tensor:
        """What each row receives, summed over heads and query rows: (B, N)."""
        return torch.stack(self._of_chunks(lambda weights: weights.sum(dim=(1, 2)))).sum(dim=0)

    def mean_attention(self) -> torch.Tensor:
        """The attention weights averaged over heads, (B, N, N); those of all heads never exist at the same time."""
        return torch.cat(self._of_chunks(lambda weights: weights.mean(dim=1)), dim=1)

    def _of_chunks(self, answer: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """What `answer` makes of the weights (B, H, n, N) of each chunk of query rows.

        The weights, all of which this takes, are those of the attention itself: where nothing else is expected of that,
        its output is computed with them, and not once more by a kernel."""
        num_rows, with_output = self.key.shape[2], self._may_give_output()
        answers: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        # Each chunk is to stay in the cache of a CPU; a compiler, or a GPU, has less to do for fewer of them.
        chunk = 64 if self.key.device.type == "cpu" and not torch.compiler.is_compiling() else 256
        for start in range(0, num_rows, chunk):
            weights = self.attention_rows(slice(start, start + chunk))
            answers.append(answer(weights))
            if with_output:
                with full_precision(self.value):
                    outputs.append((weights.to(self.value.dtype) @ self.value).transpose(1, 2))
        if with_output:
            self.output = torch.cat(outputs, dim=1)
        return answers

    def _may_give_output(self) -> bool:
        """Whether attention is softmax attention without dropout and gradients, by no kernel of the user's own choice, with
        a query for each key."""
        attention = self.attention
        return (
            self.keeps_output
            and attention.config._attn_implementation in (None, "sdpa", "eager")
            and not (attention.training and attention.config.attention_probs_dropout_prob > 0)
            and not any(tensor.requires_grad for tensor in (self.query(), self.key, self.value))
            and self.hidden_states.shape[1] == self.key.shape[2]
        )


def attention_softmax(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Softmax of attention logits (B, H, n, N) under a boolean mask (True: attend) or an additive one, in float32 at
    least, given back in the logits' dtype."""
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(dim=-1, dtype=dtype).to(logits.dtype)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision is too coarse to compare scores in; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(tensor: torch.Tensor) -> AbstractContextManager:
    """A context in which autocast does not compute products of such tensors in half precision."""
    if tensor.device.type == "meta":  # where nothing is computed, autocast does not exist
        return nullcontext()
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def gather_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of `values` (B, N, ...) at the indices `rows` (B, M): (B, M, ...)."""
    index = rows.reshape(*rows.shape, *(1,) * (values.dim() - 2)).expand(*rows.shape, *values.shape[2:])
    return values.gather(1, index)
