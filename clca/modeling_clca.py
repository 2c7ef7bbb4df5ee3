"""CLCA ViT: a ViT with token reduction in its layers, a cross-layer cache (CLC), and heads such as cross-layer
aggregation (CLA), see https://huggingface.co/papers/2501.00243.

Parameters have the same names as in transformers' ViT wherever both have the same part.

Shapes: B batch, N tokens, M tokens after a reduction, D width, H heads, d head width, L layers, K classes.
"""

import contextlib
import copy
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple, Self, Unpack, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTForImageClassification, ViTModel, ViTPreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_clca import on_device
from .budget_clca import Budget
from .cache_clca import CrossLayerCache, masked_mean, recovery_layers
from .configuration_clca import CLCAViTConfig, check_config, without_targets
from .dense_clca import feature_maps
from .fast_paths_clca import fast_paths_enabled
from .heads_clca import HEADS, NetworkEnds, SelectedLinear, best_features, head_weight, heads_reading
from .hooks_clca import HookWatch
from .layers_clca import (
    CLCAViTAttention,
    CLCAViTAttentionPooling,
    CLCAViTEmbeddings,
    CLCAViTLayer,
    CLCAViTLayerScale,
    CLCAViTSlicingLayer,
    eager_attention_forward,
)
from .linear_clca import layer_norm
from .loss_clca import classification_loss, group_lasso
from .reduction_base import LossInputs, TokenReduction, TokenState
from .reductions_clca import checked_budget, get_reduction, initial_state
from .resample_clca import Layout, resampling
from .resample_clca import conversions as resample_conversions


logger = logging.get_logger(__name__)


# Files of a stock ViT use other key names than the model in memory, and transformers converts them only for its own classes.
# This mapping is used for loading only: `save_pretrained` below writes the names in memory, which need no conversion anywhere,
# including when Trainer resumes.
# The distillation token of DeiT becomes a register. Of the two heads of a DeiT, the classification head is kept.
def _register_conversions() -> None:
    """Register the conversions of checkpoint weights with transformers.

    transformers stores them by class name, which other versions of this code in the same process share, so this is
    called before each load."""
    backbone = [
        *get_checkpoint_conversion_mapping("ViTModel"),
        WeightRenaming("distillation_token", "register_tokens"),
        WeightRenaming(r"^deit\.", "vit."),  # to load only the backbone from a file with a classifier
        *resample_conversions(),
    ]
    for name in ("CLCAViTModel", "CLCAViTBackbone"):
        register_checkpoint_conversion_mapping(name, backbone, overwrite=True)
    # The classifier needs the conversions of its backbone as well: transformers below 5.16 does not apply those registered for
    # a submodule to a checkpoint of the backbone alone, whose keys lack `vit.`.
    classifier = [WeightRenaming(r"^cls_classifier\.", "classifier."), *backbone]
    register_checkpoint_conversion_mapping("CLCAViTForImageClassification", classifier, overwrite=True)


_register_conversions()


# Arguments of `from_pretrained` that specify the location of a file.
_LOCATION_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

# Keyword arguments that the forward passes of transformers accept. All others are errors.
_FORWARD_OPTIONS = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "use_cache"}


class TokenCounts:
    """Attributes that outputs have in addition to their fields.

    Attributes:
        token_counts: number of tokens that enter each layer, and of those that enter the final norm. It is not a field
            because pipelines, exporters and `nn.DataParallel` expect every field to be a tensor with the batch first.
            Copies, pickles, `torch.compile` and accelerate's offloading preserve it. It is None if other code builds a
            new output from the fields: mixed precision in Trainer or accelerate, `nn.DataParallel`, and exported or
            traced programs. The tuple returned with `return_dict=False` does not have it.
    """

    token_counts: tuple[int, ...] | None = None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy of the output with its tensors moved or converted by `torch.Tensor.to`. accelerate calls this
        method."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if name != "token_counts":
                setattr(moved, name, _moved(value, *args, **kwargs))
        return moved


