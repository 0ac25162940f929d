"""What a recogniser should not name: crossed-out characters, other signs, and scrawls.

All are bitmaps like CASIA's, drawn by a generator, so the same seed gives the same ones.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hccr_jax.data.images import strokes
from hccr_jax.data.images.normalize import INK_BELOW, PAPER, ink_box
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer

# Strokes on a grid of 4 by 6, two digits a point; no sign that is a character as well (+, T, O).
SYMBOLS = {
    "2": ["01 10 30 41 42 06 46"],
    "3": ["00 30 41 42 33 23", "23 33 44 45 36 06"],
    "4": ["30 04 44", "30 36"],
    "5": ["40 00 03 23 33 44 45 36 06"],
    "6": ["40 20 03 05 16 36 45 44 33 13 04"],
    "8": ["31 20 10 01 02 44 45 36 16 05 04 42 31"],
    "9": ["42 33 13 02 01 10 30 41 43 35 16"],
    "A": ["06 20 46", "13 33"],
    "B": ["00 06", "00 30 41 42 33 03", "33 44 45 36 06"],
    "G": ["41 30 10 02 04 16 36 45 43 23"],
    "K": ["00 06", "40 03 46"],
    "M": ["06 00 23 40 46"],
    "R": ["06 00 30 41 42 33 03", "23 46"],
    "S": ["41 30 10 01 02 13 33 44 45 36 16 05"],
    "W": ["00 16 22 36 40"],
    "Z": ["00 40 06 46"],
    "?": ["01 10 30 41 42 23 24", "26"],
    "&": ["46 12 11 20 31 04 05 16 26 43"],
    "%": ["40 06", "10 01 12 21 10", "34 25 36 45 34"],
    "#": ["10 06", "40 36", "02 42", "04 44"],
    "√": ["04 14 26 40"],
    "○": ["20 11 03 15 26 45 43 31 20"],
    "△": ["20 06 46 20"],
    "☆": ["20 36 02 42 06 20"],
    "→": ["03 43", "21 43 25"],
    "~": ["03 12 23 34 43"],
}
_Drawer = Callable[[np.random.Generator], list[np.ndarray]]  # paths in a box from -1 to 1


def cross_out(bitmap: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a character that its writer has struck through.

    The lines have the darkness of the ink and about the width of its strokes.

    Args:
      bitmap: uint8 (H, W), dark ink on paper of 255.
      kind: a key of `CROSSINGS`.
      rng: draws the lines.

    Returns:
      uint8 (H', W'), somewhat larger, as lines reach beyond the character. A bitmap without ink
      comes back as it is.
    """
    box = ink_box(bitmap)
    if box is None:
        return bitmap
    top, bottom, left, right = box
    darkness = PAPER - float(np.median(bitmap[bitmap < INK_BELOW]))
    pen_px = 0.5 * _stroke_width(bitmap, darkness) * rng.uniform(0.7, 1.3)
    # A thin character is crossed out by more than its own width.
    half = np.maximum((right - left, bottom - top), 0.6 * max(right - left, bottom - top)) / 2
    paths = [path * half for path in CROSSINGS[kind](rng)]
    room = math.ceil(float(np.abs(np.concatenate(paths)).max())) + math.ceil(pen_px) + 2
    padded = np.pad(bitmap, room, constant_values=PAPER)
    middle = room + np.array([(left + right) / 2, (top + bottom) / 2])
    covered = strokes.cover([path + middle for path in paths], padded.shape, pen_px)
    return np.minimum(padded, np.rint(PAPER - darkness * covered)).astype(np.uint8)


def draw_symbol(symbol: str, rng: np.random.Generator) -> np.ndarray:
    """Returns a digit, letter or sign in a random hand, uint8 (H, W).

    Args:
      symbol: a key of `SYMBOLS`.
      rng: draws the hand.
    """
    slant, turn = rng.normal(0, 0.2), rng.normal(0, 0.08)
    hand = np.array([[rng.uniform(0.7, 1.1), -slant + turn], [-turn, 1.5]])
    drawn = []
    for text in SYMBOLS[symbol]:
        points = np.array([[int(p[0]) / 2 - 1, int(p[1]) / 3 - 1] for p in text.split()])
        points = points @ hand.T + rng.normal(0, 0.06, points.shape)
        drawn.append(_rounded(points) if rng.random() < 0.7 else points)
    return strokes.rasterize(drawn)


