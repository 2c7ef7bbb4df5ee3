"""Draw synthetic leaves, an ultra-fine-grained data set that needs no download.

All classes are cultivars of one imaginary species. They differ only in small local traits: the angle, number and forking of the
secondary veins, the teeth of the margin, the shape of tip and base, spots, pale variegation and a pale rim. Pose, light, color,
background, curling and damage vary more between photos than the traits vary between cultivars.

Every image is a pure function of (seed, split, class, index, image size, number of classes, difficulty), without global random
state, files or network. Each leaf is computed per pixel in its own coordinates: `u` along the midrib (0 base, 1 tip) and `v`
across it, both in leaf lengths.

    python -m dataset_scripts.synthetic_leaves --output leaves --num_classes 10 --image_size 112
    python -m dataset_scripts.synthetic_leaves --contact_sheet leaves.png --num_classes 6 --columns 8
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from ..utils.files import temporary_path


DRAWING_VERSION = "1.0.0"  # increase it when the same arguments give other pixels; part of the cache key

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class CultivarTraits:
    """Traits that define a cultivar; all other properties of a leaf are random."""

    vein_angle: float  # degrees between midrib and secondary veins
    vein_count: float  # secondary veins on each side
    vein_forks: float  # times a secondary vein forks before the margin, rounded when drawn
    tooth_count: float  # teeth on each side of the margin, rounded when drawn
    tooth_depth: float  # leaf lengths
    tooth_sharpness: float  # 0 round (crenate) to 1 saw-like (serrate)
    tip: float  # 0 round to 1 drawn out (acuminate)
    base: float  # 0 wedge-shaped to 1 round
    spots: float  # share of the grid cells with a pale spot
    variegation: float  # strength of the pale band along midrib and secondary veins, 0 to 1
    pale_margin: float  # strength and width of the pale rim, 0 to 1


# Range of each trait over all cultivars at full spread.
TRAIT_RANGES = {
    "vein_angle": (34.0, 66.0),
    "vein_count": (5.0, 11.0),
    "vein_forks": (-0.4, 2.4),
    "tooth_count": (7.0, 24.0),
    "tooth_depth": (0.004, 0.050),
    "tooth_sharpness": (0.0, 1.0),
    "tip": (0.0, 1.0),
    "base": (0.0, 1.0),
    "spots": (0.0, 0.85),
    "variegation": (0.0, 1.0),
    "pale_margin": (0.0, 1.0),
}


@dataclass(frozen=True)
class _Difficulty:
    trait_spread: float  # share of TRAIT_RANGES that the cultivars span
    trait_jitter: float  # std of a leaf's traits around its cultivar, share of TRAIT_RANGES
    rotation: float  # degrees, in both directions
    shift: float  # of the leaf's center, in both directions, in half image sides
    length: tuple[float, float]  # of the leaf, in half image sides
    bend: float  # strength of bending, curling, foreshortening and changes of width
    light: float  # strength of light, color and temperature changes
    damage: float  # expected number of brown patches, of holes and of bites


DIFFICULTIES = {
    "easy": _Difficulty(1.0, 0.015, 15.0, 0.04, (1.54, 1.70), 0.4, 0.4, 0.3),
    "medium": _Difficulty(0.6, 0.03, 60.0, 0.13, (1.25, 1.70), 1.0, 1.0, 1.0),
    "hard": _Difficulty(0.35, 0.03, 180.0, 0.18, (1.05, 1.70), 1.4, 1.3, 1.8),
}


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}.")


def _difficulty(name: str) -> _Difficulty:
    if name not in DIFFICULTIES:
        raise ValueError(f"`difficulty` must be one of {', '.join(DIFFICULTIES)}, got {name!r}.")
    return DIFFICULTIES[name]


def cultivar_traits(num_classes: int, seed: int = 0, difficulty: str = "easy") -> list[CultivarTraits]:
    """Return evenly spread traits for all cultivars: of many random Latin hypercubes, the one with the largest minimum distance.

    Each trait takes `num_classes` evenly spaced values, each once; `difficulty` scales their spread around the middle of
    `TRAIT_RANGES`.

    Raises:
        ValueError: if `num_classes` < 1, `seed` < 0, or `difficulty` is unknown.
    """
    _check_integer("num_classes", num_classes, 1)
    _check_integer("seed", seed, 0)
    spread = _difficulty(difficulty).trait_spread
    rng = np.random.default_rng(np.random.SeedSequence([seed, num_classes]))
    best, best_distance = None, -1.0
    trials = int(np.clip(2_000_000 // num_classes**2, 1, 500))
    for _ in range(trials):
        order = np.stack([rng.permutation(num_classes) for _ in TRAIT_RANGES], axis=1)
        distance = 0.0
        if trials > 1:
            squares = (order.astype(float) ** 2).sum(1)
            distances = squares[:, None] + squares[None] - 2.0 * order @ order.T
            distance = distances[~np.eye(num_classes, dtype=bool)].min(initial=np.inf)
        if distance > best_distance:
            best, best_distance = order, distance
    place = (best + 0.5) / num_classes - 0.5  # (num_classes, traits) in (-0.5, 0.5)
    low, high = np.array(list(TRAIT_RANGES.values())).T
    values = (low + high) / 2 + spread * place * (high - low)
    return [CultivarTraits(**dict(zip(TRAIT_RANGES, map(float, row), strict=True))) for row in values]


@dataclass(frozen=True)
class _Leaf:
    """Pixels around a leaf in the coordinates of the leaf; arrays are `(height, width)`, lengths are in leaf lengths."""

    u: np.ndarray  # along the midrib, 0 at the base, 1 at the tip
    v: np.ndarray  # across it
    reach: np.ndarray  # |v|
    side: np.ndarray  # sign of v
    across: np.ndarray  # |v| as a share of the half width: 0 on the midrib, 1 on the margin
    inside: np.ndarray  # distance to the toothed margin, positive on the blade
    half_width: np.ndarray  # (2048,) half width over u, without teeth
    length: np.float32  # of the leaf, in half image sides
    pixel: np.float32  # in half image sides
    box: tuple[int, int, int, int]  # left, top, right, bottom of these pixels
    size: int  # side of the whole image, in pixels


def _noise(
    rng: np.random.Generator, cells: int, size: int, box: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """Return smooth noise with about `cells` bumps per side, mean 0, std about 1: `(size, size)`, or the `box` of it."""
    left, top, right, bottom = box or (0, 0, size, size)
    grid = Image.fromarray(rng.standard_normal((cells + 1, cells + 1), dtype=np.float32))
    scale = (cells + 1) / size
    part = (left * scale, top * scale, right * scale, bottom * scale)
    return np.asarray(grid.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=part))


def _smoothstep(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - np.float32(low)) * np.float32(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def _line(distance: np.ndarray, width: np.ndarray | np.float32) -> np.ndarray:
    """Return a soft line: 1 at distance 0, decreasing over `width`; both in the same unit."""
    t = distance / width
    return np.exp(-t * t)


def _line_distance(phase: np.ndarray) -> np.ndarray:
    """Return the distance 0..0.5 to the nearest line, where lines are at `phase` = integer + 0.5."""
    return np.abs(phase - np.floor(phase) - np.float32(0.5))


def _mix(image: np.ndarray, color: np.ndarray, weight: np.ndarray) -> None:
    """Blend `image (3, H, W)` with `color (3,)` by `weight (H, W)`, in place."""
    for channel, value in zip(image, color, strict=True):
        channel += (np.float32(value) - channel) * weight


def _outline(traits: CultivarTraits, half_width: float, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tables `(2048,)` over u: half width with teeth, without teeth, and the cosine that converts steps in v to distances."""
    u = np.linspace(0, 1, 2048)
    smooth = u ** (1.0 - 0.58 * traits.base) * (1 - u) ** (0.50 + 0.75 * traits.tip)
    smooth *= half_width / smooth.max() * (1 + wave[0] * np.sin(2 * np.pi * (wave[1] * u + wave[2])))
    slope = np.gradient(smooth, u)
    arc = np.cumsum(np.sqrt(1 + np.clip(slope, -6, 6) ** 2))
    phase = (arc / arc[-1] * round(traits.tooth_count)) % 1.0
    peak = 0.5 + 0.42 * traits.tooth_sharpness
    saw = np.where(phase < peak, phase / peak, (1 - phase) / (1 - peak))
    tooth = (1 - traits.tooth_sharpness) * np.sin(np.pi * phase) + traits.tooth_sharpness * saw
    cosine = 1 / np.sqrt(1 + np.clip(slope, -4, 4) ** 2)
    room = np.minimum(1, np.minimum(u / 0.12, (1 - u) / 0.10))  # no teeth close to base and tip
    toothed = smooth + traits.tooth_depth * (tooth - 0.6) * room / np.maximum(cosine, 0.5)
    return toothed.astype(np.float32), smooth.astype(np.float32), cosine.astype(np.float32)


