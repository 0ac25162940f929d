"""Ink on paper: segmented under any lighting, and made into bitmaps like CASIA's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from hccr_jax.data.images.normalize import PAPER, ink_box
from hccr_jax.data.images.strays import distance, stroke_width, without_lines, without_parts
from hccr_jax.errors import InputError

CHARACTER_PX = 512  # a picture of one character is reduced to this side; 64 pixels would do
CHARACTER_CELLS, PAGE_CELLS = 8, 24  # cells along a side in which the lighting is estimated
MIN_CONTRAST = 25  # between paper and ink, of 255
MIN_EDGE = 5  # between pixels two apart, somewhere
FRAME = 0.12  # thickness of a frame, or of 口, over the longer side, at most
MIN_PX = 8  # longer side of a character
BAR_ASPECT = 2.5  # from here on ink may fill a picture: 一
# Width of strokes over the longer side of the ink: of CASIA-HWDB1.1, 99 % are above the first.
THINNEST, USUAL = 0.015, 0.035
INK_RANGE = (95.0, 180.0)  # median grey of a bitmap's ink: nearly all of CASIA-HWDB1.1 is in it


class Ink(NamedTuple):
    """The writing on a picture.

    Attributes:
      grey: uint8 (H, W), dark ink on paper of nearly 255, under even lighting.
      mask: bool (H, W), the pixels that are clearly ink.
    """

    grey: np.ndarray
    mask: np.ndarray


def to_bitmap(grey: np.ndarray, name: str = "image") -> np.ndarray:
    """Returns a picture of one character as a bitmap like CASIA's: dark ink on paper of 255.

    Frames, printed lines, specks and punched holes are removed. A clean bitmap is hardly changed,
    but cropped. Ink outside CASIA's range of grey values is brought to its limit; that of a very
    thin pen is thickened.

    Args:
      grey: uint8 (H, W), of any size; dark on light or light on dark, under any lighting.
      name: for messages.

    Raises:
      InputError: there is no ink.
    """
    small = reduce_to(grey, CHARACTER_PX)
    ink = find_ink(small)
    if ink is not None and small is not grey:  # a small character of a large picture
        window = _around(ink.mask, -(-max(grey.shape) // max(small.shape)))
        ink = find_ink(reduce_to(grey[window], CHARACTER_PX))
    if ink is None:
        raise InputError(f"{name}: no ink found")
    bitmap = cut_out(*_thicken(ink))
    if max(bitmap.shape) < MIN_PX:
        height, width = bitmap.shape
        raise InputError(f"{name}: the ink has {width} × {height} pixels: too few for a character")
    return bitmap


def _thicken(ink: Ink) -> Ink:
    """Returns the writing of a pen thinner than any of CASIA as that of a usual one."""
    rows, columns = (np.flatnonzero(ink.mask.any(axis=axis)) for axis in (1, 0))
    side = 1 + int(max(np.ptp(rows), np.ptp(columns)))
    width = stroke_width(distance(ink.mask))
    if width >= THINNEST * side:
        return ink
    reach = (USUAL * side - width) / 2
    mask = np.pad(ink.mask, int(np.ceil(reach)) + 1)
    cover = np.clip(reach + 1 - ndimage.distance_transform_edt(~mask), 0, 1)
    grey = np.rint(PAPER - (PAPER - INK_RANGE[0]) * cover).astype(np.uint8)
    return Ink(grey, cover > 0.4)


def find_ink(grey: np.ndarray, is_page: bool = False) -> Ink | None:
    """Returns the writing on a picture, or None without any.

    The picture is divided by the local brightness of the paper.

    Args:
      grey: uint8 (H, W).
      is_page: whether there are many characters; of one, printed lines, specks and punched holes
        are removed.
    """
    if not grey.any() and max(grey.shape) >= BAR_ASPECT * min(grey.shape):
        return Ink(grey, np.ones(grey.shape, bool))  # 一, of two values and cropped
    if not _has_edges(grey):
        return None
    if is_light_on_dark(grey):
        grey = PAPER - grey
    flat = _even_out(grey, PAGE_CELLS if is_page else CHARACTER_CELLS)
    first = _otsu(flat)
    light = flat[flat > first]
    if not light.size:
        return None
    paper = float(np.median(light))
    noise = 1.4826 * float(np.median(np.abs(light - paper)))
    all_dark = flat < paper - max(6.0 * noise, MIN_CONTRAST)
    dark = all_dark if is_page else without_lines(all_dark)
    if not dark.any():
        return None
    all_ink = dark & (flat < paper - 0.4 * (paper - float(np.median(flat[dark]))))
    mask = all_ink if is_page else without_parts(all_ink)
    # With the soft edge of what was removed, but not that of the writing.
    strays = (all_dark & ~dark) | (_widen(all_ink & ~mask, 2) & ~_widen(mask, 1))
    is_paper = strays | (flat > paper - 3.0 * noise)
    clean = np.where(is_paper, PAPER, flat * (PAPER / paper))
    return Ink(np.minimum(np.rint(clean), PAPER).astype(np.uint8), mask)


def _has_edges(grey: np.ndarray) -> bool:
    """Returns whether there is more than a soft shadow: a step within three rows or columns."""
    if min(grey.shape) < 3:
        return True
    for way in (grey.astype(np.int16), grey.T.astype(np.int16)):
        runs = way[:, :-2] + way[:, 1:-1] + way[:, 2:]  # less noisy than single pixels
        if np.abs(runs[2:] - runs[:-2]).max() >= 3 * MIN_EDGE:
            return True
    return False


def _widen(mask: np.ndarray, reach: int) -> np.ndarray:
    return ndimage.maximum_filter(mask, 2 * reach + 1, mode="constant")


def is_light_on_dark(grey: np.ndarray) -> bool:
    """Returns whether the ink is lighter than the paper.

    >>> board = np.zeros((9, 9), np.uint8); board[4, 2:7] = 200
    >>> is_light_on_dark(board), is_light_on_dark(255 - board)
    (True, False)
    """
    shares = np.cumsum(np.bincount(grey.ravel(), minlength=256)) / grey.size
    light = grey > np.searchsorted(shares, (0.001, 0.999)).mean()
    height, width = grey.shape
    y, x = np.ogrid[:height, :width]
    inset = np.minimum(np.minimum(y, height - 1 - y), np.minimum(x, width - 1 - x)).ravel()
    sizes, sums = np.bincount(inset), np.bincount(inset, light.ravel())  # of rings
    short, long = sorted(grey.shape)
    border = float((sums[: max(1, short // 50)].sum()) / sizes[: max(1, short // 50)].sum())
    is_dark = border < 0.5
    paper = np.abs(sums / sizes - is_dark)  # its share of each ring, if the border is paper
    ends = np.flatnonzero(paper < 0.5)
    if len(ends) and ends[0] <= FRAME * long:  # a frame, or 口, whose inside is paper
        inside = paper[ends[0] : ends[0] + max(1, short // 4)]
        is_dark ^= inside.mean() < 0.4
    if is_dark and long >= BAR_ASPECT * short:
        # A bar of ink may fill its picture: then what is light is at the border.
        is_dark = border <= light.mean()
    return bool(is_dark)


def cut_out(grey: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the ink of a mask with its soft edge on paper of 255, cropped.

    Args:
      grey: uint8 (H, W), from `find_ink`.
      mask: bool (H, W), the ink to cut out; not empty.
    """
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    reach = 1 + int(max(np.ptp(rows), np.ptp(columns))) // 64
    window = tuple(
        slice(max(int(places[0]) - reach, 0), int(places[-1]) + reach + 1)
        for places in (rows, columns)
    )
    grey, mask = grey[window], mask[window]
    middle = float(np.median(grey[mask]))
    wanted = float(np.clip(middle, *INK_RANGE))
    scale = (PAPER - wanted) / (PAPER - middle)
    bitmap = np.clip(PAPER - scale * (PAPER - grey.astype(np.float32)), 0, PAPER)
    bitmap = np.where(_widen(mask, reach), np.rint(bitmap), PAPER).astype(np.uint8)
    box = ink_box(bitmap)
    return bitmap if box is None else bitmap[box[0] : box[1], box[2] : box[3]]


