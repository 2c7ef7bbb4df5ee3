"""The contract between the ViT and a token reduction method.

Shapes, here and in every file of a method: B batch, N tokens in, M tokens out, D width, H heads, d head width.

A layer takes `hidden_states` (B, N, D) and a `TokenState`, and returns both. Rows of the sequence are `[CLS | registers |
patches | CLR, recalled]` until the first reduction; what holds always is that row 0 is CLS (the first patch in a model
without one) and that, right after a recall, the last rows are the recalled ones.

A method is a subclass of `TokenReduction`: one instance for each layer in which it acts (a *stage*), which owns the stage's
parameters, and a few class methods that every layer of the model calls. It overrides the shallowest hook that fits:

| hook | called | serves |
| --- | --- | --- |
| `start` | once, before the first layer | ats (validity), dyvit in training (policy) |
| `before_layer` | first thing in a stage's layer | dyvit, dpcknn, kmedoids, sit, patchmerger, sinkhorn, heuristic |
| `visible` | in every layer's attention, and when rows are averaged | ats (pads are not), heuristic (far patches) |
| `attention_mask` | in every layer's attention | tome and its kin (log size, a bias); by default what `visible` says |
| `attend` | in every layer, instead of softmax attention | dyvit in training (masked, smoothed softmax) |
| `choose_rows` | in a stage's attention, before queries exist | ats (the sampled rows are the only queries) |
| `merge_rows` | in a stage's layer, once its keys exist: what `before_mlp` does, as weighted sums of rows | topk, evit, maws, dmaws, edar, nfedar, tome, atc, pitome, mctf |
| `before_mlp` | in a stage's layer, between attention and MLP; by default applies `merge_rows` | glsf, tofu |
| `observe` | in every layer's attention, once its keys exist | kmedoids, dmaws, edar, nfedar (the layer before a stage) |
| `recalled_value` | when the cache appends rows | what those rows get in each track |
| `loss_terms` | with labels, in training | dyvit |

`ScoredPruning` holds what pruning methods share (dyvit in evaluation, glsf), `ScoredByAttention` what those share that score
by a layer's attention (`AttentionPruning`: topk, evit; maws), `TwoLayerPruning` by that of two layers (dmaws;
`RolloutPruning`: edar, nfedar). `Regrouping` and `LearntSlots` hold what methods share that make new rows of all but a
protected part (dpcknn, kmedoids; sit, patchmerger, sinkhorn), `Merging` what methods share that merge rows into their means
(tome, atc, pitome, mctf, tofu).

Tracks are per-row quantities `(B, N, ...)` that stay in step with the rows: ToMe's `size`, ATS' `valid`, DynamicViT's
`decision`. A stage that reorders or drops rows calls `state.select`, a stage that makes new rows replaces its tracks.
"""

import inspect
import math
from collections.abc import Callable
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from transformers import initialization as init

from .attention_clca import AttentionContext, RowMap, TakenRows, at_least_float32, full_precision, gather_rows
from .budget_clca import Budget


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class TokenState(NamedTuple):
    """What travels with the hidden states (B, N, D) from layer to layer. Only the model's forward owns one."""

    budget: Budget  # what stages keep, in this forward
    grid: tuple[int, int]  # patches of the image: rows, columns
    prefix: int  # CLS and registers, as embedded
    suffix: int  # CLR and every row recalled so far
    pool_len: int  # rows that enter the cache's GAP; set just before each recall
    tracks: dict[str, torch.Tensor] = {}
    record_assignments: bool = False
    report: dict[str, torch.Tensor] = {}

    @property
    def num_patches(self) -> int:
        """Patches of the image: what cumulative keep rates refer to."""
        return self.grid[0] * self.grid[1]

    def select(self, rows: torch.Tensor) -> "TokenState":
        """The state after keeping `rows` (B, M) of the sequence."""
        return self._replace(tracks={name: gather_rows(track, rows) for name, track in self.tracks.items()})

    def with_tracks(self, **tracks: torch.Tensor) -> "TokenState":
        """The state with some tracks set."""
        return self._replace(tracks=self.tracks | tracks)

    def without_track(self, name: str) -> "TokenState":
        """The state without one of its tracks, if it has it."""
        return self._replace(tracks={key: track for key, track in self.tracks.items() if key != name})

    def with_report(self, **report: torch.Tensor) -> "TokenState":
        """The state with something added to the layer's report."""
        return self._replace(report=self.report | report)

    def with_assignment(self, assignment: Callable[[], torch.Tensor]) -> "TokenState":
        """The state with a stage's assignment (B, M, N) in the report, made only if somebody asked for assignments."""
        return self.with_report(assignment=assignment().detach()) if self.record_assignments else self


