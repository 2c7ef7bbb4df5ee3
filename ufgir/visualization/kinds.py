"""Figures of how a model treats its patches.

A kind of figure is a function that takes a `View` (a model and a batch of images) and returns columns with one cell per image:

    image = draw(kept_columns, model, image_processor, images)
    image = draw(partial(attention_columns, layers=[3, 5]), model, image_processor, images, titles=names)

The figures are computed from the assignments and the attention of a forward pass, so they work for every reduction method.

`KINDS` lists all kinds. To add one, write a function and an entry; see docs/adding-a-picture.md.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BaseImageProcessor

from clca import CLCAViTConfig, CLCAViTForImageClassification

from ..interpret.attention_maps import (
    checked_layers,
    cls_attention_of_patches,
    default_ranges,
    evaluation_mode,
    on_grid,
    rollout_of_patches,
)
from ..interpret.class_maps import class_activation_maps
from ..interpret.feature_maps import feature_similarity
from ..interpret.patterns import cluster_maps, stage_layers
from ..interpret.tracing import trace_patches
from ..transforms.images import to_rgb
from .records import CLS, STAGES, Draw, Kind, Option, Page, View
from .sheet import Cell, Column, brightened, distinct_colors, draw_sheet, heated, mean_colors


_BATCH = 4  # images per forward pass
COLORINGS = {"mean": mean_colors, "distinct": distinct_colors}


def make_view(
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    interpolate_pos_encoding: bool = False,
) -> View:
    """Preprocess images for a model and return them with the model.

    Args:
        model: any CLCA model.
        image_processor: the image processor of the model.
        images: images of any size.
        interpolate_pos_encoding: accept an image processor whose output size differs from the model's input size.

    Raises:
        ValueError: if there are no images.
    """
    if not images:
        raise ValueError("`images` must contain at least one image, got none.")
    pixels = image_processor(images=[to_rgb(image) for image in images], return_tensors="pt").pixel_values
    grid = model.vit.embeddings.grid(pixels)
    height, width = (n * size for n, size in zip(grid, model.vit.embeddings.patch_embeddings.patch_size, strict=True))
    shown = _denormalize(pixels, image_processor)[:, :, :height, :width]
    return View(model, pixels.to(model.device), shown, grid, interpolate_pos_encoding)


def _denormalize(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Return images (B, 3, height, width) in [0, 1] from the output of an image processor."""
    if getattr(image_processor, "do_normalize", True):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    return pixels if getattr(image_processor, "do_rescale", True) else pixels / 255


def _assignments(view: View) -> tuple[list[torch.Tensor], list[str]]:
    """Return the assignments of all stages, on the CPU in float32, and the names of the stages.

    Raises:
        ValueError: if the model has no reduction, or its method reports no assignments.
    """
    config = view.model.config
    if config.reduction is None:
        raise ValueError("`model` reduces no tokens (`reduction` is None): there are no stages to draw.")
    with evaluation_mode(view.model):
        assignments = view.model.vit(view.pixels, view.interpolate, output_assignments=True).assignments
    return [a.float().cpu() for a in assignments], [f"after layer {layer}" for layer in stage_layers(config)]


# Kinds of figures


def input_columns(view: View) -> list[Column]:
    """Draw the preprocessed images."""
    return [Column("input", [Cell(image) for image in view.images])]


def kept_columns(view: View) -> list[Column]:
    """Draw the patches that remain after each stage.

    The brightness of a patch is its largest share in any token: full if the patch still has its own token, dark if it was dropped
    or fused with many others. Tokens retrieved from the cache are ignored.

    Raises:
        ValueError: if the model has no reduction.
    """
    assignments, names = _assignments(view)
    stages = trace_patches(assignments, view.model.config, math.prod(view.grid), retrieve=False).stages
    columns = []
    for name, stage in zip(names, stages, strict=True):
        shares = on_grid(stage.amax(dim=1).clamp(0, 1), view.grid)
        kept = (shares > 0.999).sum(dim=(1, 2)).tolist()
        captions = [f"{count} of {math.prod(view.grid)} patches kept" for count in kept]
        cells = map(Cell, map(brightened, view.images, shares), captions)
        columns.append(Column(name, list(cells)))
    return columns


