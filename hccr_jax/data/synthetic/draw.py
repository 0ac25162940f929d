"""Simulated handwriting: a writer's hand draws level-1 characters from stroke medians.

The steps of `draw`, in their order: the writer's warp of the whole character, shifts of components
(groups of strokes that are apart), shifts and bends of single strokes, links between strokes,
rounding of corners, a pen whose width follows the pressure, ink with grain. Lengths are in units of
the character's box (side 1, y downwards) until `_to_pixels`.
"""

import dataclasses
import functools
import math

import numpy as np

from hccr_jax.data.casia import charset
from hccr_jax.data.synthetic import medians
from hccr_jax.data.synthetic.writer import WARP_SPREAD, Writer
from hccr_jax.errors import InputError

MIN_PX = (18, 6)  # width and height of the smallest bitmaps of CASIA-HWDB1.1
MAX_PX = (119, 152)  # and of the largest

STROKE_POINTS = 16
PATH_POINTS = STROKE_POINTS + 2  # a stroke, then two points on the path to the next stroke
GRAIN_PX = 512
EDGE_COVER = 0.35  # bitmaps are cropped to pixels of at least this coverage

_TIME = np.linspace(0, 1, STROKE_POINTS, dtype=np.float32)
_BOW = 4 * _TIME * (1 - _TIME)
_TO_END = (_TIME**2)[:, None]
_TO_START = ((1 - _TIME) ** 2)[:, None]


@dataclasses.dataclass(frozen=True)
class _Glyph:
    """A character of S strokes ready for `draw`; the axis of two is: with hooks, without."""

    features: np.ndarray  # float32 (2, S, STROKE_POINTS, features)
    cut_chance: np.ndarray  # float64 (S,), probability that a component begins with this stroke
    directions: np.ndarray  # float32 (S, 5), similarity of a stroke to each of five directions


@functools.lru_cache(maxsize=4096)
def _glyph(character: str) -> _Glyph:
    index = charset.class_index().get(character)
    if index is None:
        raise InputError(f"character {character!r}: not one of the 3,755 of GB2312 level 1")
    strokes = medians.class_strokes(index)
    points = np.array([[_resample(stroke), _resample(_without_hook(stroke))] for stroke in strokes])
    points = points.swapaxes(0, 1)
    low, high = points[0].min(axis=1), points[0].max(axis=1)
    low_before, high_before = np.minimum.accumulate(low), np.maximum.accumulate(high)
    low_after, high_after = np.minimum.accumulate(low[::-1]), np.maximum.accumulate(high[::-1])
    gaps = (low_after[-2::-1] - high_before[:-1], low_before[:-1] - high_after[-2::-1])
    cut_chance = np.zeros(len(strokes))
    cut_chance[1:] = 0.08 + 0.85 / (1 + np.exp(-(np.max(gaps, axis=(0, 2)) + 0.03) / 0.03))
    chord = points[1, :, -1] - points[1, :, 0]
    angle = np.arctan2(chord[:, 1], chord[:, 0])[:, None]
    # Up to the right, right, down to the right, down, down to the left.
    directions = np.exp(4 * (np.cos(angle - math.pi / 4 * np.arange(-1, 4)) - 1))
    return _Glyph(warp_features(points), cut_chance, directions.astype(np.float32))


def _resample(stroke: np.ndarray) -> np.ndarray:
    """Returns STROKE_POINTS points at equal distances along a polyline."""
    step = stroke[1:] - stroke[:-1]
    along = np.zeros(len(stroke))
    np.cumsum(np.hypot(step[:, 0], step[:, 1]), out=along[1:])
    at = along[-1] * _TIME
    return np.stack([np.interp(at, along, axis) for axis in stroke.T], axis=1)


