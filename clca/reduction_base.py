"""Interface between the ViT and token reduction methods.

Shapes, here and in the files of all methods: B batch, N tokens in, M tokens out, D width, H heads, d head width.

A layer takes `hidden_states` (B, N, D) and a `TokenState`, and returns both. Until the first reduction, the tokens are
`[CLS | registers | patches | CLR, retrieved]`. Two things always hold: token 0 is CLS (or the first patch in a model
without CLS), and right after a retrieval the last tokens are the retrieved ones.

A method is a subclass of `TokenReduction`. It has one instance for each layer in which it acts (a *stage*), which owns
the parameters of the stage, and class methods that every layer of the model calls. Override the simplest hook that is
sufficient:

| hook | called | used by |
| --- | --- | --- |
| `start` | once, before the first layer | ats (validity), dyvit in training (policy) |
| `before_layer` | at the beginning of a stage's layer | dyvit, dpcknn, kmedoids, sit, patchmerger, sinkhorn, heuristic |
| `key_mask` | in every layer's attention, and when tokens are averaged | ats (padding is masked), heuristic (far patches are masked) |
| `attention_mask` | in every layer's attention | tome and similar methods (log size as a bias); the default is `key_mask` |
| `attend` | in every layer, instead of softmax attention | dyvit in training (masked, smoothed softmax) |
| `choose_tokens` | in a stage's attention, before queries are computed | ats (only sampled tokens get queries) |
| `merge_tokens` | in a stage's layer, once its keys exist: like `before_mlp`, but as a linear map of tokens | topk, evit, maws, dmaws, edar, nfedar, tome, atc, pitome, mctf |
| `before_mlp` | in a stage's layer, between attention and MLP; the default applies `merge_tokens` | glsf, tofu |
| `observe` | in every layer's attention, once its keys exist | kmedoids, dmaws, edar, nfedar (the layer before a stage) |
| `retrieved_value` | when the cache appends tokens | value of these tokens in each track |
| `loss_terms` | in training | dyvit |

Base classes for groups of methods:

- `ScoredPruning`: keep the tokens with the best scores (dyvit in evaluation, glsf). `ScoredByAttention`: scores from
  the attention of one layer (maws; `AttentionPruning`: topk, evit). `TwoLayerPruning`: from two layers (dmaws;
  `RolloutPruning`: edar, nfedar).
- `Regrouping`: make new tokens from all except a protected part (dpcknn, kmedoids). `LearnedSlots`: the same with
  learned slots (sit, patchmerger, sinkhorn).
- `Merging`: merge tokens into their means (tome, atc, pitome, mctf, tofu).

Tracks are quantities per token, `(B, N, ...)`, that must match the tokens in number and order: ToMe's `size`, ATS'
`valid`, DynamicViT's `decision`. A stage that reorders or drops tokens calls `state.select`; a stage that makes new
tokens replaces the tracks.
"""

import inspect
import math
import warnings
from collections.abc import Callable
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from transformers import initialization as init

from .attention_clca import (
    AttentionContext,
    SelectedTokens,
    TokenMap,
    as_dtype,
    at_least_float32,
    full_precision,
    gather_rows,
    is_exporting,
)
from .budget_clca import Budget


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class TokenState(NamedTuple):
    """State that accompanies the hidden states (B, N, D) from layer to layer during a forward pass.

    Attributes:
        budget: what the stages keep in this forward pass.
        grid: patches of the image, (rows, columns).
        prefix: number of CLS and register tokens, as embedded.
        suffix: number of CLR tokens and of all tokens retrieved so far.
        pool_len: number of tokens that the cache's GAP averages; set before each retrieval.
        tracks: quantities per token by name, (B, N, ...).
        record_assignments: whether stages report their assignments.
        report: tensors that the current layer reports, by name.
    """

    budget: Budget
    grid: tuple[int, int]
    prefix: int
    suffix: int
    pool_len: int
    tracks: dict[str, torch.Tensor] = {}
    record_assignments: bool = False
    report: dict[str, torch.Tensor] = {}

    @property
    def num_patches(self) -> int:
        """Number of patches of the image. Cumulative keep rates refer to it."""
        return self.grid[0] * self.grid[1]

    def select(self, indices: torch.Tensor) -> "TokenState":
        """Return the state after keeping only the tokens at `indices` (B, M)."""
        if not self.tracks:
            return self
        return self._replace(tracks={name: gather_rows(track, indices) for name, track in self.tracks.items()})

    def with_tracks(self, **tracks: torch.Tensor) -> "TokenState":
        """Return the state with these tracks set."""
        return self._replace(tracks=self.tracks | tracks)

    def without_track(self, name: str) -> "TokenState":
        """Return the state without a track, if it has it."""
        return self._replace(tracks={key: track for key, track in self.tracks.items() if key != name})

    def with_report(self, **report: torch.Tensor) -> "TokenState":
        """Return the state with these tensors added to the report of the layer."""
        return self._replace(report=self.report | report)

    def with_assignment(self, assignment: Callable[[], torch.Tensor]) -> "TokenState":
        """Return the state with the assignment (B, M, N) of a stage in its report. The function is only called if
        assignments are recorded."""
        return self.with_report(assignment=assignment().detach()) if self.record_assignments else self


