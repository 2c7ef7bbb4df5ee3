"""The operations of TrivialAugment and RandAugment: equal to Pillow, and their random choice."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from ufgir.data.synthetic_leaves import cultivar_traits, draw_leaf
from ufgir.transforms.operations import (
    ENHANCEMENTS,
    HIGHEST_LEVEL,
    MOVEMENTS,
    NAMES,
    apply_operations,
    draw_operation,
    from_levels,
    operation_value,
    to_levels,
)


def pillow(image: Image.Image, name: str, value: float) -> Image.Image:
    """Transform as defined in the code of both papers; `transform` maps from target to source."""
    back = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, -value, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -value),
    }
    if name in back:
        return image.transform(image.size, Image.Transform.AFFINE, back[name], Image.Resampling.NEAREST)
    if name in ENHANCEMENTS:
        return getattr(ImageEnhance, name.title())(image).enhance(value)
    functions = {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(value, Image.Resampling.NEAREST),
        "posterize": lambda: ImageOps.posterize(image, int(value)),
        "solarize": lambda: image.point(lambda level: level if level < value else 255 - level),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }
    return functions[name]()


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("name", NAMES)
def test_operations_do_what_pillow_does(name):
    """All levels, both signs and the strengths of both papers, in one batch."""
    image = draw_leaf(cultivar_traits(2)[1], np.random.default_rng(0), 64)
    choices = itertools.product(range(0, HIGHEST_LEVEL + 1, 2), (False, True), [64], (False, True))
    values = [operation_value(name, *choice) for choice in choices]
    pixels = from_levels(tensor(image)).expand(len(values), -1, -1, -1)
    indices = torch.full((len(values),), NAMES.index(name))
    actual = to_levels(apply_operations(pixels, indices, torch.tensor(values))).int()
    expected = torch.stack([tensor(pillow(image, name, value)) for value in values]).int()
    wrong = (actual - expected).abs() > (name not in MOVEMENTS)  # Pillow cuts decimals off, we round
    assert wrong.float().mean() < (0.005 if name in MOVEMENTS else 1e-9)  # nearest: two pixels may be equally near
    differ = (actual != tensor(image)).flatten(1).any(dim=1)
    assert differ.any() == (name != "identity")


def test_directions_and_fill():
    image = torch.arange(1, 17).view(1, 1, 4, 4).expand(1, 3, 4, 4).to(torch.uint8)

    def move(name: str, value: float) -> np.ndarray:
        index = torch.tensor([NAMES.index(name)])
        return to_levels(apply_operations(from_levels(image), index, torch.tensor([value])))[0, 0].numpy()

    plain = image[0, 0].numpy()
    np.testing.assert_array_equal(move("rotate", 90.0), np.rot90(plain))  # counter-clockwise about the centre
    np.testing.assert_array_equal(move("translate_x", 1.0), np.pad(plain, ((0, 0), (1, 0)))[:, :4])  # right, black
    np.testing.assert_array_equal(move("translate_y", -1.0), np.pad(plain, ((0, 1), (0, 0)))[1:])
    np.testing.assert_array_equal(move("shear_x", 0.99)[:, 0], [1, 6, 11, 16])  # the upper left corner stays
    np.testing.assert_array_equal(move("shear_y", 0.99)[0], [1, 6, 11, 16])


def test_strengths_are_the_published_ones():
    fixed = {"identity": 0, "autocontrast": 0, "equalize": 0}
    highest = {name: operation_value(name, HIGHEST_LEVEL, False, 224, trivial=True) for name in NAMES}
    moved = {"shear_x": 0.99, "shear_y": 0.99, "translate_x": 32, "translate_y": 32, "rotate": 135}
    assert highest == {**fixed, **moved, "posterize": 2, "solarize": 0, **dict.fromkeys(ENHANCEMENTS, 1.99)}
    usual = {name: operation_value(name, 9, True, 224, trivial=False) for name in NAMES}
    moved = {
        "rotate": -9,
        **dict.fromkeys(("shear_x", "shear_y"), pytest.approx(-0.09)),
        **dict.fromkeys(("translate_x", "translate_y"), -30),  # whole pixels of 224 * 150 / 331 * 0.3
    }
    enhanced = dict.fromkeys(ENHANCEMENTS, pytest.approx(0.73))
    assert usual == {**fixed, **moved, "posterize": 7, "solarize": 178.5, **enhanced}
    for name in NAMES:  # level 0 changes nothing; solarize at 255 still turns pure white
        nothing = {"posterize": 8, "solarize": 255, **dict.fromkeys(ENHANCEMENTS, 1)}.get(name, 0)
        assert operation_value(name, 0, True, 224, trivial=True) == nothing
    bits = [operation_value("posterize", level, False, 224, trivial=True) for level in range(31)]
    assert bits == sorted(bits, reverse=True) and set(bits) == {2, 3, 4, 5, 6, 7, 8}


def test_levels_round_trip():
    """kornia truncates the decimals of 255 * x."""
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal((from_levels(levels) * 255).to(torch.uint8), levels)
    assert torch.equal(to_levels(from_levels(levels)), levels)


def test_constant_color_is_unchanged():
    """A channel of one value cannot be stretched or equalized."""
    pixels = from_levels(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8))
    indices = torch.tensor([NAMES.index("autocontrast"), NAMES.index("equalize")])
    torch.testing.assert_close(apply_operations(pixels, indices, torch.zeros(2)), pixels)


def test_operations_levels_and_signs_are_uniform():
    generator = np.random.default_rng(0)
    draws = [draw_operation(generator, 224) for _ in range(14 * 500)]
    counts = Counter(NAMES[index] for index, _ in draws)
    assert set(counts) == set(NAMES)
    assert all(400 < count < 600 for count in counts.values())  # 500 +- 4.6 deviations
    angles = Counter(round(v / 4.5) for index, v in draws if NAMES[index] == "rotate")
    assert set(angles) == set(range(-30, 31))
    assert 0.4 < sum(n for level, n in angles.items() if level > 0) / counts["rotate"] < 0.6
    level = {value for index, value in (draw_operation(generator, 224, 9) for _ in range(99)) if index == 5}
    assert level == {-9.0, 9.0}  # RandAugment: one level, both signs
