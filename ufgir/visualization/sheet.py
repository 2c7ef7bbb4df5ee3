"""Sheets of small images with captions, and overlays for images: brightness, heat maps, groups of patches.

An image is a tensor (3, height, width) in [0, 1]. A map (rows, columns) holds one value per patch; the patches divide the image
evenly.
"""

import os
import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ..utils.files import whole_file


_MARGIN, _LABEL_HEIGHT, _SCALE_WIDTH = 4, 16, 96
_PAPER, _INK, _LINE = (255, 255, 255), (40, 40, 40), (255, 255, 255)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_ASCII = "".join(map(chr, range(32, 127)))
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "msyh.ttc",
)
_DARK = 0.15  # brightness of dropped patches
# From low to high. Brightness increases, so that the order is also visible in gray and to color-blind readers.
_HEAT = torch.tensor([[13, 8, 60], [92, 18, 110], [165, 45, 95], [222, 92, 56], [249, 156, 30], [252, 240, 150]]) / 255


class Cell(NamedTuple):
    """One image of a sheet.

    Attributes:
        image: (3, height, width) in [0, 1].
        caption: text below the image.
        groups: (rows, columns), group index of each patch; white lines separate different groups.
    """

    image: torch.Tensor
    caption: str = ""
    groups: torch.Tensor | None = None


class Column(NamedTuple):
    """A column of a sheet: its name, one cell per image, and the meaning of the `heat` colors, empty if it has none."""

    name: str
    cells: list[Cell]
    scale: str = ""


def draw_sheet(
    names: Sequence[str], rows: Sequence[Sequence[Cell]], titles: Sequence[str] | None, side: int, scale: str = ""
) -> Image.Image:
    """Draw images in rows and columns.

    Args:
        names: one per column, written above it.
        rows: the cells.
        titles: one per row, written above it.
        side: pixels of the longer side of each image.
        scale: meaning of the `heat` colors, written next to a color bar at the bottom; empty for no color bar.
    """
    sizes = [cell_size(cell.image, side) for cells in rows for cell in cells]
    size = max(width for width, _ in sizes), max(height for _, height in sizes)  # of a cell
    title_height = 0 if titles is None else _LABEL_HEIGHT
    row_height = title_height + size[1] + _LABEL_HEIGHT + _MARGIN
    bottom = _LABEL_HEIGHT + len(rows) * row_height + _MARGIN
    total = len(names) * (size[0] + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (total, bottom + (_LABEL_HEIGHT + _MARGIN if scale else 0)), _PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(left: int, top: int, text: str, room: int) -> None:
        font, text = font_for(text)
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
            sheet.paste(draw_cell(cell, cell_size(cell.image, side)), (left, top + title_height))
            write(left, top + title_height + size[1] + 1, cell.caption, size[0])
    if scale:
        ramp = heat(torch.linspace(0, 1, _SCALE_WIDTH)).expand(_LABEL_HEIGHT - 4, -1, -1)
        sheet.paste(_to_image(ramp.permute(2, 0, 1)), (_MARGIN, bottom + 2))
        write(2 * _MARGIN + _SCALE_WIDTH, bottom + 1, scale, total - 3 * _MARGIN - _SCALE_WIDTH)
    return sheet


def font_for(text: str, size: int = 12) -> tuple[Font, str]:
    """Return a font that can draw a text, and the text.

    Pillow's own font only has the letters of English. For others, common fonts of the system are tried. If none has all the
    characters, accents are removed, and characters that are still missing become question marks.

    Args:
        text: to draw.
        size: of the font, in pixels.
    """
    own = _load_font(None, size)
    assert own is not None  # Pillow has it
    if not _missing(own, text):
        return own, text
    for name in _FONTS:
        font = _load_font(name, size)
        if font is not None and not _missing(font, text):
            return font, text
    plain = "".join(mark for mark in unicodedata.normalize("NFKD", text) if not unicodedata.combining(mark))
    missing = _missing(own, plain)
    return own, "".join("?" if mark in missing else mark for mark in plain)


@cache
def _load_font(name: str | None, size: int) -> Font | None:
    """Return a font of the system, None if it is not installed; without a name, Pillow's own."""
    if name is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


def _missing(font: Font, text: str) -> set[str]:
    """Return the characters of a text for which a font only has the box that stands for missing ones."""
    box = bytes(font.getmask("\uffff"))
    return {mark for mark in set(text) - set(_ASCII) if bytes(font.getmask(mark)) == box}


def cell_size(image: torch.Tensor, side: int) -> tuple[int, int]:
    """Return width and height of an image that is scaled to `side` pixels on its longer side."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def draw_cell(cell: Cell, size: tuple[int, int]) -> Image.Image:
    """Draw the image of a cell, (width, height) pixels large, with lines between its groups."""
    image = _to_image(cell.image)
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
    """Return, for each of `pixels` along a side, which of `count` equal parts contains its center."""
    return ((torch.arange(pixels) + 0.5) * count / pixels).long()


def _to_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Save an image in the format given by the file extension. The file is written atomically; missing folders are created.

    Raises:
        ValueError: if the extension is not that of an image format.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"`path` must end in .png, .jpg or another image extension, got {path}.")
    with whole_file(path) as temporary:
        image.save(temporary, format=kind, optimize=True)
    return path


# Overlays


def over_pixels(values: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Expand a map (rows, columns) of patches to the pixels of an image, (height, width)."""
    (rows, columns), (height, width) = values.shape, image.shape[1:]
    return values.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)