def _moved(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply `torch.Tensor.to` to a tensor, or to all tensors in tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.to(*args, **kwargs)
    if isinstance(value, dict):
        return {name: _moved(inner, *args, **kwargs) for name, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(inner, *args, **kwargs) for inner in value)
    return value


@dataclass
class CLCAViTModelOutput(TokenCounts, BaseModelOutputWithPooling):
    """Output of `CLCAViTModel`.

    In evaluation every field is None or a tensor with the batch first, except those that the caller asks for.
    `token_counts` is an additional attribute, see `TokenCounts`.

    Args:
        last_hidden_state: (B, N, D), after the final norm.
        pooler_output: (B, D), the tokens pooled as `config.pooling` says; features (B, F) with a head that probes
            layers.
        cls_tokens: CLS after each layer of `config.aggregation_layers`, before the final norm, (B, M, D); for CLA and
            IFA.
        assignments: with `output_assignments=True`, one matrix (B, M, N) per stage: the share of each incoming token
            in each new one.
        reports: other tensors that the stages report, by name, one per stage; in training or with
            `output_assignments=True`. DynamicViT in training reports `decision` (B, N - 1): one for each token after
            CLS that is kept.
        hidden_states: with `output_hidden_states=True`, the embeddings and the output of each layer before cached
            tokens are appended. Their lengths differ.
        attentions: with `output_attentions=True`, (B, H, queries, N) per layer. Their sizes differ.
    """

    cls_tokens: torch.Tensor | None = None
    assignments: tuple[torch.Tensor, ...] | None = None
    reports: dict[str, tuple[torch.Tensor, ...]] | None = None


@dataclass
class CLCAViTImageClassifierOutput(TokenCounts, ImageClassifierOutput):
    """Output of `CLCAViTForImageClassification`.

    Assignments, reports, hidden states, attentions and `token_counts` are as in `CLCAViTModelOutput`; logits are (B,
    K).

    Args:
        loss: sum of all loss terms, if labels are given.
        loss_terms: the individual terms by name, detached.
        auxiliary_loss: in training, the sum of all terms except `classification`, which the method and the head add.
            `loss` includes it. It is also returned without labels: add it if you compute your own loss from the
            logits.
    """

    loss_terms: dict[str, torch.Tensor] | None = None
    auxiliary_loss: torch.Tensor | None = None
    assignments: tuple[torch.Tensor, ...] | None = None
    reports: dict[str, tuple[torch.Tensor, ...]] | None = None


@dataclass
class CLCAViTBackboneOutput(TokenCounts, BackboneOutput):
    """Output of `CLCAViTBackbone`.

    Hidden states, attentions and `token_counts` are as in `CLCAViTModelOutput`.

    Args:
        feature_maps: one map (B, D, rows, columns) over the grid of patches per stage of `config.out_features`.
        auxiliary_loss: in training, the loss terms of the method, such as DynamicViT's keep ratio.
    """

    auxiliary_loss: torch.Tensor | None = None


def _warn_of_lost_terms(names: list[str]) -> None:
    """Warn once that the model trains without labels, so these loss terms may be lost."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(
            f"The model trains without `labels`, so its output has no `loss`, and {', '.join(names)} would be lost. Add "
            "`auxiliary_loss` of the output to your own loss. With `label_smoothing_factor`, Trainer does not pass labels to "
            "the model: set it to 0 and use `label_smoothing` of the model's configuration."
        )


def _selected(hidden_states: tuple[torch.Tensor, ...], which: bool | int | Sequence[int] | None) -> Any:
    """Select hidden states as `output_hidden_states` says: all, none, or some by index with None for the others."""
    if isinstance(which, bool) or which is None:
        return hidden_states if which else None
    count = len(hidden_states)
    chosen = {index % count for index in ([which] if isinstance(which, int) else which) if -count <= index < count}
    return tuple(state if index in chosen else None for index, state in enumerate(hidden_states))


def _warn_of_unread_terms(names: list[str]) -> None:
    """Warn once that the model around a backbone does not add these terms to its loss."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        logger.warning_once(
            f"The method of the backbone adds {', '.join(names)} to the loss in training, but models of transformers ignore it. "
            "Add `auxiliary_loss` of the backbone's output to the loss, for example with a forward hook on the backbone."
        )


