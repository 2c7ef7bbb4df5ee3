"""The modules of a CLCA ViT: embeddings, attention, MLP, layer, attention pooling.

Written as the difference to transformers' ViT; names of parameters are the same wherever the parts are.

Shapes: B batch, N tokens, M tokens after a reduction, D width, H heads, d head width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTMLP

from .attention_clca import FIRST_ROW, AttentionContext, RowMap, TakenRows, attention_softmax
from .budget_clca import as_pair
from .configuration_clca import CLCAViTConfig
from .fast_paths_clca import fast_paths_enabled
from .gelu_clca import activate
from .heads_clca import HEADS, LayerTrace
from .linear_clca import linear, linear_products
from .reduction_base import TokenReduction, TokenState
from .reductions_clca import get_reduction


class CLCAViTEmbeddings(nn.Module):
    """Pixels (B, C, height, width) to `[CLS | registers | patches | CLR]` with positions, (B, N, D)."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embeddings = CLCAViTPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if config.use_class_token else None
        self.register_tokens = _token_parameter(config.num_register_tokens, width)
        self.clr_tokens = _token_parameter(config.num_clr_tokens, width)
        num_positions = config.num_patches + config.num_prefix_tokens * config.prefix_position_embeddings
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, width))
        # A table of their own: one enlarged table would not fit any stock checkpoint.
        num_clr_positions = config.num_clr_tokens * config.prefix_position_embeddings
        self.clr_position_embeddings = _token_parameter(num_clr_positions, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.pre_norm else nn.Identity()

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        patches = self.patch_embeddings(pixel_values, interpolate_pos_encoding)
        positions = self.position_embeddings
        if interpolate_pos_encoding:
            positions = self.interpolate_pos_encoding(self.grid(pixel_values))
        tokens = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        if not self.config.prefix_position_embeddings:
            patches, positions = patches + positions, None
        tokens.append(patches)
        if self.clr_tokens is not None:
            tokens.append(self.clr_tokens)
            if positions is not None and self.clr_position_embeddings is not None:
                positions = torch.cat([positions, self.clr_position_embeddings], dim=1)
        embeddings = torch.cat([token.expand(patches.shape[0], -1, -1) for token in tokens], dim=1)
        if positions is not None:
            embeddings = embeddings + positions
        return self.layernorm(self.dropout(embeddings))

    def grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, C, height, width)."""
        (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], self.patch_embeddings.patch_size
        return height // patch_height, width // patch_width

    def interpolate_pos_encoding(self, new_grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings for images of another size, bicubic, as transformers' ViT does it; the prefix's stay."""
        grid = self.config.image_grid
        if grid == new_grid:
            return self.position_embeddings
        num_prefix = self.position_embeddings.shape[1] - self.config.num_patches
        prefix, table = self.position_embeddings.split([num_prefix, self.config.num_patches], dim=1)
        table = table.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
        table = nn.functional.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
        return torch.cat([prefix, table.flatten(2).transpose(1, 2)], dim=1)