def merge_columns(view: View, colors: str = "mean") -> list[Column]:
    """Draw the groups of patches that share a token after each stage, separated by white lines.

    If a method distributes a patch over several tokens, the patch is assigned to the token that takes the largest part of it (or of
    the token that held it before the stage). Dropped patches are dark.

    Args:
        view: model and images.
        colors: `mean` fills each group with its mean color; `distinct` gives each group a different color.

    Raises:
        ValueError: if the model has no reduction, or `colors` has another value.
    """
    if colors not in COLORINGS:
        raise ValueError(f"`colors` must be one of {', '.join(COLORINGS)}, got {colors!r}.")
    assignments, names = _assignments(view)
    maps = on_grid(cluster_maps(assignments, view.model.config, math.prod(view.grid)), view.grid)
    columns = []
    for name, stage in zip(names, maps.unbind(1), strict=True):
        cells = []
        for image, groups in zip(view.images, stage, strict=True):
            dropped, count = int((groups < 0).sum()), len(groups[groups >= 0].unique())
            caption = f"{count} group{'s' * (count != 1)}" + f", {dropped} dropped" * (dropped > 0)
            cells.append(Cell(COLORINGS[colors](image, groups), caption, groups))
        columns.append(Column(name, cells))
    return columns


def trace_columns(view: View, token: int | None = None, patch: tuple[int, int] | None = None) -> list[Column]:
    """Draw the share of each patch in one token, including tokens retrieved from the cache.

    Args:
        view: model and images.
        token: index of a token at the final norm; 0 is CLS in a model that has one. Alternative to `patch`.
        patch: (row, column) of a patch, which is framed; shows the token that holds this patch after each stage.

    Raises:
        ValueError: if the model has no reduction, if neither or both of `token` and `patch` are given, or if there is no such token
            or patch.
    """
    if (token is None) == (patch is None):
        raise ValueError(
            "exactly one of `token` and `patch` must be given, got " + ("none." if token is None else "both.")
        )
    if patch is not None and not all(0 <= place < count for place, count in zip(patch, view.grid, strict=True)):
        rows, columns = view.grid
        raise ValueError(
            f"`patch` must be a row in 0 .. {rows - 1} and a column in 0 .. {columns - 1}, got {patch[0]} and {patch[1]}."
        )
    assignments, names = _assignments(view)
    config, num_patches = view.model.config, math.prod(view.grid)
    trace = trace_patches(assignments, config, num_patches)
    count = trace.final.shape[1]
    if patch is None and not 0 <= token < count:
        raise ValueError(
            f"`token` must be in 0 .. {count - 1}, the indices of the tokens at the final norm, got {token}."
        )
    if patch is None:
        return [_token_column(view, f"token {token}", trace.final, torch.full((len(view.images),), token), None)]
    patch = tuple(patch)
    holders = on_grid(cluster_maps(assignments, config, num_patches), view.grid)[:, :, *patch]  # (B, stages)
    frame = torch.zeros(view.grid, dtype=torch.long)
    frame[patch] = 1
    return [
        _token_column(view, name, shares, tokens, frame)
        for name, shares, tokens in zip(names, trace.stages, holders.unbind(1), strict=True)
    ]


def _token_column(
    view: View, name: str, shares: torch.Tensor, tokens: torch.Tensor, frame: torch.Tensor | None
) -> Column:
    """Draw the shares (B, N, P) in one token per image, `tokens` (B,); a negative index means no token."""
    cells = []
    for image, rows, token in zip(view.images, shares, tokens.tolist(), strict=True):
        parts = rows[token] if token >= 0 else torch.zeros_like(rows[0])
        count = int((parts > 0).sum())
        caption = f"token {token}: {count} patch{'es' * (count != 1)}" if token >= 0 else "no token holds it"
        values = on_grid(parts / parts.max().clamp(min=1e-12), view.grid)
        cells.append(Cell(heated(image, values.masked_fill(values == 0, torch.nan)), caption, frame))
    return Column(name, cells, "share in the token: 0 to the largest of each image")


