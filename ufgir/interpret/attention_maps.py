"""What attention says about patches: CLS attention of a layer, attention rollout, mutual attention.

The functions of the first half work on attention maps that you have (`output_attentions=True`, eager attention, or another
library's model). Those of the second half ask a model: each layer's attention is looked at while the model runs as usual,
one row of it or chunks of rows, so that no kernel is exchanged and no map of all heads is ever held. Where tokens are reduced
the answer is carried back to the patches by the assignments.

Shapes: B batch, H heads, L layers, N tokens, P patches of the image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.attention_clca import AttentionContext, at_least_float32
from clca.cache_clca import mean_rows

from .tracing import Step, carry, regroup


_CHUNK = 256  # query rows whose attention is held for all heads at a time


# On attention maps


def attention_rollout(attentions: Sequence[torch.Tensor], start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Attention rollout (https://huggingface.co/papers/2005.00928) over a range of layers of equal size: average the heads,
    add the identity for the residual connection, let rows sum to one, and multiply from the first layer up.

    Args:
        attentions: one (B, H, N, N) per layer, after the softmax, in any floating-point dtype.
        start: first layer.
        stop: the layer after the last one; None for all.

    Returns:
        (B, N, N), how much of each token that entered layer `start` is in each that leaves layer `stop` - 1; in float32
        at least.

    Raises:
        ValueError: no layer in the range, or maps of different sizes (for those, see `rollout_of_patches`).
    """
    chosen = attentions[slice(*layer_range(start, stop, len(attentions)))]
    sizes = {tuple(attention.shape[-2:]) for attention in chosen}
    if len(sizes) > 1 or len({*sizes.pop()}) > 1:
        raise ValueError(
            f"`attentions` of the layers {start} .. {start + len(chosen) - 1} must have one size, (N, N), got "
            f"{', '.join(str(tuple(a.shape[-2:])) for a in chosen)}. Use `rollout_of_patches` where tokens are reduced."
        )
    first = at_least_float32(chosen[0])
    rows = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).expand(first.shape[0], -1, -1)
    for attention in chosen:
        rows = mix(at_least_float32(attention).mean(dim=1), rows)
    return rows


