"""Attention on patches: CLS attention of a layer, attention rollout, mutual attention.

The functions of the first part take attention maps (from `output_attentions=True` with eager attention, or from another library).
Those of the second part take a model. They compute attention in a hook during a normal forward pass, for one query or a chunk of
queries at a time: attention kernels are not replaced, and the maps of all heads are never held together. For models with a
reduction, the assignments map the result to the patches.

Shapes: B batch, H heads, L layers, N tokens, P patches per image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.attention_clca import AttentionContext, at_least_float32
from clca.cache_clca import masked_mean

from .tracing import Step, propagate_shares, regroup


_CHUNK = 256  # queries per chunk of attention of all heads


# From attention maps


def attention_rollout(attentions: Sequence[torch.Tensor], start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Compute attention rollout (https://huggingface.co/papers/2005.00928) over layers with the same number of tokens: average the
    heads, add the identity for the residual connection, scale rows to sum to one, and multiply from the first layer to the last.

    Args:
        attentions: one (B, H, N, N) per layer, after the softmax, in any floating-point dtype.
        start: 0-based index of the first layer.
        stop: index after the last layer; None for all remaining layers.

    Returns:
        (B, N, N), the share of each input token of layer `start` in each output token of layer `stop` - 1; at least float32.

    Raises:
        ValueError: if the range contains no layer, or the maps differ in size (use `rollout_of_patches` for those).
    """
    chosen = attentions[slice(*layer_range(start, stop, len(attentions)))]
    sizes = {tuple(attention.shape[-2:]) for attention in chosen}
    if len(sizes) > 1 or len({*sizes.pop()}) > 1:
        raise ValueError(
            f"`attentions` of the layers {start} .. {start + len(chosen) - 1} must have one size, (N, N), got "
            f"{', '.join(str(tuple(a.shape[-2:])) for a in chosen)}. Use `rollout_of_patches` for models that reduce tokens."
        )
    first = at_least_float32(chosen[0])
    rows = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device).expand(first.shape[0], -1, -1)
    for attention in chosen:
        rows = mix(at_least_float32(attention).mean(dim=1), rows)
    return rows