_MAX_CACHED_CONSTANTS = 64  # pairs of a budget and a grid for which a stage caches constants, besides its own

_LAYER_HOOKS = ("before_layer", "choose_tokens", "merge_tokens", "before_mlp")
# Hooks that had another name in release 0.1.0. Subclasses may still use it.
_RENAMED_HOOKS = {
    "visible": "key_mask",
    "choose_rows": "choose_tokens",
    "merge_rows": "merge_tokens",
    "recalled_value": "retrieved_value",
}

Weights = Callable[[], torch.Tensor]  # only called if assignments are recorded


class LossInputs(NamedTuple):
    """Inputs of the loss terms of a method.

    Attributes:
        reports: tensors that the stages reported, by name, one per stage.
        logits: (B, K), or None in a backbone, which has no classifier.
        tokens: (B, N, D), after the final norm.
        budget: budget of this forward pass.
        teacher_logits: (B, K), or None without a teacher.
        teacher_tokens: (B, P, D) for the P patches of the image, or None without a teacher.
    """

    reports: dict[str, tuple[torch.Tensor, ...]]
    logits: torch.Tensor | None
    tokens: torch.Tensor
    budget: Budget
    teacher_logits: torch.Tensor | None = None
    teacher_tokens: torch.Tensor | None = None


