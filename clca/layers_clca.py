"""Modules of a CLCA ViT: embeddings, attention, MLP, layer, attention pooling.

Parameters have the same names as in transformers' ViT wherever both have the same part.

Shapes: B batch, N tokens, M tokens after a reduction, D width, H heads, d head width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTMLP

from .attention_clca import FIRST_TOKEN, AttentionContext, SelectedTokens, TokenMap, as_dtype, attention_softmax
from .budget_clca import as_pair
from .configuration_clca import CLCAViTConfig
from .fast_paths_clca import fast_paths_enabled
from .heads_clca import HEADS, LayerTrace
from .linear_clca import activated_linear, is_bare, layer_norm, linear, linear_products, parts_of
from .reduction_base import TokenReduction, TokenState
from .reductions_clca import get_reduction


def is_idle(module: nn.Module) -> bool:
    """Return whether the call of a module can be skipped: it returns its input unchanged, as dropout does in evaluation,
    and nothing observes the call."""
    kind = type(module)
    if kind is not nn.Identity and (module.training or kind not in (nn.Dropout, CLCAViTDropPath)):
        return False
    return is_bare(module)


class CLCAViTEmbeddings(nn.Module):
    """Embed pixels (B, C, height, width) as tokens `[CLS | registers | patches | CLR]` with position embeddings, (B,
    N, D)."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeds_prefix = config.prefix_position_embeddings  # the prefix has position embeddings, too
        width = config.hidden_size
        self.patch_embeddings = CLCAViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_class_token else None
        self.register_tokens = _token_parameter(config.num_register_tokens, width)
        self.clr_tokens = _token_parameter(config.num_clr_tokens, width)
        num_positions = config.num_patches + config.num_prefix_tokens * config.prefix_position_embeddings
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, width))
        # A separate table: stock checkpoints fit the main table only without positions of CLR.
        num_clr_positions = config.num_clr_tokens * config.prefix_position_embeddings
        self.clr_position_embeddings = _token_parameter(num_clr_positions, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else None

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        patches = self.patch_embeddings(pixel_values, interpolate_pos_encoding)
        positions = self.position_embeddings
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(self.grid(pixel_values))
        tokens = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        if not self.embeds_prefix:
            patches, positions = patches + positions, None
        tokens.append(patches)
        if self.clr_tokens is not None:
            tokens.append(self.clr_tokens)
            if positions is not None and self.clr_position_embeddings is not None:
                positions = torch.cat([positions, self.clr_position_embeddings], dim=1)
        embeddings = torch.cat([token.expand(patches.shape[0], -1, -1) for token in tokens], dim=1)
        if positions is not None:
            embeddings = embeddings + positions
        embeddings = embeddings if is_idle(self.dropout) else self.dropout(embeddings)
        return embeddings if self.layernorm is None else layer_norm(self.layernorm, embeddings)

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Return the (rows, columns) of patches of images (B, C, height, width)."""
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], self.patch_embeddings.patch_size
        return height // patch_height, width // patch_width

    def interpolate_pos_encoding(self, new_grid: tuple[int, int]) -> torch.Tensor:
        """Return position embeddings for another grid of patches, by bicubic interpolation as in transformers' ViT.

        The position embeddings of the prefix stay unchanged."""
        grid = self.config.image_grid
        if grid == new_grid:
            return self.position_embeddings
        num_prefix = self.position_embeddings.shape[1] - self.config.num_patches
        prefix, table = self.position_embeddings.split([num_prefix, self.config.num_patches], dim=1)
        table = table.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        table = nn.functional.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
        return torch.cat([prefix, table.flatten(2).transpose(1, 2)], dim=1)


class CLCAViTPatchEmbeddings(nn.Module):
    """Project pixels (B, C, height, width) to patch tokens (B, patches, D).

    Raises:
        ValueError: if the pixels have the wrong shape or there are none.
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.image_size = as_pair(config.image_size)
        self.patch_size = as_pair(config.patch_size)
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=self.patch_size,
            stride=self.patch_size,
            bias=not config.pre_norm,
        )

    def forward(self, pixel_values: torch.Tensor, any_size: bool = False) -> torch.Tensor:
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` must have the shape (batch, {self.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        if pixel_values.shape[0] == 0:  # attention kernels and BatchNorm would raise less clear errors
            raise ValueError("`pixel_values` must hold at least one image, got an empty batch. Skip empty batches.")
        size = tuple(pixel_values.shape[-2:])
        if not any_size and size != self.image_size:
            raise ValueError(
                f"`pixel_values` of {size[0]} x {size[1]} pixels do not match the model's {self.image_size[0]} x "
                f"{self.image_size[1]}. Resize the images, or pass `interpolate_pos_encoding=True`."
            )
        if min(size[0] // self.patch_size[0], size[1] // self.patch_size[1]) < 1:
            raise ValueError(
                f"`pixel_values` of {size[0]} x {size[1]} pixels are smaller than a patch, {self.patch_size[0]} x {self.patch_size[1]}."
            )
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


def _token_parameter(count: int, width: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(1, count, width)) if count else None


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention together with its map: output (B, N, H, d) and weights (B, H, N, N).

    transformers' own version computes the softmax in float32 even for float64 tensors."""
    weights = attention_softmax(query @ key.transpose(-1, -2) * scaling, attention_mask)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CLCAViTAttention(nn.Module):
    """Self-attention in two steps, so that a stage can decide in between which tokens to keep.

    `make_context` computes keys and values; calling the module computes the rest. Only submodules have parameters, and
    they are called as modules if anything replaced or observes them, because offloading and sharding fetch parameters
    when a module is called."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def __init__(self, config: CLCAViTConfig, method: type[TokenReduction]) -> None:
        super().__init__()
        self.config = config
        self.method = method
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        for name in ("q_proj", "k_proj", "v_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias))
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.q_norm, self.k_norm = None, None
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Reshape (B, N, D) to (B, H, N, d)."""
        batch, tokens, _ = hidden_states.shape
        # `unflatten` gives the same view, but takes 0.5 us longer, three times a layer.
        return hidden_states.view(batch, tokens, self.num_attention_heads, self.head_dim).transpose(1, 2)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the queries (B, H, n, d) of normalized tokens (B, n, D)."""
        query = self.split_heads(linear(parts_of(self)["q_proj"], hidden_states))
        return query if self.q_norm is None else layer_norm(self.q_norm, query)

    def query_products(self, hidden_states: torch.Tensor, vector: torch.Tensor) -> torch.Tensor | None:
        """Return the products (B, N) of all queries with one vector, without computing the queries.

        Args:
            hidden_states: normalized tokens (B, N, D).
            vector: (B, D), the concatenation over heads.

        Returns:
            (B, N), or None if the queries must be computed: they have a norm, or the projection is not a plain linear
            layer.
        """
        return None if self.q_norm is not None else linear_products(self.q_proj, hidden_states, vector)

    def make_context(self, hidden_states: torch.Tensor, state: TokenState, hidden_keys: int = 0) -> AttentionContext:
        """Compute keys, values and mask of normalized tokens (B, N, D), for statistics and for the attention itself.

        The first `hidden_keys` tokens get neither key nor value."""
        with_keys = hidden_states[:, hidden_keys:] if hidden_keys else hidden_states
        parts = parts_of(self)
        key = self.split_heads(linear(parts["k_proj"], with_keys))
        key = key if self.k_norm is None else layer_norm(self.k_norm, key)
        value = self.split_heads(linear(parts["v_proj"], with_keys))
        mask = self.method.attention_mask(state)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(key.dtype)
        return AttentionContext(self, hidden_states, key, value, mask, state)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: AttentionContext,
        token_map: TokenMap | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the attention adds to the tokens.

        Args:
            hidden_states: the normalized tokens (B, N, D) that `context` was computed from.
            context: their keys and values. It is recomputed if a hook has replaced `hidden_states`.
            token_map: map from the N tokens to M tokens. None for no change.
            output_attentions: compute the whole attention map.
            kwargs: options of the attention kernel.

        Returns:
            (B, M, D), and the map: (B, H, N, N), or (B, H, M, N) if tokens are selected before the attention. None
            unless asked for.
        """
        if hidden_states is not context.hidden_states:
            context = self.make_context(hidden_states, context.state, hidden_states.shape[1] - context.key.shape[2])
        o_proj = parts_of(self)["o_proj"]
        has_output = context.output is not None
        from_tokens = token_map is None or token_map.selected is None or has_output
        if has_output:
            output, weights = context.output.flatten(2), None
        else:
            query = context.query() if from_tokens else self.project_query(token_map(hidden_states))
            output, weights = self.attend(query, context, output_attentions, from_tokens, **kwargs)
        if token_map is None:
            return linear(o_proj, output), weights
        output = token_map(output) if from_tokens else output
        if token_map.weight_sums is None:
            return linear(o_proj, output), weights
        # The projection is linear, except for its bias, which must be scaled by the weight sums.
        sums = as_dtype(token_map.weight_sums, output.dtype)
        return linear(o_proj, output / sums.clamp(min=torch.finfo(sums.dtype).tiny)) * sums, weights

    def attend(
        self,
        query: torch.Tensor,
        context: AttentionContext,
        output_attentions: bool = False,
        from_tokens: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the attention of queries (B, H, n, d) to the keys and values of a context.

        Args:
            query: (B, H, n, d).
            context: keys, values and mask.
            output_attentions: return the weights.
            from_tokens: whether there is one query for each of the N tokens.
            kwargs: options of the attention kernel.

        Returns:
            The output (B, n, D) before its projection, and the weights (B, H, n, N) or None.
        """
        key, value, outcome = context.key, context.value, None
        if self.training:
            outcome = self.method.attend(query, key, value, self.scaling, context.state, from_tokens)
        if outcome is None:
            dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
            function = self.attention_function(context.mask, output_attentions)
            if function is sdpa_attention_forward and context.mask is None and not kwargs and fast_paths_enabled():
                # What this function does in the end, after several checks that do not concern this model.
                output = nn.functional.scaled_dot_product_attention(
                    query, key, value, dropout_p=dropout, scale=self.scaling
                )
                return output.transpose(1, 2).flatten(2), None
            outcome = function(self, query, key, value, context.mask, scaling=self.scaling, dropout=dropout, **kwargs)
        output, weights = outcome
        return output.flatten(2), weights

    def attention_function(
        self, mask: torch.Tensor | None, output_attentions: bool
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """Return the configured attention kernel, or a substitute if it lacks a feature.

        Only eager attention returns its map. Flash attention takes no mask of keys, and flex attention needs another
        mask format."""
        name = self.config._attn_implementation
        if output_attentions:
            name = "eager"
        elif mask is not None and any(kind in (name or "") for kind in ("flash", "flex")):
            name = "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class CLCAViTMLP(ViTMLP):
    """MLP, fc2(gelu(fc1 x)), in two steps, so that a probe can read the hidden activations in between."""

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, N, D) to the hidden activations (B, N, intermediate_size)."""
        parts = parts_of(self)
        return activated_linear(parts["fc1"], parts["activation_fn"], hidden_states)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the hidden activations (B, N, intermediate_size) back to (B, N, D)."""
        return linear(parts_of(self)["fc2"], hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(self.hidden(hidden_states))


class CLCAViTSwiGLU(nn.Module):
    """Gated MLP, W3(silu(W1 x) * (W2 x)), in two steps as in `CLCAViTMLP`."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (B, N, D) to the hidden activations (B, N, intermediate_size)."""
        return nn.functional.silu(linear(self.gate_proj, hidden_states)) * linear(self.up_proj, hidden_states)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the hidden activations (B, N, intermediate_size) back to (B, N, D)."""
        return linear(self.down_proj, hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(self.hidden(hidden_states))


class CLCAViTLayerScale(nn.Module):
    """Scale each channel by a learned factor."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        assert config.layerscale_value is not None
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class CLCAViTDropPath(nn.Module):
    """Stochastic depth (https://huggingface.co/papers/1603.09382): drop a residual branch for entire images in
    training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0.0:
            return hidden_states
        keep = torch.empty(hidden_states.shape[0], 1, 1, dtype=hidden_states.dtype, device=hidden_states.device)
        return hidden_states * keep.bernoulli_(1 - self.rate) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class CLCAViTLayer(GradientCheckpointingLayer):
    """One transformer layer. If it holds a stage, tokens are reduced before the layer, in its attention, or before its
    MLP.

    Attributes:
        tokens: identity module that the output tokens (B, M, D) pass through. Register hooks here: its output is a
            tensor.
    """

    def __init__(self, config: CLCAViTConfig, index: int) -> None:
        super().__init__()
        self.method = get_reduction(config.reduction)
        stages = self.method.layers(config) if config.reduction else []
        options = config.reduction_kwargs or {}
        self.reduction = self.method(config, stages.index(index), **options) if index in stages else None
        self.stage_hooks = self.method.layer_hooks if self.reduction is not None else frozenset()
        self.before_stage = index + 1 in stages
        probe = HEADS[config.head].probe
        self.probe = probe(config) if probe is not None and index in config.probe_layers else None
        self.probe_reads_tokens = self.probe is not None and self.probe.reads_tokens
        self.attention = CLCAViTAttention(config, self.method)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLCAViTSwiGLU(config) if config.use_swiglu_ffn else CLCAViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale1, self.layer_scale2 = None, None
        if config.layerscale_value:
            self.layer_scale1, self.layer_scale2 = CLCAViTLayerScale(config), CLCAViTLayerScale(config)
        self.drop_path = CLCAViTDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))
        # The layer returns a tuple, which interpretability tools cannot handle. They hook into this module instead.
        self.tokens = nn.Identity()
        # A probe that reads all tokens needs them before they are merged. (Values that are drawn per token, as in dropout,
        # must also be drawn before.)
        self.can_merge_early = (
            self.reduction is not None and self.reduction.merges_early and not self.probe_reads_tokens
        )

    def forward(
        self, hidden_states: torch.Tensor, state: TokenState, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, TokenState]:
        """Compute the layer: tokens (B, N, D) to (B, M, D). For the arguments see `transform`."""
        hidden_states, state = self.transform(hidden_states, state, *args, **kwargs)
        tokens = parts_of(self)["tokens"]
        return (hidden_states if is_idle(tokens) else tokens(hidden_states)), state

    def scale(self, output: torch.Tensor, layer_scale: nn.Module | None) -> torch.Tensor:
        """Return what a branch of the layer adds to the tokens: its output after dropout, LayerScale and drop path."""
        output = self.dropout(output)
        return self.drop_path(output if layer_scale is None else layer_scale(output))

    def transform(
        self,
        hidden_states: torch.Tensor,
        state: TokenState,
        output_attentions: bool = False,
        skip_unread: bool = False,
        only_first: bool = False,
        hidden_keys: int = 0,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, TokenState]:
        """Compute the output of the layer.

        Args:
            hidden_states: tokens (B, N, D).
            state: their state.
            output_attentions: compute the whole attention map, for recording.
            skip_unread: in a stage, skip computations for tokens that it removes, where possible.
            only_first: return only token 0, (B, 1, D), and compute only keys and values of the others.
            hidden_keys: number of tokens at the front that no token attends to.
            kwargs: options of the attention kernel.

        Returns:
            Tokens (B, M, D) and their state.
        """
        hooks = self.stage_hooks
        if "before_layer" in hooks and self.reduction is not None:
            hidden_states, state = self.reduction("before_layer", hidden_states, state)

        parts = parts_of(self)
        attention = cast("CLCAViTAttention", parts["attention"])
        normed = layer_norm(parts["layernorm_before"], hidden_states)
        context = attention.make_context(normed, state, hidden_keys)
        context.layer_input = hidden_states
        merge_early = self.can_merge_early and skip_unread and not (self.training and self.dropout.p > 0)
        # torch.jit.trace checks a trace by a second one without gradients, which must not take this path.
        context.keeps_output = not output_attentions and fast_paths_enabled() and not torch.jit.is_tracing()
        token_map, state = self.map_tokens(context, merge_early, only_first)
        context.keeps_output = False  # from here on the output is known
        attended, _ = attention(normed, context, token_map, output_attentions, **kwargs)
        is_plain = self.layer_scale1 is None and is_idle(parts["dropout"]) and is_idle(parts["drop_path"])
        attended = attended if is_plain else self.scale(attended, self.layer_scale1)
        if token_map is not None:
            hidden_states = token_map(hidden_states)
        hidden_states, between = hidden_states + attended, state

        if "before_mlp" in hooks and not merge_early and self.reduction is not None:
            hidden_states, state = self.reduction("before_mlp", hidden_states, state, context)

        if self.probe is None:  # free memory: only probes read these tensors
            del normed, attended, context, token_map
        tokens, inner = layer_norm(parts["layernorm_after"], hidden_states), None
        if self.probe_reads_tokens:  # otherwise the MLP is called as a whole, so that hooks on it work
            inner = self.mlp.hidden(tokens)
        transformed = parts["mlp"](tokens) if inner is None else self.mlp.project(inner)
        transformed = transformed if is_plain else self.scale(transformed, self.layer_scale2)
        if self.probe is not None:
            method = self.method
            key_masks = method.key_mask(context.state), method.key_mask(between), method.key_mask(state)
            trace = LayerTrace(normed, attended, inner, transformed, key_masks, context)
            state = state.with_report(probe=self.read_probe(trace))
        return hidden_states + transformed, state

    def map_tokens(
        self, context: AttentionContext, merge_early: bool, only_first: bool
    ) -> tuple[TokenMap | None, TokenState]:
        """Return the map from the tokens to those that leave the attention, as far as it is known before the
        attention.

        Returns:
            The map, or None if all tokens stay unchanged; and the state of the new tokens.
        """
        state = self.method.observe(context, context.state, self.before_stage)
        if self.reduction is None:
            return first_token(state) if only_first else (None, state)
        if "choose_tokens" in self.stage_hooks:
            indices, state = self.reduction("choose_tokens", context, state)
            if indices is not None:
                return SelectedTokens(indices), state
        if merge_early and "merge_tokens" in self.stage_hooks:
            return self.reduction("merge_tokens", context, state)
        return None, state

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """Return the features that the probe of the head extracts from this layer."""
        assert self.probe is not None
        # Pass a function, not a module: accelerate moves modules among the arguments to a device.
        return self.probe(self.transform_queries, trace)

    def transform_queries(self, queries: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Pass additional tokens (B, Q, D) through the layer. They attend to the tokens of the layer, not to each
        other."""
        query = self.attention.project_query(layer_norm(self.layernorm_before, queries))
        attended, _ = self.attention.attend(query, context, from_tokens=False)
        attended = linear(self.attention.o_proj, attended)
        queries = queries + self.scale(attended, self.layer_scale1)
        transformed = self.mlp(layer_norm(self.layernorm_after, queries))
        return queries + self.scale(transformed, self.layer_scale2)


def first_token(state: TokenState) -> tuple[TokenMap, TokenState]:
    """Return the map that keeps only token 0, and the state of that token."""
    first = SelectedTokens(FIRST_TOKEN)
    return first, state._replace(tracks={name: first(track) for name, track in state.tracks.items()})


class CLCAViTSlicingLayer(CLCAViTLayer):
    """Layer with VQT as the original CLCA code computes it.

    The Q queries are appended to the tokens. The first Q tokens have no keys and values; after the layer they are
    removed and used as the features in place of the queries, which stay."""

    def transform(
        self, hidden_states: torch.Tensor, state: TokenState, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, TokenState]:
        assert self.probe is not None  # the configuration only creates this layer with queries
        queries = self.probe()
        count = queries.shape[1]
        tokens = torch.cat([hidden_states, queries.expand(hidden_states.shape[0], -1, -1)], dim=1)
        tokens, state = super().transform(tokens, state, *args, hidden_keys=count, **kwargs)
        return tokens[:, count:], state.with_report(probe=tokens[:, :count])

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """Return empty features: the features are tokens after the MLP, see `transform`."""
        return trace.transformed[:, :0]


class CLCAViTAttentionPooling(nn.Module):
    """Pool tokens (B, N, D) to (B, D) by attention with one learned query (`pooling="map"`, as in SigLIP)."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.query = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(config.hidden_size, config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViTMLP(config)

    def forward(self, hidden_states: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(self.query), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        mask = None if key_mask is None else key_mask[:, None, None, :]
        query = query.expand(hidden_states.shape[0], -1, -1, -1)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        pooled = self.o_proj(pooled.transpose(1, 2).flatten(2))  # (B, 1, D)
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)
