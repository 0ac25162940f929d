"""Layout of a page: characters, grouped into lines and ordered by geometry alone.

Sufficient for separated writing: characters that touch their neighbours, ruled lines and pictures
are taken for characters.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from hccr_jax.data.images.ink import cut_out, find_ink, reduce_to
from hccr_jax.data.images.normalize import PAPER
from hccr_jax.data.synthetic import archives

PAGE_PIXELS = 4_000_000  # a larger page is reduced first
MAX_SLOPE = 0.1  # of a line
# Costs of a gap within a character, a wide and a narrow character, and a narrow gap between two, by
# lengths in units of a character's side.
INNER, WIDE, NARROW, NEAR = 6.0, 20.0, 3.0, 4.0
COLOUR = (200, 30, 30)

Box = tuple[int, int, int, int]


class Character(NamedTuple):
    """A character of a page.

    Attributes:
      box: left, top, right, bottom in pixels of the page, half-open.
      bitmap: uint8 (H, W), as `normalize.normalize` takes it.
    """

    box: Box
    bitmap: np.ndarray


class Parts(NamedTuple):
    """The connected components of a mask, arrays (N,); boxes in pixels, half-open.

    Attributes:
      left, top, right, bottom: int.
      area: int, pixels.
      labels: int, of each run of pixels: its component.
      runs: int (R, 3): row, first column, end column of each run.
    """

    left: np.ndarray
    top: np.ndarray
    right: np.ndarray
    bottom: np.ndarray
    area: np.ndarray
    labels: np.ndarray
    runs: np.ndarray


def read_page(grey: np.ndarray, vertical: bool = False) -> list[list[Character]]:
    """Returns the characters of a page, line by line, in reading order.

    Args:
      grey: uint8 (H, W), of any size and light.
      vertical: lines are columns from right to left, instead of rows from top to bottom.
    """
    height, width = grey.shape
    page = reduce_to(grey, np.sqrt(PAGE_PIXELS * max(height, width) / min(height, width)))
    factor = -(-height // page.shape[0])
    ink = find_ink(page, is_page=True)
    if ink is None:
        return []
    # Turned to the left, columns from right to left are rows from top to bottom.
    flat, mask = (np.ascontiguousarray(np.rot90(a)) if vertical else a for a in ink)
    parts = find_parts(mask)
    lines = [[_cut(flat, mask, parts, members) for members in line] for line in group_parts(parts)]
    return [[_place(c, factor, grey.shape, page.shape, vertical) for c in line] for line in lines]


def find_parts(mask: np.ndarray) -> Parts:
    """Returns the connected components of a mask; pixels that touch at a corner are connected.

    Args:
      mask: bool (H, W).

    >>> parts = find_parts(np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 1]]) > 0)
    >>> parts.area.tolist(), parts.left.tolist(), parts.bottom.tolist()
    ([2, 3], [0, 3], [2, 3])
    """
    height, width = mask.shape
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    components, num = ndimage.label(mask, np.ones((3, 3)))
    labels = components[rows, starts] - 1
    left, top = np.full(num, width), np.full(num, height)
    right, bottom = np.zeros(num, int), np.zeros(num, int)
    np.minimum.at(left, labels, starts)
    np.minimum.at(top, labels, rows)
    np.maximum.at(right, labels, stops)
    np.maximum.at(bottom, labels, rows + 1)
    area = np.bincount(labels, stops - starts, num).astype(int)
    runs = np.stack([rows, starts, stops], axis=1)
    return Parts(left, top, right, bottom, area, labels, runs)


def group_parts(parts: Parts) -> list[list[np.ndarray]]:
    """Returns the components of each character of each line, in reading order.

    Args:
      parts: from `find_parts`.
    """
    if not len(parts.area):
        return []
    sides = np.maximum(parts.right - parts.left, parts.bottom - parts.top)
    size = _weighted_median(sides, parts.area)
    kept = np.flatnonzero(sides >= max(3.0, 0.06 * size))
    if not len(kept):
        return []
    slope = _find_slope(parts, kept, size)
    lines = _find_lines(parts, kept, size, slope)
    heights = [parts.bottom[line].max() - parts.top[line].min() for line in lines]
    size = max(size, 0.75 * float(np.median(heights)))
    for _ in range(2):
        found = [_find_characters(parts, line, size) for line in lines]
        extents = [
            max(
                parts.right[members].max() - parts.left[members].min(),
                parts.bottom[members].max() - parts.top[members].min(),
            )
            for line in found
            for members in line
        ]
        size = float(np.median(extents))
    return found


def draw_page(grey: np.ndarray, lines: Sequence[Sequence[tuple[Box, str, bool]]]) -> Image.Image:
    """Returns a page with a box around each character and its prediction above or below it.

    Args:
      grey: uint8 (H, W).
      lines: of boxes, predictions, and whether the prediction is certain enough.
    """
    picture = Image.fromarray(grey).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    for left, top, right, bottom, character, is_sure in (
        (*box, character, is_sure) for line in lines for box, character, is_sure in line
    ):
        side = max(right - left, bottom - top)
        colour = COLOUR if is_sure else (150, 150, 150)
        canvas.rectangle((left, top, right - 1, bottom - 1), None, colour, max(1, side // 40))
        glyph_px = max(8, side * 2 // 5)
        glyph = archives.reference_glyph(character, glyph_px)
        place = (left, top - glyph_px if top >= glyph_px else bottom)
        if glyph is None:
            canvas.text(place, f"{ord(character):04X}", colour)
        else:
            picture.paste(colour, place, Image.fromarray(PAPER - glyph))
    return picture


def _find_slope(parts: Parts, kept: np.ndarray, size: float) -> float:
    """Returns by how much lines fall to the right: the slope whose profile is the most uneven."""
    runs = parts.runs[np.isin(parts.labels, kept)]
    slopes = np.linspace(-MAX_SLOPE, MAX_SLOPE, 41)
    scores = [float(np.square(_profile(runs, slope, size / 8)[0]).sum()) for slope in slopes]
    best, level = int(np.argmax(scores)), scores[len(slopes) // 2]
    return float(slopes[best]) if scores[best] > 1.05 * level else 0.0


def _profile(runs: np.ndarray, slope: float, bin_px: float) -> tuple[np.ndarray, float]:
    """Returns the ink by position across the lines, and the position of the first bin."""
    across = runs[:, 0] + 0.5 - slope * (runs[:, 1] + runs[:, 2]) / 2
    first = float(across.min())
    return np.bincount(((across - first) / bin_px).astype(int), runs[:, 2] - runs[:, 1]), first


def _find_lines(parts: Parts, kept: np.ndarray, size: float, slope: float) -> list[np.ndarray]:
    """Returns the components of each line, lines from the top."""
    runs = parts.runs[np.isin(parts.labels, kept)]
    profile, first = _profile(runs, slope, 1.0)
    width = max(1, round(size / 10))
    smooth = np.convolve(profile, np.ones(width) / width, "same")
    inked = np.concatenate([[False], smooth > 0.04 * np.percentile(smooth, 95), [False]])
    edges = np.flatnonzero(np.diff(inked.astype(int))).reshape(-1, 2).tolist()
    spans: list[list[int]] = []
    for start, stop in edges:
        # Parts of one line are separate only where all of its characters are.
        if spans and stop - spans[-1][0] <= 1.3 * size and start - spans[-1][1] < 0.5 * size:
            spans[-1][1] = stop
        else:
            spans.append([start, stop])
    cuts = [span for start, stop in spans for span in _split(smooth, start, stop, size)]
    middles = (parts.top[kept] + parts.bottom[kept]) / 2
    middles = middles - slope * (parts.left[kept] + parts.right[kept]) / 2 - first
    bounds = [(a[1] + b[0]) / 2 for a, b in itertools.pairwise(cuts)]
    place = np.searchsorted(bounds, middles)
    lines = [kept[place == index] for index in range(len(cuts))]
    return [line for line in lines if len(line)]


def _split(smooth: np.ndarray, start: int, stop: int, size: float) -> list[tuple[int, int]]:
    """Returns a line, or the lines that it consists of, cut where there is least ink."""
    if stop - start < 1.9 * size:
        return [(start, stop)]
    low, high = start + round(0.7 * size), stop - round(0.7 * size)
    if low >= high:  # of tiny characters, such as noise
        return [(start, stop)]
    cut = low + int(np.argmin(smooth[low:high]))
    if smooth[cut] > 0.5 * smooth[start:stop].mean():
        return [(start, stop)]
    return _split(smooth, start, cut, size) + _split(smooth, cut, stop, size)


def _find_characters(parts: Parts, line: np.ndarray, size: float) -> list[np.ndarray]:
    """Returns the components of each character of a line, from the left.

    Components above one another go together. Then the gaps that separate characters are those for
    which the sum of costs is least: wide characters, gaps within, and narrow gaps between.
    """
    columns: list[list[int]] = []
    ends: list[tuple[int, int]] = []
    for part in line[np.argsort(parts.left[line], kind="stable")]:
        left, right = int(parts.left[part]), int(parts.right[part])
        if ends:
            overlap = ends[-1][1] - left
            if overlap > 0.3 * min(right - left, ends[-1][1] - ends[-1][0]):
                columns[-1].append(int(part))
                ends[-1] = ends[-1][0], max(right, ends[-1][1])
                continue
        columns.append([int(part)])
        ends.append((left, right))
    count = len(columns)
    best, before = np.full(count + 1, np.inf), np.zeros(count + 1, int)
    best[0] = 0.0
    for stop in range(1, count + 1):
        for start in range(max(0, stop - 6), stop):
            cost = best[start] + _cost(
                ends[start:stop], ends[start - 1][1] if start else None, size
            )
            if cost < best[stop]:
                best[stop], before[stop] = cost, start
    found, stop = [], count
    while stop:
        start = int(before[stop])
        found.append(np.array([part for column in columns[start:stop] for part in column]))
        stop = start
    return found[::-1]


def _cost(columns: Sequence[tuple[int, int]], end_before: int | None, size: float) -> float:
    """Returns the cost of columns as one character, and of the cut before it."""
    left, right = columns[0][0], max(stop for _, stop in columns)
    width = (right - left) / size
    inner = sum(max(0.0, (b[0] - a[1]) / size) for a, b in itertools.pairwise(columns))
    cost = INNER * inner + WIDE * max(0.0, width - 1.15) ** 2 + NARROW * max(0.0, 0.6 - width)
    if end_before is not None:
        cost += NEAR * max(0.0, 0.25 - (left - end_before) / size)
    return cost


def _cut(flat: np.ndarray, mask: np.ndarray, parts: Parts, members: np.ndarray) -> Character:
    """Returns a character with everything else erased."""
    left, top = int(parts.left[members].min()), int(parts.top[members].min())
    right, bottom = int(parts.right[members].max()), int(parts.bottom[members].max())
    edge = 2 + max(right - left, bottom - top) // 32
    above, before = max(top - edge, 0), max(left - edge, 0)
    own = np.zeros((bottom + edge - above, right + edge - before), bool)
    for row, start, stop in parts.runs[np.isin(parts.labels, members)]:
        own[row - above, start - before : stop - before] = True
    window = flat[above : bottom + edge, before : right + edge]
    own = own[: window.shape[0], : window.shape[1]]
    return Character((left, top, right, bottom), cut_out(window, own))


def _place(
    character: Character,
    factor: int,
    shape: tuple[int, int],
    page_shape: tuple[int, int],
    vertical: bool,
) -> Character:
    """Returns a character with its box in the pixels of the picture as given, upright."""
    (left, top, right, bottom), bitmap = character
    if vertical:
        width = page_shape[1]
        left, top, right, bottom = width - bottom, left, width - top, right
        bitmap = np.rot90(bitmap, -1)
    height, width = shape
    box = left * factor, top * factor, min(right * factor, width), min(bottom * factor, height)
    return Character(box, np.ascontiguousarray(bitmap))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    shares = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(shares, shares[-1] / 2)])