def one_hot_assignment(indices: torch.Tensor, num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Return an assignment (B, M, N) with a one where new token m is old token `indices[b, m]`.

    Args:
        indices: (B, M). A negative index gives a row of zeros.
        num_tokens: number N of old tokens.
        dtype: dtype of the result.
    """
    columns = torch.arange(num_tokens, device=indices.device)
    return (indices.unsqueeze(-1) == columns).to(dtype)


def identity_assignment(tokens: torch.Tensor) -> torch.Tensor:
    """Return the assignment (B, N, N) that leaves all `tokens` (B, N, ...) unchanged."""
    batch, num_tokens = tokens.shape[:2]
    return torch.eye(num_tokens, dtype=tokens.dtype, device=tokens.device).expand(batch, -1, -1)


def _option_types(cls: type) -> dict[str, Any]:
    """Return the types of the keyword-only arguments of a class' `__init__`, by name.

    With `from __future__ import annotations` they are strings. Each is evaluated separately, and those of other
    arguments are not, because they may use names that are only imported for type checkers. A type that cannot be
    evaluated counts as not annotated."""
    names = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
    types = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            alone = SimpleNamespace(__annotations__={name: parameter.annotation})
            try:
                types[name] = get_type_hints(alone, names)[name]
            except Exception:  # an expression can raise anything
                types[name] = inspect.Parameter.empty
    return types


def _fits(value: Any, annotation: Any) -> bool:
    """Return whether a value has the type of an annotation: a class, a list, a union, or literals."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(annotation))
    if kind is Literal:
        return value in get_args(annotation)
    if not isinstance(kind, type):
        return True  # for example a type variable
    if isinstance(value, bool) or kind not in (int, float):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return isinstance(value, int | kind) and math.isfinite(value)


def _overrides(cls: type, base: type, name: str) -> bool:
    """Return whether a subclass, or another of its bases, overrides a method of `base`."""
    return inspect.getattr_static(cls, name) is not inspect.getattr_static(base, name)


class TokenReduction(nn.Module):
    """Base of all methods. It does nothing by itself and is used by models without reduction.

    Options of a method are keyword-only arguments of its `__init__`; `config.reduction_kwargs` must match them.

    Args:
        config: the model's configuration.
        stage: 0-based index of the stage among the method's layers.
    """

    name: ClassVar[str | None] = None
    distils: ClassVar[bool] = False  # its loss uses a teacher, if there is one
    static_shapes: ClassVar[bool] = True  # token counts do not depend on the image
    differentiable_tracks: ClassVar[bool] = False  # gradients flow through a track from layer to layer
    max_exported_patches: ClassVar[int | None] = None  # graphs of larger images would have too many operators

    # Derived from the definition of a subclass when it is created.
    option_types: ClassVar[dict[str, Any]] = {}  # of the keyword-only arguments of `__init__`
    option_defaults: ClassVar[dict[str, Any]] = {}
    merges_early: bool = True  # `merge_tokens` does the same as `before_mlp`: True unless `before_mlp` is overridden
    adds_to_loss: ClassVar[bool] = False  # `loss_terms` is overridden, and may read all tokens
    layer_hooks: ClassVar[frozenset[str]] = frozenset()  # those that the layer has to call

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in _RENAMED_HOOKS.items():
            if old in cls.__dict__:
                message = f"The hook `{old}` of {cls.__name__} is called `{new}` now: rename it."
                warnings.warn(message, FutureWarning, stacklevel=2)
                setattr(cls, new, cls.__dict__[old])
        parameters = inspect.signature(cls.__init__).parameters
        cls.option_types = _option_types(cls)
        cls.option_defaults = {name: parameters[name].default for name in cls.option_types}
        cls.merges_early = not _overrides(cls, TokenReduction, "before_mlp")
        cls.adds_to_loss = _overrides(cls, TokenReduction, "loss_terms")
        cls.layer_hooks = frozenset(name for name in _LAYER_HOOKS if _overrides(cls, TokenReduction, name))
        if "merge_tokens" in cls.layer_hooks:
            cls.layer_hooks |= {"before_mlp"}  # which calls it

    def __init__(self, config: "CLCAViTConfig", stage: int) -> None:
        super().__init__()
        self.config = config
        self.stage = stage

    def init_weights(self) -> None:
        """Initialize the parameters of the stage itself; those of its submodules are already initialized.

        Use the functions of `transformers.initialization`, which do not change loaded parameters."""

    def constants(self, budget: Budget, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the tensors, on the CPU, that depend only on a budget and a grid (rows, columns) of patches.

        They must not be floating-point tensors, which would be rounded when the model is converted to half precision.
        """
        return {}

    def make_constants(self) -> None:
        """Store the `constants` of the configuration as buffers that are not saved.

        This is called when a stage is created, when transformers loads a model (which leaves such buffers empty), and
        when the keep rate of the configuration changes."""
        self._made_for = Budget.of(self.config), self.config.image_grid
        self._other_constants: dict[Any, dict[str, torch.Tensor]] = {}
        for name, value in self.constants(*self._made_for).items():
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.shape == value.shape:
                init.copy_(buffer, value)
            else:
                device = None if buffer is None else buffer.device
                self.register_buffer(name, value.to(device), persistent=False)

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, local_metadata: dict, *args: Any, **kwargs: Any
    ) -> None:
        """Load the parameters and compute the constants, which are in no file. A model on the meta device gets them
        with its weights."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers") and state_dict:
            device = next(iter(state_dict.values())).device
            meta = {n: b for n, b in self._buffers.items() if b is not None and b.is_meta}
            self._buffers |= {n: torch.empty_like(b, device=device) for n, b in meta.items()}
        self.make_constants()

    def constant(self, name: str, state: TokenState) -> torch.Tensor:
        """Return one of the `constants` for the budget and image size of this forward pass.

        Constants for other budgets or sizes than the configuration's are cached, because a copy from host to GPU in
        each pass would block."""
        own, asked = self._buffers[name], (state.budget, state.grid)
        assert own is not None
        if asked == self._made_for:
            return own
        if torch.compiler.is_compiling():  # becomes a constant of the graph
            return self.constants(*asked)[name].to(own.device)
        key = (*asked, own.device)
        if key not in self._other_constants:
            if len(self._other_constants) >= _MAX_CACHED_CONSTANTS:
                self._other_constants.clear()
            self._other_constants[key] = {n: c.to(own.device) for n, c in self.constants(*asked).items()}
        return self._other_constants[key][name]

    # Called by the configuration and the token schedule.

    @classmethod
    def is_static(cls, config: "CLCAViTConfig") -> bool:
        """Return whether the model keeps the same number of tokens of every image: `static_shapes`, or an option with
        this effect."""
        return cls.static_shapes

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str | None:
        """Return the reason why the keep rate of a trained model cannot be changed, or None if it can."""
        return None

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        """Refuse configurations that the method does not support.

        Raises:
            ValueError: if `reduction_kwargs` do not fit the options of the method, or a subclass refuses the
                configuration.
        """
        for option, value in (config.reduction_kwargs or {}).items():
            if option not in cls.option_types:
                allowed = ", ".join(cls.option_types) or "none"
                raise ValueError(f"`reduction_kwargs`: {cls.name} has no option `{option}`. Its options: {allowed}.")
            expected = cls.option_types[option]
            if not _fits(value, expected):
                kind = getattr(expected, "__name__", None) or str(expected)
                raise ValueError(f"`reduction_kwargs`: `{option}` must be {kind}, got {value!r}.")

    @classmethod
    def option(cls, config: "CLCAViTConfig", name: str) -> Any:
        """Return the value of an option: from `config.reduction_kwargs`, or the default of `__init__`."""
        return (config.reduction_kwargs or {}).get(name, cls.option_defaults[name])

    @classmethod
    def check_option(cls, config: "CLCAViTConfig", name: str, is_valid: Callable[[Any], bool], allowed: str) -> None:
        """Check the value of `config.reduction_kwargs[name]` with `is_valid`, if it is set.

        Args:
            config: the configuration.
            name: name of the option.
            is_valid: whether a value is accepted.
            allowed: description of the accepted values, for the error message.

        Raises:
            ValueError: if the value is not accepted. The message gives the option, what is `allowed`, and the value.
        """
        options = config.reduction_kwargs or {}
        if name in options and not is_valid(options[name]):
            raise ValueError(f"`reduction_kwargs`: `{name}` must be {allowed}, got {options[name]!r}.")

    @classmethod
    def layers(cls, config: "CLCAViTConfig") -> list[int]:
        """Return the layers that hold a stage."""
        return list(config.reduction_layers)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        """Return the number of tokens that leave a stage which `num_tokens` tokens enter.

        The layers and `token_schedule` both call this. Use `state.budget`, which may differ from the configuration's.
        """
        return num_tokens

    # Called in every layer.

    @classmethod
    def start(cls, hidden_states: torch.Tensor, state: TokenState, training: bool) -> TokenState:
        """Set the initial tracks on the state, before the first layer."""
        return state

    @classmethod
    def attention_mask(cls, state: TokenState) -> torch.Tensor | None:
        """Return the mask of the attention's keys, (B, 1, 1, N), boolean (True: attend) or additive. None
        for no mask."""
        key_mask = cls.key_mask(state)
        return None if key_mask is None else key_mask[:, None, None, :]

    @classmethod
    def attend(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        state: TokenState,
        from_tokens: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compute the attention in training instead of softmax attention. None: use softmax attention.

        Args:
            query: (B, H, n, d).
            key, value: (B, H, N, d).
            scaling: factor of the logits.
            state: state of the N tokens.
            from_tokens: whether the queries belong to the N tokens, not to additional ones.

        Returns:
            Output (B, n, H, d) and weights (B, H, n, N), or None.
        """
        return None

    @classmethod
    def observe(cls, context: AttentionContext, state: TokenState, before_stage: bool) -> TokenState:
        """Store information about a layer's attention in the state, before a stage selects or merges tokens.

        Args:
            context: attention of the layer.
            state: state of its tokens.
            before_stage: whether the next layer holds a stage.
        """
        return state

    @classmethod
    def retrieved_value(cls, name: str, track: torch.Tensor, training: bool) -> float | torch.Tensor:
        """Return the track value of tokens that the cache appends: a number, or a tensor that broadcasts to (B, n,
        ...)."""
        return 1.0

    @classmethod
    def extend_tracks(cls, state: TokenState, count: int, training: bool) -> TokenState:
        """Return the state after `count` tokens were appended to the sequence."""
        if not state.tracks:
            return state
        tracks = {}
        for name, track in state.tracks.items():
            value = cls.retrieved_value(name, track, training)
            shape = (track.shape[0], count, *track.shape[2:])
            # A number becomes a tensor on the device of the track, without a copy from the host.
            added = value.to(track.dtype).expand(shape) if torch.is_tensor(value) else track.new_full(shape, value)
            tracks[name] = torch.cat([track, added], dim=1)
        return state._replace(tracks=tracks)

    @classmethod
    def key_mask(cls, state: TokenState) -> torch.Tensor | None:
        """Return the key mask (B, N): True for tokens that others attend to and that are averaged. None for all."""
        return None

    @classmethod
    def loss_terms(cls, config: "CLCAViTConfig", inputs: LossInputs) -> dict[str, torch.Tensor]:
        """Return the weighted terms, by name, that the method adds to the loss in training."""
        return {}

    # Called by the layer of a stage.

    def forward(self, hook: str, *args: Any) -> Any:
        """Call one of the hooks below by its name.

        Hooks are called through the module because offloading and sharding fetch the parameters of a stage when the
        module is called. The layer calls only those in `layer_hooks`: the others do nothing."""
        return getattr(self, hook)(*args)

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        """Reduce the tokens before the layer's attention.

        Args:
            hidden_states: tokens (B, N, D).
            state: their state.

        Returns:
            The new tokens (B, M, D) and their state.
        """
        return hidden_states, state

    def choose_tokens(self, context: AttentionContext, state: TokenState) -> tuple[torch.Tensor | None, TokenState]:
        """Return the indices (B, M) of the tokens to compute attention for, and their state. None for all tokens."""
        return None, state

    def merge_tokens(self, context: AttentionContext, state: TokenState) -> tuple[TokenMap | None, TokenState]:
        """Return the map from old to new tokens, if keys and a few queries suffice to compute it, and the state of the
        new tokens.

        Use this hook instead of `before_mlp` where possible, because it saves computations: if the new tokens are
        unchanged old ones (`TokenMap.selected`), the queries of all others; otherwise the output projection of tokens
        that are summed.

        Args:
            context: attention of the layer, before it is computed.
            state: state of the N tokens.

        Returns:
            The map, or None to leave the tokens unchanged; and the state of the new tokens.
        """
        return None, state

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        """Reduce the tokens between attention and MLP.

        Args:
            hidden_states: tokens (B, N, D).
            state: their state.
            context: attention of the layer.

        Returns:
            The new tokens (B, M, D) and their state.
        """
        token_map, state = self.merge_tokens(context, state)
        return (hidden_states if token_map is None else token_map(hidden_states)), state


class FusedTokens(TokenMap):
    """Select some of the tokens and append one weighted sum of all tokens.

    Args:
        selected: indices (B, M - 1) of the tokens to select.
        weights: (B, 1, N).
    """

    def __init__(self, selected: torch.Tensor, weights: torch.Tensor) -> None:
        self.select, self.weights = SelectedTokens(selected), weights
        self.weight_sums = nn.functional.pad(weights.sum(dim=2, keepdim=True), (0, 0, selected.shape[1], 0), value=1.0)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        fused = as_dtype(self.weights, values.dtype) @ values
        # Autocast computes it in half precision.
        return torch.cat([self.select(values), as_dtype(fused, values.dtype)], dim=1)


class ScoredPruning(TokenReduction):
    """Keep token 0 and the other tokens with the best scores.

    Patches, registers, CLR and retrieved tokens are treated alike, as in the original. A method calls `prune` with its
    scores. With `fuse_rest` the dropped tokens are fused into one additional token, their sum weighted by the scores;
    a method may have an option of that name.

    Kept tokens are sorted by descending score. If no token is dropped, the sequence stays unchanged, unless the method
    sets `always_sorts`."""

    fuse_rest: bool = False
    normalize_weights: bool = False  # rescale the weights of the fused token so that those of all tokens cover [0, 1]
    always_sorts: ClassVar[bool] = False

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        if "normalize_weights" in cls.option_types and not cls.fuses(config):
            cls.check_option(config, "normalize_weights", lambda v: not v, "False without `fuse_rest`")

    @classmethod
    def fuses(cls, config: "CLCAViTConfig") -> bool:
        """Return whether a stage fuses the tokens it drops into one: `fuse_rest` of its stages."""
        return cls.option(config, "fuse_rest") if "fuse_rest" in cls.option_types else cls.fuse_rest

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        kept = cls.keep(config, stage, num_tokens, state)
        return 1 + kept + int(cls.fuses(config) and kept < num_tokens - 1)

    @classmethod
    def keep(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        """Return the number of tokens to keep besides token 0."""
        return state.budget.of_current(stage, num_tokens - 1)

    def prune(
        self, hidden_states: torch.Tensor, state: TokenState, scores: torch.Tensor
    ) -> tuple[torch.Tensor, TokenState]:
        """Keep token 0 and the tokens of `hidden_states` (B, N, D) with the best `scores` (B, N - 1).

        Raises:
            ValueError: if `scores` has another number of tokens; token 0 has no score.
        """
        if scores.shape[1] != hidden_states.shape[1] - 1:
            raise ValueError(
                f"`scores` must have one value per token except token 0, (B, {hidden_states.shape[1] - 1}), got "
                f"{tuple(scores.shape)}."
            )
        token_map, state = self.keep_best(state, scores)
        return (hidden_states if token_map is None else token_map(hidden_states)), state

    def keep_best(self, state: TokenState, scores: torch.Tensor) -> tuple[TokenMap | None, TokenState]:
        """Return the map that `prune` applies, and the state of the kept tokens. The map is None if no token is
        dropped."""
        num_tokens = scores.shape[1] + 1
        keep = self.keep(self.config, self.stage, num_tokens, state)
        if keep == num_tokens - 1 and not self.always_sorts:
            return None, state.with_assignment(lambda: identity_assignment(nn.functional.pad(scores, (1, 0))))
        best = scores.topk(keep, dim=1).indices
        indices = nn.functional.pad(best + 1, (1, 0))  # token 0 comes first
        state = state.select(indices)
        if not self.fuse_rest:
            return SelectedTokens(indices), state.with_assignment(
                lambda: one_hot_assignment(indices, num_tokens, scores.dtype)
            )
        weights = self.fusion_weights(scores).scatter(1, best, 0.0)  # zero for kept tokens
        weights = nn.functional.pad(weights, (1, 0)).unsqueeze(1)  # (B, 1, N)
        state = self.extend_tracks(state, 1, self.training).with_assignment(
            lambda: torch.cat([one_hot_assignment(indices, num_tokens, weights.dtype), shares_of(weights)], dim=1)
        )
        return FusedTokens(indices, weights), state

    def fusion_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the weights (B, N - 1) in the fused token that all tokens would have, from their `scores`
        (B, N - 1)."""
        weights = self.weigh(scores)
        if not self.normalize_weights:
            return weights
        least, most = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
        return (weights - least) / torch.where(most > least, most - least, 1.0)  # equal weights: 0 instead of 0 / 0

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the weights of scores, before `normalize_weights` is applied. The default is the scores
        themselves."""
        return scores


def shares_of(weights: torch.Tensor) -> torch.Tensor:
    """Return the shares (B, 1, N) of a fused token to report as its assignment, from its weights (B, 1, N).

    Weights may be negative or add up to more than one; shares may not."""
    shares = weights.abs()
    return shares / shares.sum(dim=2, keepdim=True).clamp(min=1)


class ScoredByAttention(ScoredPruning):
    """Between attention and MLP, keep token 0 and the ceil(rate * (N - 1)) other tokens with the best scores, which
    are computed from the layer's attention. Subclasses define `score`."""

    def merge_tokens(self, context: AttentionContext, state: TokenState) -> tuple[TokenMap | None, TokenState]:
        if self.fuse_rest:
            context.query()  # project all queries at once: all are needed, not only that of CLS
        return self.keep_best(state, self.score(context)[:, 1:])

    def score(self, context: AttentionContext) -> torch.Tensor:
        """Return the scores (B, N) of all tokens. The score of token 0, which is always kept, is ignored."""
        raise NotImplementedError


class AttentionPruning(ScoredByAttention):
    """Keep the tokens that receive the most attention.

    Args:
        score_by: `cls`, the attention from token 0, or `received`, the mean attention from all tokens; both averaged
            over heads. The default is `cls` in a model with a CLS token and `received` without. (The original always
            uses token 0, which is the first patch in a model without CLS.)
    """

    def __init__(self, config: "CLCAViTConfig", stage: int, *, score_by: str | None = None) -> None:
        super().__init__(config, stage)
        self.score_by = score_by or ("cls" if config.use_class_token else "received")

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        cls.check_option(config, "score_by", lambda v: v in (None, "cls", "received"), "'cls' or 'received'")

    def score(self, context: AttentionContext) -> torch.Tensor:
        if self.score_by == "cls":
            return context.cls_attention()
        received = context.received_attention()
        return received / (self.config.num_attention_heads * received.shape[1])


class TwoLayerPruning(ScoredByAttention):
    """Score tokens by the attention of the stage's layer and of the layer before it.

    Subclasses define `note`, which computes in the earlier layer what `score` needs from it, and `score`.

    A note is used only if the tokens that enter the stage's layer are the same, in the same order, as those that
    entered the layer before. If that layer dropped, fused or merged tokens, if the cache appended tokens after it, or
    if the stage is in layer 0, there is no note, and scores depend on the stage's own layer alone."""

    differentiable_tracks = True  # through the weights of a fused token

    @classmethod
    def note(cls, context: AttentionContext) -> torch.Tensor:
        """Return what the next layer needs to know about this layer's attention, (B, N, ...)."""
        raise NotImplementedError

    @classmethod
    def noted(cls, context: AttentionContext) -> torch.Tensor | None:
        """Return the note of the layer before, or None if it cannot be used.

        The context has the state that entered this layer. So the note is still available there after `observe` has
        stored the next one."""
        return context.state.tracks.get("noted")

    @classmethod
    def observe(cls, context: AttentionContext, state: TokenState, before_stage: bool) -> TokenState:
        if not before_stage:
            return state.without_track("noted")
        with torch.set_grad_enabled(torch.is_grad_enabled() and cls.fuses(context.attention.config)):
            return state.with_tracks(noted=cls.note(context))

    @classmethod
    def extend_tracks(cls, state: TokenState, count: int, training: bool) -> TokenState:
        return super().extend_tracks(state.without_track("noted"), count, training)

    def keep_best(self, state: TokenState, scores: torch.Tensor) -> tuple[TokenMap | None, TokenState]:
        token_map, new_state = super().keep_best(state, scores)
        return token_map, new_state if token_map is None else new_state.without_track("noted")


class RolloutPruning(TwoLayerPruning):
    """Score tokens by the attention of token 0 through two layers (attention rollout,
    https://huggingface.co/papers/2005.00928).

    Let a be the attention averaged over heads and R = (a + I) / 2, whose rows sum to one; the identity I stands for
    the residual connection. The scores are row 0 of R of the stage's layer times R of the layer before."""

    @classmethod
    def note(cls, context: AttentionContext) -> torch.Tensor:
        return context.mean_attention()  # (B, N, N)

    def score(self, context: AttentionContext) -> torch.Tensor:
        attention = context.cls_attention()  # (B, N)
        own = torch.cat([attention[:, :1] + 1, attention[:, 1:]], dim=1) / 2
        before = self.noted(context)
        if before is None:
            return own
        with full_precision(own):
            return ((own.unsqueeze(1) @ before).squeeze(1) + own) / 2


class Regrouping(TokenReduction):
    """Before the layer, replace the tokens between a protected head and a protected tail of the sequence by M new
    ones.

    Subclasses define `regroup`."""

    @classmethod
    def protected(cls, state: TokenState) -> tuple[int, int]:
        """Return the number of tokens at the head and at the tail to leave unchanged.

        The default is CLS and registers; CLR and retrieved tokens are regrouped with the patches."""
        return state.prefix, 0

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        """Return the number M of new tokens that replace `num_tokens` tokens."""
        return state.budget.of_patches(stage, state.num_patches)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        protected = sum(cls.protected(state))
        return protected + cls.slots(config, stage, num_tokens - protected, state)

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        head, tail = self.protected(state)
        body = hidden_states.shape[1] - head - tail
        first, tokens, last = hidden_states.split([head, body, tail], dim=1)
        slots = self.slots(self.config, self.stage, body, state)
        # Call it even without slots: parameters in the graph get a gradient, which is zero here.
        tokens, weights = self.regroup(tokens, slots, state)
        state = state._replace(suffix=tail, tracks={}).with_assignment(
            lambda: _block_assignment(hidden_states, head, tail, weights())
        )
        return torch.cat([first, tokens.to(hidden_states.dtype), last], dim=1), state

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        """Make new tokens.

        Args:
            tokens: (B, n, D).
            slots: number M of new tokens.
            state: the state of the sequence.

        Returns:
            The new tokens (B, M, D), and a function that returns the weights (B, M, n) they were made with.
        """
        raise NotImplementedError


class LearnedSlots(Regrouping):
    """Regroup tokens into slots that are parameters. Their number follows from `config.image_size`, not from the
    input."""

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str:
        slots = ", ".join(str(cls.num_slots(config, stage)) for stage in range(len(config.reduction_layers)))
        return f"the {slots} slots of its stages are parameters"

    @classmethod
    def num_slots(cls, config: "CLCAViTConfig", stage: int) -> int:
        """Return the number of slots of a stage: at least one if no other token would be left."""
        budget = Budget.of(config)
        slots = budget.of_patches(stage, config.num_patches)
        state = TokenState(budget, config.image_grid, config.num_prefix_tokens, config.num_clr_tokens, pool_len=0)
        return slots if sum(cls.protected(state)) else max(slots, 1)

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        return cls.num_slots(config, stage)


def _block_assignment(hidden_states: torch.Tensor, head: int, tail: int, weights: torch.Tensor) -> torch.Tensor:
    """Return the assignment (B, head + M + tail, N): identity for protected tokens, `weights` (B, M, n) for those in
    between."""
    identity = identity_assignment(hidden_states)
    body = nn.functional.pad(weights.to(identity.dtype), (head, tail))
    return torch.cat([identity[:, :head], body, identity[:, identity.shape[1] - tail :]], dim=1)


def pairwise_distance(tokens: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Return the Euclidean distances (B, n, n) between the tokens (B, n, D), without gradients.

    They are computed in place in one matrix product. The result is exactly symmetric, and exactly zero on the
    diagonal. (`torch.cdist` does not export to ONNX.)"""
    squares = tokens.square().sum(dim=-1)
    with full_precision(tokens):
        distances = torch.baddbmm(squares.unsqueeze(1), tokens, tokens.transpose(1, 2), alpha=-2)
    distances = distances.add_(squares.unsqueeze(2)).clamp_(min=0).sqrt_()
    # A matrix product is not exactly symmetric, which would break ties: copy the upper triangle to the lower one.
    for start in range(0, distances.shape[1], chunk):  # in chunks, because a second matrix would double the memory
        here, after = slice(start, start + chunk), slice(start + chunk, None)
        block = distances[:, here, here].triu(1)
        distances[:, here, here] = block + block.transpose(1, 2)
        distances[:, after, here] = distances[:, here, after].transpose(1, 2)
    return distances


def nearest_token(distances: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Return, for each of n points, which of M points is nearest: (B, n), values in 0 .. M - 1.

    Args:
        distances: (B, n, n).
        candidates: indices (B, M).
    """
    # Chunks keep the temporary tensor much smaller than the distances, with few steps if it is small anyway.
    chunk = distances.shape[1] if 4 * candidates.shape[1] <= distances.shape[1] else 256
    return torch.cat([gather_rows(part, candidates).argmin(dim=1) for part in distances.split(chunk, dim=2)], dim=1)


class MergedTokens(TokenMap):
    """Sum tokens in groups, with weights.

    Args:
        target: index of the new token that each old token is added to, (B, N).
        share: weight of each old token, (B, N); those of a new token sum to one.
        num_tokens: number M of new tokens.
    """

    def __init__(self, target: torch.Tensor, share: torch.Tensor, num_tokens: int) -> None:
        self.target, self.share, self.num_tokens = target, share, num_tokens

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        index = self.target.unsqueeze(-1).expand_as(values)
        weighted = values * self.share.unsqueeze(-1).to(values.dtype)
        return torch.zeros_like(values[:, : self.num_tokens]).scatter_add(1, index, weighted)


class Merging(TokenReduction):
    """Between attention and MLP, merge tokens into their means, weighted by size: the number of patches a token stands
    for.

    Token 0 is never merged. Subclasses define `match`, and may change how many tokens are removed.

    A token that stands for n patches receives n times the attention, in every layer: log n is added to its logits."""

    from_patches: ClassVar[bool] = (
        True  # the keep rate is a cumulative share of the patches, not of the current tokens
    )

    size_track = "size"  # with any other name, sizes do not affect the attention, only the means

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        return num_tokens - cls.num_merged(config, stage, num_tokens, state)

    @classmethod
    def num_merged(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        """Return the number of tokens that a stage removes. As a share of the patches: the difference between two
        targets."""
        if cls.from_patches:
            last = state.num_patches if stage == 0 else state.budget.of_patches(stage - 1, state.num_patches)
            wanted = last - state.budget.of_patches(stage, state.num_patches)
        else:
            wanted = num_tokens - 1 - state.budget.of_current(stage, num_tokens - 1)
        return max(min(wanted, cls.max_merged(num_tokens)), 0)

    @classmethod
    def max_merged(cls, num_tokens: int) -> int:
        """Return the maximum number of tokens that can be removed: by default half of those after token 0, for merging
        in pairs."""
        return (num_tokens - 1) // 2

    @classmethod
    def attention_mask(cls, state: TokenState) -> torch.Tensor | None:
        size = state.tracks.get("size")
        return None if size is None else size.log()[:, None, None, :]

    def size(self, context: AttentionContext, state: TokenState) -> torch.Tensor:
        """Return the sizes (B, N) in float32 or float64; all one if no token has been merged yet."""
        size = state.tracks.get(self.size_track)
        return at_least_float32(context.key).new_ones(context.key[:, 0, :, 0].shape) if size is None else size

    def merge_tokens(self, context: AttentionContext, state: TokenState) -> tuple[TokenMap | None, TokenState]:
        merged = self.num_merged(self.config, self.stage, context.key.shape[2], state)
        if merged == 0:
            return None, state.with_assignment(lambda: identity_assignment(context.key[:, 0]))
        return self.merge(context, state, merged)

    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[TokenMap, TokenState]:
        """Return the map that removes `merged` tokens, at least one, and the state of the new tokens."""
        with torch.no_grad():
            target = self.match(context.key.mean(dim=1), merged)
        return self.pool(target, context.key.shape[2] - merged, self.size(context, state), state)

    def match(self, metric: torch.Tensor, merged: int) -> torch.Tensor:
        """Return the index (B, N) of the new token that each token goes to.

        By default the `merged` most similar pairs of tokens at even and at odd positions are merged.

        Args:
            metric: features (B, N, d) to compare tokens by: keys averaged over heads.
            merged: number of tokens to remove.
        """
        return match_halves(cosine_of_halves(metric), merged).target

    def pool(
        self,
        target: torch.Tensor,
        num_tokens: int,
        size: torch.Tensor,
        state: TokenState,
        weights: torch.Tensor | None = None,
    ) -> tuple[MergedTokens, TokenState]:
        """Return the map to the means of the tokens with the same `target`, and the state with the new sizes, which
        are sums.

        Args:
            target: index of the new token of each token, (B, N).
            num_tokens: number M of new tokens.
            size: (B, N).
            state: the state of the N tokens.
            weights: weights of the means, (B, N); by default the sizes.
        """
        new_size = size.new_zeros(size.shape[0], num_tokens).scatter_add(1, target, size)
        total = new_size if weights is None else torch.zeros_like(new_size).scatter_add(1, target, weights)
        share = (size if weights is None else weights) / total.gather(1, target)
        state = state._replace(tracks={self.size_track: new_size}).with_assignment(
            lambda: share.new_zeros(*new_size.shape, size.shape[1]).scatter(1, target.unsqueeze(1), share.unsqueeze(1))
        )
        return MergedTokens(target, share, num_tokens), state


class Matching(NamedTuple):
    """Which tokens stay, and which new token each of the others is merged into.

    Attributes:
        kept: (B, M), tokens that stay, in their new order.
        removed: (B, N - M), the other tokens.
        destination: (B, N - M), index of the new token that each of the others is merged into.
    """

    kept: torch.Tensor
    removed: torch.Tensor
    destination: torch.Tensor

    @property
    def target(self) -> torch.Tensor:
        """Index of the new token of each token, (B, N)."""
        tokens = torch.cat([self.kept, self.removed], dim=1)
        positions = torch.arange(self.kept.shape[1], device=tokens.device).expand_as(self.kept)
        return torch.zeros_like(tokens).scatter(1, tokens, torch.cat([positions, self.destination], dim=1))


def cosine_of_halves(metric: torch.Tensor) -> torch.Tensor:
    """Return the cosines (B, a, b) of the a tokens of `metric` (B, N, d) at even positions with the b at odd ones.

    They are computed in float32 or float64."""
    metric = nn.functional.normalize(at_least_float32(metric), dim=-1)
    with full_precision(metric):
        return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def match_halves(scores: torch.Tensor, merged: int) -> Matching:
    """Merge the `merged` tokens at even positions with the best scores into their best partners at odd positions.

    The new order is: even tokens that stay, ascending; all odd tokens.

    Args:
        scores: (B, a, b) of the a even and b odd tokens. The scores of token 0 are overwritten, so that it stays.
        merged: number of tokens to remove.
    """
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=2)  # (B, a)
    order = descending_order(best)
    removed, stay = order[:, :merged], order[:, merged:].sort(dim=1).values
    odd = torch.arange(1, 2 * scores.shape[2], 2, device=scores.device).expand(scores.shape[0], -1)
    return Matching(torch.cat([2 * stay, odd], dim=1), 2 * removed, partner.gather(1, removed) + stay.shape[1])


def descending_order(values: torch.Tensor) -> torch.Tensor:
    """Return the indices that sort `values` (B, n) in descending order; of equal values the lower index
    comes first."""
    # A stable sort does not export to ONNX. A plain sort becomes TopK, which breaks ties in the same way.
    stable = {} if is_exporting() else {"stable": True}
    return values.argsort(dim=1, descending=True, **stable)
