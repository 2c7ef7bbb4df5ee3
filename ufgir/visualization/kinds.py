"""Pictures of what a model does with its patches.

A kind of picture is a function that takes a `View` (a model and the images it looks at) and returns columns with one cell
per image:

    image = draw(kept_columns, model, image_processor, images)
    image = draw(partial(attention_columns, layers=[3, 5]), model, image_processor, images, titles=names)

All of them work from the assignments and from attention that is asked for, for any method of token reduction.

`KINDS` lists them. A new picture is a function and an entry there; docs/adding-a-picture.md shows how.
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
from .sheet import Cell, Column, brightened, distinct_colours, draw_sheet, heated, mean_colours


_BATCH = 4  # images that a model looks at at a time
COLOURINGS = {"mean": mean_colours, "distinct": distinct_colours}


def make_view(
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    interpolate_pos_encoding: bool = False,
) -> View:
    """Images of any size as a model sees them.

    Args:
        model: any CLCA model.
        image_processor: the one that belongs to the model.
        images: pictures of any size.
        interpolate_pos_encoding: accept that the processor makes another size than the model's.

    Raises:
        ValueError: no images.
    """
    if not images:
        raise ValueError("`images` must hold at least one picture, got none.")
    pixels = image_processor(images=[to_rgb(image) for image in images], return_tensors="pt").pixel_values
    grid = model.vit.embeddings.grid(pixels)
    height, width = (n * size for n, size in zip(grid, model.vit.embeddings.patch_embeddings.patch_size, strict=True))
    pictures = _denormalise(pixels, image_processor)[:, :, :height, :width]
    return View(model, pixels.to(model.device), pictures, grid, interpolate_pos_encoding)


def _denormalise(pixels: torch.Tensor, image_processor: Any) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [0, 1] from what an image processor made of them."""
    if getattr(image_processor, "do_normalize", True):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
        pixels = pixels * std + mean
    return pixels if getattr(image_processor, "do_rescale", True) else pixels / 255


def _assignments(view: View) -> tuple[list[torch.Tensor], list[str]]:
    """The assignments of all stages, on the CPU in float32, and the names of the stages.

    Raises:
        ValueError: the model reduces no tokens, or its method reports no assignments.
    """
    config = view.model.config
    if config.reduction is None:
        raise ValueError("`model` reduces no tokens (`reduction` is None): there are no stages to draw.")
    with evaluation_mode(view.model):
        assignments = view.model.vit(view.pixels, view.interpolate, output_assignments=True).assignments
    return [a.float().cpu() for a in assignments], [f"after layer {layer}" for layer in stage_layers(config)]


# Kinds of pictures


def input_columns(view: View) -> list[Column]:
    """What the model sees."""
    return [Column("input", [Cell(picture) for picture in view.pictures])]


def kept_columns(view: View) -> list[Column]:
    """What each reduction stage left. A patch is as bright as its share in the token that holds most of it: full if it still
    has a token of its own, dark if it was dropped or fused with many. Recalled rows are no such tokens.

    Raises:
        ValueError: the model reduces no tokens.
    """
    assignments, names = _assignments(view)
    stages = trace_patches(assignments, view.model.config, math.prod(view.grid), recall=False).stages
    columns = []
    for name, stage in zip(names, stages, strict=True):
        shares = on_grid(stage.amax(dim=1).clamp(0, 1), view.grid)
        kept = (shares > 0.999).sum(dim=(1, 2)).tolist()
        captions = [f"{count} of {math.prod(view.grid)} patches kept" for count in kept]
        cells = map(Cell, map(brightened, view.pictures, shares), captions)
        columns.append(Column(name, list(cells)))
    return columns


def merge_columns(view: View, colours: str = "mean") -> list[Column]:
    """The groups of patches that share a token after each reduction stage, with white lines between them. Where a method gives
    parts of a patch to several tokens, it belongs to the one that takes most of it, or of the token it was in before; dropped
    patches are dark.

    Args:
        view: model and images.
        colours: `mean`, each group has the mean colour of its pixels; `distinct`, each has a colour of its own.

    Raises:
        ValueError: the model reduces no tokens, or other `colours`.
    """
    if colours not in COLOURINGS:
        raise ValueError(f"`colours` must be one of {', '.join(COLOURINGS)}, got {colours!r}.")
    assignments, names = _assignments(view)
    maps = on_grid(cluster_maps(assignments, view.model.config, math.prod(view.grid)), view.grid)
    columns = []
    for name, stage in zip(names, maps.unbind(1), strict=True):
        cells = []
        for picture, groups in zip(view.pictures, stage, strict=True):
            dropped, count = int((groups < 0).sum()), len(groups[groups >= 0].unique())
            caption = f"{count} group{'s' * (count != 1)}" + f", {dropped} dropped" * (dropped > 0)
            cells.append(Cell(COLOURINGS[colours](picture, groups), caption, groups))
        columns.append(Column(name, cells))
    return columns


