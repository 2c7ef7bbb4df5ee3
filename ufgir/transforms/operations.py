"""The fourteen operations of TrivialAugment (wide) and RandAugment, each image of a batch with its own strength.

TrivialAugment: https://huggingface.co/papers/2103.10158, RandAugment: https://huggingface.co/papers/1909.13719. What an
operation does is Pillow's word, as in both papers' code: enhancing with a factor of 1 + strength, 8-bit levels for
posterize, solarize and equalize, black where a moved image leaves nothing, a rotation about the centre and a shear that
leaves the upper left corner where it is. Shapes: B batch, H, W height and width, pixels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


HIGHEST_LEVEL = 30  # levels of strength: 0, which changes little or nothing, to 30


class Operation(NamedTuple):
    """Strength at the highest level: in TrivialAugment, in RandAugment, and whether its sign is drawn."""

    trivial: float = 0.0
    rand: float = 0.0
    signed: bool = False


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(),
    "shear_x": Operation(0.99, 0.3, signed=True),  # pixels sideways a pixel downwards
    "shear_y": Operation(0.99, 0.3, signed=True),
    "translate_x": Operation(32.0, 150 / 331, signed=True),  # pixels; RandAugment: share of the side
    "translate_y": Operation(32.0, 150 / 331, signed=True),
    "rotate": Operation(135.0, 30.0, signed=True),  # degrees, counter-clockwise
    "brightness": Operation(0.99, 0.9, signed=True),
    "color": Operation(0.99, 0.9, signed=True),
    "contrast": Operation(0.99, 0.9, signed=True),
    "sharpness": Operation(0.99, 0.9, signed=True),
    "posterize": Operation(6.0, 4.0),  # bits taken away
    "solarize": Operation(255.0, 255.0),  # what the threshold falls by
    "autocontrast": Operation(),
    "equalize": Operation(),
}
NAMES = tuple(OPERATIONS)
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
MOVEMENTS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def operation_value(name: str, level: int, negative: bool, side: int, trivial: bool) -> float:
    """What `apply_operations` takes for an operation at a level.

    Args:
        name: one of `OPERATIONS`.
        level: 0 to `HIGHEST_LEVEL`.
        negative: turn the sign of the strength, where the operation has one.
        side: of the image, pixels.
        trivial: strengths of TrivialAugment rather than RandAugment.

    Returns:
        Shear, whole pixels, degrees, factor, bits left, threshold in 0 to 255, or 0 where there is nothing to choose.
    """
    operation = OPERATIONS[name]
    largest = operation.trivial if trivial else operation.rand
    if name.startswith("translate") and not trivial:
        largest *= side
    strength = largest * level / HIGHEST_LEVEL
    if name.startswith("translate"):
        strength = math.floor(strength)
    if operation.signed and negative:
        strength = -strength
    if name in ENHANCEMENTS:
        return 1 + strength
    if name == "posterize":
        return 8 - round(strength)
    return 255 - strength if name == "solarize" else strength


def draw_operation(generator: np.random.Generator, side: int, level: int | None = None) -> tuple[int, float]:
    """(index in `NAMES`, value): TrivialAugment's, all operations, levels and signs alike, or RandAugment's at `level`."""
    index = int(generator.integers(len(NAMES)))
    drawn, negative = int(generator.integers(HIGHEST_LEVEL + 1)), bool(generator.integers(2))
    name, trivial = NAMES[index], level is None
    return index, operation_value(name, drawn if trivial else level, negative, side, trivial)


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """8-bit levels -> float32 in [0, 1].

    (Divided by a tensor: CUDA multiplies by the inverse of a number, and 255 * x of that may lie below the level.)
    """
    return levels.float() / torch.full((), 255.0, device=levels.device)


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> the nearest 8-bit levels, uint8."""
    return (pixels * 255).round().to(torch.uint8)


def apply_operations(
    pixels: torch.Tensor, operations: torch.Tensor, values: torch.Tensor, interpolation: str = "nearest"
) -> torch.Tensor:
    """One operation an image. Images that drew the same one go through it together.

    Args:
        pixels: (B, 3, H, W), float32 in [0, 1], 8-bit levels over 255.
        operations: (B,), indices in `NAMES`, on the CPU.
        values: (B,), see `operation_value`, on the CPU.
        interpolation: `nearest` or `bilinear`, for images that are sheared, moved or turned.

    Returns:
        Of the same shape, in [0, 1], on the device of `pixels`.
    """
    names = [NAMES[int(index)] for index in operations]
    groups: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault("move" if name in MOVEMENTS else name, []).append(row)
    groups.pop("identity", None)
    changed = pixels.clone()
    for group, rows in groups.items():
        chosen, strength = pixels[rows], values[rows]
        if group == "move":
            moves = zip((names[row] for row in rows), strength.tolist(), strict=True)
            matrices = [_source_to_target(name, value, *pixels.shape[-2:]) for name, value in moves]
            changed[rows] = _move(chosen, torch.tensor(matrices), interpolation)
        else:
            changed[rows] = _FUNCTIONS[group](chosen, strength.to(pixels.device))
    return changed


def _source_to_target(name: str, value: float, height: int, width: int) -> list[list[float]]:
    """The 2 x 3 matrix from where a pixel is to where it goes. Pixels have their centres at whole numbers."""
    if name == "shear_x":  # the corner of the image is half a pixel away from the centre of its first pixel
        return [[1.0, -value, -value / 2], [0.0, 1.0, 0.0]]
    if name == "shear_y":
        return [[1.0, 0.0, 0.0], [-value, 1.0, -value / 2]]
    if name == "translate_x":
        return [[1.0, 0.0, value], [0.0, 1.0, 0.0]]
    if name == "translate_y":
        return [[1.0, 0.0, 0.0], [0.0, 1.0, value]]
    cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
    x, y = (width - 1) / 2, (height - 1) / 2
    return [[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]]


def _move(pixels: torch.Tensor, matrices: torch.Tensor, interpolation: str) -> torch.Tensor:
    from kornia.geometry.transform import warp_affine

    return warp_affine(pixels, matrices.to(pixels.device), tuple(pixels.shape[-2:]), mode=interpolation)


def _brightness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import adjust_brightness_accumulative

    return adjust_brightness_accumulative(pixels, factor)


def _color(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    from kornia.enhance.adjust import adjust_saturation_with_gray_subtraction

    return adjust_saturation_with_gray_subtraction(pixels, factor)


def _contrast(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    from kornia.enhance.adjust import adjust_contrast_with_mean_subtraction

    return adjust_contrast_with_mean_subtraction(pixels, factor)


def _sharpness(pixels: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import sharpness

    return sharpness(pixels, factor)


def _posterize(pixels: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    step = 2 ** (8 - bits.to(torch.int32))[:, None, None, None]
    return from_levels(to_levels(pixels) // step * step)


def _solarize(pixels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import solarize

    return solarize(pixels, (threshold.ceil() - 0.5) / 255)  # halfway between two levels: rounding decides nothing


def _autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) / (high - low), pixels)  # a channel of one value stays as it is


def _equalize(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import equalize

    return equalize(pixels)


_FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