def brightened(image: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Darken an image where the share (rows, columns) of a patch, in [0, 1], is low."""
    return image * over_pixels(_DARK + (1 - _DARK) * shares, image)


def heat(values: torch.Tensor) -> torch.Tensor:
    """Return the colors (..., 3) of values (...) in [0, 1], from dark violet to bright yellow."""
    position = values.clamp(0, 1) * (len(_HEAT) - 1)
    low = position.floor().long().clamp(max=len(_HEAT) - 2)
    part = (position - low).unsqueeze(-1)
    return _HEAT[low] * (1 - part) + _HEAT[low + 1] * part


def heated(image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Overlay a gray image with the heat map (rows, columns), in [0, 1]; NaN patches are dark."""
    gray = image.mean(dim=0, keepdim=True).clamp(0, 1)
    colors = heat(values.nan_to_num(0.0))
    colors = torch.stack([over_pixels(colors[..., channel], image) for channel in range(3)])
    strength = 0.4 + 0.4 * over_pixels(values.nan_to_num(0.0), image)
    mixed = colors * strength + gray * (1 - strength)
    missing = over_pixels(values.isnan().to(image.dtype), image)
    return mixed * (1 - missing) + _DARK * gray * missing


def mean_colors(image: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Fill each group (rows, columns) of patches with its mean color. Patches with a negative index belong to no group and are dark."""
    ids = over_pixels(groups, image).flatten()
    flat, inside = image.flatten(1), ids >= 0
    index = ids.clamp(min=0)
    weight = inside.to(image.dtype)
    count = weight.new_zeros(int(index.max()) + 1).index_add(0, index, weight)
    total = weight.new_zeros(3, len(count)).index_add(1, index, flat * weight)
    means = (total / count.clamp(min=1))[:, index]
    return torch.where(inside, means, _DARK * flat).unflatten(1, image.shape[1:])


def distinct_colors(image: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Tint each group (rows, columns) of patches of a gray image; consecutive group indices have very different colors. Patches with a
    negative index belong to no group and are dark."""
    gray = image.mean(dim=0)
    ids = over_pixels(groups, image)
    hue = (ids * 0.618034) % 1.0  # the golden ratio spreads any number of hues
    tint = (((hue + torch.tensor([0.0, 2 / 3, 1 / 3]).view(3, 1, 1)) % 1.0 * 6 - 3).abs() - 1).clamp(0, 1)
    return torch.where(ids >= 0, tint * (0.25 + 0.75 * gray), _DARK * image)