def draw_scrawl(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Returns what no one meant to write, uint8 (H, W).

    Args:
      kind: a key of `SCRAWLS`.
      rng: draws it.
    """
    paths = SCRAWLS[kind](rng)
    return strokes.rasterize(paths) if paths else np.full((64, 64), PAPER, np.uint8)


def crossed_out(bitmaps: Sequence[np.ndarray], seed: Sequence[int]) -> tuple[list[Any], np.ndarray]:
    """Returns bitmaps struck through, each in another manner, and the kind of each, str (N,)."""
    rng = np.random.default_rng(seed)
    kinds = np.resize(list(CROSSINGS), len(bitmaps))
    rng.shuffle(kinds)
    return [cross_out(b, str(k), rng) for b, k in zip(bitmaps, kinds, strict=True)], kinds


def unknown(
    count: int, seed: Sequence[int], symbols: Sequence[str], others: Sequence[str] = ()
) -> tuple[list[Any], np.ndarray]:
    """Returns signs, and characters that are not among the classes, by turns, and their kind.

    Args:
      count: of the bitmaps.
      seed: of the simulated writers.
      symbols: keys of `SYMBOLS`.
      others: characters of level 1; none for signs only.
    """
    rng = np.random.default_rng(seed)
    kinds = np.resize(["symbol", "other_class"] if others else ["symbol"], count)
    bitmaps = [
        draw(others[int(rng.integers(len(others)))], create_writer([*seed, number]), rng)
        if kind == "other_class"
        else draw_symbol(symbols[int(rng.integers(len(symbols)))], rng)
        for number, kind in enumerate(kinds)
    ]
    return bitmaps, kinds


def scrawls(count: int, seed: Sequence[int]) -> tuple[list[Any], np.ndarray]:
    """Returns scrawls of every kind, by turns, and the kind of each."""
    rng = np.random.default_rng(seed)
    kinds = np.resize(list(SCRAWLS), count)
    return [draw_scrawl(str(kind), rng) for kind in kinds], kinds


def _lines(rng: np.random.Generator, angle: float, offsets: Iterable[float]) -> list[np.ndarray]:
    """Returns nearly straight and nearly parallel lines across the box."""
    paths = []
    for offset in offsets:
        turn = angle + rng.normal(0, 0.06)
        along, across = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        place = np.linspace(-1, 1, 6) * rng.uniform(0.9, 1.25)
        bow = offset + rng.normal(0, 0.05) * (1 - place**2) + rng.normal(0, 0.012, 6)
        paths.append(place[:, None] * along + bow[:, None] * across)
    return paths


def _slope(rng: np.random.Generator) -> float:
    """Returns the angle of a line that crosses out: most lie, some fall or rise."""
    return rng.normal(0, 0.25) if rng.random() < 0.6 else rng.uniform(-np.pi / 3, np.pi / 3)


def _cross_line(rng: np.random.Generator) -> list[np.ndarray]:
    return _lines(rng, _slope(rng), [rng.normal(0, 0.12)])


def _cross_lines(rng: np.random.Generator) -> list[np.ndarray]:
    number = int(rng.integers(2, 5))
    return _lines(rng, _slope(rng), np.linspace(-0.45, 0.45, number) + rng.normal(0, 0.07, number))


def _cross(rng: np.random.Generator) -> list[np.ndarray]:
    angles = np.pi / 4 * np.array([1, -1]) + rng.normal(0, 0.15, 2)
    return [path for angle in angles for path in _lines(rng, angle, [rng.normal(0, 0.08)])]


def _zigzag(rng: np.random.Generator) -> list[np.ndarray]:
    number = int(rng.integers(5, 11))
    x = np.linspace(-1, 1, number) * rng.uniform(0.8, 1.1)
    y = np.resize([-1.0, 1.0], number) * rng.uniform(0.3, 0.9)
    points = np.stack([x, y], axis=1) + rng.normal(0, 0.06, (number, 2))
    turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.3)
    return [points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])]


def _loops(rng: np.random.Generator) -> list[np.ndarray]:
    number = 14 * int(rng.integers(2, 6))
    time = np.linspace(0, 1, number)
    turn, radius = 2 * np.pi * rng.uniform(2, 6) * time, rng.uniform(0.35, 0.8)
    x = (2 * time - 1) * rng.uniform(0.3, 0.9) + 0.5 * radius * np.cos(turn)
    return [np.stack([x, radius * np.sin(turn)], axis=1) + rng.normal(0, 0.03, (number, 2))]


def _random_strokes(rng: np.random.Generator) -> list[np.ndarray]:
    """Returns strokes that wander about."""
    strokes = []
    for _ in range(int(rng.integers(1, 8))):
        turn = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, rng.uniform(0.1, 0.8), 12))
        way = np.cumsum(np.stack([np.cos(turn), np.sin(turn)], axis=1), axis=0)
        strokes.append(rng.uniform(-1, 1, 2) + way * rng.uniform(0.02, 0.2))
    return strokes


def _dots(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.uniform(-1, 1, (1, 2)) for _ in range(int(rng.integers(1, 5)))]


def _nothing(rng: np.random.Generator) -> list[np.ndarray]:
    del rng
    return []


def _rounded(points: np.ndarray, rounds: int = 2) -> np.ndarray:
    """Returns a path whose corners are cut off.

    Source: Chaikin, "An algorithm for high-speed curve generation", 1974.
    """
    for _ in range(rounds if len(points) > 2 else 0):
        starts, ends = points[:-1], points[1:]
        cut = np.stack([0.75 * starts + 0.25 * ends, 0.25 * starts + 0.75 * ends], axis=1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2)[1:-1], points[-1:]])
    return points


def _stroke_width(bitmap: np.ndarray, darkness: float) -> float:
    """Returns the mean width of the strokes in pixels: the ink's area over half its outline."""
    covered = np.clip((PAPER - bitmap.astype(np.float32)) / darkness, 0.0, 1.0)
    inside = np.pad(covered > 0.5, 1)
    # Edges between pixels are 4 / π times as long as a line of any direction.
    outline = np.pi / 4 * sum(np.count_nonzero(np.diff(inside, axis=axis)) for axis in (0, 1))
    return max(1.5, 2.0 * float(covered.sum()) / max(outline, 1.0))


CROSSINGS: Mapping[str, _Drawer] = {
    "line": _cross_line,
    "lines": _cross_lines,
    "cross": _cross,
    "zigzag": _zigzag,
    "loops": _loops,
}
SCRAWLS: Mapping[str, _Drawer] = {"strokes": _random_strokes, "dots": _dots, "empty": _nothing}