def _without_hook(stroke: np.ndarray) -> np.ndarray:
    """Cuts a stroke at its last sharp turn if only a short part follows."""
    steps = (stroke[1:] - stroke[:-1]).tolist()
    lengths = [math.hypot(*step) for step in steps]
    for i in range(len(steps) - 1, 0, -1):
        if sum(lengths[i:]) > min(0.2, 0.3 * sum(lengths)):
            break
        if np.dot(steps[i], steps[i - 1]) < 0.3 * lengths[i] * lengths[i - 1]:
            return stroke[: i + 1]
    return stroke


def warp_features(points: np.ndarray) -> np.ndarray:
    """Returns float32 (..., 15) terms of the points (..., 2), those of `WARP_SPREAD`."""
    x, y = points[..., 0], points[..., 1]
    (sin_x, cos_x), (sin_y, cos_y) = ((np.sin(math.pi * v), np.cos(math.pi * v)) for v in (x, y))
    terms = [x, y, x * y, x * x, y * y, sin_x * cos_y, cos_x * sin_y, sin_x, cos_x, sin_y, cos_y]
    terms += [wave(2 * math.pi * v) for v in (x, y) for wave in (np.sin, np.cos)]
    return np.stack(terms, axis=-1).astype(np.float32)


def draw(character: str, writer: Writer, rng: np.random.Generator) -> np.ndarray:
    """Returns one instance of a character in a writer's hand.

    Args:
      character: one of `charset.level1()`.
      writer: the hand.
      rng: makes every instance different; the same state gives the same bitmap.

    Returns:
      uint8 (H, W), cropped to the ink, 18 to 119 wide and 6 to 152 high; 255 is paper.

    Raises:
      InputError: the character is not of level 1.

    >>> from hccr_jax.data.synthetic.writer import create_writer
    >>> bitmap = draw("永", create_writer(0), np.random.default_rng(0))
    >>> bitmap.dtype, int(bitmap.max()), bool(bitmap.min() < 150)
    (dtype('uint8'), 255, True)
    """
    glyph = _glyph(character)
    strokes = _shift(_warp(glyph, writer, rng), glyph, writer, rng)
    path, drawn = _connect(strokes, writer, rng)
    radius = _pressure(len(strokes), writer, rng)
    # Writers give more room to characters of more strokes.
    size = len(strokes) ** 0.12 * math.exp(writer.size_spread * rng.standard_normal())
    path = _to_pixels(path, size * writer.size_px, writer.pen_px)
    return _ink(_cover(path, radius, drawn, writer), writer, rng)


def _warp(glyph: _Glyph, writer: Writer, rng: np.random.Generator) -> np.ndarray:
    """Returns the strokes, float32 (S, STROKE_POINTS, 2), after the bend of the whole character."""
    count = len(glyph.cut_chance)
    noise = rng.standard_normal(writer.warp.shape, np.float32)
    warp = writer.warp + WARP_SPREAD * np.float32(writer.warp_spread) * noise
    hookless = (rng.random(count) > writer.hook).astype(np.intp)
    return glyph.features[hookless, np.arange(count)] @ warp


def _shift(
    strokes: np.ndarray, glyph: _Glyph, writer: Writer, rng: np.random.Generator
) -> np.ndarray:
    """Moves, stretches and turns components and single strokes, and bows the strokes."""
    count = len(strokes)
    begins = rng.random(count) < glyph.cut_chance
    begins[0] = True
    component = np.cumsum(begins) - 1
    first = np.flatnonzero(begins)
    noise = rng.standard_normal((len(first) + count, 6), np.float32)
    large = (np.float32(writer.component_spread) * noise)[component]
    small = noise[len(first) :]
    centre = strokes.mean(axis=1)
    middle = np.add.reduceat(centre, first)[component]
    middle /= np.bincount(component)[component, None]

    habit = glyph.directions @ writer.direction_habit
    grow = np.exp(2 * large[:, 2:4])
    stretch = np.exp(np.float32(writer.stretch_spread) * small[:, 2:4] + habit[:, :1])
    turn = large[:, 4] + np.float32(writer.turn_spread) * small[:, 4] + habit[:, 1]
    matrix = np.empty((count, 2, 2), np.float32)
    matrix[:, 0, 0], matrix[:, 1, 1] = stretch.T
    matrix[:, 0, 1], matrix[:, 1, 0] = turn, -turn
    moved = (strokes - centre[:, None]) @ (matrix * grow[:, None])
    bow = np.float32(writer.bow) + np.float32(writer.bow_spread) * small[:, 5]
    across = (moved[:, -1] - moved[:, 0]) * bow[:, None]
    moved[..., 0] -= across[:, 1:] * _BOW
    moved[..., 1] += across[:, :1] * _BOW
    target = middle + (centre - middle) * grow + large[:, :2]
    return moved + (target + np.float32(writer.stroke_spread) * small[:, :2])[:, None]