def attention_columns(
    view: View, layers: Sequence[int] | None = None, heads: str | Sequence[int] = "mean"
) -> list[Column]:
    """Draw the attention of CLS on the patches.

    Args:
        view: model and images.
        layers: 0-based layer indices; None for all layers.
        heads: `mean`, `all`, or indices. With `all` or indices, there is one column per layer and head.

    Raises:
        ValueError: if the model has no CLS token, or there is no such layer or head.
    """
    config = view.model.config
    layers, count = checked_layers(layers, config), config.num_attention_heads
    if not isinstance(heads, str) and not (heads and all(0 <= head < count for head in heads)):
        raise ValueError(f"`heads` must be 'mean', 'all' or indices in 0 .. {count - 1}, got {list(heads)}.")
    if isinstance(heads, str) and heads not in ("mean", "all"):
        raise ValueError(f"`heads` must be 'mean', 'all' or indices in 0 .. {count - 1}, got {heads!r}.")
    maps = cls_attention_of_patches(view.model, view.pixels, layers, view.interpolate)  # (B, layers, H, P)
    columns = []
    for position, layer in enumerate(layers):
        if heads == "mean":
            columns.append(_heat_column(view, f"layer {layer}", maps[:, position].mean(dim=1)))
        else:
            for head in range(count) if heads == "all" else heads:
                columns.append(_heat_column(view, f"layer {layer}, head {head}", maps[:, position, head]))
    return columns


def rollout_columns(view: View, ranges: Sequence[tuple[int, int]] | None = None) -> list[Column]:
    """Draw attention rollout over ranges of layers.

    Args:
        view: model and images.
        ranges: (start, stop) of each range, without `stop`; None for each encoder group and all layers.

    Raises:
        ValueError: if a range contains no layer.
    """
    ranges = default_ranges(view.model.config) if ranges is None else list(ranges)
    maps = rollout_of_patches(view.model, view.pixels, ranges, view.interpolate)
    names = [f"layers {start} to {stop - 1}" if stop > start + 1 else f"layer {start}" for start, stop in ranges]
    return [_heat_column(view, name, maps[:, index]) for index, name in enumerate(names)]


def _heat_column(view: View, name: str, maps: torch.Tensor) -> Column:
    """Draw the attention on the patches, (B, P)."""
    cells = []
    for image, shares in zip(view.images, maps.float().cpu(), strict=True):
        caption = f"{100 * float(shares.sum()):.0f} % on patches"
        cells.append(Cell(heated(image, on_grid(shares / shares.max().clamp(min=1e-12), view.grid)), caption))
    return Column(name, cells, "attention: 0 to the largest of each image")


def similarity_columns(
    view: View, to: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> list[Column]:
    """Draw the cosine similarity of each patch's feature to CLS and to the mean of the patch tokens. Dropped patches are dark.

    Args:
        view: model and images.
        to: any of `mean` and `cls`; None for both, or only `mean` in a model without CLS.
        layers: 0-based indices of the layers whose outputs are compared; None for the output of the final norm.

    Raises:
        ValueError: if `to` has another value, if it is `cls` and the model has no CLS token, or if there is no such layer.
    """
    to = (["mean", "cls"] if view.model.config.use_class_token else ["mean"]) if to is None else to
    names = ["final norm"] if layers is None else [f"layer {layer}" for layer in layers]
    columns = []
    for reference in to:
        maps = feature_similarity(view.model, view.pixels, reference, layers, view.interpolate).float().cpu()
        for index, name in enumerate(names):
            cells = []
            for image, cosines in zip(view.images, maps[:, index], strict=True):
                known = cosines[~cosines.isnan()]
                low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
                scaled = (cosines - low) / max(high - low, 1e-12)
                caption = f"{low:.2f} to {high:.2f}" if len(known) else "no patch is left"
                cells.append(Cell(heated(image, on_grid(scaled, view.grid)), caption))
            scale = "cosine: the smallest to the largest of each image"
            columns.append(Column(f"to {'CLS' if reference == 'cls' else 'mean'}, {name}", cells, scale))
    return columns


def gradcam_columns(view: View, target: int | None = None, layers: Sequence[int] | None = None) -> list[Column]:
    """Draw Grad-CAM: patches whose features increase the logit of a class. Patches held by no token are dark.

    Args:
        view: model and images.
        target: class index; None for the predicted class of each image.
        layers: 0-based indices of the layers whose outputs are weighted; None for the second to last layer.

    Raises:
        ValueError: if there is no such class or layer.
    """
    maps = class_activation_maps(view.model, view.pixels, target, layers, view.interpolate).float().cpu()
    names = ["second to last layer"] if layers is None else [f"layer {layer}" for layer in layers]
    columns = []
    for index, name in enumerate(names):
        cells = []
        for image, heat in zip(view.images, maps[:, index], strict=True):
            largest = float(heat.max())
            scaled = on_grid(heat / max(largest, 1e-12), view.grid)
            cells.append(Cell(heated(image, scaled), f"largest {largest:.2g}"))
        columns.append(Column(name, cells, "Grad-CAM: 0 to the largest of each image"))
    return columns


# The options and the list of kinds


def _read_heads(words: list[str]) -> str | list[int]:
    if words in (["mean"], ["all"]):
        return words[0]
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"`--heads` must be mean, all or head indices, got {' '.join(words)}.") from error


