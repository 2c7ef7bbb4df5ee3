"""The fourteen operations of TrivialAugment (wide) and RandAugment on batches, with a different strength per image.

TrivialAugment: https://huggingface.co/papers/2103.10158, RandAugment: https://huggingface.co/papers/1909.13719. The operations follow
Pillow, as in the code of both papers: enhancement with a factor of 1 + strength; 8-bit levels for posterize, solarize and equalize;
black where a transformed image has no pixels; rotation about the center; shear about the upper left corner.

Shapes: B batch, H, W height and width in pixels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch


HIGHEST_LEVEL = 30  # levels of strength range from 0 (little or no change) to 30


class Operation(NamedTuple):
    """Strength at the highest level, in TrivialAugment and in RandAugment, and whether the sign is random."""

    trivial: float = 0.0
    rand: float = 0.0
    signed: bool = False


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(),
    "shear_x": Operation(0.99, 0.3, signed=True),  # horizontal pixels per vertical pixel
    "shear_y": Operation(0.99, 0.3, signed=True),
    "translate_x": Operation(32.0, 150 / 331, signed=True),  # pixels; RandAugment: share of the side
    "translate_y": Operation(32.0, 150 / 331, signed=True),
    "rotate": Operation(135.0, 30.0, signed=True),  # degrees, counter-clockwise
    "brightness": Operation(0.99, 0.9, signed=True),
    "color": Operation(0.99, 0.9, signed=True),
    "contrast": Operation(0.99, 0.9, signed=True),
    "sharpness": Operation(0.99, 0.9, signed=True),
    "posterize": Operation(6.0, 4.0),  # removed bits
    "solarize": Operation(255.0, 255.0),  # decrease of the threshold
    "autocontrast": Operation(),
    "equalize": Operation(),
}
NAMES = tuple(OPERATIONS)
ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
MOVEMENTS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def operation_value(name: str, level: int, negative: bool, side: int, trivial: bool) -> float:
    """Return the value that `apply_operations` takes for an operation at a level.

    Args:
        name: one of `OPERATIONS`.
        level: 0 to `HIGHEST_LEVEL`.
        negative: invert the sign of the strength, if the operation has one.
        side: image size, pixels.
        trivial: use the strengths of TrivialAugment rather than RandAugment.

    Returns:
        Shear, translation in whole pixels, rotation in degrees, factor, remaining bits, threshold in 0 to 255, or 0 for operations
        without a strength.
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
    """Draw (index in `NAMES`, value). Without a `level`, as in TrivialAugment, operations, levels and signs are uniform; with a `level`, as
    in RandAugment, it is fixed."""
    index = int(generator.integers(len(NAMES)))
    drawn, negative = int(generator.integers(HIGHEST_LEVEL + 1)), bool(generator.integers(2))
    name, trivial = NAMES[index], level is None
    return index, operation_value(name, drawn if trivial else level, negative, side, trivial)


def from_levels(levels: torch.Tensor) -> torch.Tensor:
    """Convert 8-bit levels to float32 in [0, 1].

    The divisor is a tensor, because CUDA replaces division by a number with multiplication by its inverse, after which 255 * x can be
    slightly below the level.
    """
    return levels.float() / torch.full((), 255.0, device=levels.device)


def to_levels(pixels: torch.Tensor) -> torch.Tensor:
    """Convert values in [0, 1] to the nearest 8-bit levels, uint8."""
    return (pixels * 255).round().to(torch.uint8)


def apply_operations(
    pixels: torch.Tensor, operations: torch.Tensor, values: torch.Tensor, interpolation: str = "nearest"
) -> torch.Tensor:
    """Apply one operation to each image. Images with the same operation are processed together.

    Args:
        pixels: (B, 3, H, W), float32 in [0, 1], multiples of 1/255.
        operations: (B,), indices in `NAMES`, on the CPU.
        values: (B,), see `operation_value`, on the CPU.
        interpolation: `nearest` or `bilinear`, for shear, translation and rotation.

    Returns:
        (B, 3, H, W), in [0, 1], on the device of `pixels`.
    """
    names = [NAMES[int(index)] for index in operations]
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault("move" if name in MOVEMENTS else name, []).append(index)
    groups.pop("identity", None)
    changed = pixels.clone()
    for group, indices in groups.items():
        chosen, strength = pixels[indices], values[indices]
        if group == "move":
            moves = zip((names[index] for index in indices), strength.tolist(), strict=True)
            matrices = [_source_to_target(name, value, *pixels.shape[-2:]) for name, value in moves]
            changed[indices] = _move(chosen, torch.tensor(matrices), interpolation)
        else:
            changed[indices] = _FUNCTIONS[group](chosen, strength.to(pixels.device))
    return changed


def _source_to_target(name: str, value: float, height: int, width: int) -> list[list[float]]:
    """Return the 2 x 3 matrix that maps the source position of a pixel to its target position. Pixel centers are integers."""
    if name == "shear_x":  # the image corner is half a pixel from the center of the first pixel
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

    return solarize(
        pixels, (threshold.ceil() - 0.5) / 255
    )  # halfway between two levels, so that rounding has no effect


def _autocontrast(pixels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    low, high = pixels.amin(dim=(2, 3), keepdim=True), pixels.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (pixels - low) / (high - low), pixels)  # a constant channel is unchanged


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