def mix(attention: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Apply one layer of a rollout: multiply rows (B, N, S) that sum to one by `attention` (B, N, N), add the residual connection and
    rescale. Rows of zeros remain zero."""
    mixed = (attention.to(rows.dtype) @ rows + rows) * (rows.sum(dim=-1, keepdim=True) > 0)
    return unit_sum(mixed)


def unit_sum(rows: torch.Tensor) -> torch.Tensor:
    """Scale rows (..., S) to sum to one; rows of zeros remain zero."""
    return rows / rows.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def mutual_attention(attention: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Compute mutual attention weights (MAWS, https://huggingface.co/papers/2107.02341) of the patches: attention from CLS to a patch
    times attention from the patch to CLS.

    Args:
        attention: (B, H, N, N), after the softmax; row and column 0 belong to CLS.
        logits: (B, H, N, N), before the softmax.

    Returns:
        (B, N - 1), at least float32.
    """
    given = at_least_float32(attention).mean(dim=1)[:, 0, 1:]
    received = at_least_float32(logits).mean(dim=1).softmax(dim=1)[:, 1:, 0]  # over the queries
    return given * received


def best_patches(features: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
    """Select the `count` features (B, P, D) with the highest `scores` (B, P), best first: (B, count, D).

    Raises:
        ValueError: if the shapes do not match, or `count` is outside 1 .. P.
    """
    if features.shape[:2] != scores.shape:
        raise ValueError(
            f"`scores` must have the first two dimensions of `features`, {tuple(features.shape[:2])}, got {tuple(scores.shape)}."
        )
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"`count` must be between 1 and {scores.shape[1]}, the number of patches, got {count}.")
    best = scores.topk(count, dim=1).indices
    return features.gather(1, best.unsqueeze(-1).expand(-1, -1, features.shape[2]))


def on_grid(values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Reshape values (..., P) of patches to a map (..., rows, columns), in row-major order.

    Raises:
        ValueError: if the grid has a different number of patches.
    """
    if values.shape[-1] != grid[0] * grid[1]:
        raise ValueError(
            f"`values` must hold one value per patch of the {grid[0]} x {grid[1]} grid ({grid[0] * grid[1]}), got "
            f"{values.shape[-1]}. Pass the grid of the images that the values belong to."
        )
    return values.unflatten(-1, grid)


def layer_range(start: int, stop: int | None, num_layers: int) -> tuple[int, int]:
    """Check a range of layers, and replace a `stop` of None by the number of layers.

    Raises:
        ValueError: if the range contains no layer, or one that does not exist.
    """
    stop = num_layers if stop is None else stop
    if not 0 <= start < stop <= num_layers:
        raise ValueError(
            f"a range of layers must lie in 0:{num_layers} and contain at least one layer (the end is excluded), got "
            f"{start}:{stop}."
        )
    return start, stop


def encoder_groups(config: CLCAViTConfig) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) of layers that end after each reduction layer and after the last layer, where CLA reads CLS. For
    reduction layers 3, 6, 9 of 12 they are 0:4, 4:7, 7:10 and 10:12."""
    ends = [layer + 1 for layer in config.aggregation_layers]
    return list(zip([0, *ends[:-1]], ends, strict=True))


# From a model


class Recorded(NamedTuple):
    """A value computed from the attention of one layer.

    Attributes:
        value: the result of an `AttentionReader`.
        reduced: whether the layer has a stage that reduces tokens before the attention rather than after it.
    """

    value: torch.Tensor
    reduced: bool


AttentionReader = Callable[[AttentionContext], torch.Tensor]


def cls_attention(context: AttentionContext) -> torch.Tensor:
    """Return the attention of CLS on all tokens, (B, H, N)."""
    return context.attention_rows(slice(0, 1)).squeeze(2)


def head_mean_map(context: AttentionContext) -> torch.Tensor:
    """Return the attention map averaged over the heads, (B, N, N), computed for a chunk of queries at a time."""
    starts = range(0, context.key.shape[2], _CHUNK)
    return torch.cat([context.attention_rows(slice(i, i + _CHUNK)).mean(dim=1) for i in starts], dim=1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context manager that disables gradients and puts the model into evaluation mode; afterwards, each module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def record_attention(
    model: CLCAViTForImageClassification, read: AttentionReader, layers: Sequence[int]
) -> Iterator[dict[int, Recorded]]:
    """Context manager that yields a dict. Each forward pass stores in it the result of `read` for the attention of each of `layers`."""
    recorded: dict[int, Recorded] = {}

    def make_hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], None]:
        def record(attention: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
            context = inputs[1]
            recorded[index] = Recorded(read(context), "assignment" in context.state.report)

        return record

    hooks = [model.vit.layers[index].attention.register_forward_hook(make_hook(index)) for index in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def cls_attention_of_patches(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    layers: Sequence[int] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Compute the attention of CLS on the patches of the image.

    The attention on a token that holds several patches, such as a GAP token retrieved from the cache, is distributed over them in
    proportion to their shares. Attention of CLS on itself, registers and CLR belongs to no patch, so the patches sum to at most one.

    Args:
        model: any CLCA model with a CLS token.
        pixel_values: normalized images (B, C, height, width).
        layers: 0-based layer indices; None for all layers.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Returns:
        (B, layers, H, P), at least float32.

    Raises:
        ValueError: if the model has no CLS token, there is no such layer, or the method reports no assignments.
    """
    check_class_token(model.config, "CLS attention")
    layers = checked_layers(layers, model.config)
    assignments, recorded = _observe(model, pixel_values, cls_attention, layers, interpolate_pos_encoding)
    trace = propagate_shares(embedded_tokens(model, pixel_values), assignments, model.config)
    maps = []
    for layer in layers:
        attention, reduced = recorded[layer]  # (B, H, N)
        shares = unit_sum((trace.left if reduced else trace.entered)[layer]).to(attention.dtype)
        maps.append(of_patches(attention @ shares, model.config))
    return torch.stack(maps, dim=1)


def rollout_of_patches(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    ranges: Sequence[tuple[int, int]] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Compute attention rollout over ranges of layers, from CLS (or, in a model without CLS, the mean of the tokens) to the patches.

    If the number of tokens does not change, this equals `attention_rollout`. Otherwise, the attention of a layer is multiplied with
    the assignment of its stage, before or after it depending on where the method reduces. Tokens retrieved from the cache have the
    shares they had when they were cached. Rows are scaled to sum to one after every layer. Layers before the range contribute their
    assignments but not their attention, so that the tokens at the start of the range are mapped to patches.

    Args:
        model: any CLCA model.
        pixel_values: normalized images (B, C, height, width).
        ranges: (start, stop) of each range, without `stop`; None for `default_ranges`.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Returns:
        (B, ranges, P), at least float32. The patches sum to at most one; the rest is on CLS, registers and CLR.

    Raises:
        ValueError: if a range contains no layer, or the method reports no assignments.
    """
    config = model.config
    ranges = default_ranges(config) if ranges is None else ranges
    ranges = [layer_range(start, stop, config.num_hidden_layers) for start, stop in ranges]
    layers = sorted({layer for start, stop in ranges for layer in range(start, stop)})
    assignments, recorded = _observe(model, pixel_values, head_mean_map, layers, interpolate_pos_encoding)
    sources = embedded_tokens(model, pixel_values).to(recorded[layers[0]].value.dtype)
    maps = []
    for start, stop in ranges:
        step = _rollout_step({layer: recorded[layer] for layer in range(start, stop)})
        rows = propagate_shares(sources, assignments, config, step).left[stop - 1]
        if config.use_class_token:
            chosen = rows[:, 0]
        else:
            chosen = masked_mean(rows, config.num_prefix_tokens, rows.shape[1], rows.sum(dim=-1) > 0).squeeze(1)
        maps.append(of_patches(chosen, config))
    return torch.stack(maps, dim=1)


def _rollout_step(maps: Mapping[int, Recorded]) -> Step:
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
    read: AttentionReader,
    layers: Sequence[int],
    interpolate_pos_encoding: bool,
) -> tuple[tuple[torch.Tensor, ...], dict[int, Recorded]]:
    """Run a forward pass; return its assignments and the recorded attention."""
    check_traceable(model.config)
    with evaluation_mode(model), record_attention(model, read, layers) as recorded:
        output = model.vit(pixel_values.to(model.device), interpolate_pos_encoding, output_assignments=True)
    return output.assignments, recorded


def embedded_tokens(model: CLCAViTForImageClassification, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return an identity matrix (B, N, N) in which each embedded token (CLS, registers, patches, CLR) is its own source."""
    config, (rows, columns) = model.config, model.vit.embeddings.grid(pixel_values)
    count = config.num_prefix_tokens + rows * columns + config.num_clr_tokens
    return torch.eye(count, device=model.device).expand(pixel_values.shape[0], -1, -1)


def of_patches(shares: torch.Tensor, config: CLCAViTConfig) -> torch.Tensor:
    """Select the shares of the patches, (..., P), from those of all embedded tokens, (..., N)."""
    return shares[..., config.num_prefix_tokens : shares.shape[-1] - config.num_clr_tokens]


def default_ranges(config: CLCAViTConfig) -> list[tuple[int, int]]:
    """Return the ranges of the encoder groups, and one of all layers."""
    everything = (0, config.num_hidden_layers)
    return [*(group for group in encoder_groups(config) if group != everything), everything]


def checked_layers(layers: Sequence[int] | None, config: CLCAViTConfig, what: str = "`layers`") -> list[int]:
    """Return layer indices as a list, all layers for None. Error messages use `what` as the name of the argument.

    Raises:
        ValueError: if there are no layers, or one does not exist.
    """
    chosen = list(range(config.num_hidden_layers) if layers is None else layers)
    if not chosen or not all(0 <= layer < config.num_hidden_layers for layer in chosen):
        raise ValueError(
            f"{what} must name at least one layer of 0 .. {config.num_hidden_layers - 1}, got "
            f"{', '.join(map(str, chosen)) or 'none'}."
        )
    return chosen


def check_class_token(config: CLCAViTConfig, what: str) -> None:
    """Check that a model has a CLS token; `what` is the subject of the error message.

    Raises:
        ValueError: if `use_class_token` is False.
    """
    if not config.use_class_token:
        raise ValueError(
            f"{what} needs a CLS token, but this model has none (`use_class_token` is False). Use attention rollout or the "
            "similarity to the mean instead."
        )


def check_traceable(config: CLCAViTConfig) -> None:
    """Check that the assignments describe all changes of the tokens.

    Raises:
        ValueError: if `vqt_original_slicing` is True.
    """
    if config.vqt_original_slicing:
        raise ValueError(
            "`vqt_original_slicing` removes tokens without recording it in an assignment, so the tokens of this model cannot be "
            "traced to patches. Use a model with `vqt_original_slicing` False."
        )