def reduce_to(grey: np.ndarray, side_px: float) -> np.ndarray:
    """Returns a picture reduced by a whole factor, so that its longer side is at most `side_px`."""
    factor = int(np.ceil(max(grey.shape) / side_px))
    return np.asarray(Image.fromarray(grey).reduce(factor)) if factor > 1 else grey


def _even_out(grey: np.ndarray, cells: int) -> np.ndarray:
    """Returns a picture divided by the local brightness of its paper.

    The brightness is a surface of second degree times a remainder for each cell.
    """
    side = max(1, -(-max(grey.shape) // cells))
    starts = [np.arange(0, length, side) for length in grey.shape]
    level = np.array(
        [
            [np.percentile(grey[i : i + side, j : j + side], 80) for j in starts[1]]
            for i in starts[0]
        ]
    )
    pixels = [np.arange(length) + 0.5 for length in grey.shape]
    centres = [
        (start + np.minimum(start + side, length)) / 2
        for start, length in zip(starts, grey.shape, strict=True)
    ]
    # A cell may be full of ink.
    closed = _close(level)
    weights = _fit_light(level, level > 0.85 * closed, _terms(centres, grey.shape))
    if np.abs(weights[1:]).max() < 1.0:
        paper: Any = np.array([[weights[0]]])
        rest = level / weights[0]
    else:
        paper = np.zeros(grey.shape, np.float32)
        for weight, term in zip(weights, _terms(pixels, grey.shape), strict=True):
            paper += np.float32(weight) * term.astype(np.float32)
        rest = level / np.maximum(np.tensordot(weights, _terms(centres, grey.shape), 1), 1.0)
    rest = _close(rest)
    if np.ptp(rest) > 0.06:
        # Bilinear between the cells' centres.
        size = rest.shape[1] * side, rest.shape[0] * side
        image = Image.fromarray(rest.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        paper = paper * np.asarray(image)[: grey.shape[0], : grey.shape[1]]
    else:
        paper = paper * np.median(rest)
    scale = np.float32(PAPER) / np.maximum(paper, 1.0).astype(np.float32)
    return np.minimum(np.rint(grey * scale), PAPER).astype(np.uint8)


def _terms(places: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """Returns 1, x, y, x y, x² and y², (6, rows, columns), of coordinates y and x in pixels."""
    units = [2 * place / length - 1 for place, length in zip(places, shape, strict=True)]
    y, x = np.meshgrid(*units, indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * y, x * x, y * y])


def _fit_light(level: np.ndarray, is_paper: np.ndarray, terms: np.ndarray) -> np.ndarray:
    """Returns the weights of the terms by which their sum fits the paper's brightness."""
    flat = np.zeros(len(terms))
    flat[0] = max(float(level.max()), 1.0)
    weights = flat
    for _ in range(4):
        if is_paper.sum() < 3 * len(terms):
            return flat
        weights, *_ = np.linalg.lstsq(terms[:, is_paper].T, level[is_paper], rcond=None)
        is_paper = level > 0.95 * np.tensordot(weights, terms, 1)
    return weights


def _around(mask: np.ndarray, factor: int) -> tuple[slice, slice]:
    """Returns the window of the ink and some paper around it, in pixels `factor` times as small."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    edge = 4 + max(np.ptp(rows), np.ptp(columns)) // 4
    top, bottom, left, right = (
        max(0, int(place)) * factor
        for places in (rows, columns)
        for place in (places[0] - edge, places[-1] + 1 + edge)
    )
    return slice(top, bottom), slice(left, right)


def _close(values: np.ndarray) -> np.ndarray:
    """Returns the grey-scale closing of values (rows, columns) by 3 × 3 cells, float32."""
    return ndimage.grey_closing(values, 3, mode="nearest").astype(np.float32)


def _otsu(grey: np.ndarray) -> int:
    """Returns the grey value up to which pixels are dark, by the best split into two classes.

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    counts = np.bincount(grey.ravel(), minlength=256).astype(np.float64)
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (sums[-1] * below / total - sums) ** 2 / (below * (total - below))
    return int(np.nanargmax(np.append(np.nan_to_num(spread[:-1], posinf=0.0), 0.0)))