def _connect(
    strokes: np.ndarray, writer: Writer, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Links strokes and rounds corners.

    Returns:
      path: float32 (S * PATH_POINTS, 2), the path of the pen, including in the air.
      drawn: bool (S * PATH_POINTS,), whether the pen is down from a point to the next.
    """
    count = len(strokes)
    chance = rng.random((3, count), np.float32)
    gap = np.zeros((count, 2), np.float32)
    np.subtract(strokes[1:, 0], strokes[:-1, -1], out=gap[:-1])
    joined = chance[0] < writer.joining * np.exp(np.hypot(*gap.T) / np.float32(-writer.reach))
    joined[-1] = False
    pull = gap * (joined * chance[2] * np.float32(writer.pull))[:, None]
    strokes += pull[:, None] * _TO_END
    strokes[1:] -= pull[:-1, None] * _TO_START
    strokes += np.float32(writer.tremor) * rng.standard_normal(strokes.shape, np.float32)

    np.subtract(strokes[1:, 0], strokes[:-1, -1], out=gap[:-1])
    path = np.empty((count, PATH_POINTS, 2), np.float32)
    path[:, :STROKE_POINTS] = strokes
    path[:, -2] = path[:, -3] + np.where(joined, 0.33, 0.05 + 0.15 * chance[2])[:, None] * gap
    path[:, -1] = path[:, -3] + np.float32(0.67) * gap
    drawn = np.ones((count, PATH_POINTS), bool)
    drawn[:, -3] = joined | (chance[1] < writer.flick)
    drawn[:, -2:] = joined[:, None]
    way, down = path.reshape(-1, 2), drawn.reshape(-1)
    rounding = (down[1:-1] & down[:-2])[:, None] * np.float32(0.5 * writer.roundness)
    for _ in range(2):
        way[1:-1] += rounding * ((way[:-2] + way[2:]) * np.float32(0.5) - way[1:-1])
    return way, down


def _pressure(count: int, writer: Writer, rng: np.random.Generator) -> np.ndarray:
    """Returns half the line's width in pixels along the path, float32 (S * PATH_POINTS,)."""
    noise = np.float32(writer.pressure) * rng.standard_normal((count, 3), np.float32)
    factor = np.full((count, PATH_POINTS), 0.6 - 0.3 * writer.taper, np.float32)
    curves = np.stack([np.ones_like(_TIME), 2 * _TIME - 1, _BOW])
    factor[:, :STROKE_POINTS] = noise @ curves + (1 - np.float32(writer.taper) * _TIME**3)
    return np.clip(factor.reshape(-1), 0.35, 1.6) * np.float32(writer.pen_px)


def _to_pixels(path: np.ndarray, size_px: float, pen_px: float) -> np.ndarray:
    """Scales a path so that its ink fits the limits of CASIA's bitmaps; it begins at (0, 0)."""
    low = path.min(axis=0)
    extent = np.maximum(path.max(axis=0) - low, 1e-3)
    target = np.clip(extent * size_px, MIN_PX, np.subtract(MAX_PX, 4 * pen_px + 2))
    return ((path - low) * (target / extent)).astype(np.float32)


def _cover(path: np.ndarray, radius: np.ndarray, drawn: np.ndarray, writer: Writer) -> np.ndarray:
    """Returns the coverage of each pixel by the pen, float32 (H, W) from 0 to 1, cropped.

    A sum of Gaussians of spread s along a line, with weights exp(r² / 2s²), is exp((r² - d²) / 2s²)
    at the distance d from it. So the logarithm of the sum gives the depth of a pixel in the ink,
    the ink runs together a little where lines meet, and all points take one matrix product.
    """
    spread = 0.55 * writer.pen_px
    spacing = 1.4 * spread
    margin = 1.7 * writer.pen_px + 1
    width, height = np.ceil(path.max(axis=0) + 2 * margin).astype(int)
    step = np.diff(path, axis=0)
    along = np.zeros(len(path))
    np.cumsum(np.hypot(step[:, 0], step[:, 1]) * drawn[:-1] + 1e-4, out=along[1:])
    at = np.arange(0, along[-1], spacing)
    x, y, r = (np.interp(at, along, values) for values in (*path.T, radius))
    variance = spread * spread
    weights = np.exp(r * r / (2 * variance)) * (spacing / (spread * math.sqrt(2 * math.pi)))
    rows = _bells(y + margin, height, variance) * weights.astype(np.float32)[:, None]
    total = rows.T @ _bells(x + margin, width, variance)
    inked = total > math.exp((EDGE_COVER - 0.5) * writer.blur_px * writer.pen_px / variance)
    rows_inked = np.flatnonzero(inked.any(axis=1))
    columns_inked = np.flatnonzero(inked.any(axis=0))
    total = total[rows_inked[0] : rows_inked[-1] + 1, columns_inked[0] : columns_inked[-1] + 1]
    cover = np.log(total + np.float32(1e-6))
    cover *= np.float32(variance / (writer.pen_px * writer.blur_px))
    cover += np.float32(0.5)
    return np.clip(cover, 0, 1, out=cover)


def _bells(centres: np.ndarray, length: int, variance: float) -> np.ndarray:
    """Returns float32 (points, length): a Gaussian around each centre, without its factor."""
    distance = np.arange(length, dtype=np.float32) - centres.astype(np.float32)[:, None]
    distance *= distance
    distance *= np.float32(-0.5 / variance)
    return np.exp(distance, out=distance)


def _ink(cover: np.ndarray, writer: Writer, rng: np.random.Generator) -> np.ndarray:
    """Returns the uint8 bitmap: ink with fine grain and broader mottle on white paper."""
    height, width = cover.shape
    fine, coarse = _grain()
    top, left, other_top, other_left = rng.integers(0, GRAIN_PX - max(MAX_PX), 4)
    ink = fine[top : top + height, left : left + width] * np.float32(writer.ink * writer.grain)
    mottle = coarse[other_top : other_top + height, other_left : other_left + width]
    ink += mottle * np.float32(writer.ink * writer.mottle)
    ink += np.float32(writer.ink)
    ink *= cover
    # Scanners cut faint grey to paper, so that 255 is the only light value in CASIA's bitmaps.
    ink[ink < 6] = 0
    return np.subtract(255, np.clip(ink, 0, 255)).astype(np.uint8)


@functools.cache
def _grain() -> tuple[np.ndarray, np.ndarray]:
    """Returns two noises of unit spread, float32 (GRAIN_PX, GRAIN_PX): fine, and broad."""
    rng = np.random.default_rng(0)
    fine = rng.standard_normal((GRAIN_PX, GRAIN_PX), np.float32)
    coarse = rng.standard_normal((GRAIN_PX, GRAIN_PX), np.float32)
    for axis in (0, 1):
        for _ in range(3):
            coarse = coarse + np.roll(coarse, 1, axis) + np.roll(coarse, -1, axis)
    return fine, coarse / coarse.std()
