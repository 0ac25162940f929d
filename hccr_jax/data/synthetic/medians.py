"""Stroke medians of the level-1 characters: the path of a pen that writes them."""

import functools
import itertools
from pathlib import Path

import numpy as np

MEDIANS_FILE = Path(__file__).with_name("medians.npz")
BOX, BASELINE = 1024, 124  # the box reaches from y = -124 to y = 900


@functools.cache
def load_medians() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the stroke medians of all level-1 characters, in the order of `charset.level1()`.

    Returns:
      points: int16 (212886, 2), x to the right and y upwards, 1024 units a side.
      stroke_offsets: int32 (36671,), the start of each stroke's points, and the end.
      character_offsets: int32 (3756,), the start of each character's strokes, and the end.

    Source: hanzi-writer-data 2.0.1, see build_medians.py.

    >>> [len(array) for array in load_medians()]
    [212886, 36671, 3756]
    """
    with np.load(MEDIANS_FILE) as arrays:
        return arrays["points"], arrays["stroke_offsets"], arrays["character_offsets"]


def class_strokes(index: int) -> list[np.ndarray]:
    """Returns the strokes of a character in writing order.

    Args:
      index: its place in `charset.level1()`.

    Returns:
      One float32 (points, 2) array a stroke: x and y (downwards) in a box from -0.5 to 0.5.

    >>> [stroke.shape for stroke in class_strokes(0)][:3]
    [(4, 2), (7, 2), (5, 2)]
    """
    points, stroke_offsets, character_offsets = load_medians()
    first, last = character_offsets[index], character_offsets[index + 1]
    origin, scale = (BOX / 2, BOX / 2 - BASELINE), (1 / BOX, -1 / BOX)
    return [
        ((points[begin:end] - origin) * scale).astype(np.float32)
        for begin, end in itertools.pairwise(stroke_offsets[first : last + 1])
    ]
