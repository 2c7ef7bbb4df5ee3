"""Sheets of small pictures with captions, and what is drawn over a picture: brightness, heat, groups, outlines.

A picture is a tensor (3, height, width) in [0, 1]; a map (rows, columns) holds a value for each of its patches, and covers it
evenly.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..utils.files import whole_file


_MARGIN, _LABEL_HEIGHT, _SCALE_WIDTH = 4, 16, 96
_PAPER, _INK, _LINE = (255, 255, 255), (40, 40, 40), (255, 255, 255)
_DARK = 0.15  # brightness of what is gone
# From low to high, ever brighter, so that the order also shows in grey and to colour-blind readers.
_HEAT = torch.tensor([[13, 8, 60], [92, 18, 110], [165, 45, 95], [222, 92, 56], [249, 156, 30], [252, 240, 150]]) / 255


class Cell(NamedTuple):
    """A picture of a sheet.

    Attributes:
        picture: (3, height, width) in [0, 1].
        caption: below it.
        groups: (rows, columns) of patches; white lines are drawn between different ones.
    """

    picture: torch.Tensor
    caption: str = ""
    groups: torch.Tensor | None = None


class Column(NamedTuple):
    """A name, one cell per image, and what the colours of `heat` mean in them, if there are any."""

    name: str
    cells: list[Cell]
    scale: str = ""


def draw_sheet(
    names: Sequence[str], rows: Sequence[Sequence[Cell]], titles: Sequence[str] | None, side: int, scale: str = ""
) -> Image.Image:
    """Pictures in rows and columns.

    Args:
        names: one per column, written above it.
        rows: the cells.
        titles: one per row, written above it.
        side: pixels of the longer side of each picture.
        scale: what the colours of `heat` mean, written beside them at the bottom; empty for no scale.
    """
    sizes = [cell_size(cell.picture, side) for cells in rows for cell in cells]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)  # of a place
    title_height = 0 if titles is None else _LABEL_HEIGHT
    row_height = title_height + size[1] + _LABEL_HEIGHT + _MARGIN
    bottom = _LABEL_HEIGHT + len(rows) * row_height + _MARGIN
    total = len(names) * (size[0] + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (total, bottom + (_LABEL_HEIGHT + _MARGIN if scale else 0)), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)

    def write(left: int, top: int, text: str, room: int) -> None:
        while text and font.getlength(text) > room:
            text = text.rstrip("…")[:-1] + "…" if len(text) > 1 else ""
        draw.text((left, top), text, fill=_INK, font=font)

    lefts = [_MARGIN + column * (size[0] + _MARGIN) for column in range(len(names))]
    for left, name in zip(lefts, names, strict=True):
        write(left, 1, name, size[0])
    for index, cells in enumerate(rows):
        top = _LABEL_HEIGHT + index * row_height
        if titles is not None:
            write(lefts[0], top + 1, titles[index], total - 2 * _MARGIN)
        for left, cell in zip(lefts, cells, strict=True):
            sheet.paste(draw_cell(cell, cell_size(cell.picture, side)), (left, top + title_height))
            write(left, top + title_height + size[1] + 1, cell.caption, size[0])
    if scale:
        ramp = heat(torch.linspace(0, 1, _SCALE_WIDTH)).expand(_LABEL_HEIGHT - 4, -1, -1)
        sheet.paste(_to_image(ramp.permute(2, 0, 1)), (_MARGIN, bottom + 2))
        write(2 * _MARGIN + _SCALE_WIDTH, bottom + 1, scale, total - 3 * _MARGIN - _SCALE_WIDTH)
    return sheet


def cell_size(picture: torch.Tensor, side: int) -> tuple[int, int]:
    """Width and height of a picture whose longer side has `side` pixels."""
    height, width = picture.shape[1:]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_cell(cell: Cell, size: tuple[int, int]) -> Image.Image:
    """A cell's picture with the lines between its groups, (width, height) pixels large."""
    image = _to_image(cell.picture)
    smaller = size[0] < image.width
    image = image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.NEAREST)
    if cell.groups is None:
        return image
    groups = cell.groups[_cells(size[1], cell.groups.shape[0])][:, _cells(size[0], cell.groups.shape[1])]
    lines = torch.zeros_like(groups, dtype=torch.bool)
    lines[1:] |= groups[1:] != groups[:-1]
    lines[:, 1:] |= groups[:, 1:] != groups[:, :-1]
    image.paste(_LINE, mask=Image.fromarray(lines.to(torch.uint8).mul(255).numpy()))
    return image


