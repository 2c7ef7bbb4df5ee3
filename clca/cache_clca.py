"""The cross-layer cache (CLC) of https://huggingface.co/papers/2501.00243: after each layer, a summary of its tokens is
written to the cache; after each reduction, what was cached is appended to the tokens and the cache is emptied.

Shapes: B batch, N tokens, D width.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import gather_rows
from .reduction_base import TokenReduction, TokenState


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


def recovery_layers(config: "CLCAViTConfig") -> list[int]:
    """Layers after which the cache is recalled: the reduction layers and, with `cache_recover_at_last`, the last but one,
    so that the last layer sees what was cached since the last reduction."""
    if not config.cross_layer_cache:
        return []
    layers = {i for i in config.reduction_layers if i < config.num_hidden_layers}
    if config.cache_recover_at_last and config.num_hidden_layers > 1:
        layers.add(config.num_hidden_layers - 2)
    return sorted(layers)


def rows_per_entry(config: "CLCAViTConfig") -> int:
    """Rows that one layer writes to the cache."""
    return int(config.cache_gap) + config.num_clr_tokens


def mean_rows(hidden_states: torch.Tensor, start: int, stop: int, visible: torch.Tensor | None) -> torch.Tensor:
    """Mean of rows start .. stop of `hidden_states` (B, N, D) over those that are `visible` (B, N): (B, 1, D). Where
    there is none, row 0 stands in for it, so that nothing is divided by zero."""
    rows = hidden_states[:, start:stop]
    if rows.shape[1] == 0:
        return hidden_states[:, :1]
    if visible is None:
        return rows.mean(dim=1, keepdim=True)
    weights = visible[:, start:stop].unsqueeze(-1).to(rows.dtype)
    # A sum over hundreds of rows may be larger than half precision can hold.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    count = weights.sum(dim=1, keepdim=True, dtype=dtype)
    mean = (rows * weights).sum(dim=1, keepdim=True, dtype=dtype) / count.clamp(min=1)
    return torch.where(count > 0, mean.to(rows.dtype), hidden_states[:, :1])


def last_rows(hidden_states: torch.Tensor, count: int, visible: torch.Tensor | None) -> torch.Tensor:
    """The last `count` rows of `hidden_states` (B, N, D) that are `visible` (B, N), in their order: (B, count, D). Where
    there are fewer, row 0 stands in for the rest."""
    there = min(count, hidden_states.shape[1])
    if visible is None:
        rows = hidden_states[:, hidden_states.shape[1] - there :]
    else:
        positions = torch.arange(visible.shape[1], device=visible.device) * visible  # (B, N), 0 where not visible
        rows = gather_rows(hidden_states, positions.topk(there, dim=1).values.flip(1))
    if there == count:
        return rows
    return torch.cat([hidden_states[:, :1].expand(-1, count - there, -1), rows], dim=1)


class CrossLayerCache:
    """The cache of one forward pass.

    Args:
        config: the model's configuration.
        method: the reduction of the model; it says which rows may be averaged and what its tracks hold for recalled rows.
        training: whether the model trains.
    """

    def __init__(self, config: "CLCAViTConfig", method: type[TokenReduction], training: bool) -> None:
        self.config = config
        self.method = method
        self.training = training
        self.recovery_layers = recovery_layers(config)
        self.entries: list[torch.Tensor] = []  # (B, rows_per_entry, D) each

    def recall(self, index: int, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        """After layer `index`, if it is a recovery layer: append what was cached, oldest layer first, and forget it."""
        if index not in self.recovery_layers:
            return hidden_states, state
        # From here on the GAP takes in all of today's rows, CLR and older recalled rows included, but not the ones that
        # are appended now: published checkpoints were trained like this.
        state = state._replace(pool_len=hidden_states.shape[1])
        if not self.entries:
            return hidden_states, state
        # Layers may lie on different devices.
        rows = torch.cat([entry.to(hidden_states.device) for entry in self.entries], dim=1)
        self.entries = []
        state = self.method.extend_tracks(state, rows.shape[1], self.training)
        state = state._replace(suffix=state.suffix + rows.shape[1])
        return torch.cat([hidden_states, rows], dim=1), state

    def write(self, index: int, hidden_states: torch.Tensor, state: TokenState) -> None:
        """Cache a summary of layer `index`, if a later layer will recall it: GAP, then CLR."""
        if not self.recovery_layers or index >= self.recovery_layers[-1]:
            return
        entry, visible = [], self.method.visible(state)
        if self.config.cache_gap:
            # Row 0 stays apart; registers are averaged, too, as in the original.
            start = 0 if self.config.cache_pool_cls else 1
            entry.append(mean_rows(hidden_states, start, state.pool_len, visible))
        if self.config.num_clr_tokens:
            # The last rows: CLR itself before the first recall, its newest recalled snapshot afterwards. The recovery
            # layer thus caches the snapshot a second time, which published checkpoints were trained with.
            entry.append(last_rows(hidden_states, self.config.num_clr_tokens, visible))
        self.entries.append(torch.cat(entry, dim=1))
