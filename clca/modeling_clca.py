"""A ViT whose layers may hand their tokens to a reduction method, whose forward keeps a cross-layer cache (CLC), and whose
head may aggregate CLS tokens across layers (CLA): https://huggingface.co/papers/2501.00243.

Written as the difference to transformers' ViT; names of parameters are the same wherever the parts are.

Shapes: B batch, N tokens, M tokens after a reduction, D width, H heads, d head width, L layers, K classes.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import ClassVar, Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTMLP, ViTModel, ViTPreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .aggregation_clca import (
    CLAHead,
    H2TProbe,
    LayerTrace,
    SelectedLinear,
    VQTProbe,
    best_features,
    build_head,
    head_weight,
    mean_tokens,
)
from .cache_clca import CrossLayerCache, mean_rows
from .configuration_clca import (
    AGGREGATING_HEADS,
    HEADS_BEFORE_NORM,
    PROBING_HEADS,
    CLCAViTConfig,
    as_pair,
    check_config,
)
from .loss_clca import classification_loss, group_lasso
from .reduction_base import AttentionContext, LossInputs, TokenReduction, TokenState, attention_softmax, gather_rows
from .reductions_clca import get_reduction, initial_state


logger = logging.get_logger(__name__)

# Stock ViT files hold other key names than the model in memory, and transformers converts them for its own classes only.
# The mapping serves loading alone: `save_pretrained` below writes the names of the memory, which load without conversion
# everywhere, also where Trainer resumes.
# DeiT's distillation token is a register to this model, and the class head of a DeiT with two is the one that stays.
register_checkpoint_conversion_mapping(
    "CLCAViTModel",
    [*get_checkpoint_conversion_mapping("ViTModel"), WeightRenaming("distillation_token", "register_tokens")],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "CLCAViTForImageClassification",
    [WeightRenaming(r"^deit\.", "vit."), WeightRenaming(r"^cls_classifier\.", "classifier.")],
    overwrite=True,
)


# What transformers' own forwards take beside their arguments; anything else is a mistake of the caller.
_FORWARD_OPTIONS = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "use_cache"}


@dataclass
class CLCAViTModelOutput(BaseModelOutputWithPooling):
    """Output of `CLCAViTModel`.

    Args:
        last_hidden_state: (B, N, D), after the final norm.
        pooler_output: (B, D), what `config.pooling` makes of the tokens.
        cls_tokens: CLS after each layer of `config.aggregation_layers`, before the final norm, (B, M, D); for CLA and IFA.
        token_counts: rows that entered each layer, and last the rows the final norm saw.
        assignments: with `output_assignments=True`, one (B, M, N) per stage: which incoming rows made row m.
        reports: what else the stages report, by name, one tensor per stage. DynamicViT in training: `decision` (B, N - 1),
            one where a row after CLS is kept.
        hidden_states: with `output_hidden_states=True`, the embeddings and the output of each layer before the cache was
            recalled. Their lengths differ.
        attentions: with `output_attentions=True`, (B, H, queries, N) per layer. Their sizes differ.
    """

    cls_tokens: torch.FloatTensor | None = None
    token_counts: tuple[int, ...] | None = None
    assignments: tuple[torch.FloatTensor, ...] | None = None
    reports: dict[str, tuple[torch.FloatTensor, ...]] | None = None


@dataclass
class CLCAViTImageClassifierOutput(ImageClassifierOutput):
    """Output of `CLCAViTForImageClassification`: what `CLCAViTModelOutput` has, logits (B, K), and

    Args:
        loss: the sum of all terms, if labels were given.
        loss_terms: the named parts of the loss, detached.
    """

    loss_terms: dict[str, torch.FloatTensor] | None = None
    token_counts: tuple[int, ...] | None = None
    assignments: tuple[torch.FloatTensor, ...] | None = None
    reports: dict[str, tuple[torch.FloatTensor, ...]] | None = None


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
        prefix = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in prefix]
        if self.config.prefix_position_embeddings:
            embeddings = torch.cat([*prefix, patches], dim=1) + positions
        else:
            embeddings = torch.cat([*prefix, patches + positions], dim=1)
        if self.clr_tokens is not None:
            clr = self.clr_tokens
            if self.clr_position_embeddings is not None:
                clr = clr + self.clr_position_embeddings
            embeddings = torch.cat([embeddings, clr.expand(patches.shape[0], -1, -1)], dim=1)
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
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its map: output (B, N, H, d) and weights (B, H, N, N). transformers' own takes the softmax in float32
    even for float64 tensors."""
    weights = attention_softmax(query @ key.transpose(-1, -2) * scaling, attention_mask)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CLCAViTAttention(nn.Module):
    """Self-attention in which a reduction may mask or weigh keys, choose the query rows, or look at the outcome."""

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
        return self.q_norm(self.split_heads(self.q_proj(hidden_states)))

    def forward(
        self,
        hidden_states: torch.Tensor,
        state: TokenState,
        choose_rows: Callable[[AttentionContext, TokenState], tuple[torch.Tensor | None, TokenState]] | None = None,
        output_attentions: bool = False,
        hidden_keys: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, TokenState, AttentionContext]:
        key = self.k_norm(self.split_heads(self.k_proj(hidden_states[:, hidden_keys:])))
        value = self.split_heads(self.v_proj(hidden_states[:, hidden_keys:]))
        mask = self.method.attention_mask(state)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(key.dtype)
        context = AttentionContext(self, hidden_states, key, value, mask)
        if choose_rows is not None:
            context.rows, state = choose_rows(context, state)
        if context.rows is None:
            query = self.project_query(hidden_states)
            context.remember_query(query)
        else:
            query = self.project_query(gather_rows(hidden_states, context.rows))

        attended, weights = self.attend(query, context, state, output_attentions, **kwargs)
        return attended, weights, state, context

    def attend(
        self,
        query: torch.Tensor,
        context: AttentionContext,
        state: TokenState,
        output_attentions: bool = False,
        from_rows: bool = True,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of queries (B, H, n, d) to the keys and values of a context: output (B, n, D) and, if asked for,
        weights (B, H, n, N)."""
        key, value, outcome = context.key, context.value, None
        if self.training:
            outcome = self.method.attend(query, key, value, self.scaling, state, from_rows)
        if outcome is None:
            dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
            function = self.attention_function(context.mask, output_attentions)
            outcome = function(self, query, key, value, context.mask, scaling=self.scaling, dropout=dropout, **kwargs)
        output, weights = outcome
        return self.o_proj(output.flatten(2)), weights

    def attention_function(self, mask: torch.Tensor | None, output_attentions: bool):
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
        return self.activation_fn(self.fc1(hidden_states))

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """And back."""
        return self.fc2(hidden)

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
        return nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """And back."""
        return self.down_proj(hidden)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.project(self.hidden(hidden_states))


class CLCAViTLayerScale(nn.Module):
    """A learnt factor per channel."""

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__()
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
    """One transformer layer. If it holds a stage, tokens are reduced before it, in its attention, or before its MLP."""

    def __init__(self, config: CLCAViTConfig, index: int) -> None:
        super().__init__()
        self.method = get_reduction(config.reduction)
        stages = self.method.layers(config) if config.reduction else []
        options = config.reduction_kwargs or {}
        self.reduction = self.method(config, stages.index(index), **options) if index in stages else None
        self.before_stage = index + 1 in stages
        self.probe = None
        if index in config.probe_layers:
            self.probe = H2TProbe() if config.head == "h2t" else VQTProbe(config)
        self.attention = CLCAViTAttention(config, self.method)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLCAViTSwiGLU(config) if config.use_swiglu_ffn else CLCAViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_scale1, self.layer_scale2 = nn.Identity(), nn.Identity()
        if config.layerscale_value:
            self.layer_scale1, self.layer_scale2 = CLCAViTLayerScale(config), CLCAViTLayerScale(config)
        self.drop_path = CLCAViTDropPath(config.drop_path_rate * index / max(config.num_hidden_layers - 1, 1))

    def forward(
        self, hidden_states: torch.Tensor, state: TokenState, output_attentions: bool = False, **kwargs
    ) -> tuple[torch.Tensor, TokenState]:
        if self.reduction is not None:
            hidden_states, state = self.reduction("before_layer", hidden_states, state)
        before = state

        normed = self.layernorm_before(hidden_states)
        # The probe, too, gets a function and not a module: accelerate moves modules among the arguments to a device.
        choose_rows = None if self.reduction is None else partial(self.reduction, "choose_rows")
        attended, _, state, context = self.attention(normed, state, choose_rows, output_attentions, **kwargs)
        attended = self.drop_path(self.layer_scale1(self.dropout(attended)))
        if context.rows is not None:
            hidden_states = gather_rows(hidden_states, context.rows)
        hidden_states = hidden_states + attended
        state = between = self.method.observe(context, state, self.before_stage)

        if self.reduction is not None:
            hidden_states, state = self.reduction("before_mlp", hidden_states, state, context)

        inner = self.mlp.hidden(self.layernorm_after(hidden_states))
        transformed = self.drop_path(self.layer_scale2(self.dropout(self.mlp.project(inner))))
        if self.probe is not None:
            visible = tuple(self.method.visible(s) for s in (before, between, state))
            trace = LayerTrace(normed, attended, inner, transformed, visible, context, before)
            state = state.with_report(probe=self.read_probe(trace))
        return hidden_states + transformed, state

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """What the head's probe takes out of this layer."""
        return self.probe(self.answer, trace)

    def answer(self, queries: torch.Tensor, context: AttentionContext, state: TokenState) -> torch.Tensor:
        """Rows (B, Q, D) that pass through the layer beside its tokens: they attend to the tokens, not to each other."""
        query = self.attention.project_query(self.layernorm_before(queries))
        attended, _ = self.attention.attend(query, context, state, from_rows=False)
        queries = queries + self.drop_path(self.layer_scale1(self.dropout(attended)))
        transformed = self.mlp(self.layernorm_after(queries))
        return queries + self.drop_path(self.layer_scale2(self.dropout(transformed)))


class CLCAViTSlicingLayer(CLCAViTLayer):
    """A layer with VQT as the original CLCA code computes it: the queries are appended and stay, while as many rows at the
    front lend nobody their keys and values, are read as the queries' features, and leave."""

    def forward(self, hidden_states: torch.Tensor, state: TokenState, **kwargs) -> tuple[torch.Tensor, TokenState]:
        queries = self.probe()
        count = queries.shape[1]
        rows = torch.cat([hidden_states, queries.expand(hidden_states.shape[0], -1, -1)], dim=1)
        rows, state = super().forward(rows, state, hidden_keys=count, **kwargs)
        return rows[:, count:], state.with_report(probe=rows[:, :count])

    def read_probe(self, trace: LayerTrace) -> torch.Tensor:
        """Nothing yet: the features are rows that leave the layer, MLP and all."""
        return trace.transformed[:, :0]


class CLCAViTAttentionPooling(nn.Module):
    """One learnt query attends to all tokens (`pooling="map"`, as in SigLIP): (B, N, D) to (B, D)."""

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


class CLCAViTPreTrainedModel(ViTPreTrainedModel):
    """Initialisation, loading and saving."""

    config: CLCAViTConfig
    config_class = CLCAViTConfig
    base_model_prefix = "vit"
    accepts_loss_kwargs = False  # the loss is a mean over the batch: Trainer divides it by its accumulation steps
    _no_split_modules: ClassVar = ["CLCAViTEmbeddings", "CLCAViTLayer", "CLCAViTSlicingLayer"]
    _can_record_outputs: ClassVar = {"hidden_states": CLCAViTLayer, "attentions": CLCAViTAttention}
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"pooler\.dense",
        r"mask_token",
        r"^decoder\.",
        r"^distillation_classifier\.",
    ]  # heads of other tasks

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs) -> None:
        """Save model, configuration and code. `save_original_format=True`, the default elsewhere in transformers, would
        write key names that Trainer cannot resume from. Both classes are announced, so that either Auto class loads it."""
        method = get_reduction(self.config.reduction)
        if method.__module__.rpartition(".")[0] != __name__.rpartition(".")[0]:
            logger.warning(
                "The code of `reduction`=%r is not saved with the model: whoever loads it must register the method first.",
                self.config.reduction,
            )
        if self._auto_class is not None:
            classes = {"AutoModel": CLCAViTModel, "AutoModelForImageClassification": CLCAViTForImageClassification}
            auto_map = {auto: f"modeling_clca.{cls.__name__}" for auto, cls in classes.items()}
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def _activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, *args, **kwargs):
        reentrant = (activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        culprits = (
            {"reduction": self.config.reduction} if get_reduction(self.config.reduction).differentiable_tracks else {}
        )
        culprits |= {"head": self.config.head} if self.config.head in PROBING_HEADS else {}
        if reentrant and culprits:
            names = " and ".join(f"`{name}`={value!r}" for name, value in culprits.items())
            raise ValueError(
                f"`use_reentrant`=True would lose gradients of {names}: reentrant checkpointing sees the hidden states "
                "only. Use `use_reentrant`=False, the default."
            )
        return super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CLCAViTEmbeddings):
            for token in (
                module.cls_token,
                module.register_tokens,
                module.position_embeddings,
                module.clr_position_embeddings,
            ):
                if token is not None:
                    init.trunc_normal_(token, std=std)
            if module.clr_tokens is not None:  # after CLS, which may have been loaded
                init.copy_(module.clr_tokens, module.cls_token.expand_as(module.clr_tokens))
        elif isinstance(module, CLCAViTAttentionPooling):
            init.trunc_normal_(module.query, std=std)
        elif isinstance(module, CLCAViTLayerScale):
            init.constant_(module.lambda1, float(self.config.layerscale_value))
        elif isinstance(module, TokenReduction | VQTProbe):
            module.init_weights()
        elif isinstance(module, CLAHead):
            # A kernel of a few numbers per channel needs more than the range meant for wide layers.
            bound = module.aggregate.kernel_size[0] ** -0.5
            init.uniform_(module.aggregate.weight, -bound, bound)


