"""Strokes drawn with a mouse, pen or finger, rasterised to bitmaps like CASIA's.

`demo/index.html` has the same arithmetic in JavaScript; golden vectors keep the two equal.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hccr_jax.data.images.normalize import PAPER
from hccr_jax.errors import InputError

MAX_POINTS = 10_000  # of a drawing
MAX_COORDINATE = 1e6
# Medians of CASIA-HWDB1.1's writers, as in `synthetic.writer.create_writer`.
LONG_PX = 80.0  # longer side of the ink
PEN_PX = 2.1  # half the width of a line
EDGE_PX = 2.2  # width of the soft edge of a line
INK = 150  # darkness of the ink, 0 to 255
MARGIN_PX = 4  # around the path: more than half a line with its edge


def parse_strokes(value: Any) -> list[np.ndarray]:
    """Returns the strokes of a drawing given as JSON.

    Args:
      value: a list of strokes, each a list of points [x, y], y downwards, in any unit.

    Returns:
      One float64 (points, 2) array for each stroke with points; an empty list without ink.

    Raises:
      InputError: the value has another form, or more than `MAX_POINTS` points.

    >>> [stroke.tolist() for stroke in parse_strokes([[[1, 2], [3, 4.5]], []])]
    [[[1.0, 2.0], [3.0, 4.5]]]
    """
    if not isinstance(value, list) or not all(isinstance(stroke, list) for stroke in value):
        raise InputError("strokes: a list of lists of points [x, y] is needed")
    if sum(map(len, value)) > MAX_POINTS:
        raise InputError(f"strokes: at most {MAX_POINTS:,} points are read")
    for point in itertools.chain.from_iterable(value):
        if not (isinstance(point, list) and len(point) == 2 and all(map(_is_place, point))):
            raise InputError(
                f"strokes: each point must be two numbers of at most {MAX_COORDINATE:,.0f}"
            )
    return [np.array(stroke, np.float64) for stroke in value if stroke]


def _is_place(value: Any) -> bool:
    # A comparison with "not a number" is false.
    return type(value) in (int, float) and -MAX_COORDINATE <= value <= MAX_COORDINATE


def rasterize(strokes: Sequence[np.ndarray]) -> np.ndarray:
    """Returns strokes as a bitmap like CASIA's: round, soft-edged lines of one width.

    The width is proportional to the longer side of the ink, for any unit of the points. The
    coverage of a pixel follows from the distance of its centre to the nearest line.

    Args:
      strokes: float64 (points, 2) each, x to the right and y downwards; one point is a dot.

    Returns:
      uint8 (H, W), dark ink on paper of 255.

    >>> bitmap = rasterize([np.array([[0.0, 0.0], [10.0, 0.0]])])
    >>> bitmap.shape, [int(grey) for grey in bitmap[:, 40]]
    ((8, 84), [255, 207, 139, 105, 105, 139, 207, 255])
    """
    points = np.concatenate(strokes)
    low = points.min(axis=0)
    extent = points.max(axis=0) - low
    longest = float(extent.max())
    scale = (LONG_PX - 2 * PEN_PX) / longest if longest > 0 else 0.0
    width, height = (math.ceil(length * scale) + 2 * MARGIN_PX for length in extent)
    paths = [(stroke - low) * scale + MARGIN_PX for stroke in strokes]
    covered = cover(paths, (height, width), PEN_PX)
    return (PAPER - np.floor(INK * covered + 0.5)).astype(np.uint8)


def cover(paths: Sequence[np.ndarray], shape: tuple[int, int], pen_px: float) -> np.ndarray:
    """Returns the coverage of each pixel by soft-edged lines, float64 (H, W) from 0 to 1.

    Args:
      paths: float64 (points, 2) each, in pixels, x to the right and y downwards, none outside of
        the picture; one point is a dot.
      shape: H, W.
      pen_px: half the width of a line.
    """
    square = np.full(shape, np.inf)  # of the distance to the nearest line
    reach = math.ceil(pen_px + EDGE_PX / 2)
    for path in paths:
        for start, end in zip(path, path[1:] if len(path) > 1 else path, strict=False):
            _draw_line(square, start, end, reach)
    return np.clip(0.5 + (pen_px - np.sqrt(square)) / EDGE_PX, 0.0, 1.0)


def _draw_line(square: np.ndarray, start: np.ndarray, end: np.ndarray, reach: int) -> None:
    """Lowers the squared distances to those to one straight line, where these are smaller."""
    low, high = np.minimum(start, end), np.maximum(start, end)
    left, top = (max(math.floor(place) - reach, 0) for place in low)
    right, bottom = (math.floor(place) + reach + 1 for place in high)
    window = square[top:bottom, left:right]
    x = np.arange(left, left + window.shape[1]) + 0.5 - start[0]
    y = (np.arange(top, top + window.shape[0]) + 0.5 - start[1])[:, None]
    way_x, way_y = end - start
    length = way_x * way_x + way_y * way_y
    along = np.clip((x * way_x + y * way_y) / length, 0.0, 1.0) if length > 0 else 0.0
    off_x, off_y = x - along * way_x, y - along * way_y
    np.minimum(window, off_x * off_x + off_y * off_y, out=window)