def _read_range(text: str) -> tuple[int, int]:
    """Parse one value of `--ranges`."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be two layer indices such as 0:4, got {text}") from error
    return start, stop


def _layers_on_the_page(config: CLCAViTConfig) -> dict[str, list[int]]:
    """Select the layers that reduce tokens, and the last layer."""
    return {"layers": [layer for layer in config.aggregation_layers if layer < config.num_hidden_layers]}


_LAYERS = Option("0-based layer indices", type=int, nargs="+", metavar="LAYER")

KINDS: dict[str, Kind] = {
    "kept": Kind(
        title="Kept patches",
        help="patches that each stage keeps",
        caption="The patches that remain after each stage: bright patches are kept, dark ones were dropped or fused with others.",
        function=kept_columns,
        needs=(STAGES,),
        page=Page("Bright: the patch still has its own token. Dark: dropped, or fused with many others."),
    ),
    "merge": Kind(
        title="Groups of patches",
        help="groups of patches that share a token",
        caption="Which patches share a token after each stage: each group is filled with its mean color, and white lines separate "
        "the groups.",
        function=merge_columns,
        options={
            "colors": Option(
                "mean color of each group, or distinct colors", "mean", choices=list(COLORINGS), alias="colours"
            )
        },
        needs=(STAGES,),
        page=Page("Patches that share a token have their mean color. Dark: dropped."),
    ),
    "trace": Kind(
        title="Trace of a token",
        help="share of each patch in one token",
        caption="The share of each patch in one token, traced through all stages and the cache.",
        function=trace_columns,
        options={
            "token": Option("index of a token at the final norm, CLS is 0", type=int, metavar="N"),
            "patch": Option(
                "the token that holds this patch, 0-based", type=int, nargs=2, metavar=("ROW", "COLUMN"), convert=tuple
            ),
        },
        needs=(STAGES,),
        page=Page(
            "The patches that are part of the token that holds the framed patch, tokens retrieved from the cache included. Dark: not "
            "part of it.",
            patch_heading="Token of the patch in row {row}, column {column}",
        ),
        example={"patch": (1, 2)},
    ),
    "attention": Kind(
        title="Attention of CLS",
        help="attention of CLS on the patches",
        caption="Bright: the model looks here. The attention of CLS on the patches, averaged over the heads.",
        function=attention_columns,
        options={
            "layers": _LAYERS._replace(default="all"),
            "heads": Option(
                "mean, all, or 0-based head indices", "mean", nargs="+", metavar="HEAD", convert=_read_heads
            ),
        },
        needs=(CLS,),
        page=Page(
            "Mean of the heads, in the layers that reduce tokens and the last layer. Bright: more attention.",
            options=_layers_on_the_page,
        ),
    ),
    "rollout": Kind(
        title="Attention rollout",
        help="attention rollout over layers",
        caption="Attention through several layers ([Abnar and Zuidema 2020](https://huggingface.co/papers/2005.00928)): average the "
        "heads, add the residual connection, scale rows to sum to one, multiply the layers.",
        function=rollout_columns,
        options={
            "ranges": Option(
                "0-based layer ranges, without TO",
                "each encoder group, then all layers",
                type=_read_range,
                nargs="+",
                metavar="FROM:TO",
            )
        },
    ),
    "similarity": Kind(
        title="Similarity of features",
        help="cosine similarity of features to CLS and to the mean",
        caption="Cosine similarity of each patch's feature to the mean of the patch tokens, and to CLS.",
        function=similarity_columns,
        options={
            "layers": _LAYERS._replace(default="after the final norm"),
            "to": Option("reference", "both; mean in a model without CLS", nargs="+", choices=("mean", "cls")),
        },
    ),
    "gradcam": Kind(
        title="Class activation maps",
        help="Grad-CAM of a class",
        caption="Grad-CAM ([Selvaraju et al. 2017](https://huggingface.co/papers/1610.02391)): the patches that increase the logit "
        "of a class.",
        function=gradcam_columns,
        options={
            "layers": _LAYERS._replace(default="the second to last"),
            "target": Option("0-based class index", "the predicted class", type=int, metavar="CLASS"),
        },
    ),
}


# Sheets


def draw(
    kind: Draw,
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    side: int = 224,
    interpolate_pos_encoding: bool = False,
) -> Image.Image:
    """Draw a sheet with one row per image: the preprocessed image, then the columns of `kind`.

    Args:
        kind: one of `KINDS`, or its function; set options with `functools.partial`.
        model: any CLCA model.
        image_processor: the image processor of the model.
        images: images of any size.
        titles: one per image, written above its row.
        side: pixels of the longer side of each image in the sheet.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Raises:
        ValueError: if there are no images, if the number of titles differs from that of images, or if `kind` raises it.
    """
    _check(images, titles)
    columns = _draw_columns(kind, model, image_processor, images, interpolate_pos_encoding)
    rows = list(zip(*(column.cells for column in columns), strict=True))
    return draw_sheet([column.name for column in columns], rows, titles, side, columns[-1].scale)


def kept_patches_image(
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    side: int = 224,
) -> Image.Image:
    """Draw the patches that remain after each stage: `draw` with `kept_columns`."""
    return draw(kept_columns, model, image_processor, images, titles, side)


def comparison(
    kind: Draw,
    models: Iterable[tuple[CLCAViTForImageClassification, BaseImageProcessor]],
    columns: Sequence[str],
    images: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    rows: Sequence[str] = ("",),
    side: int = 224,
    interpolate_pos_encoding: bool = False,
) -> Image.Image:
    """Draw a grid of models, methods or keep rates. Each place shows the last column of `kind`: the last stage, the last layer, or the
    rollout over all layers.

    Args:
        kind: one of `KINDS`, or its function; set options with `functools.partial`.
        models: models with their image processors, row by row. May be a generator; only one model is held at a time.
        columns: names of the columns, such as keep rates.
        images: images of any size; each is drawn with all `rows`, one below the other.
        titles: one per image.
        rows: names of the rows, such as methods.
        side: pixels of the longer side of each image in the sheet.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Raises:
        ValueError: if there are no images, if the number of titles or models does not match, or if `kind` raises it.
    """
    _check(images, titles)
    inputs, found = None, []
    for model, image_processor in models:
        first, *_, last = _draw_columns(kind, model, image_processor, images, interpolate_pos_encoding)
        inputs = inputs or first
        found.append(last)
    if not found or len(found) != len(rows) * len(columns):
        raise ValueError(f"`models` must hold {len(rows)} x {len(columns)} models, got {len(found)}.")
    sheet, names = [], []
    for image in range(len(images)):
        for row, name in enumerate(rows):
            here = found[row * len(columns) : (row + 1) * len(columns)]
            sheet.append([inputs.cells[image], *(column.cells[image] for column in here)])
            names.append(", ".join(filter(None, [titles[image] if titles else "", name])))
    return draw_sheet(["input", *columns], sheet, names if any(names) else None, side, found[-1].scale)


def _draw_columns(
    kind: Draw,
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    interpolate_pos_encoding: bool,
) -> list[Column]:
    """Return the columns of all images, the input first. The model processes `_BATCH` images at a time."""
    parts = []
    for start in range(0, len(images), _BATCH):
        here = make_view(model, image_processor, images[start : start + _BATCH], interpolate_pos_encoding)
        parts.append([*input_columns(here), *kind(here)])
    return [
        same[0]._replace(cells=[cell for column in same for cell in column.cells]) for same in zip(*parts, strict=True)
    ]


def _check(images: Sequence[Image.Image], titles: Sequence[str] | None) -> None:
    if not images:
        raise ValueError("`images` must contain at least one image, got none.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"`titles` must hold one text per image, {len(images)}, got {len(titles)}.")