class CLCAViTPatchEmbeddings(nn.Module):
    """Pixels (B, C, height, width) to patch tokens (B, patches, D)."""

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
        if pixel_values.shape[0] == 0:  # attention kernels and BatchNorms fail at such a batch, each in its own way
            raise ValueError("`pixel_values` must hold at least one image, got a batch of none. Skip empty batches.")
        size = tuple(pixel_values.shape[-2:])
        if not any_size and size != self.image_size:
            raise ValueError(
                f"`pixel_values` of {size[0]} x {size[1]} pixels do not match the model's {self.image_size[0]} x "
                f"{self.image_size[1]}. Resize the images, or pass `interpolate_pos_encoding=True`."
            )
        if min(size[0] // self.patch_size[0], size[1] // self.patch_size[1]) < 1:
            raise ValueError(f"`pixel_values` of {size[0]} x {size[1]} pixels are smaller than a patch.")
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
    """Attention with its map: output (B, N, H, d) and weights (B, H, N, N). transformers' own takes the softmax in float32
    even for float64 tensors."""
    weights = attention_softmax(query @ key.transpose(-1, -2) * scaling, attention_mask)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CLCAViTAttention(nn.Module):
    """Self-attention in two steps, between which a stage may say what becomes of the tokens: `make_context` makes keys and
    values, a call of the module the rest. Only the parts have parameters, and they are always called as modules, which
    offloading and sharding wait for."""

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
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, H, N, d)."""
        return hidden_states.unflatten(-1, (self.num_attention_heads, self.head_dim)).transpose(1, 2)

    def project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries (B, H, n, d) of normalised rows (B, n, D)."""
        return self.q_norm(self.split_heads(linear(self.q_proj, hidden_states)))

    def query_products(self, hidden_states: torch.Tensor, vector: torch.Tensor) -> torch.Tensor | None:
        """Products (B, N) of the queries of normalised tokens (B, N, D), their heads side by side, with one vector (B, D),
        without the queries. None where the queries must be made: they have a norm, or weights alone do not tell them."""
        return None if self.config.use_qk_norm else linear_products(self.q_proj, hidden_states, vector)

    def make_context(self, hidden_states: torch.Tensor, state: TokenState, hidden_keys: int = 0) -> AttentionContext:
        """Keys, values and mask of normalised tokens (B, N, D), for questions and for the attention itself. The first
        `hidden_keys` tokens have neither key nor value."""
        key = self.k_norm(self.split_heads(linear(self.k_proj, hidden_states[:, hidden_keys:])))
        value = self.split_heads(linear(self.v_proj, hidden_states[:, hidden_keys:]))
        mask = self.method.attention_mask(state)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(key.dtype)
        return AttentionContext(self, hidden_states, key, value, mask, state)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: AttentionContext,
        row_map: RowMap | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the attention adds to the tokens.

        Args:
            hidden_states: the normalised tokens (B, N, D) that `context` was made of.
            context: their keys and values. If a hook has put other tokens in the place of `hidden_states`, new ones are made.
            row_map: which M tokens are made of the N. None for all as they are.
            output_attentions: compute the whole attention map.
            kwargs: options of the attention kernel.

        Returns:
            (B, M, D), and the map (B, H, N, N), (B, H, M, N) for tokens chosen before, or None.
        """
        if hidden_states is not context.hidden_states:
            context = self.make_context(hidden_states, context.state, hidden_states.shape[1] - context.key.shape[2])
        has_output = context.output is not None
        from_rows = row_map is None or row_map.rows is None or has_output
        if has_output:
            output, weights = context.output.flatten(2), None
        else:
            query = context.query() if from_rows else self.project_query(row_map(hidden_states))
            output, weights = self.attend(query, context, output_attentions, from_rows, **kwargs)
        if row_map is None:
            return linear(self.o_proj, output), weights
        output = row_map(output) if from_rows else output
        if row_map.weight_sums is None:
            return linear(self.o_proj, output), weights
        # The projection's bias counts as often as the weights of a row say; the projection itself is linear.
        sums = row_map.weight_sums.to(output.dtype)
        return linear(self.o_proj, output / sums.clamp(min=torch.finfo(sums.dtype).tiny)) * sums, weights

    def attend(
        self,
        query: torch.Tensor,
        context: AttentionContext,
        output_attentions: bool = False,
        from_rows: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of queries (B, H, n, d) to the keys and values of a context: output (B, n, D) before its projection and,
        if asked for, weights (B, H, n, N). `from_rows`: the queries are those of the N tokens, one each."""
        key, value, outcome = context.key, context.value, None
        if self.training:
            outcome = self.method.attend(query, key, value, self.scaling, context.state, from_rows)
        if outcome is None:
            dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
            function = self.attention_function(context.mask, output_attentions)
            outcome = function(self, query, key, value, context.mask, scaling=self.scaling, dropout=dropout, **kwargs)
        output, weights = outcome
        return output.flatten(2), weights

    def attention_function(
        self, mask: torch.Tensor | None, output_attentions: bool
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """The configured kernel, or one that can do what it cannot: return its map (only eager attention does), take a
        mask of keys (flash attention takes none, flex attention only one of another shape)."""
        name = self.config._attn_implementation
        if output_attentions:
            name = "eager"
        elif mask is not None and any(kind in (name or "") for kind in ("flash", "flex")):
            name = "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)


class CLCAViTMLP(ViTMLP):
    """fc2(gelu(fc1 x)), in two steps, between which a probe may look."""

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, intermediate_size)."""
        return activate(self.activation_fn, self.fc1, linear(self.fc1, hidden_states))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """And back."""
        return linear(self.fc2, hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(self.hidden(hidden_states))


class CLCAViTSwiGLU(nn.Module):
    """Gated MLP: silu(W1 x) * (W2 x), projected back; in two steps."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) to (B, N, intermediate_size)."""
        return nn.functional.silu(linear(self.gate_proj, hidden_states)) * linear(self.up_proj, hidden_states)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """And back."""
        return linear(self.down_proj, hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(self.hidden(hidden_states))


class CLCAViTLayerScale(nn.Module):
    """A learnt factor per channel."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
        assert config.layerscale_value is not None
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class CLCAViTDropPath(nn.Module):
    """Stochastic depth (https://huggingface.co/papers/1603.09382): drop a residual branch for whole images in training."""

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
    """One transformer layer. If it holds a stage, tokens are reduced before it, in its attention, or before its MLP.

    Attributes:
        tokens: a module through which the tokens (B, M, D) leave the layer, unchanged: the place for hooks, whose output is a
            tensor.
    """

    def __init__(self, config: CLCAViTConfig, index: int) -> None:
        super().__init__()
        self.method = get_reduction(config.reduction)
        stages = self.method.layers(config) if config.reduction else []
        options = config.reduction_kwargs or {}
        self.reduction = self.method(config, stages.index(index), **options) if index in stages else None
        self.before_stage = index + 1 in stages
        probe = HEADS[config.head].probe
        self.probe = probe(config) if probe is not None and index in config.probe_layers else None
        self.probe_reads_tokens = self.probe is not None and self.probe.reads_tokens
        self.attention = CLCAViTAttention(config, self.method)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLCAViTSwiGLU(config) if config.use_swiglu_ffn else CLCAViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        if config.layerscale_value:
            self.layer_scale1, self.layer_scale2 = CLCAViTLayerScale(config), CLCAViTLayerScale(config)
        self.drop_path = CLCAViTDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))
        # The layer itself returns a tuple, which tools of interpretability cannot take: they hook into this.
        self.tokens = nn.Identity()
        # A probe of all tokens needs them before they are merged. (What is drawn per token, as dropout is, must be drawn
        # before, too.)
        self.can_merge_early = (
            self.reduction is not None and self.reduction.merges_early and not self.probe_reads_tokens
        )

    def forward(
        self, hidden_states: torch.Tensor, state: TokenState, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, TokenState]:
        """Tokens (B, N, D) through the layer, to (B, M, D). Arguments are those of `transform`."""
        hidden_states, state = self.transform(hidden_states, state, *args, **kwargs)
        return self.tokens(hidden_states), state

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
        """Compute what leaves the layer.

        Args:
            hidden_states: the tokens.
            state: what belongs to them.
            output_attentions: compute the whole attention map, for whoever records it.
            skip_unread: compute nothing in a stage for tokens that leave in it, where that is possible.
            only_first: give token 0 alone, (B, 1, D), and compute nothing for the others but keys and values.
            hidden_keys: first tokens that nobody attends to.
            kwargs: options of the attention kernel.
        """
        if self.reduction is not None:
            hidden_states, state = self.reduction("before_layer", hidden_states, state)

        normed = self.layernorm_before(hidden_states)
        context = self.attention.make_context(normed, state, hidden_keys)
        context.layer_input = hidden_states
        merge_early = self.can_merge_early and skip_unread and not (self.training and self.dropout.p > 0)
        # A trace is checked by another one without gradients, where attention may give its output.
        context.keeps_output = not output_attentions and fast_paths_enabled() and not torch.jit.is_tracing()
        row_map, state = self.map_rows(context, merge_early, only_first)
        context.keeps_output = False  # whoever asks later asks about an attention that has been computed
        attended, _ = self.attention(normed, context, row_map, output_attentions, **kwargs)
        attended = self.drop_path(self.layer_scale1(self.dropout(attended)))
        if row_map is not None:
            hidden_states = row_map(hidden_states)
        hidden_states, between = hidden_states + attended, state

        if self.reduction is not None and not merge_early:
            hidden_states, state = self.reduction("before_mlp", hidden_states, state, context)

        if self.probe is None:  # what only a probe asks for is large
            del normed, attended, context, row_map
        rows, inner = self.layernorm_after(hidden_states), None
        if self.probe_reads_tokens:  # and what is inside the MLP, which is otherwise called whole, as hooks expect
            inner = self.mlp.hidden(rows)
        transformed = self.mlp(rows) if inner is None else self.mlp.project(inner)
        transformed = self.drop_path(self.layer_scale2(self.dropout(transformed)))
        if self.probe is not None:
            method = self.method
            visible = method.visible(context.state), method.visible(between), method.visible(state)
            trace = LayerTrace(normed, attended, inner, transformed, visible, context)
            state = state.with_report(probe=self.read_probe(trace))
        return hidden_states + transformed, state

    def map_rows(
        self, context: AttentionContext, merge_early: bool, only_first: bool
    ) -> tuple[RowMap | None, TokenState]:
        """Return the map from the tokens to those that leave the attention (None for all as they are), as far as the stage
        knows it from the context, and the state that belongs to these."""
        state = self.method.observe(context, context.state, self.before_stage)
        if self.reduction is None:
            return first_row(state) if only_first else (None, state)
        rows, state = self.reduction("choose_rows", context, state)
        if rows is not None:
            return TakenRows(rows), state
        return self.reduction("merge_rows", context, state) if merge_early else (None, state)

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """What the head's probe takes out of this layer."""
        assert self.probe is not None
        # It is given a function and not a module: accelerate moves modules among the arguments to a device.
        return self.probe(self.answer, trace)

    def answer(self, queries: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Tokens (B, Q, D) that pass through the layer beside its own: they attend to those, not to each other."""
        query = self.attention.project_query(self.layernorm_before(queries))
        attended, _ = self.attention.attend(query, context, from_rows=False)
        attended = linear(self.attention.o_proj, attended)
        queries = queries + self.drop_path(self.layer_scale1(self.dropout(attended)))
        transformed = self.mlp(self.layernorm_after(queries))
        return queries + self.drop_path(self.layer_scale2(self.dropout(transformed)))


def first_row(state: TokenState) -> tuple[RowMap, TokenState]:
    """Of all rows, only row 0."""
    rows = TakenRows(FIRST_ROW)
    return rows, state._replace(tracks={name: rows(track) for name, track in state.tracks.items()})


class CLCAViTSlicingLayer(CLCAViTLayer):
    """A layer with VQT as the original CLCA code computes it: the queries are appended and stay, while as many rows at the
    front lend nobody their keys and values, are read as the queries' features, and leave."""

    def transform(
        self, hidden_states: torch.Tensor, state: TokenState, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, TokenState]:
        assert self.probe is not None  # the configuration refuses this layer without queries
        queries = self.probe()
        count = queries.shape[1]
        rows = torch.cat([hidden_states, queries.expand(hidden_states.shape[0], -1, -1)], dim=1)
        rows, state = super().transform(rows, state, *args, hidden_keys=count, **kwargs)
        return rows[:, count:], state.with_report(probe=rows[:, :count])

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """Nothing yet: the features are rows that leave the layer, MLP and all."""
        return trace.transformed[:, :0]


class CLCAViTAttentionPooling(nn.Module):
    """One learnt query attends to all tokens (`pooling="map"`, as in SigLIP): (B, N, D) to (B, D)."""

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

    def forward(self, hidden_states: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(self.query), self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        mask = None if visible is None else visible[:, None, None, :]
        query = query.expand(hidden_states.shape[0], -1, -1, -1)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        pooled = self.o_proj(pooled.transpose(1, 2).flatten(2))  # (B, 1, D)
        return (pooled + self.mlp(self.layernorm(pooled))).squeeze(1)
