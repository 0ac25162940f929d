"""The normal form of a character image: the only one in the project.

Training, evaluation, prediction and export all use `normalize`, because a resize that differs
between training and use costs more accuracy than any recipe gains.
"""

import functools
import math

import numpy as np

PAPER = 255
INK_BELOW = 250  # a pixel at least this bright is paper for the ink box


def ink_box(bitmap: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns (top, bottom, left, right) of the ink, half-open, or None without ink.

    Args:
      bitmap: uint8 (H, W), 255 is paper.
    """
    ink = bitmap < INK_BELOW
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not rows.size:
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@functools.lru_cache(maxsize=8192)
def resize_weights(length: int, side: float, image_px: int, margin_px: int) -> np.ndarray:
    """Returns the float32 (image_px, length) matrix that resamples one axis.

    The axis holds `length` source pixels centred in a square of `side`; the square fills the output
    but for `margin_px` pixels at each end. The kernel is a triangle, widened when shrinking, so
    that thin strokes fade instead of breaking. Pixel centres are at half-integers. Everything
    outside the source is paper (zero ink), so each row is divided by the kernel's sum over the
    whole line.
    """
    scale = side / (image_px - 2 * margin_px)
    support = max(scale, 1.0)
    offset = (side - length) / 2
    centre = (np.arange(image_px) - margin_px + 0.5) * scale - offset
    reach = int(np.ceil(support)) + image_px * int(np.ceil(scale))
    position = np.arange(-reach, length + reach) + 0.5
    weights = np.maximum(0.0, 1.0 - np.abs(position - centre[:, None]) / support)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.ascontiguousarray(weights[:, reach : reach + length], np.float32)


def squared_aspect(aspect: float) -> float:
    """Returns the ratio of the shorter side to the longer after the "adaptive" rule.

    √(sin(π/2 · aspect)): elongated characters become more square, thin ones stay thin.

    Source: aspect-ratio adaptive normalisation, Liu, Nakashima, Sako and Fujisawa, "Handwritten
    digit recognition: investigation of normalization and feature extraction techniques", Pattern
    Recognition 37 (2004).

    >>> [round(squared_aspect(aspect), 2) for aspect in (1.0, 0.5, 0.2, 0.05)]
    [1.0, 0.84, 0.56, 0.28]
    """
    return math.sqrt(math.sin(math.pi / 2 * aspect))


def normalize(
    bitmap: np.ndarray, image_px: int, margin_px: int, aspect: str = "keep"
) -> np.ndarray:
    """Returns a character in normal form: cropped to its ink, centred, square, resized, inverted.

    Args:
      bitmap: uint8 (H, W) of any size, dark ink on paper of 255.
      image_px: side S of the result in pixels.
      margin_px: pixels left free at each border; the longer side of the ink fills the rest.
      aspect: "keep", or "adaptive": the shorter side is stretched by `squared_aspect`.

    Returns:
      uint8 (S, S), ink high, paper 0. An image without ink gives zeros.

    >>> bar = np.full((6, 40), 255, np.uint8); bar[2:4, 10:30] = 0
    >>> form = normalize(bar, image_px=16, margin_px=2)
    >>> form.shape, [int(i) for i in np.flatnonzero(form.max(axis=0) > 127)]
    ((16, 16), [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13])
    """
    box = ink_box(bitmap)
    if box is None:
        return np.zeros((image_px, image_px), np.uint8)
    top, bottom, left, right = box
    ink = np.subtract(PAPER, bitmap[top:bottom, left:right], dtype=np.float32)
    height, width = ink.shape
    side, short = max(height, width), min(height, width)
    short_side: float = side
    if aspect == "adaptive":
        short_side = short / squared_aspect(short / side)
    sides = (side, short_side) if height >= width else (short_side, side)
    rows = resize_weights(height, sides[0], image_px, margin_px)
    columns = resize_weights(width, sides[1], image_px, margin_px)
    return np.floor(rows @ ink @ columns.T + 0.5).astype(np.uint8)
