"""The embedded data set `strokes`: level-1 characters drawn from stroke medians by simulated writers."""

import os
import zipfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from hccr_jax.data import charset
from hccr_jax.data.gnt import pack_record
from hccr_jax.data.handwriting import character_strokes, create_writer, draw
from hccr_jax.errors import InputError

FIRST_WRITER = 1001


def reference_glyph(character: str, size_px: int) -> np.ndarray | None:
    """Returns a clean upright drawing of a character, to label plots without a CJK font.

    Args:
      character: one character.
      size_px: side S of the drawing in pixels.

    Returns:
      uint8 (S, S), 255 is paper, ink 0; None where the character is not of level 1.

    >>> bar = reference_glyph("一", 32) < 128
    >>> bar.any(axis=1).sum() < 8, bar.any(axis=0).sum() > 20, reference_glyph("A", 32)
    (True, True, None)
    """
    strokes = character_strokes(character)
    if strokes is None:
        return None
    zoom = 4
    side = size_px * zoom
    width = max(zoom, round(0.045 * side))
    image = Image.new("L", (side, side), 255)
    canvas = ImageDraw.Draw(image)
    for stroke in strokes:
        pixels = (stroke + 0.5) * side
        canvas.line([tuple(point) for point in pixels.tolist()], 0, width, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 0)
    return np.asarray(image.reduce(zoom))