def check_finite(weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise an error if weights contain infinity or NaN: all outputs would be invalid.

    Args:
        weights: state dict. Tensors on the meta device and quantized tensors of other classes are skipped.
        source: name of the weights in the error message.

    Raises:
        ValueError: if weights are not finite. The message names up to three of them.
    """
    plain = (torch.Tensor, nn.Parameter)
    floats = {n: t for n, t in weights.items() if type(t) in plain and t.is_floating_point() and not t.is_meta}
    # A sum is ten times faster than testing every number, but the sum of large finite numbers may overflow.
    found = [n for n, t in floats.items() if not t.sum().isfinite() and not t.isfinite().all()]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{source} are not finite: {', '.join(found[:3])}{more}.")


class Shortcuts(NamedTuple):
    """Computations that the forward pass can skip because their results are unused."""

    skip_unread: bool  # in stages: queries of dropped tokens, and the output projection of tokens that are summed
    only_first: bool  # in the last layer: everything but the keys and values of all tokens except the first


class CLCAViTPreTrainedModel(ViTPreTrainedModel):
    """Base class of all CLCA models: weight initialization, loading and saving."""

    config: CLCAViTConfig  # ty: ignore[incompatible-mutable-override]  # as in all models of transformers
    config_class = CLCAViTConfig
    base_model_prefix = "vit"
    accepts_loss_kwargs = False  # the loss is a mean over the batch, so Trainer divides it by its accumulation steps
    _no_split_modules = ["CLCAViTEmbeddings", "CLCAViTLayer", "CLCAViTSlicingLayer"]
    _can_record_outputs = {"hidden_states": CLCAViTLayer, "attentions": CLCAViTAttention}
    _keys_to_ignore_on_load_unexpected = [
        r"pooler\.dense",
        r"mask_token",
        r"^decoder\.",
        r"^distillation_classifier\.",
    ]  # heads of other tasks

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Load a model, see transformers' `from_pretrained`.

        If `image_size` or `patch_size` differ from the checkpoint's, position embeddings and patch projection are
        resampled, see `resample_clca`. This does not need `ignore_mismatched_sizes`.

        Raises:
            ValueError: if position embeddings do not fit the configuration of the checkpoint, or weights are not
                finite.
            RuntimeError: if other weights have the wrong shape, such as a classifier for another number of classes,
                and `ignore_mismatched_sizes` is not set.
        """
        saved = None
        if pretrained_model_name_or_path is not None and kwargs.get("gguf_file") is None:
            place = {name: kwargs[name] for name in _LOCATION_OPTIONS if name in kwargs}
            with contextlib.suppress(OSError):  # the folder has no config.json, only weights or an adapter
                contents, _ = CLCAViTConfig.get_config_dict(pretrained_model_name_or_path, **place)
                saved = Layout.of(contents, CLCAViTConfig) if contents else None
        _register_conversions()
        with resampling(pretrained_model_name_or_path, saved):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_finite(model.state_dict(), f"Weights of {pretrained_model_name_or_path}")
        model.freeze_unread()  # transformers makes all loaded parameters trainable
        return loaded

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all parameters. Unused ones, see `freeze_unread`, always stay frozen."""
        super().requires_grad_(requires_grad)
        self.freeze_unread()
        return self

    def freeze_unread(self) -> None:
        """Freeze the parameters that the head does not use.

        They stay in the checkpoint for other heads. Distributed training fails if a trainable parameter gets no
        gradient."""
        backbone, head = cast("CLCAViTModel", self.base_model), HEADS[self.config.head]
        if head.before_norm:
            backbone.layernorm.requires_grad_(False)
        if backbone.attention_pooling is not None and head.reads != "pooled":
            backbone.attention_pooling.requires_grad_(False)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> None:
        """Save model, configuration and code, registered for all Auto classes.

        Args:
            save_directory: folder to write to.
            save_original_format: default of other models in transformers. True would write key names that Trainer
                cannot resume from.
            args, kwargs: as in transformers.
        """
        for name, part in (
            ("reduction", get_reduction(self.config.reduction)),
            ("head", HEADS[self.config.head]),
        ):
            if part.__module__.rpartition(".")[0] != __name__.rpartition(".")[0]:
                logger.warning(
                    "The code of `%s`=%r is not saved with the model. Register it before you load the model.",
                    name,
                    getattr(self.config, name),
                )
        if self._auto_class is not None:
            classes = {
                "AutoBackbone": CLCAViTBackbone,
                "AutoModel": CLCAViTModel,
                "AutoModelForImageClassification": CLCAViTForImageClassification,
            }
            auto_map = {auto: f"modeling_clca.{cls.__name__}" for auto, cls in classes.items()}
            self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | auto_map
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def set_keep_rate(self, keep_rate: float | Sequence[float]) -> None:
        """Change the keep rate of a trained model permanently, also in its configuration.

        To change it for one forward pass, or from several threads, pass `keep_rate` to `forward`.

        Args:
            keep_rate: in (0, 1], one rate for all stages or one per stage. It replaces `keep_tokens`.

        Raises:
            ValueError: if a rate is out of range, or the method's number of slots is fixed by its parameters.
        """
        budget = checked_budget(self.config, keep_rate)
        self.config.keep_tokens = None
        self.config.keep_rate = list(budget.keep_rate)
        self.config.reduction_kwargs = without_targets(self.config.reduction_kwargs)
        for module in self.modules():
            if isinstance(module, TokenReduction):
                module.make_constants()

    def _activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, *args: Any, **kwargs: Any
    ) -> None:
        self._check_checkpointing(activation_checkpointing_kwargs)
        super()._activation_checkpointing_enable(activation_checkpointing_kwargs, *args, **kwargs)

    if not hasattr(
        PreTrainedModel, "activation_checkpointing_enable"
    ):  # transformers below 5.23 only has the older name

        def gradient_checkpointing_enable(
            self, gradient_checkpointing_kwargs: dict | None = None, *args: Any, **kwargs: Any
        ) -> None:
            self._check_checkpointing(gradient_checkpointing_kwargs)
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs, *args, **kwargs)

    def _check_checkpointing(self, options: dict | None) -> None:
        reentrant = (options or {}).get("use_reentrant", False)
        affected = (
            {"reduction": self.config.reduction} if get_reduction(self.config.reduction).differentiable_tracks else {}
        )
        affected |= {"head": self.config.head} if HEADS[self.config.head].reads == "probes" else {}
        if reentrant and affected:
            names = " and ".join(f"`{name}`={value!r}" for name, value in affected.items())
            raise ValueError(
                f"`use_reentrant`=True would lose gradients of {names}, because reentrant checkpointing only tracks the "
                "hidden states. Use `use_reentrant`=False, the default."
            )

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
            if module.clr_tokens is not None:  # copy CLS, which may have been loaded from a checkpoint
                assert module.cls_token is not None  # the configuration does not allow CLR without CLS
                init.copy_(module.clr_tokens, module.cls_token.expand_as(module.clr_tokens))
        elif isinstance(module, CLCAViTAttentionPooling):
            init.trunc_normal_(module.query, std=std)
        elif isinstance(module, CLCAViTLayerScale):
            assert self.config.layerscale_value is not None
            init.constant_(module.lambda1, float(self.config.layerscale_value))
        elif isinstance(module, TokenReduction):
            module.init_weights()
            module.make_constants()
        elif not isinstance(module, PreTrainedModel):
            init_weights = getattr(module, "init_weights", None)  # of modules of a head
            if init_weights is not None:
                init_weights()


class CLCAViTModel(CLCAViTPreTrainedModel, ViTModel):
    """Backbone of a CLCA ViT: embeddings, layers, reductions and cache, without a classifier.

    Args:
        config: the configuration. It is checked again here, because values may have been changed after it was made.

    Raises:
        ValueError: if `CLCAViTConfig` refuses the configuration.
    """

    embeddings: CLCAViTEmbeddings
    skip_unread_rows = True  # if False, tokens that are unused are computed as well, as the paper counts them

    def __init__(self, config: CLCAViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)  # ViTModel.__init__ would build its own layers
        check_config(config)
        self.config = config
        self.method, self.head = get_reduction(config.reduction), HEADS[config.head]
        self.embeddings = CLCAViTEmbeddings(config)
        self.layers = nn.ModuleList(
            CLCAViTSlicingLayer(config, index)
            if config.vqt_original_slicing and index in config.probe_layers
            else CLCAViTLayer(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention_pooling = CLCAViTAttentionPooling(config) if config.pools_by_attention else None
        self.aggregation_layers = config.aggregation_layers if self.head.reads == "cls_tokens" else []
        self.hook_watch = HookWatch()
        self.freeze_unread()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_assignments: bool = False,
        keep_rate: float | Sequence[float] | None = None,
        for_head: bool = False,
        budget: Budget | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLCAViTModelOutput:
        """Run the backbone on `pixel_values` (B, C, height, width).

        Args:
            pixel_values: normalized images.
            interpolate_pos_encoding: accept images of other sizes than `config.image_size`.
            output_assignments: return the assignment of each stage.
            keep_rate: keep rate of this forward pass instead of the configuration's: one for all stages or one per
                stage.
            for_head: compute only what the classifier reads. If that is CLS, `last_hidden_state` has the shape (B, 1,
                D).
            budget: result of `checked_budget`, instead of `keep_rate`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and options of the attention kernel.

        Raises:
            ValueError: if pixels are missing or have the wrong shape, a keep rate is not allowed, or an
                `attention_mask` or an unknown argument is given.
        """
        if pixel_values is None:
            raise ValueError("`pixel_values` must be given.")
        # ty: ignore[invalid-typed-dict-key]  # not a known option: callers must not pass it
        if kwargs.pop("attention_mask", None) is not None:
            raise ValueError("`attention_mask` is not supported because reductions reorder the tokens. Remove it.")
        # ty: ignore[invalid-typed-dict-key]  # the same
        if kwargs.pop("head_mask", None) is not None:
            raise ValueError("`head_mask` is not supported. Remove it, or pass None.")
        unknown = [name for name in kwargs if name not in _FORWARD_OPTIONS]
        if unknown:
            close = get_close_matches(unknown[0], ["output_assignments", "keep_rate", *_FORWARD_OPTIONS], n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise ValueError(f"`{unknown[0]}` is not an argument of this model's forward.{hint}")
        kwargs["output_attentions"] = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_recorded = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        recording = bool(hidden_recorded or kwargs["output_attentions"] or output_assignments)
        shortcuts = self.shortcuts(for_head, recording)

        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, bool(interpolate_pos_encoding))
        budget = checked_budget(self.config, keep_rate) if budget is None else budget
        state = initial_state(self.config, self.embeddings.grid(pixel_values), output_assignments, budget)
        state = self.method.start(hidden_states, state, self.training)
        cache = CrossLayerCache(self.config, self.method, self.training)
        embeddings = hidden_states if self.head.reads == "probes" else None
        cls_tokens, token_counts, reports = [], [], defaultdict(tuple)
        last = len(self.layers) - 1

        for index, layer in enumerate(self.layers):
            token_counts.append(hidden_states.shape[1])
            only_first = shortcuts.only_first and index == last
            hidden_states, state = layer(  # includes the reduction
                hidden_states, state, skip_unread=shortcuts.skip_unread, only_first=only_first, **kwargs
            )
            if state.report:
                for name, report in state.report.items():
                    reports[name] += (report,)
                state = state._replace(report={})
            hidden_states, state = cache.retrieve(index, hidden_states, state)
            cache.write(index, hidden_states, state)
            if index in self.aggregation_layers:
                cls_tokens.append(hidden_states.select(1, 0))

        token_counts.append(token_counts[-1] if shortcuts.only_first else hidden_states.shape[1])
        last_hidden_state = layer_norm(self.layernorm, hidden_states)
        if embeddings is not None:
            ends = NetworkEnds(embeddings, hidden_states, last_hidden_state, self.method.key_mask(state))
            features = self.head.collect(reports.pop("probe", ()), ends)
            pooled = torch.cat([on_device(feature, hidden_states.device) for feature in features], dim=-1)
        else:
            pooled = self.pool(hidden_states, last_hidden_state, state)
        # Layers may be on different devices.
        cls_tokens = [on_device(token, hidden_states.device) for token in cls_tokens]
        output = CLCAViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooled,
            cls_tokens=torch.stack(cls_tokens, dim=1) if cls_tokens else None,
            assignments=reports.pop("assignment", ()) if output_assignments else None,
            reports=(dict(reports) or None) if self.training or output_assignments else None,
        )
        output.token_counts = tuple(token_counts)
        return output

    def shortcuts(self, for_head: bool, recording: bool) -> Shortcuts:
        """Decide which computations to skip.

        Nothing is skipped while hidden states, attention maps or assignments are recorded. In the last layer, tokens
        other than token 0 are also computed if a hook observes the layer or the modules after it, if the backbone is
        called directly, if the head reads them, or if a stage or the cache still changes the tokens there.

        Args:
            for_head: whether only the classifier reads the output.
            recording: whether intermediate results are recorded.
        """
        if not self.skip_unread_rows or recording or not fast_paths_enabled():
            return Shortcuts(False, False)
        config, layer, last = self.config, self.layers[-1], len(self.layers) - 1
        only_first = (
            for_head
            and self.head.reads_only_cls(config)
            and layer.reduction is None
            and last not in recovery_layers(config)
            and not config.vqt_original_slicing
            # Hooks on the last layer, or on modules that receive its tokens, must see all of them.
            and not self.hook_watch(layer, self.layernorm, self)
        )
        return Shortcuts(True, only_first)

    def pool(self, hidden_states: torch.Tensor, normalized: torch.Tensor, state: TokenState) -> torch.Tensor:
        """Pool the last tokens to (B, D), as `config.pooling` says.

        Args:
            hidden_states: tokens (B, N, D) before the final norm.
            normalized: the same after the final norm.
            state: their state.
        """
        if self.config.pooling == "cls":
            return normalized[:, 0]
        key_mask = self.method.key_mask(state)
        if self.attention_pooling is not None and self.config.pooling == "map_then_norm":
            return self.layernorm(self.attention_pooling(hidden_states, key_mask))
        if self.attention_pooling is not None:
            return self.attention_pooling(normalized, key_mask)
        # All tokens after the prefix, including CLR and retrieved tokens. `mean` is normalized after pooling, as in most models of timm.
        before = self.config.pooling == "normed_mean"
        tokens = normalized if before else hidden_states
        skipped = self.config.num_prefix_tokens
        if key_mask is not None and skipped > 1:
            # Padding may be among the first tokens, so the prefix is the first tokens that the mask admits.
            key_mask, skipped = key_mask & (key_mask.cumsum(dim=1) > skipped), 0
        mean = masked_mean(tokens, skipped, tokens.shape[1], key_mask)
        return (mean if before else self.layernorm(mean)).squeeze(1)


class CLCAViTBackbone(BackboneMixin, CLCAViTModel):
    """CLCA ViT that returns feature maps over the patches of an image, for segmentation and detection models of
    transformers.

    Dropped and merged tokens are put back on the grid, see `dense_clca.feature_maps`. `config.out_features` or
    `config.out_indices` selects the stages to return. Parameters that none of these stages uses are frozen.

    Args:
        config: as for `CLCAViTModel`.

    Raises:
        ValueError: if `CLCAViTConfig` refuses the configuration.

    Example:

    ```python
    >>> import torch
    >>> from clca import CLCAViTBackbone, CLCAViTConfig
    >>> config = CLCAViTConfig(
    ...     image_size=64, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
    ...     reduction="evit", reduction_layers=[1, 2], keep_rate=0.5, out_indices=[2, 4],
    ... )
    >>> output = CLCAViTBackbone(config).eval()(torch.zeros(2, 3, 64, 96))
    >>> [tuple(feature_map.shape) for feature_map in output.feature_maps], output.token_counts
    ([(2, 32, 8, 12), (2, 32, 8, 12)], (97, 97, 50, 27, 27))

    ```
    """

    def __init__(self, config: CLCAViTConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that are returned."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the stages that are returned."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: list[int] | tuple[int, ...] | None) -> None:
        self.config.out_indices = indices

    def freeze_unread(self) -> None:
        """Freeze the parameters that no feature map depends on."""
        config = self.config
        unread = [
            *self.layers[max(self._hidden_indices()) :],
            *(layer.probe for layer in self.layers),
            self.attention_pooling,
            None if config.apply_layernorm else self.layernorm,
        ]
        for module in unread:
            if isinstance(module, nn.Module):
                module.requires_grad_(False)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = True,
        keep_rate: float | Sequence[float] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLCAViTBackboneOutput:
        """Compute the feature maps of `pixel_values` (B, C, height, width).

        Args:
            pixel_values: normalized images.
            interpolate_pos_encoding: accept images of other sizes than `config.image_size`.
            keep_rate: keep rate of this forward pass instead of the configuration's: one for all stages or one per
                stage.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and options of the attention kernel.

        Raises:
            ValueError: as `CLCAViTModel.forward`, and if the method reports no assignments.
        """
        recorded = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        budget = checked_budget(self.config, keep_rate)
        outputs = CLCAViTModel.forward(
            self,
            pixel_values,
            interpolate_pos_encoding,
            output_assignments=True,
            budget=budget,
            output_hidden_states=True,
            return_dict=True,
            **kwargs,
        )
        norm = self.layernorm if self.config.apply_layernorm else None
        grid = self.embeddings.grid(cast("torch.Tensor", pixel_values))
        indices = self._hidden_indices()
        maps = feature_maps(outputs.hidden_states, outputs.assignments, self.config, grid, indices, norm)
        auxiliary = {}
        if self.training and self.method.adds_to_loss:
            inputs = LossInputs(outputs.reports or {}, None, outputs.last_hidden_state, budget)
            auxiliary = self.method.loss_terms(self.config, inputs)
            if auxiliary:
                _warn_of_unread_terms(list(auxiliary))
        output = CLCAViTBackboneOutput(
            feature_maps=cast("Any", maps),  # transformers declares a tuple of one map
            hidden_states=_selected(outputs.hidden_states, recorded),
            attentions=outputs.attentions,
            auxiliary_loss=cast("torch.Tensor", sum(auxiliary.values())) if auxiliary else None,
        )
        output.token_counts = outputs.token_counts
        return output

    def _hidden_indices(self) -> list[int]:
        """Return the non-negative indices of the hidden states to return."""
        count = self.config.num_hidden_layers + 1
        return [index % count for index in self.config.out_indices]


class CLCAViTForImageClassification(CLCAViTPreTrainedModel, ViTForImageClassification):
    """CLCA ViT with a classifier: linear on pooled features, or an aggregation over the CLS tokens of several layers.

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

    vit: CLCAViTModel

    def __init__(self, config: CLCAViTConfig) -> None:
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = CLCAViTModel(config)
        self.classifier = HEADS[config.head].build(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_assignments: bool = False,
        keep_rate: float | Sequence[float] | None = None,
        teacher_logits: torch.Tensor | None = None,
        teacher_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLCAViTImageClassifierOutput:
        """Classify `pixel_values` (B, C, height, width).

        Args:
            pixel_values: normalized images.
            labels: see `loss_clca.classification_loss`.
            interpolate_pos_encoding: accept images of other sizes than `config.image_size`.
            output_assignments: return the assignment of each stage.
            keep_rate: keep rate of this forward pass instead of the configuration's: one for all stages or one per
                stage.
            teacher_logits: (B, K), for methods that distill (DynamicViT), in training.
            teacher_tokens: (B, patches, D), for the same methods.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and options of the attention kernel.

        Raises:
            ValueError: if pixels are missing, pixels or labels have the wrong shape, or the method does not use a
                teacher.
        """
        has_teacher = teacher_logits is not None or teacher_tokens is not None
        if has_teacher and not self.vit.method.distils:
            raise ValueError(
                f"`teacher_logits` and `teacher_tokens` have no effect with `reduction`={self.config.reduction!r}, which does "
                "not distill. Remove them."
            )
        budget = checked_budget(self.config, keep_rate)
        outputs = self.vit(
            pixel_values,
            interpolate_pos_encoding,
            output_assignments,
            for_head=not (self.training and self.vit.method.adds_to_loss),  # such a loss may read all tokens
            budget=budget,
            return_dict=True,  # the option of the configuration only concerns the output of this model
            **kwargs,
        )
        features = outputs.cls_tokens if self.vit.aggregation_layers else outputs.pooler_output
        at_rate = (budget.mean_rate,) if self.vit.head.takes_rate(self.config) else ()
        logits = self.classifier(features, *at_rate)
        if teacher_logits is not None and teacher_logits.shape != logits.shape:
            raise ValueError(
                f"`teacher_logits` must have the shape of the logits, {tuple(logits.shape)}, got "
                f"{tuple(teacher_logits.shape)}. The teacher needs the same classes."
            )
        loss, loss_terms, auxiliary = None, {}, {}
        if self.training:
            inputs = LossInputs(
                outputs.reports or {},
                logits,
                outputs.last_hidden_state,
                budget,
                teacher_logits,
                teacher_tokens,
            )
            auxiliary |= self.vit.method.loss_terms(self.config, inputs)
            if self.config.group_lasso_weight:
                auxiliary["group_lasso"] = self.config.group_lasso_weight * group_lasso(head_weight(self.classifier))
        if labels is not None:
            smoothing = self.config.label_smoothing if self.training else 0.0
            loss_terms = {"classification": classification_loss(logits, labels, self.config, smoothing)} | auxiliary
            loss = cast("torch.Tensor", sum(loss_terms.values()))
        elif auxiliary:
            loss_terms = auxiliary
            _warn_of_lost_terms(list(auxiliary))
        output = CLCAViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            loss_terms={name: term.detach() for name, term in loss_terms.items()} or None,
            auxiliary_loss=cast("torch.Tensor", sum(auxiliary.values())) if auxiliary else None,
            assignments=outputs.assignments,
            reports=outputs.reports,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        output.token_counts = outputs.token_counts
        return output

    @torch.no_grad()
    def select_features(self, fraction: float) -> torch.Tensor:
        """Keep the features with the largest weights in the trained head, and re-initialize the head on these features
        only.

        This is the second step of Head2Toe (https://huggingface.co/papers/2201.03529). Train the new head afterwards.

        Args:
            fraction: share of the features to keep, in (0, 1].

        Returns:
            Ascending indices of the kept features among the features that the head read before.

        Raises:
            ValueError: if the head is not H2T or VQT, or the fraction is out of range.
        """
        if self.vit.head.reads != "probes":
            names = " or ".join(heads_reading("probes"))
            raise ValueError(f"`head` must be {names} to select features, got {self.config.head!r}.")
        if not 0 < fraction <= 1:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        weight = head_weight(self.classifier)
        best = best_features(weight, fraction)
        selected = self.classifier.selected[best] if isinstance(self.classifier, SelectedLinear) else best
        self.config.num_selected_features = len(best)
        self.classifier = SelectedLinear(len(best), len(weight)).to(device=weight.device, dtype=weight.dtype)
        self.classifier.selected.copy_(selected)
        self.classifier.apply(self._init_weights)
        return best


__all__ = [
    "CLCAViTBackbone",
    "CLCAViTForImageClassification",
    "CLCAViTModel",
    "CLCAViTPreTrainedModel",
    "eager_attention_forward",
]