def trace_columns(view: View, token: int | None = None, patch: tuple[int, int] | None = None) -> list[Column]:
    """What one token is made of: the share of each patch in it, recalled rows included.

    Args:
        view: model and images.
        token: index among the rows the final norm sees; 0 is CLS in a model that has one.
        patch: (row, column), instead: the token that holds this patch, after each reduction stage. The patch is framed.

    Raises:
        ValueError: the model reduces no tokens; neither or both of `token` and `patch`; or one that does not exist.
    """
    if (token is None) == (patch is None):
        raise ValueError("either `token` or `patch` must be given, got " + ("none." if token is None else "both."))
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
        raise ValueError(f"`token` must be in 0 .. {count - 1}, of the tokens the final norm sees, got {token}.")
    if patch is None:
        return [_token_column(view, f"token {token}", trace.final, torch.full((len(view.pictures),), token), None)]
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
    """Shares (B, N, P) in one token of each image, (B,); negative for none."""
    cells = []
    for picture, rows, token in zip(view.pictures, shares, tokens.tolist(), strict=True):
        parts = rows[token] if token >= 0 else torch.zeros_like(rows[0])
        count = int((parts > 0).sum())
        caption = f"token {token}: {count} patch{'es' * (count != 1)}" if token >= 0 else "no token holds it"
        values = on_grid(parts / parts.max().clamp(min=1e-12), view.grid)
        cells.append(Cell(heated(picture, values.masked_fill(values == 0, torch.nan)), caption, frame))
    return Column(name, cells, "share in the token: 0 to the largest of each picture")