def _cells(pixels: int, count: int) -> torch.Tensor:
    """For each of `pixels` along a side, which of `count` equal parts its middle lies in."""
    return ((torch.arange(pixels) + 0.5) * count / pixels).long()


def _to_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_picture(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a picture in the format of its ending, whole or not at all; folders are made.

    Raises:
        ValueError: no ending of a picture.
        OSError: the file cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"the file of a picture must end in .png, .jpg or another picture format, got {path}.")
    with whole_file(path) as beside:
        image.save(beside, format=kind, optimize=True)
    return path


# Over a picture


def over_pixels(values: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """A map (rows, columns) of patches as one of the picture's pixels, (height, width)."""
    (rows, columns), (height, width) = values.shape, picture.shape[1:]
    return values.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)


def brightened(picture: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The picture, dark where a patch's share (rows, columns) in [0, 1] is zero."""
    return picture * over_pixels(_DARK + (1 - _DARK) * shares, picture)


def heat(values: torch.Tensor) -> torch.Tensor:
    """Colours (..., 3) of values (...) in [0, 1], from dark violet to bright yellow."""
    position = values.clamp(0, 1) * (len(_HEAT) - 1)
    low = position.floor().long().clamp(max=len(_HEAT) - 2)
    part = (position - low).unsqueeze(-1)
    return _HEAT[low] * (1 - part) + _HEAT[low + 1] * part


def heated(picture: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The picture in grey under the heat of a map (rows, columns) in [0, 1]; dark where it is NaN."""
    grey = picture.mean(dim=0, keepdim=True).clamp(0, 1)
    colours = heat(values.nan_to_num(0.0))
    colours = torch.stack([over_pixels(colours[..., channel], picture) for channel in range(3)])
    strength = 0.4 + 0.4 * over_pixels(values.nan_to_num(0.0), picture)
    mixed = colours * strength + grey * (1 - strength)
    missing = over_pixels(values.isnan().to(picture.dtype), picture)
    return mixed * (1 - missing) + _DARK * grey * missing


def mean_colours(picture: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The picture with the mean colour of each group (rows, columns) of patches in all its places; a negative group, which
    is none, is dark."""
    ids = over_pixels(groups, picture).flatten()
    flat, inside = picture.flatten(1), ids >= 0
    index = ids.clamp(min=0)
    weight = inside.to(picture.dtype)
    count = weight.new_zeros(int(index.max()) + 1).index_add(0, index, weight)
    total = weight.new_zeros(3, len(count)).index_add(1, index, flat * weight)
    means = (total / count.clamp(min=1))[:, index]
    return torch.where(inside, means, _DARK * flat).unflatten(1, picture.shape[1:])


def distinct_colours(picture: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The picture in grey, each group (rows, columns) of patches tinted with a colour far from those of its neighbours by
    number; a negative group, which is none, is dark."""
    grey = picture.mean(dim=0)
    ids = over_pixels(groups, picture)
    hue = (ids * 0.618034) % 1.0  # the golden ratio spreads any number of hues
    tint = (((hue + torch.tensor([0.0, 2 / 3, 1 / 3]).view(3, 1, 1)) % 1.0 * 6 - 3).abs() - 1).clamp(0, 1)
    return torch.where(ids >= 0, tint * (0.25 + 0.75 * grey), _DARK * picture)