class CLCAViTModel(CLCAViTPreTrainedModel, ViTModel):
    """The backbone: embeddings, layers, reductions and cache, without a classifier.

    Args:
        config: checked again here, since values may have been overridden after it was made.

    Raises:
        ValueError: what `CLCAViTConfig` refuses.
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)  # ViTModel's would build its own layers first
        check_config(config)
        self.config = config
        self.method = get_reduction(config.reduction)
        self.embeddings = CLCAViTEmbeddings(config)
        self.layers = nn.ModuleList(
            CLCAViTSlicingLayer(config, index)
            if config.vqt_original_slicing and index in config.probe_layers
            else CLCAViTLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_pooling = CLCAViTAttentionPooling(config) if config.pooling == "map" else None
        self.aggregation_layers = config.aggregation_layers if config.head in AGGREGATING_HEADS else []
        if config.head in HEADS_BEFORE_NORM:
            # These heads read CLS before the final norm. It stays in the checkpoint, for other heads; frozen, since
            # distributed training stops at trainable parameters without a gradient.
            self.layernorm.requires_grad_(False)
        if self.attention_pooling is not None and config.head != "linear":
            self.attention_pooling.requires_grad_(False)  # for the same reason
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_assignments: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLCAViTModelOutput:
        """Run the backbone on `pixel_values` (B, C, height, width).

        Args:
            pixel_values: normalised images.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            output_assignments: return, per stage, which rows made which.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and options of the attention kernel.

        Raises:
            ValueError: no pixels, pixels of a wrong shape, or an `attention_mask`, which tokens that move cannot follow.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given.")
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("`attention_mask` is not supported: rows are reordered by reductions. Leave it out.")
        unknown = [name for name in kwargs if name not in _FORWARD_OPTIONS]
        if unknown:
            close = get_close_matches(unknown[0], ["output_assignments", *_FORWARD_OPTIONS], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`{unknown[0]}` is no argument of this model's forward.{hint}")
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)

        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = embeddings = self.embeddings(pixel_values, bool(interpolate_pos_encoding))
        state = initial_state(self.config, self.embeddings.grid(pixel_values), output_assignments)
        state = self.method.start(hidden_states, state, self.training)
        cache = CrossLayerCache(self.config, self.method, self.training)
        cls_tokens, token_counts, reports = [], [], defaultdict(tuple)

        for index, layer in enumerate(self.layers):
            token_counts.append(hidden_states.shape[1])
            hidden_states, state = layer(hidden_states, state, **kwargs)  # a reduction happens inside
            for name, report in state.report.items():
                reports[name] += (report,)
            hidden_states, state = cache.recall(index, hidden_states, state._replace(report={}))
            cache.write(index, hidden_states, state)
            if index in self.aggregation_layers:
                cls_tokens.append(hidden_states[:, 0])

        token_counts.append(hidden_states.shape[1])
        last_hidden_state = self.layernorm(hidden_states)
        if self.config.head in PROBING_HEADS:
            probed = reports.pop("probe")
            pooled = self.collect(embeddings, probed, hidden_states, last_hidden_state, state)
        else:
            pooled = self.pool(hidden_states, last_hidden_state, state)
        return CLCAViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            cls_tokens=torch.stack(cls_tokens, dim=1) if cls_tokens else None,
            # nn.DataParallel gathers the outputs of its replicas, and only tensors can be gathered
            token_counts=None if getattr(self, "_is_replica", False) else tuple(token_counts),
            assignments=reports.pop("assignment", ()) if output_assignments else None,
            reports=dict(reports) or None,
        )

    def collect(
        self,
        embeddings: torch.Tensor,
        probed: tuple[torch.Tensor, ...],
        hidden_states: torch.Tensor,
        normalised: torch.Tensor,
        state: TokenState,
    ) -> torch.Tensor:
        """What an H2T or VQT head reads, (B, F): the probes' features between those of the ends of the network."""
        unit = partial(nn.functional.normalize, dim=-1)
        if self.config.head == "h2t":
            first, last = embeddings.mean(dim=1), mean_tokens(normalised, self.method.visible(state))
            return torch.cat([unit(first), *probed, unit(last)], dim=-1)
        return torch.cat([*(unit(answers.flatten(1)) for answers in probed), unit(hidden_states[:, 0])], dim=-1)

    def pool(self, hidden_states: torch.Tensor, normalised: torch.Tensor, state: TokenState) -> torch.Tensor:
        """What a linear head reads, (B, D), of the last tokens before and after the final norm."""
        if self.config.pooling == "cls":
            return normalised[:, 0]
        visible = self.method.visible(state)
        if self.attention_pooling is not None:
            return self.attention_pooling(normalised, visible)
        # All rows but the prefix: CLR and recalled rows too. `mean` is normalised after the mean, as timm mostly does.
        before = self.config.pooling == "normed_mean"
        rows = normalised if before else hidden_states
        mean = mean_rows(rows, self.config.num_prefix_tokens, rows.shape[1], visible)
        return (mean if before else self.layernorm(mean)).squeeze(1)