def attention_columns(
    view: View, layers: Sequence[int] | None = None, heads: str | Sequence[int] = "mean"
) -> list[Column]:
    """What CLS attends to.

    Args:
        view: model and images.
        layers: 0-based; None for all.
        heads: `mean`, `all`, or indices: one column for each layer and head.

    Raises:
        ValueError: a model without CLS, or a layer or head that does not exist.
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
    """Attention rollout over ranges of layers (start, stop), the end not in it; by default over each encoder group and over
    all layers.

    Raises:
        ValueError: a range without layers.
    """
    ranges = default_ranges(view.model.config) if ranges is None else list(ranges)
    maps = rollout_of_patches(view.model, view.pixels, ranges, view.interpolate)
    names = [f"layers {start} to {stop - 1}" if stop > start + 1 else f"layer {start}" for start, stop in ranges]
    return [_heat_column(view, name, maps[:, index]) for index, name in enumerate(names)]


def _heat_column(view: View, name: str, maps: torch.Tensor) -> Column:
    """Shares of attention on the patches, (B, P)."""
    cells = []
    for picture, shares in zip(view.pictures, maps.float().cpu(), strict=True):
        caption = f"{100 * float(shares.sum()):.0f} % on patches"
        cells.append(Cell(heated(picture, on_grid(shares / shares.max().clamp(min=1e-12), view.grid)), caption))
    return Column(name, cells, "attention: 0 to the largest of each picture")


def similarity_columns(
    view: View, to: Sequence[str] | None = None, layers: Sequence[int] | None = None
) -> list[Column]:
    """Cosine of each patch's feature with the mean of the tokens that hold patches, and with CLS. Dropped patches are dark.

    Args:
        view: model and images.
        to: of `mean` and `cls`; by default both, in a model without CLS the mean.
        layers: 0-based, whose outputs are compared; None for the tokens after the final norm.

    Raises:
        ValueError: another `to`, `cls` of a model without CLS, or a layer that does not exist.
    """
    to = (["mean", "cls"] if view.model.config.use_class_token else ["mean"]) if to is None else to
    names = ["final norm"] if layers is None else [f"layer {layer}" for layer in layers]
    columns = []
    for reference in to:
        maps = feature_similarity(view.model, view.pixels, reference, layers, view.interpolate).float().cpu()
        for index, name in enumerate(names):
            cells = []
            for picture, cosines in zip(view.pictures, maps[:, index], strict=True):
                known = cosines[~cosines.isnan()]
                low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
                scaled = (cosines - low) / max(high - low, 1e-12)
                caption = f"{low:.2f} to {high:.2f}" if len(known) else "no patch is left"
                cells.append(Cell(heated(picture, on_grid(scaled, view.grid)), caption))
            scale = "cosine: the smallest to the largest of each picture"
            columns.append(Column(f"to {'CLS' if reference == 'cls' else 'mean'}, {name}", cells, scale))
    return columns


def gradcam_columns(view: View, target: int | None = None, layers: Sequence[int] | None = None) -> list[Column]:
    """Grad-CAM: patches whose features raise the logit of a class. Patches that no token holds are dark.

    Args:
        view: model and images.
        target: the class; by default what the model predicts for each image.
        layers: 0-based, whose outputs are weighted; by default the last but one.

    Raises:
        ValueError: a class or a layer that does not exist.
    """
    maps = class_activation_maps(view.model, view.pixels, target, layers, view.interpolate).float().cpu()
    names = ["last but one layer"] if layers is None else [f"layer {layer}" for layer in layers]
    columns = []
    for index, name in enumerate(names):
        cells = []
        for picture, heat in zip(view.pictures, maps[:, index], strict=True):
            largest = float(heat.max())
            scaled = on_grid(heat / max(largest, 1e-12), view.grid)
            cells.append(Cell(heated(picture, scaled), f"largest {largest:.2g}"))
        columns.append(Column(name, cells, "Grad-CAM: 0 to the largest of each picture"))
    return columns


# The options and the list of kinds


def _read_heads(words: list[str]) -> str | list[int]:
    if words in (["mean"], ["all"]):
        return words[0]
    try:
        return [int(word) for word in words]
    except ValueError as error:
        raise ValueError(f"`--heads` must be mean, all or numbers of heads, got {' '.join(words)}.") from error


def _read_range(text: str) -> tuple[int, int]:
    """The type of `--ranges`."""
    try:
        start, stop = map(int, text.split(":"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be two numbers of layers such as 0:4, got {text}") from error
    return start, stop


def _layers_on_the_page(config: CLCAViTConfig) -> dict[str, list[int]]:
    """The layers that reduce, and the last one."""
    return {"layers": [layer for layer in config.aggregation_layers if layer < config.num_hidden_layers]}


_LAYERS = Option("counted from 0", type=int, nargs="+", metavar="LAYER")

KINDS: dict[str, Kind] = {
    "kept": Kind(
        title="Kept patches",
        help="patches that each stage keeps",
        caption="What each stage left. A patch is as bright as its share in the token that holds most of it: full where it "
        "still has a token of its own, dark where it was dropped or fused with many.",
        function=kept_columns,
        needs=(STAGES,),
        page=Page("Bright: the patch still has a token of its own. Dark: dropped, or fused with many others."),
    ),
    "merge": Kind(
        title="Groups of patches",
        help="groups of patches that share a token",
        caption="Which patches share a token after each stage: each group has the mean colour of its pixels, white lines run "
        "between groups.",
        function=merge_columns,
        options={"colours": Option("a group's mean colour, or distinct ones", "mean", choices=list(COLOURINGS))},
        needs=(STAGES,),
        page=Page("Patches that share a token have one colour, their mean. Dark: dropped."),
    ),
    "trace": Kind(
        title="Trace of a token",
        help="what one token is made of",
        caption="What one token is made of, through all stages and the cache.",
        function=trace_columns,
        options={
            "token": Option("index among the last tokens, CLS is 0", type=int, metavar="N"),
            "patch": Option(
                "the token with this patch, from 0", type=int, nargs=2, metavar=("ROW", "COLUMN"), convert=tuple
            ),
        },
        needs=(STAGES,),
        page=Page(
            "What the token that holds this patch is made of, recalled rows included. Dark: not part of it.",
            patch_heading="Token of the patch in row {row}, column {column}",
        ),
        example={"patch": (1, 2)},
    ),
    "attention": Kind(
        title="Attention of CLS",
        help="of CLS",
        caption="What CLS attends to, the mean of the heads.",
        function=attention_columns,
        options={
            "layers": _LAYERS._replace(default="all"),
            "heads": Option("mean, all, or heads from 0", "mean", nargs="+", metavar="HEAD", convert=_read_heads),
        },
        needs=(CLS,),
        page=Page(
            "Average of the heads, in the layers that reduce and the last one. Bright: more attention.",
            options=_layers_on_the_page,
        ),
    ),
    "rollout": Kind(
        title="Attention rollout",
        help="attention through layers",
        caption="Attention through several layers ([Abnar and Zuidema 2020](https://huggingface.co/papers/2005.00928)): heads "
        "averaged, the residual connection added, rows scaled to sum to one, layers multiplied.",
        function=rollout_columns,
        options={
            "ranges": Option(
                "layers from 0, TO not among them",
                "each encoder group, then all layers",
                type=_read_range,
                nargs="+",
                metavar="FROM:TO",
            )
        },
    ),
    "similarity": Kind(
        title="Similarity of features",
        help="of features to CLS and to the mean",
        caption="Cosine of each patch's feature with the mean of the tokens that hold patches, and with CLS.",
        function=similarity_columns,
        options={
            "layers": _LAYERS._replace(default="after the final norm"),
            "to": Option("to what", "both, without CLS the mean", nargs="+", choices=("mean", "cls")),
        },
    ),
    "gradcam": Kind(
        title="Class activation maps",
        help="Grad-CAM of a class",
        caption="Grad-CAM ([Selvaraju et al. 2017](https://huggingface.co/papers/1610.02391)): which patches raise the logit of a "
        "class.",
        function=gradcam_columns,
        options={
            "layers": _LAYERS._replace(default="the last but one"),
            "target": Option("class, from 0", "what the model predicts", type=int, metavar="CLASS"),
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
    """A sheet: one row per image, first what the model sees, then what `kind` makes of it.

    Args:
        kind: one of `KINDS`, or its function; options of its own through `functools.partial`.
        model: any CLCA model.
        image_processor: the one that belongs to the model.
        images: pictures of any size.
        titles: one per image, written above its row.
        side: pixels of the longer side of one picture in the sheet.
        interpolate_pos_encoding: accept images of another size than the model's.

    Raises:
        ValueError: no images, titles of another number, or what the kind refuses.
    """
    _check(images, titles)
    columns = _look(kind, model, image_processor, images, interpolate_pos_encoding)
    rows = list(zip(*(column.cells for column in columns), strict=True))
    return draw_sheet([column.name for column in columns], rows, titles, side, columns[-1].scale)


def kept_patches_image(
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    side: int = 224,
) -> Image.Image:
    """`draw` of `kept_columns`: the patches that each reduction stage left."""
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
    """A grid of models, methods or keep rates side by side: of each model the last of the columns that `kind` makes, which is
    the last stage, the last layer, or all layers of a rollout.

    Args:
        kind: one of `KINDS`, or its function; options of its own through `functools.partial`.
        models: models with their image processors, row by row. They may be made one after the other: none is kept.
        columns: names of the columns, such as keep rates.
        images: pictures of any size; each has all `rows` below each other.
        titles: one per image.
        rows: names of the rows, such as methods.
        side: pixels of the longer side of one picture in the sheet.
        interpolate_pos_encoding: accept images of another size than a model's.

    Raises:
        ValueError: no images, titles of another number, models of another number than the grid has places, or what the kind
            refuses.
    """
    _check(images, titles)
    inputs, found = None, []
    for model, image_processor in models:
        first, *_, last = _look(kind, model, image_processor, images, interpolate_pos_encoding)
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


def _look(
    kind: Draw,
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    interpolate_pos_encoding: bool,
) -> list[Column]:
    """The columns of all images, the input first; the model gets a few images at a time."""
    parts = []
    for start in range(0, len(images), _BATCH):
        here = make_view(model, image_processor, images[start : start + _BATCH], interpolate_pos_encoding)
        parts.append([*input_columns(here), *kind(here)])
    return [
        same[0]._replace(cells=[cell for column in same for cell in column.cells]) for same in zip(*parts, strict=True)
    ]


def _check(images: Sequence[Image.Image], titles: Sequence[str] | None) -> None:
    if not images:
        raise ValueError("`images` must hold at least one picture, got none.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"`titles` must hold one text per image, {len(images)}, got {len(titles)}.")