def _place(
    traits: CultivarTraits, level: _Difficulty, rng: np.random.Generator, size: int
) -> tuple[_Leaf, float, np.ndarray]:
    """Return the leaf in its pose, its bend (0..1), and its wave (strength, turns, phase)."""
    turn, shift_x, shift_y, bend, sway, squeeze = rng.uniform(-1, 1, 6)
    length = rng.uniform(*level.length)
    half_width = 0.33 + 0.04 * level.bend * rng.uniform(-1, 1)
    wave = rng.uniform([0, 0.8, 0], [0.035 * level.bend, 3.0, 1])
    angle = np.radians(turn * level.rotation)
    center_x, center_y = shift_x * level.shift, shift_y * level.shift - 0.05

    # Box of all pixels that leaf and petiole can cover, with even borders, because pixels are averaged in pairs.
    widest = half_width / (1 - 0.16 * level.bend * abs(squeeze)) + 0.10
    corners_u, corners_v = np.array([-0.74, -0.74, 0.5, 0.5]), np.array([-widest, widest, widest, -widest])
    corners_x = center_x + length * (corners_u * np.sin(angle) + corners_v * np.cos(angle))
    corners_y = center_y + length * (corners_v * np.sin(angle) - corners_u * np.cos(angle))
    edges = [corners_x.min(), corners_y.min(), corners_x.max(), corners_y.max()]
    left, top, right, bottom = (int(np.clip((edge + 1) * size / 4, 0, size // 2)) * 2 for edge in edges)
    right, bottom = min(right + 2, size), min(bottom + 2, size)

    pixel = np.float32(2 / size)
    ramp = (np.arange(size, dtype=np.float32) + 0.5) * pixel - 1
    x = ramp[None, left:right] - np.float32(center_x)
    y = ramp[top:bottom, None] - np.float32(center_y)
    cos, sin = np.float32(np.cos(angle) / length), np.float32(np.sin(angle) / length)
    u = sin * x - cos * y + np.float32(0.5)
    v = cos * x + sin * y
    along = u - np.float32(0.5)
    v -= along * along * (np.float32(0.16 * bend * level.bend) + np.float32(0.10 * sway * level.bend) * along)
    side = np.sign(v)
    v *= 1 + np.float32(0.16 * squeeze * level.bend) * np.tanh(v * 30)  # one half is foreshortened
    reach = np.abs(v)

    toothed, smooth, cosine = _outline(traits, half_width, wave)
    index = np.clip(u * np.float32(2047), 0, 2047).astype(np.int32)
    inside = (toothed[index] - reach) * cosine[index]
    inside = np.where((u > 0) & (u < 1), inside, np.float32(-1))
    across = reach / np.maximum(smooth[index], np.float32(1e-3))
    box = (left, top, right, bottom)
    leaf = _Leaf(u, v, reach, side, across, inside, smooth, np.float32(length), pixel, box, size)
    return leaf, abs(squeeze), wave


def _venation(
    traits: CultivarTraits, leaf: _Leaf, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return midrib, secondary and tertiary veins, the pale zone along the veins, and the bulge between them, each 0..1."""
    u, reach, across, length, pixel = leaf.u, leaf.reach, leaf.across, leaf.length, leaf.pixel
    angle = np.radians(traits.vein_angle)
    splay = np.float32(0.40) + np.float32(0.60) * _smoothstep(u, 0.0, 0.55)  # veins spread wider near the base
    start = u - reach * (
        splay * np.float32(1 / np.tan(angle)) + np.float32(0.55) * reach
    )  # position where the vein leaves the midrib
    count = np.float32(traits.vein_count)
    phase = start * count + np.float32(0.22) * leaf.side  # the veins of the two sides are offset
    number = np.floor(phase)
    gap = phase - number - np.float32(0.5)  # 0 on a vein, -0.5 and 0.5 halfway to its neighbours
    distance = np.abs(gap)
    for fork_at, way in ((0.42, 0.95), (0.66, -0.95))[: round(traits.vein_forks)]:
        branch = _line_distance(phase + np.float32(way) * (across - np.float32(fork_at)))
        distance = np.where(across > fork_at, np.minimum(distance, branch), distance)
    unit = length * np.float32(np.sin(angle)) / count  # from gaps to half image sides
    taper = np.maximum(np.float32(0.0090) - np.float32(0.0054) * across, np.float32(0.8) * pixel)
    secondary = _line(distance * unit, taper) * ((start > 0.01) & (start < 0.93)) * _smoothstep(-across, -1.02, -0.85)
    midrib = _line(reach * length, np.maximum(np.float32(0.020) - np.float32(0.015) * u, pixel))
    offsets = rng.uniform(size=64).astype(np.float32)[(number * 2 + leaf.side).astype(np.int32) & 63]
    rungs = _line_distance(reach * np.float32(17) + offsets + np.float32(0.9) * gap * gap)
    tertiary = _line(rungs * (length / np.float32(17)), np.maximum(np.float32(0.0055), np.float32(0.7) * pixel))
    zone = np.exp(np.float32(-24) * distance * distance) * _smoothstep(-across, -0.98, -0.55) * (start > 0)
    zone = np.maximum(zone, _line(reach, np.float32(0.045)))
    return midrib, secondary, tertiary, zone, (1 - 4 * gap * gap) * (1 - secondary)


def _spots(traits: CultivarTraits, leaf: _Leaf, rng: np.random.Generator) -> np.ndarray:
    """Return pale spots (0..1), at most one per cell of a grid on the leaf."""
    cells, table = np.float32(15), rng.uniform(size=(4, 1024)).astype(np.float32)
    cell_u, cell_v = np.floor(leaf.u * cells), np.floor(leaf.v * cells)
    cell = (cell_u * 31 + cell_v * 7 + 512).astype(np.int32) & 1023
    du = leaf.u * cells - cell_u - (np.float32(0.3) + np.float32(0.4) * table[0])[cell]
    dv = leaf.v * cells - cell_v - (np.float32(0.3) + np.float32(0.4) * table[1])[cell]
    radius = (np.float32(0.15) + np.float32(0.13) * table[2])[cell]
    spot = _smoothstep(radius - np.sqrt(du * du + dv * dv), -0.04, 0.06)
    return spot * ((table[3] < traits.spots)[cell] & (leaf.across < 0.93))


def _damage(leaf: _Leaf, blade: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Draw brown patches on `blade (3, H, W)`, and return `inside` without holes and bites."""
    ragged = _noise(rng, 7, leaf.size, leaf.box)
    patches, holes, bites = np.minimum(rng.poisson(amount, 3), 4)
    places = rng.uniform(size=(3, 4, 3))
    inside = leaf.inside

    def distance(u: float, v: float) -> np.ndarray:
        return np.sqrt((leaf.u - np.float32(u)) ** 2 + (leaf.v - np.float32(v)) ** 2)

    for u, v, width in places[0, :patches]:
        away = (
            distance(0.15 + 0.75 * u, 0.6 * (v - 0.5)) + np.float32(0.018) * ragged - np.float32(0.02 + 0.05 * width)
        )
        _mix(blade, np.array([0.68, 0.62, 0.24]), 0.7 * _smoothstep(-away, -0.02, 0.01))
        _mix(blade, np.array([0.40, 0.27, 0.14]) * (0.8 + 0.4 * width), _smoothstep(-away, 0.0, 0.018))
    for u, v, width in places[1, :holes]:
        away = (
            distance(0.15 + 0.7 * u, 0.5 * (v - 0.5)) + np.float32(0.008) * ragged - np.float32(0.012 + 0.025 * width)
        )
        _mix(blade, np.array([0.45, 0.33, 0.16]), 0.7 * _smoothstep(-away, -0.02, -0.005))
        inside = np.minimum(inside, away)
    for u, v, width in places[2, :bites]:
        edge = np.copysign(1.05, v - 0.5) * leaf.half_width[int((0.2 + 0.7 * u) * 2047)]
        away = distance(0.2 + 0.7 * u, edge) + np.float32(0.005) * ragged - np.float32(0.03 + 0.06 * width)
        inside = np.minimum(inside, away)
    return inside


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw paper, soil or cloth, `(3, size, size)`, about 0..1."""
    kind, tone, tint, angle, thread = rng.uniform(size=5)
    coarse, medium, fine = _noise(rng, 5, size), _noise(rng, 22, size), _noise(rng, 70, size)
    if kind < 0.4:  # paper
        color = np.array([0.90, 0.885, 0.85]) * (0.78 + 0.24 * tone) + np.array([0.02, 0.0, -0.03]) * tint
        texture = 0.012 * coarse + 0.008 * medium + 0.010 * fine
    elif kind < 0.7:  # soil
        color = np.array([0.38, 0.285, 0.205]) * (0.62 + 0.75 * tone) + np.array([0.03, 0.0, -0.02]) * tint
        texture = 0.022 * coarse + 0.040 * medium + 0.050 * fine - 0.10 * (medium * fine > 1.1)
    else:  # cloth: two crossing sets of threads
        colors = np.array([[0.50, 0.53, 0.60], [0.66, 0.61, 0.53], [0.36, 0.40, 0.45]])
        color = colors[int(tint * 2.999)] * (0.75 + 0.4 * tone)
        ramp = np.arange(size, dtype=np.float32) * np.float32(2 * np.pi * (26 + 16 * thread) / size)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        warp = np.sin(cos * ramp[None] + sin * ramp[:, None])
        weft = np.sin(cos * ramp[:, None] - sin * ramp[None])
        texture = 0.030 * warp * weft + 0.014 * (warp + weft) + 0.022 * coarse + 0.012 * fine
    gains = np.float32([1.0, 0.95, 0.88])
    return np.float32(color)[:, None, None] + gains[:, None, None] * texture.astype(np.float32)


def _halve(image: np.ndarray) -> np.ndarray:
    """Average each 2 x 2 pixels, `(..., 2H, 2W)` to `(..., H, W)`."""
    rows = image[..., 0::2, :] + image[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]) * np.float32(0.25)


def draw_leaf(
    traits: CultivarTraits, rng: np.random.Generator, image_size: int = 112, difficulty: str = "easy"
) -> Image.Image:
    """Draw one photo of one leaf: RGB, `image_size` x `image_size` pixels.

    Everything except the traits is drawn from `rng`, and the number of draws does not depend on the traits: two cultivars drawn
    from equal generators share pose, light, background and damage.

    Raises:
        ValueError: if `image_size` < 16, or `difficulty` is unknown.
    """
    _check_integer("image_size", image_size, 16)
    level = _difficulty(difficulty)
    image_size = int(image_size)

    jitter = np.clip(rng.standard_normal(len(TRAIT_RANGES)), -2, 2) * level.trait_jitter
    own = {}
    for (name, (low, high)), shift in zip(TRAIT_RANGES.items(), jitter, strict=True):
        own[name] = min(max(getattr(traits, name) + shift * (high - low), low), high)
    traits = CultivarTraits(**own)
    azimuth, elevation, intensity, warmth, fill, fold, cup = rng.uniform(-1, 1, 7)
    vignette, age, blue, dark, gloss, stem_bend = rng.uniform(size=6)
    stem_length, stem_width = rng.uniform([0.12, 0.010], [0.22, 0.015])
    shadow_reach, shadow_blur, shadow_depth = rng.uniform([0.02, 0.012, 0.30], [0.07, 0.035, 0.60])

    # Draw the leaf at twice the size, in its box only, and average it; draw the background at the final size.
    leaf, curl, wave = _place(traits, level, rng, 2 * image_size)
    u, v, length, pixel = leaf.u, leaf.v, leaf.length, leaf.pixel
    midrib, secondary, tertiary, zone, bulge = _venation(traits, leaf, rng)
    blotch, mottle, grain = (_noise(rng, cells, leaf.size, leaf.box) for cells in (4, 14, 60))

    # Relief and lighting.
    relief = np.float32(0.024) * bulge - np.float32(0.012) * secondary - np.float32(0.030) * midrib
    relief += np.float32(0.006) * mottle - np.float32(0.004) * tertiary
    relief -= leaf.reach * (length * np.float32(0.25 + 0.25 * fold * level.bend))
    relief -= leaf.reach * leaf.reach * (length * np.float32(0.6 * cup * level.bend))
    ripple = np.sin(np.float32(2 * np.pi) * (u * np.float32(2.3) + np.float32(wave[2])))
    relief += ripple * (leaf.across * leaf.across * np.float32(0.03 * (wave[0] / 0.035 + curl * level.bend)))
    slope_y, slope_x = np.gradient(relief, pixel)
    slant = np.radians(52 + 14 * elevation)
    light_x, light_y = np.cos(np.pi * azimuth) * np.cos(slant), np.sin(np.pi * azimuth) * np.cos(slant)
    light_x, light_y, light_z = np.array([light_x, light_y, np.sin(slant)], np.float32)
    steep = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    facing = light_x * slope_x + light_y * slope_y
    lambert = np.maximum((light_z - facing) * steep, 0)
    ambient = np.float32(0.42 + 0.10 * fill)
    shade = ambient + (1 - ambient) * lambert / np.float32(np.sin(np.radians(52)))
    shine = np.maximum((light_z + 1 - facing) * steep / np.sqrt(2 + 2 * light_z), 0)
    for _ in range(4):
        shine = shine * shine

    # Color: blade, pale zones, veins, spots, rim.
    mixed = 0.5 + (age - 0.5) * level.light
    green = np.array([0.36, 0.52, 0.17]) * (1 - mixed) + np.array([0.15, 0.335, 0.12]) * mixed
    green = green * (1 - 0.18 * dark * level.light) + np.array([-0.02, 0.0, 0.05]) * blue * level.light
    pale = green * 0.35 + np.array([0.52, 0.56, 0.34])
    blade = np.empty((3, *u.shape), np.float32)
    blade[:] = np.float32(green)[:, None, None]
    _mix(
        blade,
        green * 1.35 + np.array([0.05, 0.03, 0.0]),
        np.clip(np.float32(0.16) + np.float32(0.15) * blotch, 0, 0.5),
    )
    zone *= np.float32(0.85) + np.float32(0.2) * mottle
    _mix(blade, green * 0.3 + np.array([0.60, 0.62, 0.42]), np.clip(np.float32(traits.variegation) * zone, 0, 0.9))
    rim = leaf.across - np.float32(1.04 - 0.40 * traits.pale_margin) - np.float32(0.035) * mottle
    rim = _smoothstep(rim, -0.04, 0.04) * np.float32(0.85 * min(1.0, 3 * traits.pale_margin))
    _mix(blade, green * 0.25 + np.array([0.67, 0.67, 0.46]), rim)
    _mix(blade, pale * 0.92, np.float32(0.55) * secondary + np.float32(0.12) * tertiary)
    _mix(blade, pale, np.float32(0.80) * midrib)
    _mix(blade, np.array([0.86, 0.85, 0.56]), np.float32(0.85) * _spots(traits, leaf, rng))
    inside = _damage(leaf, blade, level.damage, rng)
    blade *= shade * (1 + np.float32(0.05) * mottle + np.float32(0.04) * grain)
    blade += np.float32(0.05 + 0.16 * gloss) * shine

    # Petiole.
    soft = length / pixel
    alpha = np.clip(inside * soft + np.float32(0.5), 0, 1)
    back = np.minimum(u, 0)
    off = np.abs(v - np.float32(1.6 * stem_bend - 0.8) * back * back) - np.float32(stem_width) * (1 - u)
    stem = np.clip(np.float32(0.5) - off * soft, 0, 1) * ((u < 0.04) & (u > -np.float32(stem_length))) * (1 - alpha)
    roundness = np.float32(0.45) + np.float32(0.55) * np.clip(1 - (off / np.float32(stem_width) + 1) ** 2, 0, 1)
    blade *= alpha
    blade += np.float32(pale * 0.75)[:, None, None] * (roundness * stem)
    blade, alpha = _halve(blade), _halve(alpha + stem)

    # Shadow and background.
    image = _background(rng, image_size)
    left, top, right, bottom = (edge // 2 for edge in leaf.box)
    cover = Image.new("L", (image_size, image_size))
    cover.paste(Image.fromarray((np.clip(alpha, 0, 1) * 255).astype(np.uint8)), (left, top))
    cover = cover.filter(ImageFilter.GaussianBlur(float(shadow_blur * image_size / 2 + 0.3)))
    step = shadow_reach * image_size * 0.8 / np.sin(slant)
    move = (1, 0, float(light_x * step), 0, 1, float(light_y * step))
    cover = cover.transform(cover.size, Image.Transform.AFFINE, move, Image.Resampling.BILINEAR)
    image *= 1 - np.float32(shadow_depth / 255) * np.asarray(cover, dtype=np.float32)
    around = image[:, top:bottom, left:right]
    around *= 1 - alpha
    around += blade

    # Camera: exposure and its gradient, vignette, white balance, sensor noise.
    ramp = (np.arange(image_size, dtype=np.float32) + 0.5) * np.float32(2 / image_size) - 1
    lit = 1 + np.float32(0.16 * level.light) * (light_x * ramp[None] + light_y * ramp[:, None])
    lit *= 1 - np.float32(0.16 * vignette * level.light) * (ramp[None] ** 2 + ramp[:, None] ** 2)
    image *= lit * np.float32(1 + 0.22 * intensity * level.light)
    image *= np.float32(1 + np.array([0.09, 0.0, -0.11]) * warmth * level.light)[:, None, None]
    image += np.float32(0.010) * rng.standard_normal((image_size, image_size), dtype=np.float32)
    return Image.fromarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


@dataclass
class SyntheticLeavesConfig(datasets.BuilderConfig):
    """Checked arguments of `synthetic_leaves`."""

    num_classes: int = 10
    train_images: int = 80  # per class; a split of 0 images is absent
    validation_images: int = 20
    test_images: int = 20
    image_size: int = 112  # pixels
    seed: int = 0
    difficulty: str = "easy"
    version: datasets.Version | str | None = DRAWING_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("num_classes", self.num_classes, 1)
        for split in SPLITS:
            _check_integer(f"{split}_images", getattr(self, f"{split}_images"), 0)
        if not any(self.images_per_class):
            raise ValueError("`images_per_class` must leave at least one split with images, got 0 for every split.")
        _check_integer("image_size", self.image_size, 16)
        _check_integer("seed", self.seed, 0)
        _difficulty(self.difficulty)

    @property
    def images_per_class(self) -> tuple[int, int, int]:
        """Images per class in train, validation and test."""
        return self.train_images, self.validation_images, self.test_images

    @property
    def class_names(self) -> list[str]:
        """`cultivar_00`, `cultivar_01`, ..."""
        width = max(2, len(str(self.num_classes - 1)))
        return [f"cultivar_{label:0{width}d}" for label in range(self.num_classes)]

    def draw(self, split: str, label: int, index: int) -> Image.Image:
        """Draw image `index` of class `label` in `split`: a pure function of these and of the config."""
        key = [
            self.seed,
            self.num_classes,
            list(DIFFICULTIES).index(self.difficulty),
            SPLITS.index(split),
            label,
            index,
        ]
        traits = _traits(self.num_classes, self.seed, self.difficulty)[label]
        return draw_leaf(traits, np.random.default_rng(np.random.SeedSequence(key)), self.image_size, self.difficulty)

    def examples(self, split: str) -> Iterator[tuple[str, int, bytes]]:
        """Yield `(class/file.png, label, PNG bytes)` of every image in `split`, class by class."""
        for label, name in enumerate(self.class_names):
            for index in range(getattr(self, f"{split}_images")):
                stream = io.BytesIO()
                self.draw(split, label, index).save(stream, format="PNG")
                yield f"{name}/{index:05d}.png", label, stream.getvalue()


@lru_cache(maxsize=16)
def _traits(num_classes: int, seed: int, difficulty: str) -> list[CultivarTraits]:
    return cultivar_traits(num_classes, seed, difficulty)


class SyntheticLeaves(datasets.GeneratorBasedBuilder):
    """Builder of the data set: `SyntheticLeaves(num_classes=10, ...)`, then `download_and_prepare()`; nothing is downloaded.

    The cache key contains the arguments, `DRAWING_VERSION` and a hash of this file, so that changes of the drawing code invalidate
    the cache.
    """

    BUILDER_CONFIG_CLASS = SyntheticLeavesConfig
    config: SyntheticLeavesConfig

    def __init__(self, *args: Any, hash: str | None = None, **kwargs: Any) -> None:
        file_hash = hashlib.sha256(DRAWING_VERSION.encode() + Path(__file__).read_bytes()).hexdigest()[:16]
        super().__init__(*args, hash=hash or file_hash, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        label = datasets.ClassLabel(names=self.config.class_names)
        features = datasets.Features({"image": datasets.Image(mode="RGB"), "label": label})
        return datasets.DatasetInfo(description="Leaves of synthetic cultivars.", features=features, license="MIT")

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        counts = zip(SPLITS, self.config.images_per_class, strict=True)
        return [datasets.SplitGenerator(name=split, gen_kwargs={"split": split}) for split, count in counts if count]

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for path, label, png in self.config.examples(split):
            yield path, {"image": {"bytes": png, "path": f"{split}/{path}"}, "label": label}


def _arguments(
    num_classes: int, images_per_class: int | Sequence[int], image_size: int, seed: int, difficulty: str
) -> dict[str, Any]:
    """Return the checked keyword arguments of `SyntheticLeavesConfig`."""
    counts = (images_per_class,) * 3 if isinstance(images_per_class, int | np.integer) else tuple(images_per_class)
    if len(counts) != 3:
        raise ValueError(
            f"`images_per_class` must be one number or three (train, validation, test), got {images_per_class!r}."
        )
    for count in counts:
        _check_integer("images_per_class", count, 0)
    images = {f"{split}_images": int(count) for split, count in zip(SPLITS, counts, strict=True)}
    sizes = {"num_classes": num_classes, "image_size": image_size, "seed": seed}
    SyntheticLeavesConfig(**sizes, **images, difficulty=difficulty)
    return {**{name: int(value) for name, value in sizes.items()}, **images, "difficulty": difficulty}


def synthetic_leaves(
    num_classes: int = 10,
    images_per_class: int | Sequence[int] = (80, 20, 20),
    image_size: int = 112,
    seed: int = 0,
    difficulty: str = "easy",
    cache_dir: str | Path | None = None,
) -> datasets.DatasetDict:
    """Draw the data set, or load it from the cache of `datasets`.

    Args:
        num_classes: number of cultivars, at least 1.
        images_per_class: images per class in (train, validation, test), or one number for all three. A split of 0 images is
            absent.
        image_size: side of the square images in pixels, at least 16.
        seed: seed of traits and photos, at least 0.
        difficulty: "easy", "medium" or "hard": the distance of the traits and the variation of everything else.
        cache_dir: folder for the drawn images; by default the cache of `datasets`.

    Returns:
        Splits train, validation and test with columns `image` (`datasets.Image`, stored as PNG) and `label`
        (`datasets.ClassLabel` with names `cultivar_00`, ...).

    Raises:
        ValueError: if an argument is out of range.
    """
    arguments = _arguments(num_classes, images_per_class, image_size, seed, difficulty)
    builder = SyntheticLeaves(cache_dir=None if cache_dir is None else str(cache_dir), **arguments)
    builder.download_and_prepare()
    return cast("datasets.DatasetDict", builder.as_dataset())  # of all splits


def contact_sheet(
    split: datasets.Dataset | None = None, rows: int | None = None, columns: int = 8, **arguments: Any
) -> Image.Image:
    """Draw a table of images, with one labeled row per class.

    Args:
        split: a split with columns `image` and `label`; without it, test photos of `synthetic_leaves(**arguments)` are drawn.
        rows: number of classes, from the first one; by default all.
        columns: images per class. If a class has fewer, the rest of its row is white.
        arguments: `num_classes`, `image_size`, `seed`, `difficulty` of `synthetic_leaves`, only without `split`.

    Raises:
        ValueError: if `rows` or `columns` is below 1, or `split` is empty.
        TypeError: if `arguments` are given together with `split`, or one is unknown.
    """
    _check_integer("columns", columns, 1)
    if rows is not None:
        _check_integer("rows", rows, 1)
    if split is None:
        config = SyntheticLeavesConfig(test_images=columns, **arguments)
        names, side = config.class_names[:rows], config.image_size
        table = [[config.draw("test", label, index) for index in range(columns)] for label in range(len(names))]
    elif arguments:
        raise TypeError(f"contact_sheet() does not accept {', '.join(sorted(arguments))} together with `split`.")
    else:
        if not len(split):
            raise ValueError("`split` must have at least one image, got none.")
        names = split.features["label"].names[:rows]
        members: list[list[int]] = [[] for _ in names]
        for index, label in enumerate(split["label"]):
            if label < len(names) and len(members[label]) < columns:
                members[label].append(index)
        table = [[split[index]["image"] for index in indices] for indices in members]
        side = max((max(image.size) for row in table for image in row), default=1)
    draw_text = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox
    margin = max(draw_text((0, 0), name)[2] for name in names) + 12
    sheet = Image.new("RGB", (margin + columns * (side + 2), len(names) * (side + 2)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(zip(names, table, strict=True)):
        pen.text((6, row * (side + 2) + side // 2 - 5), name, fill="black")
        for column, image in enumerate(images):
            sheet.paste(image, (margin + column * (side + 2), row * (side + 2)))
    return sheet


def write_image_folder(output: str | Path, **arguments: Any) -> Path:
    """Write split/class/00000.png to the folder `output`, which appears when it is complete.

    Args:
        output: a folder that does not exist or is empty.
        arguments: those of `synthetic_leaves`, all optional, without `cache_dir`.

    Raises:
        ValueError: if an argument is out of range.
        FileExistsError: if `output` exists and is not an empty folder.
    """
    defaults = {
        "num_classes": 10,
        "images_per_class": (80, 20, 20),
        "image_size": 112,
        "seed": 0,
        "difficulty": "easy",
    }
    config = SyntheticLeavesConfig(**_arguments(**{**defaults, **arguments}))
    output = Path(output).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"`output` {output} already exists and is not an empty folder. Choose another folder or remove it."
        )
    with temporary_path(output, folder=True) as scratch:
        folder = scratch / output.name
        total = config.num_classes * sum(config.images_per_class)
        with tqdm(total=total, desc="Drawing leaves", unit="image") as progress:
            for split, count in zip(SPLITS, config.images_per_class, strict=True):
                for name in config.class_names if count else ():
                    (folder / split / name).mkdir(parents=True)
                for path, _, png in config.examples(split):
                    (folder / split / path).write_bytes(png)
                    progress.update()
        os.replace(folder, output)
    return output
