"""Cross-layer cache (CLC) of https://huggingface.co/papers/2501.00243.

Each layer writes a summary of its tokens to the cache. After each reduction, the cached summaries are appended to the
tokens and the cache is emptied.

Shapes: B batch, N tokens, D width.
"""

from typing import TYPE_CHECKING

import torch

from .attention_clca import gather_rows, on_device
from .reduction_base import TokenReduction, TokenState


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


def recovery_layers(config: "CLCAViTConfig") -> list[int]:
    """Return the layers after which cached tokens are retrieved: the reduction layers and, with
    `cache_recover_at_last`, the second-to-last layer, so that the last layer sees what was cached since the last
    reduction."""
    if not config.cross_layer_cache:
        return []
    num_layers = config.num_hidden_layers
    layers = {i for i in config.reduction_layers if i < num_layers}
    if config.cache_recover_at_last and num_layers > 1:
        layers.add(num_layers - 2)
    return sorted(layers)


def tokens_per_entry(config: "CLCAViTConfig") -> int:
    """Return the number of tokens that one layer writes to the cache."""
    return int(config.cache_gap) + config.num_clr_tokens


def masked_mean(hidden_states: torch.Tensor, start: int, stop: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean (B, 1, D) of `hidden_states[:, start:stop]`, of shape (B, N, D), over the tokens that the mask
    admits.

    Args:
        hidden_states: (B, N, D).
        start, stop: range of tokens.
        key_mask: (B, N), True for tokens to include; None for all. If none is included, token 0 is returned instead of
            a division by zero.
    """
    tokens = hidden_states[:, start:stop]
    if tokens.shape[1] == 0:
        return hidden_states[:, :1]
    if key_mask is None:
        return tokens.mean(dim=1, keepdim=True)
    weights = key_mask[:, start:stop].unsqueeze(-1).to(tokens.dtype)
    # A sum over hundreds of tokens may overflow in half precision.
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    count = weights.sum(dim=1, keepdim=True, dtype=dtype)
    mean = (tokens * weights).sum(dim=1, keepdim=True, dtype=dtype) / count.clamp(min=1)
    return torch.where(count > 0, mean.to(tokens.dtype), hidden_states[:, :1])


def last_tokens(hidden_states: torch.Tensor, count: int, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Return the last `count` tokens that the mask admits, in their order: (B, count, D).

    Args:
        hidden_states: (B, N, D).
        count: number of tokens. If there are fewer, copies of token 0 are put in front.
        key_mask: (B, N), True for tokens to include; None for all.
    """
    available = min(count, hidden_states.shape[1])
    if key_mask is None:
        tokens = hidden_states[:, hidden_states.shape[1] - available :]
    else:
        positions = torch.arange(key_mask.shape[1], device=key_mask.device) * key_mask  # (B, N), 0 where masked
        tokens = gather_rows(hidden_states, positions.topk(available, dim=1).values.flip(1))
    if available == count:
        return tokens
    return torch.cat([hidden_states[:, :1].expand(-1, count - available, -1), tokens], dim=1)


class CrossLayerCache:
    """Cache of one forward pass.

    Args:
        config: the model's configuration.
        method: the reduction of the model. It defines which tokens may be averaged and the track values of retrieved
            tokens.
        training: whether the model is in training mode.
    """

    def __init__(self, config: "CLCAViTConfig", method: type[TokenReduction], training: bool) -> None:
        self.method = method
        self.training = training
        self.recovery_layers = recovery_layers(config)
        self.last_recovery = self.recovery_layers[-1] if self.recovery_layers else -1
        self.pools, self.num_clr = config.cache_gap, config.num_clr_tokens
        # Token 0 is excluded, but registers are averaged, as in the original.
        self.first_pooled = 0 if config.cache_pool_cls else 1
        self.entries: list[torch.Tensor] = []  # GAP (B, 1, D) and CLR (B, num_clr_tokens, D) of each layer

    def retrieve(self, index: int, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        """Append the cached tokens, oldest layer first, and empty the cache, if layer `index` is a recovery layer.

        Args:
            index: the layer that was just computed, from 0.
            hidden_states: its output, (B, N, D).
            state: the state of these tokens.

        Returns:
            The tokens (B, N + cached, D) and their state.
        """
        if index not in self.recovery_layers:
            return hidden_states, state
        # From here on the GAP covers all current tokens, including CLR and earlier retrieved tokens, but not those appended
        # now. Published checkpoints were trained this way.
        if not self.entries:
            return hidden_states, state._replace(pool_len=hidden_states.shape[1])
        # Layers may lie on different devices.
        device, num_tokens = hidden_states.device, hidden_states.shape[1]
        hidden_states = torch.cat([hidden_states, *(on_device(entry, device) for entry in self.entries)], dim=1)
        self.entries = []
        count = hidden_states.shape[1] - num_tokens
        state = self.method.extend_tracks(state, count, self.training)
        return hidden_states, state._replace(pool_len=num_tokens, suffix=state.suffix + count)

    def write(self, index: int, hidden_states: torch.Tensor, state: TokenState) -> None:
        """Cache a summary of layer `index`, GAP then CLR, if a later layer will retrieve it."""
        if index >= self.last_recovery:
            return
        key_mask = self.method.key_mask(state)
        if self.pools:
            self.entries.append(masked_mean(hidden_states, self.first_pooled, state.pool_len, key_mask))
        if self.num_clr:
            # The last tokens are CLR itself before the first retrieval, and its newest retrieved copy afterwards. So the
            # recovery layer caches that copy a second time. Published checkpoints were trained this way.
            newest = last_tokens(hidden_states, self.num_clr, key_mask)
            self.entries.append(newest.clone())  # a view would keep all tokens in memory