class CLCAViTForImageClassification(CLCAViTPreTrainedModel, ViTForImageClassification):
    """A CLCA ViT with a classifier: linear on pooled features, or an aggregation over the CLS tokens of several layers.

    Example:

    ```python
    >>> import torch
    >>> from clca import CLCAViTConfig, CLCAViTForImageClassification
    >>> config = CLCAViTConfig(
    ...     image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
    ...     reduction="evit", reduction_layers=[1, 2], keep_rate=0.5, cross_layer_cache=True, num_clr_tokens=1, head="cla",
    ...     num_labels=5,
    ... )
    >>> model = CLCAViTForImageClassification(config).eval()
    >>> output = model(torch.zeros(2, 3, 64, 64))
    >>> output.logits.shape, output.token_counts
    (torch.Size([2, 5]), (66, 66, 37, 22, 22))

    ```
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = CLCAViTModel(config)
        self.classifier = build_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_assignments: bool = False,
        teacher_logits: torch.Tensor | None = None,
        teacher_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLCAViTImageClassifierOutput:
        """Classify `pixel_values` (B, C, height, width).

        Args:
            pixel_values: normalised images.
            labels: see `loss_clca.classification_loss`.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            output_assignments: return, per stage, which rows made which.
            teacher_logits: (B, K), for methods that distil (DynamicViT), in training.
            teacher_tokens: (B, patches, D), likewise.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and options of the attention kernel.

        Raises:
            ValueError: no pixels, pixels or labels of a wrong shape.
        """
        has_teacher = teacher_logits is not None or teacher_tokens is not None
        if has_teacher and not self.vit.method.distils:
            raise ValueError(
                f"`teacher_logits` and `teacher_tokens` mean nothing to `reduction`={self.config.reduction!r}, whose loss "
                "does not distil."
            )
        outputs = self.vit(pixel_values, interpolate_pos_encoding, output_assignments, **kwargs)
        features = outputs.cls_tokens if self.vit.aggregation_layers else outputs.pooler_output
        logits = self.classifier(features)
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise ValueError(
                f"`teacher_logits` must have the shape of the logits, {tuple(logits.shape)}, got "
                f"{tuple(teacher_logits.shape)}: the teacher needs the same classes."
            )
        loss, loss_terms = None, None
        if labels is not None:
            loss_terms = {"classification": classification_loss(logits, labels, self.config)}
            if self.training:
                inputs = LossInputs(
                    outputs.reports or {}, logits, outputs.last_hidden_state, teacher_logits, teacher_tokens
                )
                loss_terms |= self.vit.method.loss_terms(self.config, inputs)
                if self.config.group_lasso_weight:
                    penalty = group_lasso(head_weight(self.classifier))
                    loss_terms["group_lasso"] = self.config.group_lasso_weight * penalty
            loss = sum(loss_terms.values())
            loss_terms = {name: term.detach() for name, term in loss_terms.items()}
        return CLCAViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            loss_terms=loss_terms,
            token_counts=outputs.token_counts,
            assignments=outputs.assignments,
            reports=outputs.reports,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def select_features(self, fraction: float) -> torch.Tensor:
        """Head2Toe's second step: keep the features to which the trained head gives the largest weights, and put a new
        head on them, to be trained again.

        Args:
            fraction: share of the features to keep, in (0, 1].

        Returns:
            Indices of the kept features, ascending, among those the head has read.

        Raises:
            ValueError: another head than H2T or VQT, or a fraction out of range.
        """
        if self.config.head not in PROBING_HEADS:
            raise ValueError(f"`head` must be h2t or vqt to select features, it is {self.config.head!r}.")
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        weight = head_weight(self.classifier)
        best = best_features(weight, fraction)
        selected = self.classifier.selected[best] if isinstance(self.classifier, SelectedLinear) else best
        self.config.num_selected_features = len(best)
        self.classifier = SelectedLinear(len(best), self.num_labels).to(device=weight.device, dtype=weight.dtype)
        self.classifier.selected.copy_(selected)
        self.classifier.apply(self._init_weights)
        return best


__all__ = ["CLCAViTForImageClassification", "CLCAViTModel", "CLCAViTPreTrainedModel"]