_KEPT_CONSTANTS = 64  # pairs of a budget and an image size that a stage remembers beside its own

Weights = Callable[[], torch.Tensor]  # made only if somebody asks for assignments


class LossInputs(NamedTuple):
    """What a method may build its loss from."""

    reports: dict[str, tuple[torch.Tensor, ...]]  # what the stages reported, by name
    logits: torch.Tensor | None  # (B, K); None in a backbone, which has no classifier
    tokens: torch.Tensor  # (B, N, D), after the final norm
    budget: Budget  # of this forward
    teacher_logits: torch.Tensor | None = None  # (B, K)
    teacher_tokens: torch.Tensor | None = None  # (B, P, D), of the image's P patches


def one_hot_assignment(rows: torch.Tensor, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, M, N) with a one where row m was row `rows[b, m]` of N = `num_rows`; a negative index gives a row of zeros."""
    columns = torch.arange(num_rows, device=rows.device)
    return (rows.unsqueeze(-1) == columns).to(dtype)


def identity_assignment(rows: torch.Tensor) -> torch.Tensor:
    """(B, N, N): every one of `rows` (B, N, ...) is what it was."""
    batch, num_rows = rows.shape[:2]
    return torch.eye(num_rows, dtype=rows.dtype, device=rows.device).expand(batch, -1, -1)


def _option_types(cls: type) -> dict[str, Any]:
    """Types of the keyword-only arguments of a class' `__init__`, by name.

    Under `from __future__ import annotations` they are strings. Each is evaluated by itself, and those of other arguments
    are not: they may name what is imported for type checkers alone. What cannot be evaluated counts as not annotated."""
    names = getattr(inspect.unwrap(cls.__init__), "__globals__", {})
    types = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            alone = SimpleNamespace(__annotations__={name: parameter.annotation})
            try:
                types[name] = get_type_hints(alone, names)[name]
            except Exception:  # whatever an expression may raise
                types[name] = inspect.Parameter.empty
    return types


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value has the type that a parameter is annotated with: a class, a list of something, a union, or literals."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    kind = get_origin(annotation) or annotation
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(annotation))
    if kind is Literal:
        return value in get_args(annotation)
    if not isinstance(kind, type):
        return True  # a type variable, say
    if isinstance(value, bool) or kind not in (int, float):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return isinstance(value, int | kind) and math.isfinite(value)


def _overrides(cls: type, base: type, name: str) -> bool:
    """Whether a subclass defines a method anew, itself or by another of its bases."""
    return inspect.getattr_static(cls, name) is not inspect.getattr_static(base, name)


class TokenReduction(nn.Module):
    """A method that does nothing: the base of all, and what a model without reduction uses.

    Knobs are keyword-only arguments of a subclass' `__init__`; `config.reduction_kwargs` must match them.

    Args:
        config: the model's configuration.
        stage: 0-based number of the stage among the method's layers.
    """

    name: ClassVar[str | None] = None
    distils: ClassVar[bool] = False  # its loss learns from a teacher, where there is one
    static_shapes: ClassVar[bool] = True  # token counts do not depend on the image
    differentiable_tracks: ClassVar[bool] = False  # gradients flow through a track from layer to layer
    most_exported_patches: ClassVar[int | None] = None  # graphs of larger images would hold too many operators

    # What follows from a subclass' definition, set when it is made.
    option_types: ClassVar[dict[str, Any]] = {}  # of the keyword-only arguments of `__init__`
    option_defaults: ClassVar[dict[str, Any]] = {}
    merges_early: bool = True  # `merge_rows` says all that `before_mlp` does; True unless that is overridden
    adds_to_loss: ClassVar[bool] = False  # `loss_terms` is overridden: it may read all tokens

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = inspect.signature(cls.__init__).parameters
        cls.option_types = _option_types(cls)
        cls.option_defaults = {name: parameters[name].default for name in cls.option_types}
        cls.merges_early = not _overrides(cls, TokenReduction, "before_mlp")
        cls.adds_to_loss = _overrides(cls, TokenReduction, "loss_terms")

    def __init__(self, config: "CLCAViTConfig", stage: int) -> None:
        super().__init__()
        self.config = config
        self.stage = stage

    def init_weights(self) -> None:
        """Initialise parameters that belong to the stage itself (those of its modules are done), with the functions of
        `transformers.initialization`, which leave alone what was loaded."""

    def constants(self, budget: Budget, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Tensors, on the CPU, that follow from a budget and a grid of patches (rows, columns) alone. Not floating-point
        ones: those would be rounded when the model is brought to half precision."""
        return {}

    def make_constants(self) -> None:
        """Keep the `constants` of the configuration as buffers that are not saved. Called when a stage is made, where
        transformers loads a model (it leaves such buffers empty), and when the configuration's keep rate has changed."""
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
        """Constants are in no file: a model made on the meta device has them once it is given its weights."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers") and state_dict:
            device = next(iter(state_dict.values())).device
            meta = {n: b for n, b in self._buffers.items() if b is not None and b.is_meta}
            self._buffers |= {n: torch.empty_like(b, device=device) for n, b in meta.items()}
        self.make_constants()

    def constant(self, name: str, state: TokenState) -> torch.Tensor:
        """One of the `constants`: the buffer, or what was made for another budget or image size of a forward, and kept: a
        copy from the host each time would stop a GPU."""
        own, asked = self._buffers[name], (state.budget, state.grid)
        assert own is not None
        if asked == self._made_for:
            return own
        if torch.compiler.is_compiling():  # a constant of the graph
            return self.constants(*asked)[name].to(own.device)
        key = (*asked, own.device)
        if key not in self._other_constants:
            if len(self._other_constants) >= _KEPT_CONSTANTS:
                self._other_constants.clear()
            self._other_constants[key] = {n: c.to(own.device) for n, c in self.constants(*asked).items()}
        return self._other_constants[key][name]

    # What the configuration and the token schedule ask.

    @classmethod
    def is_static(cls, config: "CLCAViTConfig") -> bool:
        """Whether the model keeps as many tokens of every image: `static_shapes`, or an option that makes it so."""
        return cls.static_shapes

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str | None:
        """Why the keep rate of a trained model cannot be changed; None if it can."""
        return None

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        """Refuse configurations the method cannot serve.

        Raises:
            ValueError: `reduction_kwargs` that are no option of the method, and whatever a subclass refuses.
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
        """An option's value: what `config.reduction_kwargs` says, or the default of `__init__`."""
        return (config.reduction_kwargs or {}).get(name, cls.option_defaults[name])

    @classmethod
    def check_option(cls, config: "CLCAViTConfig", name: str, is_valid: Callable[[Any], bool], allowed: str) -> None:
        """Refuse a value of `config.reduction_kwargs[name]`, if there is one, that `is_valid` does not accept.

        Raises:
            ValueError: naming the option, what is `allowed`, and the value.
        """
        options = config.reduction_kwargs or {}
        if name in options and not is_valid(options[name]):
            raise ValueError(f"`reduction_kwargs`: `{name}` must be {allowed}, got {options[name]!r}.")

    @classmethod
    def layers(cls, config: "CLCAViTConfig") -> list[int]:
        """Layers that hold a stage."""
        return list(config.reduction_layers)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """Rows that leave a stage which `num_rows` enter. The layers and `token_schedule` both ask this function. What the
        stage may keep is `state.budget`, which need not be the configuration's."""
        return num_rows

    # What every layer calls.

    @classmethod
    def start(cls, hidden_states: torch.Tensor, state: TokenState, training: bool) -> TokenState:
        """Put tracks on the state before the first layer."""
        return state

    @classmethod
    def attention_mask(cls, state: TokenState) -> torch.Tensor | None:
        """Mask of the attention's keys, (B, 1, 1, N): boolean (True: attend) or additive. None for no mask."""
        visible = cls.visible(state)
        return None if visible is None else visible[:, None, None, :]

    @classmethod
    def attend(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        state: TokenState,
        from_rows: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Attention of the method's own in training, instead of softmax attention: output (B, n, H, d) and weights
        (B, H, n, N). `from_rows`: the queries are those of the N rows, not of others beside them. None for the usual one."""
        return None

    @classmethod
    def observe(cls, context: AttentionContext, state: TokenState, before_stage: bool) -> TokenState:
        """Take note of a layer's attention, before a stage chooses or merges rows. `before_stage`: the next layer holds a
        stage."""
        return state

    @classmethod
    def recalled_value(cls, name: str, track: torch.Tensor, training: bool) -> float | torch.Tensor:
        """What rows appended by the cache get in a track: a number, or a tensor that broadcasts to (B, n, ...)."""
        return 1.0

    @classmethod
    def extend_tracks(cls, state: TokenState, count: int, training: bool) -> TokenState:
        """The state after `count` rows were appended to the sequence."""
        tracks = {}
        for name, track in state.tracks.items():
            value = cls.recalled_value(name, track, training)
            shape = (track.shape[0], count, *track.shape[2:])
            # A number becomes a tensor where the track is, without a copy from the host.
            rows = value.to(track.dtype).expand(shape) if torch.is_tensor(value) else track.new_full(shape, value)
            tracks[name] = torch.cat([track, rows], dim=1)
        return state._replace(tracks=tracks)

    @classmethod
    def visible(cls, state: TokenState) -> torch.Tensor | None:
        """Rows (B, N), as booleans, that others attend to and that means are taken over. None for all."""
        return None

    @classmethod
    def loss_terms(cls, config: "CLCAViTConfig", inputs: LossInputs) -> dict[str, torch.Tensor]:
        """Weighted terms that the method adds to the loss in training, by name."""
        return {}

    # What the layer of a stage calls.

    def forward(self, hook: str, *args: Any) -> Any:
        """Call one of the hooks below, by its name. Calls of the module, not of its methods, are what offloading and sharding
        wait for to fetch the stage's own parameters."""
        return getattr(self, hook)(*args)

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        """Reduce before the layer's attention."""
        return hidden_states, state

    def choose_rows(self, context: AttentionContext, state: TokenState) -> tuple[torch.Tensor | None, TokenState]:
        """Indices (B, M) of the rows for which attention is computed at all, and the state that belongs to them. None
        for all rows."""
        return None, state

    def merge_rows(self, context: AttentionContext, state: TokenState) -> tuple[RowMap | None, TokenState]:
        """How the rows between attention and MLP are made of those before the attention, known from its keys and some of
        its queries, and the state that belongs to them. None for all rows as they are.

        A method that says so here instead of in `before_mlp` saves what the attention would compute for nothing: where new
        rows are old ones (`RowMap.rows`) the queries of all others, else the output projection of rows that are summed."""
        return None, state

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        """Reduce between attention and MLP."""
        row_map, state = self.merge_rows(context, state)
        return (hidden_states if row_map is None else row_map(hidden_states)), state


class FusedRows(RowMap):
    """Some of the rows as they are, and last a weighted sum of all."""

    def __init__(self, rows: torch.Tensor, weights: torch.Tensor) -> None:
        """`rows`: indices (B, M - 1). `weights`: (B, 1, N)."""
        self.taken, self.weights = TakenRows(rows), weights
        self.weight_sums = nn.functional.pad(weights.sum(dim=2, keepdim=True), (0, 0, rows.shape[1], 0), value=1.0)

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        fused = (self.weights.to(values.dtype) @ values).to(values.dtype)  # autocast halves the precision
        return torch.cat([self.taken(values), fused], dim=1)


class ScoredPruning(TokenReduction):
    """Keep row 0 and the best of all other rows: patches, registers, CLR and recalled rows compete alike, as in the
    original. A method decides when it calls `prune`, and with which scores; `fuse_rest` adds one row, the sum of all that
    was dropped, weighted by the scores. An option of that name decides in a method that has it.

    Kept rows are in the order of falling scores. Where nothing is dropped the sequence is left as it is, unless the method
    `always_sorts`.
    """

    fuse_rest: bool = False
    normalize_weights: bool = False  # stretch the weights of the fused row, so that those of all rows cover 0 .. 1
    always_sorts: ClassVar[bool] = False

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        if "normalize_weights" in cls.option_types and not cls.fuses(config):
            cls.check_option(config, "normalize_weights", lambda v: not v, "False without `fuse_rest`")

    @classmethod
    def fuses(cls, config: "CLCAViTConfig") -> bool:
        """Whether what a stage drops is fused into one row: `fuse_rest` of its stages."""
        return cls.option(config, "fuse_rest") if "fuse_rest" in cls.option_types else cls.fuse_rest

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        kept = cls.keep(config, stage, num_rows, state)
        return 1 + kept + int(cls.fuses(config) and kept < num_rows - 1)

    @classmethod
    def keep(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """Rows kept beside row 0."""
        return state.budget.of_current(stage, num_rows - 1)

    def prune(
        self, hidden_states: torch.Tensor, state: TokenState, scores: torch.Tensor
    ) -> tuple[torch.Tensor, TokenState]:
        """Keep row 0 and the rows of `hidden_states` (B, N, D) with the best `scores` (B, N - 1)."""
        row_map, state = self.keep_best(state, scores)
        return (hidden_states if row_map is None else row_map(hidden_states)), state

    def keep_best(self, state: TokenState, scores: torch.Tensor) -> tuple[RowMap | None, TokenState]:
        """The same, for rows that do not exist yet."""
        num_rows = scores.shape[1] + 1
        keep = self.keep(self.config, self.stage, num_rows, state)
        if keep == num_rows - 1 and not self.always_sorts:
            return None, state.with_assignment(lambda: identity_assignment(nn.functional.pad(scores, (1, 0))))
        best = scores.topk(keep, dim=1).indices
        rows = nn.functional.pad(best + 1, (1, 0))  # row 0 first
        state = state.select(rows)
        if not self.fuse_rest:
            return TakenRows(rows), state.with_assignment(lambda: one_hot_assignment(rows, num_rows, scores.dtype))
        weights = self.fusion_weights(scores).scatter(1, best, 0.0)  # 0 where kept
        weights = nn.functional.pad(weights, (1, 0)).unsqueeze(1)  # (B, 1, N)
        state = self.extend_tracks(state, 1, self.training).with_assignment(
            lambda: torch.cat([one_hot_assignment(rows, num_rows, weights.dtype), shares_of(weights)], dim=1)
        )
        return FusedRows(rows, weights), state

    def fusion_weights(self, scores: torch.Tensor) -> torch.Tensor:
        """What each row would weigh in the fused row, (B, N - 1), by the `scores` (B, N - 1) of all rows."""
        weights = self.weigh(scores)
        if not self.normalize_weights:
            return weights
        least, most = weights.amin(dim=1, keepdim=True), weights.amax(dim=1, keepdim=True)
        return (weights - least) / torch.where(most > least, most - least, 1.0)  # all alike: 0, not 0 / 0

    def weigh(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights of scores, before `normalize_weights`: by default the scores themselves."""
        return scores


def shares_of(weights: torch.Tensor) -> torch.Tensor:
    """Shares (B, 1, N) that a fused row reports of its weights (B, 1, N), which may be negative or add up to more than one:
    shares are neither."""
    shares = weights.abs()
    return shares / shares.sum(dim=2, keepdim=True).clamp(min=1)


class ScoredByAttention(ScoredPruning):
    """Between attention and MLP, keep row 0 and the ceil(rate * (N - 1)) other rows with the best scores, which the layer's
    attention tells. A method is its `score`."""

    def merge_rows(self, context: AttentionContext, state: TokenState) -> tuple[RowMap | None, TokenState]:
        if self.fuse_rest:
            context.query()  # of all rows, which will be needed: CLS is not projected by itself
        return self.keep_best(state, self.score(context)[:, 1:])

    def score(self, context: AttentionContext) -> torch.Tensor:
        """Scores (B, N) of all rows; that of row 0, which stays, is not read."""
        raise NotImplementedError


class AttentionPruning(ScoredByAttention):
    """By the attention that rows draw.

    Args:
        score_by: `cls`, what row 0 attends to; `received`, the mean attention a row receives; both averaged over heads. By
            default `cls` in a model with a CLS token and `received` in one without. (The original always takes row 0,
            which is the first patch in a model without CLS.)
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
    """By the attention of the stage's layer and of the one before. A method is its `note`, which takes from the layer before
    what its `score` will need, and `score`.

    A note counts only if the tokens that enter the stage's layer are those that entered the layer before, in their order:
    where that layer dropped, fused or merged some, or the cache appended some after it, and in layer 0, there is none, and
    the stage's own layer decides alone.
    """

    differentiable_tracks = True  # through the weights of a fused row

    @classmethod
    def note(cls, context: AttentionContext) -> torch.Tensor:
        """What to know of a layer's attention in the next layer, (B, N, ...)."""
        raise NotImplementedError

    @classmethod
    def noted(cls, context: AttentionContext) -> torch.Tensor | None:
        """What was noted in the layer before, if it counts: the context still has the state that entered this layer, so a
        stage reads that note although `observe` has made the next one."""
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

    def keep_best(self, state: TokenState, scores: torch.Tensor) -> tuple[RowMap | None, TokenState]:
        row_map, new_state = super().keep_best(state, scores)
        return row_map, new_state if row_map is None else new_state.without_track("noted")


class RolloutPruning(TwoLayerPruning):
    """By what row 0 attends to through two layers, of which each token passes on one half unchanged (attention rollout).

    With a the attention averaged over heads and R = (a + 1) / 2, rows of which sum to one: row 0 of R in the stage's layer,
    times R in the layer before.
    """

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
    """Before the layer, replace the rows between a protected head and a protected tail of the sequence by M new ones. A
    method is its `regroup`."""

    @classmethod
    def protected(cls, state: TokenState) -> tuple[int, int]:
        """Rows at the head and at the tail that stay as they are. By default CLS and registers; CLR and recalled rows are
        regrouped with the patches."""
        return state.prefix, 0

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """New rows M that take the place of `num_rows`."""
        return state.budget.of_patches(stage, state.num_patches)

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        protected = sum(cls.protected(state))
        return protected + cls.slots(config, stage, num_rows - protected, state)

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        head, tail = self.protected(state)
        body = hidden_states.shape[1] - head - tail
        first, tokens, last = hidden_states.split([head, body, tail], dim=1)
        slots = self.slots(self.config, self.stage, body, state)
        # Also for no slots at all: parameters that take part in the graph have a gradient, if only of zeros.
        tokens, weights = self.regroup(tokens, slots, state)
        state = state._replace(suffix=tail, tracks={}).with_assignment(
            lambda: _block_assignment(hidden_states, head, tail, weights())
        )
        return torch.cat([first, tokens.to(hidden_states.dtype), last], dim=1), state

    def regroup(self, tokens: torch.Tensor, slots: int, state: TokenState) -> tuple[torch.Tensor, Weights]:
        """M = `slots` new tokens (B, M, D) of `tokens` (B, n, D), and a function that gives the weights (B, M, n) they were
        made with."""
        raise NotImplementedError


class LearntSlots(Regrouping):
    """Regrouping into slots that are parameters: their number follows from `config.image_size`, whatever the image's."""

    @classmethod
    def fixed_rate(cls, config: "CLCAViTConfig") -> str:
        slots = ", ".join(str(cls.num_slots(config, stage)) for stage in range(len(config.reduction_layers)))
        return f"its slots, {slots} of them, are parameters"

    @classmethod
    def num_slots(cls, config: "CLCAViTConfig", stage: int) -> int:
        """Slots of a stage; at least one where nothing else would be left of the sequence."""
        budget = Budget.of(config)
        slots = budget.of_patches(stage, config.num_patches)
        state = TokenState(budget, config.image_grid, config.num_prefix_tokens, config.num_clr_tokens, pool_len=0)
        return slots if sum(cls.protected(state)) else max(slots, 1)

    @classmethod
    def slots(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        return cls.num_slots(config, stage)


def _block_assignment(hidden_states: torch.Tensor, head: int, tail: int, weights: torch.Tensor) -> torch.Tensor:
    """(B, head + M + tail, N): identity for the protected rows, `weights` (B, M, n) between them."""
    identity = identity_assignment(hidden_states)
    body = nn.functional.pad(weights.to(identity.dtype), (head, tail))
    return torch.cat([identity[:, :head], body, identity[:, identity.shape[1] - tail :]], dim=1)


def pairwise_distance(tokens: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Euclidean distances (B, n, n) between the rows of `tokens` (B, n, D), as one matrix product in one matrix; exactly
    symmetric, and exactly zero on the diagonal. Without gradients. (`torch.cdist` does not export to ONNX.)"""
    squares = tokens.square().sum(dim=-1)
    with full_precision(tokens):
        distances = torch.baddbmm(squares.unsqueeze(1), tokens, tokens.transpose(1, 2), alpha=-2)
    distances = distances.add_(squares.unsqueeze(2)).clamp_(min=0).sqrt_()
    # A product need not be symmetric to the last bit, which would break ties: what is above the diagonal is copied below it.
    for start in range(0, distances.shape[1], chunk):  # a second square of this size would take as much again
        here, after = slice(start, start + chunk), slice(start + chunk, None)
        block = distances[:, here, here].triu(1)
        distances[:, here, here] = block + block.transpose(1, 2)
        distances[:, after, here] = distances[:, here, after].transpose(1, 2)
    return distances


def nearest_row(distances: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For each of the n points of `distances` (B, n, n), which of `rows` (B, M) is nearest to it: (B, n) of 0 .. M - 1."""
    # Never anything near to the size of the distances, and otherwise few steps.
    chunk = distances.shape[1] if 4 * rows.shape[1] <= distances.shape[1] else 256
    return torch.cat([gather_rows(part, rows).argmin(dim=1) for part in distances.split(chunk, dim=2)], dim=1)


class MergedRows(RowMap):
    """Sums of rows, each of which goes into one of them.

    Args:
        target: row of the new sequence each row goes to, (B, N).
        share: of each row in it, (B, N); those of a new row add up to one.
        num_rows: rows M of the new sequence.
    """

    def __init__(self, target: torch.Tensor, share: torch.Tensor, num_rows: int) -> None:
        self.target, self.share, self.num_rows = target, share, num_rows

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        index = self.target.unsqueeze(-1).expand_as(values)
        weighted = values * self.share.unsqueeze(-1).to(values.dtype)
        return torch.zeros_like(values[:, : self.num_rows]).scatter_add(1, index, weighted)


class Merging(TokenReduction):
    """Between attention and MLP, merge rows into their means, weighted by sizes: how many patches a row stands for. A method
    is its `match`, and what it may remove. Row 0 is never merged.

    A token that stands for n patches draws n times the attention, in every layer: log n is added to its logits.
    """

    from_patches: ClassVar[bool] = True  # the keep rate is a cumulative share of those; else of the current tokens

    size_track = "size"  # under another name attention does not see the sizes; means are weighted all the same

    @classmethod
    def count(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        return num_rows - cls.num_merged(config, stage, num_rows, state)

    @classmethod
    def num_merged(cls, config: "CLCAViTConfig", stage: int, num_rows: int, state: TokenState) -> int:
        """Rows that disappear. As a share of the patches: the step from the last target to this one."""
        if cls.from_patches:
            last = state.num_patches if stage == 0 else state.budget.of_patches(stage - 1, state.num_patches)
            wanted = last - state.budget.of_patches(stage, state.num_patches)
        else:
            wanted = num_rows - 1 - state.budget.of_current(stage, num_rows - 1)
        return max(min(wanted, cls.most_merged(num_rows)), 0)

    @classmethod
    def most_merged(cls, num_rows: int) -> int:
        """Rows that can disappear: half of those beside row 0, where rows are merged in pairs."""
        return (num_rows - 1) // 2

    @classmethod
    def attention_mask(cls, state: TokenState) -> torch.Tensor | None:
        size = state.tracks.get("size")
        return None if size is None else size.log()[:, None, None, :]

    def size(self, context: AttentionContext, state: TokenState) -> torch.Tensor:
        """Sizes (B, N), at least in float32; one as long as nothing has been merged."""
        size = state.tracks.get(self.size_track)
        return at_least_float32(context.key).new_ones(context.key[:, 0, :, 0].shape) if size is None else size

    def merge_rows(self, context: AttentionContext, state: TokenState) -> tuple[RowMap | None, TokenState]:
        merged = self.num_merged(self.config, self.stage, context.key.shape[2], state)
        if merged == 0:
            return None, state.with_assignment(lambda: identity_assignment(context.key[:, 0]))
        return self.merge(context, state, merged)

    def merge(self, context: AttentionContext, state: TokenState, merged: int) -> tuple[RowMap, TokenState]:
        """The map that removes `merged` rows, at least one, and the state that belongs to what is left."""
        with torch.no_grad():
            target = self.match(context.key.mean(dim=1), merged)
        return self.pool(target, context.key.shape[2] - merged, self.size(context, state), state)

    def match(self, metric: torch.Tensor, merged: int) -> torch.Tensor:
        """New row (B, N) of each row with the features `metric` (B, N, d), keys averaged over heads. By default the `merged`
        most similar pairs of rows at even and at odd positions merge."""
        return match_halves(cosine_of_halves(metric), merged).target

    def pool(
        self,
        target: torch.Tensor,
        num_rows: int,
        size: torch.Tensor,
        state: TokenState,
        weights: torch.Tensor | None = None,
    ) -> tuple[MergedRows, TokenState]:
        """The means of the rows with the same `target` (B, N), of M = `num_rows` new ones, weighted by `weights` (B, N) or, by
        default, by `size` (B, N); and the state with the new sizes, which are sums."""
        new_size = size.new_zeros(size.shape[0], num_rows).scatter_add(1, target, size)
        total = new_size if weights is None else torch.zeros_like(new_size).scatter_add(1, target, weights)
        share = (size if weights is None else weights) / total.gather(1, target)
        state = state._replace(tracks={self.size_track: new_size}).with_assignment(
            lambda: share.new_zeros(*new_size.shape, size.shape[1]).scatter(1, target.unsqueeze(1), share.unsqueeze(1))
        )
        return MergedRows(target, share, num_rows), state


class Matching(NamedTuple):
    """Which rows stay, and where the others go."""

    kept: torch.Tensor  # (B, M), rows that stay, in their new order
    gone: torch.Tensor  # (B, N - M), the others
    into: torch.Tensor  # (B, N - M), the new row that each of those goes to

    @property
    def target(self) -> torch.Tensor:
        """The new row of each row, (B, N)."""
        rows = torch.cat([self.kept, self.gone], dim=1)
        positions = torch.arange(self.kept.shape[1], device=rows.device).expand_as(self.kept)
        return torch.zeros_like(rows).scatter(1, rows, torch.cat([positions, self.into], dim=1))


def cosine_of_halves(metric: torch.Tensor) -> torch.Tensor:
    """Cosines (B, a, b), at least in float32, of the a rows of `metric` (B, N, d) at even positions with the b at odd ones."""
    metric = nn.functional.normalize(at_least_float32(metric), dim=-1)
    with full_precision(metric):
        return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def match_halves(scores: torch.Tensor, merged: int) -> Matching:
    """Send the `merged` rows at even positions with the best `scores` (B, a, b) to their best partners at odd ones. Row 0
    stays: its scores are overwritten. The new order: even rows that stay, ascending; all odd rows."""
    scores[:, 0] = -torch.inf
    best, partner = scores.max(dim=2)  # (B, a)
    order = falling_order(best)
    gone, stay = order[:, :merged], order[:, merged:].sort(dim=1).values
    odd = torch.arange(1, 2 * scores.shape[2], 2, device=scores.device).expand(scores.shape[0], -1)
    return Matching(torch.cat([2 * stay, odd], dim=1), 2 * gone, partner.gather(1, gone) + stay.shape[1])


def falling_order(values: torch.Tensor) -> torch.Tensor:
    """Indices that sort `values` (B, n), the greatest first; of equal values the one at the lower index."""
    # A stable sort does not export to ONNX. A plain one becomes TopK, which breaks ties in this way, too.
    stable = {} if torch.compiler.is_exporting() else {"stable": True}
    return values.argsort(dim=1, descending=True, **stable)
