"""What is on a picture of one character besides it: printed lines, specks, punched holes."""

import numpy as np
from scipy import ndimage

_EIGHT = np.ones((3, 3), bool)
_SPECK_PX = 3
_ROUNDS = 4  # frame in frame, and a grid inside them
# Coverage of a printed line from end to end; of the pixels next to it, at most, and where three
# lines are found already; of a diagonal of a rice grid (米字格), which may be dashed.
_LINE, _NEXT_TO_LINE, _NEXT_TO_FRAME, _DIAGONAL = 0.95, 0.45, 0.8, 0.6


def without_lines(mask: np.ndarray) -> np.ndarray:
    """Returns ink without printed lines around and across it: frames, grids, ruled paper.

    A line is straight to the pixel, runs from one end of all ink to the other, and is thin: hardly
    a stroke of a hand. Of a frame with a cross in it, the diagonals go as well. Strokes that cross
    a line stay whole. Where hardly anything would be left, such as of 一, nothing is removed.

    Args:
      mask: bool (H, W), all that is darker than paper.
    """
    for _ in range(_ROUNDS):
        box = _box(mask)
        if box is None:
            return mask
        ink = mask[box]
        rows, columns = _find_lines(ink), _find_lines(ink.T)
        if len(rows) + len(columns) > 2:
            rows, columns = (_find_lines(part, _NEXT_TO_FRAME) for part in (ink, ink.T))
        if not rows and not columns:
            return mask
        rest = _erase(ink, rows) & _erase(ink.T, columns).T
        if len(rows) > 2 and len(columns) > 2:
            rest = _without_diagonals(rest)
        left = _box(rest)
        if left is None or max(side.stop - side.start for side in left) < 0.4 * max(ink.shape):
            return mask
        mask = np.zeros_like(mask)
        mask[box] = rest
    return mask


def without_parts(mask: np.ndarray) -> np.ndarray:
    """Returns ink without specks and round blots, such as punched holes.

    A speck is smaller than the pen is wide. A blot is twice as thick, and as wide as it is thick.
    Where hardly anything would be left, nothing is removed.

    Args:
      mask: bool (H, W), what is clearly ink.
    """
    labels, count = ndimage.label(mask, _EIGHT)
    if not count:
        return mask
    depth = distance(mask)
    width = stroke_width(depth)
    keep = np.arange(count + 1) > 0
    for index, part in enumerate(ndimage.find_objects(labels), 1):
        long = max(side.stop - side.start for side in part)
        keep[index] = long > max(0.7 * width, _SPECK_PX)
    rest = _without_blots(keep[labels], depth, width)
    return rest if rest.sum() > 0.3 * mask.sum() else mask


def stroke_width(depth: np.ndarray) -> float:
    """Returns the median width in pixels of strokes, by the `distance` in them, (H, W)."""
    ridge = (depth == ndimage.maximum_filter(depth, 3)) & (depth > 0)
    return 2 * float(np.median(depth[ridge])) - 1 if ridge.any() else 1.0


def distance(mask: np.ndarray) -> np.ndarray:
    """Returns each pixel's distance to the nearest one outside a mask (H, W) or the picture."""
    return ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]


def has_lines(mask: np.ndarray) -> bool:
    """Returns whether straight lines run all across a mask (H, W)."""
    box = _box(mask)
    return box is not None and bool(_find_lines(mask[box]) or _find_lines(mask[box].T))


def _find_lines(ink: np.ndarray, beside: float = _NEXT_TO_LINE) -> list[slice]:
    """Returns the rows of each straight line that runs all across, from side to side."""
    coverage = ink.mean(axis=1)
    found = []
    for (rows,) in ndimage.find_objects(ndimage.label(coverage >= _LINE)[0]):
        sides = [coverage[i] for i in (rows.start - 1, rows.stop) if 0 <= i < len(coverage)]
        is_thin = rows.stop - rows.start <= max(2, 0.08 * max(ink.shape))
        if is_thin and all(side < beside for side in sides):
            found.append(rows)
    return found


def _erase(ink: np.ndarray, lines: list[slice]) -> np.ndarray:
    """Returns the ink without lines, except where a stroke comes out on both sides of one."""
    rest, none = ink.copy(), np.zeros(ink.shape[1], bool)
    for rows in lines:
        above = ink[rows.start - 1] if rows.start > 0 else none
        below = ink[rows.stop] if rows.stop < len(ink) else none
        reach = (rows.stop - rows.start) // 2 + 1  # a slanted stroke comes out elsewhere
        near = [ndimage.binary_dilation(side, iterations=reach) for side in (above, below)]
        rest[rows] &= (above | below) & near[0] & near[1]
    return rest


def _without_diagonals(ink: np.ndarray) -> np.ndarray:
    """Returns the inside of a frame without thin lines from corner to corner."""
    height, width = ink.shape
    rows, columns = np.arange(height)[:, None], np.arange(width)
    for middle in (np.linspace(0, height - 1, width), np.linspace(height - 1, 0, width)):
        # One pixel to each side: a line that is drawn may step elsewhere than this one.
        middle = np.floor(middle + 0.5).astype(int)
        near = np.clip(np.stack([middle - 1, middle, middle + 1]), 0, height - 1)
        hit = ink[near, columns]
        if hit.any(axis=0).mean() < _DIAGONAL:
            continue
        row = near[hit.argmax(axis=0), columns]
        start = np.maximum.accumulate(np.where(ink, -1, rows), axis=0)[row, columns] + 1
        stop = np.minimum.accumulate(np.where(ink, height, rows)[::-1], axis=0)[::-1][row, columns]
        length = stop - start
        is_thin = hit.any(axis=0) & (length <= 1.5 * np.median(length[hit.any(axis=0)]) + 1)
        ink = ink & ~(is_thin & (rows >= start) & (rows < stop))
    return ink


def _without_blots(mask: np.ndarray, depth: np.ndarray, width: float) -> np.ndarray:
    labels, count = ndimage.label(depth > width, _EIGHT)
    if not count:
        return mask
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for row, column in ndimage.maximum_position(depth, labels, range(1, count + 1)):
        radius = depth[row, column]
        cores = ndimage.label(depth > radius / 2, _EIGHT)[0]
        core = ndimage.find_objects(cores)[cores[row, column] - 1]
        # A disc's core is as wide as its radius. That of a stroke's thick place is longer.
        if max(side.stop - side.start for side in core) < 1.5 * radius:
            mask = mask & ((rows - row) ** 2 + (columns - column) ** 2 > (radius + 1) ** 2)
    return mask


def _box(mask: np.ndarray) -> tuple[slice, slice] | None:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return None
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
