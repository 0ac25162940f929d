"""Ink on paper: segmented under any lighting, and made into bitmaps like CASIA's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from hccr_jax.data.images.normalize import PAPER, ink_box
from hccr_jax.errors import InputError

CHARACTER_PX = 1024  # a picture of one character is reduced to this side; 64 pixels would do
CHARACTER_CELLS, PAGE_CELLS = 8, 24  # cells along a side in which the lighting is estimated
MIN_CONTRAST = 25  # between paper and ink, of 255
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

    A clean bitmap is hardly changed, but cropped. Ink outside CASIA's range of grey values is
    brought to its limit.

    Args:
      grey: uint8 (H, W), of any size; dark on light or light on dark, under any lighting.
      name: for messages.

    Raises:
      InputError: there is no ink.
    """
    small = reduce_to(grey, CHARACTER_PX)
    ink = find_ink(small, CHARACTER_CELLS)
    if ink is not None and small is not grey:  # a small character of a large picture
        window = _around(ink.mask, -(-max(grey.shape) // max(small.shape)))
        ink = find_ink(reduce_to(grey[window], CHARACTER_PX), CHARACTER_CELLS)
    if ink is None:
        raise InputError(f"{name}: no ink found")
    return cut_out(ink.grey, ink.mask)


def find_ink(grey: np.ndarray, cells: int) -> Ink | None:
    """Returns the writing on a picture, or None without any.

    Paper is the median of the border; ink is on that side of it to which the grey values reach
    further. The picture is divided by the local brightness of the paper.

    Args:
      grey: uint8 (H, W).
      cells: number of cells along the longer side in which the lighting is estimated; each must be
        wider than a stroke.
    """
    if is_light_on_dark(grey):
        grey = PAPER - grey
    flat = _even_out(grey, cells)
    first = _otsu(flat)
    light = flat[flat > first]
    if not light.size:
        return None
    paper = float(np.median(light))
    noise = 1.4826 * float(np.median(np.abs(light - paper)))
    dark = flat[flat < paper - max(6.0 * noise, MIN_CONTRAST)]
    if not dark.size:
        return None
    level = paper - 0.4 * (paper - float(np.median(dark)))
    mask = flat < min(level, paper - max(6.0 * noise, MIN_CONTRAST))
    clean = np.where(flat > paper - 3.0 * noise, PAPER, flat * (PAPER / paper))
    return Ink(np.minimum(np.rint(clean), PAPER).astype(np.uint8), mask)


def is_light_on_dark(grey: np.ndarray) -> bool:
    """Returns whether the ink is lighter than the paper.

    >>> board = np.zeros((9, 9), np.uint8); board[4, 2:7] = 200
    >>> is_light_on_dark(board), is_light_on_dark(255 - board)
    (True, False)
    """
    frame = max(1, min(grey.shape) // 50)
    sides = (grey[:frame], grey[-frame:], grey[:, :frame], grey[:, -frame:])
    paper = float(np.median(np.concatenate([side.ravel() for side in sides])))
    shares = np.cumsum(np.bincount(grey.ravel(), minlength=256)) / grey.size
    low, high = np.searchsorted(shares, (0.001, 0.999))
    return bool(high - paper > paper - low)


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
    bitmap = np.where(
        ndimage.maximum_filter(mask, 2 * reach + 1, mode="constant"), np.rint(bitmap), PAPER
    ).astype(np.uint8)
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