def mix(attention: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """One layer of a rollout: rows (B, N, S) that sum to one, after `attention` (B, N, N) and the residual connection. Rows
    of zeros stay."""
    mixed = (attention.to(rows.dtype) @ rows + rows) * (rows.sum(dim=-1, keepdim=True) > 0)
    return unit_sum(mixed)


def unit_sum(rows: torch.Tensor) -> torch.Tensor:
    """Rows (..., S) scaled to sum to one; rows of zeros stay."""
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def mutual_attention(attention: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mutual attention weights of the patches (MAWS, https://huggingface.co/papers/2107.02341): what CLS gives to each patch
    times what it gets from it.

    Args:
        attention: (B, H, N, N), after the softmax; row and column 0 are those of CLS.
        logits: the same before the softmax.

    Returns:
        (B, N - 1), in float32 at least.
    """
    given = at_least_float32(attention).mean(dim=1)[:, 0, 1:]
    received = at_least_float32(logits).mean(dim=1).softmax(dim=1)[:, 1:, 0]  # over the queries
    return given * received


def best_patches(features: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` rows of `features` (B, P, D) with the highest `scores` (B, P), best first: (B, count, D).

    Raises:
        ValueError: scores that do not belong to the features, or a count outside 1 .. P.
    """
    if features.shape[:2] != scores.shape:
        raise ValueError(
            f"`scores` must hold one number per row of `features`, {tuple(features.shape[:2])}, got {tuple(scores.shape)}."
        )
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"`count` must be between 1 and {scores.shape[1]}, the number of patches, got {count}.")
    best = scores.topk(count, dim=1).indices
    return features.gather(1, best.unsqueeze(-1).expand(-1, -1, features.shape[2]))


def on_grid(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Values (..., P) of patches as a map (..., rows, columns); patches are counted row by row.

    Raises:
        ValueError: another number of values than the grid has patches.
    """
    if values.shape[-1] != grid[0] * grid[1]:
        raise ValueError(
            f"`values` of {values.shape[-1]} patches do not fill a grid of {grid[0]} x {grid[1]}, which has "
            f"{grid[0] * grid[1]}. Give the grid of the images they come from."
        )
    return values.unflatten(-1, grid)


def layer_range(start: int, stop: int | None, num_layers: int) -> tuple[int, int]:
    """First layer and the one after the last, checked.

    Raises:
        ValueError: no layer between them, or one that does not exist.
    """
    stop = num_layers if stop is None else stop
    if not 0 <= start < stop <= num_layers:
        raise ValueError(
            f"a range of layers must lie in 0:{num_layers} and hold at least one (the end is not in it), got {start}:{stop}."
        )
    return start, stop


def encoder_groups(config: CLCAViTConfig) -> list[tuple[int, int]]:
    """Ranges (start, stop) of layers that end after each reduction layer and the last layer, where CLA reads CLS: for
    layers 3, 6, 9 of 12 these are 0:4, 4:7, 7:10 and 10:12."""
    ends = [layer + 1 for layer in config.aggregation_layers]
    return list(zip([0, *ends[:-1]], ends, strict=True))


# On a model


class Observed(NamedTuple):
    """What a layer's attention answered.

    Attributes:
        answer: to the question.
        reduced: whether the layer's stage, if it holds one, acted before the attention, not after it.
    """

    answer: torch.Tensor
    reduced: bool


Question = Callable[[AttentionContext], torch.Tensor]


def cls_row(context: AttentionContext) -> torch.Tensor:
    """What CLS attends to, (B, H, N): one query against all keys."""
    return context.attention_rows(slice(0, 1)).squeeze(2)


def head_mean_map(context: AttentionContext) -> torch.Tensor:
    """The attention map, averaged over heads, (B, N, N): all heads of it exist for a chunk of query rows at a time."""
    starts = range(0, context.key.shape[2], _CHUNK)
    return torch.cat([context.attention_rows(slice(i, i + _CHUNK)).mean(dim=1) for i in starts], dim=1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """In this context the model is in evaluation mode and takes no gradients; every part of it is as before after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def ask_attention(
    model: CLCAViTForImageClassification, question: Question, layers: Sequence[int]
) -> Iterator[dict[int, Observed]]:
    """In this context every forward pass puts what the attention of `layers` answers to a question into a dictionary."""
    answers: dict[int, Observed] = {}

    def listener(index: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], None]:
        def listen(attention: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            context = inputs[1]
            answers[index] = Observed(question(context), "assignment" in context.state.report)

        return listen

    hooks = [model.vit.layers[index].attention.register_forward_hook(listener(index)) for index in layers]
    try:
        yield answers
    finally:
        for hook in hooks:
            hook.remove()


def cls_attention_of_patches(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    layers: Sequence[int] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """What CLS attends to in some layers, on the patches of the image.

    A token that stands for several patches, a recalled GAP among them, spreads its attention over them by its shares. What
    CLS gives to itself, to registers and to CLR lies on no patch: a layer's patches sum to at most one.

    Args:
        model: any CLCA model with a CLS token.
        pixel_values: normalised images (B, C, height, width).
        layers: 0-based; None for all.
        interpolate_pos_encoding: accept images of another size than the model's.

    Returns:
        (B, layers, H, P), in float32 at least.

    Raises:
        ValueError: a model without CLS, a layer that does not exist, or a method that reports no assignments.
    """
    check_class_token(model.config, "CLS attention")
    layers = checked_layers(layers, model.config)
    assignments, answers = _observe(model, pixel_values, cls_row, layers, interpolate_pos_encoding)
    trace = carry(embedded_rows(model, pixel_values), assignments, model.config)
    maps = []
    for layer in layers:
        attention, reduced = answers[layer]  # (B, H, N)
        shares = unit_sum((trace.left if reduced else trace.entered)[layer]).to(attention.dtype)
        maps.append(of_patches(attention @ shares, model.config))
    return torch.stack(maps, dim=1)


def rollout_of_patches(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    ranges: Sequence[tuple[int, int]] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Attention rollout over ranges of layers, from CLS (in a model without it: the mean of the tokens) to the patches.

    Where token counts stay, this is `attention_rollout`. Where they change, the step of a layer is followed by its stage's
    assignment, or comes after it where the method reduces before the attention; recalled rows carry what they held when they
    were cached; rows are scaled to sum to one after every layer. Layers before the range do not attend here, they only
    hand on, merge and drop tokens: what enters the range is thus known by its patches.

    Args:
        model: any CLCA model.
        pixel_values: normalised images (B, C, height, width).
        ranges: (start, stop) each, the end not in it; None for `default_ranges`.
        interpolate_pos_encoding: accept images of another size than the model's.

    Returns:
        (B, ranges, P), in float32 at least. A range's patches sum to at most one: the rest is on CLS, registers and CLR.

    Raises:
        ValueError: a range without layers, or a method that reports no assignments.
    """
    config = model.config
    ranges = default_ranges(config) if ranges is None else ranges
    ranges = [layer_range(start, stop, config.num_hidden_layers) for start, stop in ranges]
    layers = sorted({layer for start, stop in ranges for layer in range(start, stop)})
    assignments, answers = _observe(model, pixel_values, head_mean_map, layers, interpolate_pos_encoding)
    sources = embedded_rows(model, pixel_values).to(answers[layers[0]].answer.dtype)
    maps = []
    for start, stop in ranges:
        step = _rollout_step({layer: answers[layer] for layer in range(start, stop)})
        rows = carry(sources, assignments, config, step).left[stop - 1]
        if config.use_class_token:
            chosen = rows[:, 0]
        else:
            chosen = mean_rows(rows, config.num_prefix_tokens, rows.shape[1], rows.sum(dim=-1) > 0).squeeze(1)
        maps.append(of_patches(chosen, config))
    return torch.stack(maps, dim=1)


def _rollout_step(maps: Mapping[int, Observed]) -> Step:
    def step(index: int, rows: torch.Tensor, assignment: torch.Tensor | None) -> torch.Tensor:
        attention, reduced = maps.get(index, (None, False))
        if reduced:
            rows, assignment = unit_sum(regroup(index, rows, assignment)), None
        if attention is not None:
            rows = mix(attention, rows)
        return unit_sum(regroup(index, rows, assignment))

    return step


def _observe(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    question: Question,
    layers: Sequence[int],
    interpolate_pos_encoding: bool,
) -> tuple[tuple[torch.Tensor, ...], dict[int, Observed]]:
    """The assignments of a forward pass, and what its attention answered."""
    check_rows_stay(model.config)
    with evaluation_mode(model), ask_attention(model, question, layers) as answers:
        output = model.vit(pixel_values.to(model.device), interpolate_pos_encoding, output_assignments=True)
    return output.assignments, answers


def embedded_rows(model: CLCAViTForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, N, N): each embedded row, CLS and all, as a source of its own, on the model's device."""
    config, (rows, columns) = model.config, model.vit.embeddings.grid(pixel_values)
    count = config.num_prefix_tokens + rows * columns + config.num_clr_tokens
    return torch.eye(count, device=model.device).expand(pixel_values.shape[0], -1, -1)


def of_patches(shares: torch.Tensor, config: CLCAViTConfig) -> torch.Tensor:
    """Of shares (..., N) of all embedded rows those of the patches, (..., P)."""
    return shares[..., config.num_prefix_tokens : shares.shape[-1] - config.num_clr_tokens]


def default_ranges(config: CLCAViTConfig) -> list[tuple[int, int]]:
    """Each encoder group, and all layers."""
    everything = (0, config.num_hidden_layers)
    return [*(group for group in encoder_groups(config) if group != everything), everything]


def checked_layers(layers: Sequence[int] | None, config: CLCAViTConfig, what: str = "`layers`") -> list[int]:
    """Layers, None for all of the model; `what` they are called in messages.

    Raises:
        ValueError: no layer, or one that the model does not have.
    """
    chosen = list(range(config.num_hidden_layers) if layers is None else layers)
    if not chosen or not all(0 <= layer < config.num_hidden_layers for layer in chosen):
        raise ValueError(
            f"{what} must name at least one layer of 0 .. {config.num_hidden_layers - 1}, got "
            f"{', '.join(map(str, chosen)) or 'none'}."
        )
    return chosen


def check_class_token(config: CLCAViTConfig, what: str) -> None:
    """Refuse models without a CLS token, saying for `what` it is needed.

    Raises:
        ValueError: `use_class_token` is False.
    """
    if not config.use_class_token:
        raise ValueError(
            f"{what} needs a CLS token, and this model has none (`use_class_token` is False). Attention rollout and the "
            "similarity to the mean need none."
        )


def check_rows_stay(config: CLCAViTConfig) -> None:
    """Refuse models whose rows leave the sequence without a trace.

    Raises:
        ValueError: VQT with the original's slicing.
    """
    if config.vqt_original_slicing:
        raise ValueError(
            "`vqt_original_slicing` takes rows out of the sequence that no assignment records: there is no way back from the "
            "tokens of this model to patches."
        )
