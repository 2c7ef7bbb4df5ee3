"""Pictures of what a model does with its patches."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import BaseImageProcessor

from clca import CLCAViTForImageClassification

from .tracing import trace_patches


_MARGIN, _LABEL_HEIGHT = 4, 16
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


@torch.no_grad()
def kept_patches_image(
    model: CLCAViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[Image.Image],
    titles: Sequence[str] | None = None,
    side: int = 224,
) -> Image.Image:
    """A grid: one row per image, first what the model sees, then what each reduction stage left.

    A patch is as bright as its share in the token that holds most of it: full if it still has a token of its own, dark if
    it was dropped or fused with many.

    Args:
        model: a model with a reduction.
        image_processor: the one that belongs to the model.
        images: pictures of any size.
        titles: one per image, written above its row.
        side: pixels of one picture in the grid.

    Raises:
        ValueError: no images, titles of another number, or a model without a reduction.
    """
    if not images:
        raise ValueError("`images` must hold at least one picture, got none.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"`titles` must hold one text per image, {len(images)}, got {len(titles)}.")
    if model.config.reduction is None:
        raise ValueError("`model` reduces no tokens (`reduction` is None): there are no stages to draw.")
    pixels = image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
    training = model.training
    output = model.eval()(pixels.to(model.device), output_assignments=True)
    model.train(training)
    stages = trace_patches(output.assignments, model.config).stages
    shares = [stage.amax(dim=1).clamp(0, 1).float().cpu().unflatten(1, model.config.image_grid) for stage in stages]

    layers = model.vit.method.layers(model.config)
    columns = ["input", *(f"after layer {layer}" for layer in layers)]
    grid = _Grid(len(images), columns, side, with_titles=titles is not None)
    for row, picture in enumerate(_denormalise(pixels, image_processor)):
        grid.paste(row, 0, picture)
        for column, share in enumerate(shares, start=1):
            mask = (0.15 + 0.85 * share[row]).repeat_interleave(picture.shape[1] // share.shape[1], 0)
            mask = mask.repeat_interleave(picture.shape[2] // share.shape[2], 1)
            grid.paste(row, column, picture * mask)
            grid.write(row, column, f"{int((share[row] > 0.999).sum())} of {share[row].numel()} patches kept")
        if titles is not None:
            grid.write_title(row, titles[row])
    return grid.image


class _Grid:
    """Pictures in rows and columns with captions."""

    def __init__(self, rows: int, columns: Sequence[str], side: int, with_titles: bool) -> None:
        self.side = side
        self.title_height = _LABEL_HEIGHT if with_titles else 0
        self.row_height = self.title_height + side + _LABEL_HEIGHT + _MARGIN
        self.font = ImageFont.load_default(size=12)
        size = (len(columns) * (side + _MARGIN) + _MARGIN, _LABEL_HEIGHT + rows * self.row_height + _MARGIN)
        self.image = Image.new("RGB", size, _PAPER)
        self.draw = ImageDraw.Draw(self.image)
        for column, name in enumerate(columns):
            self.draw.text((self._left(column), 1), name, fill=_INK, font=self.font)

    def paste(self, row: int, column: int, picture: torch.Tensor) -> None:
        """Put a picture (3, height, width) in [0, 1] into a cell."""
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        cell = Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.NEAREST)
        self.image.paste(cell, (self._left(column), self._top(row) + self.title_height))

    def write(self, row: int, column: int, text: str) -> None:
        top = self._top(row) + self.title_height + self.side + 1
        self.draw.text((self._left(column), top), text, fill=_INK, font=self.font)

    def write_title(self, row: int, text: str) -> None:
        self.draw.text((self._left(0), self._top(row) + 1), text, fill=_INK, font=self.font)

    def _left(self, column: int) -> int:
        return _MARGIN + column * (self.side + _MARGIN)

    def _top(self, row: int) -> int:
        return _LABEL_HEIGHT + row * self.row_height


def _denormalise(pixels: torch.Tensor, image_processor: BaseImageProcessor) -> torch.Tensor:
    """Pictures (B, 3, height, width) in [0, 1] from normalised pixels."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return pixels * std + mean
