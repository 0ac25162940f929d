"""Distorted test images, made from the original bitmaps: which ones, how, and in normal form.

What is drawn depends on the number of records alone, never on the device, the number of processes
or the seed of a run: every network meets the same images.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hccr_jax.data import splits
from hccr_jax.data.images.normalize import PAPER, normalize
from hccr_jax.runtime.worker_pool import Advance, WorkerPool

SEED = 9000  # of all draws: the paper's number of distorted images
ROTATION_DEG, PROTOCOL_DEG = 25.0, 30.0
RESIZE_MIN, RESIZE_MAX = 0.5, 2.5

# One distorted image: the record it is made of, then the arguments of `distort`, in their order.
DRAW = np.dtype(
    [
        ("row", "<i4"),
        ("flip_left_right", "?"),
        ("flip_up_down", "?"),
        ("angle_deg", "<f8"),
        ("width_factor", "<f8"),
        ("height_factor", "<f8"),
    ]
)

_TASK_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the bitmaps come from and the normal form they end in: see `splits.load_split`."""

    name: str
    data_dir: str | Path
    split: str
    image_px: int
    margin_px: int
    aspect: str


def draw_sets(num_records: int, num_images: int) -> dict[str, np.ndarray]:
    """Returns the draws of the paper's three sets, by name, each `DRAW` (N,).

    *rotation*: U(−25°, 25°). *flip*: every image, a third of them left/right, a third up/down, a
    third both. *resize*: width and height by two independent factors U(0.5, 2.5). No image is twice
    in a set, nor in two sets where the split has three times N.

    Args:
      num_records: of the split.
      num_images: N, of each set; 0, or more than there are: every record is in every set.

    Source: section 6.3 of the paper (its final test).
    """
    size = min(num_images or num_records, num_records)
    order = _shuffled(num_records)
    rotation, flip, resize = (
        _undistorted(order[np.arange(start, start + size) % num_records])
        for start in (0, size, 2 * size)
    )
    rotation["angle_deg"] = _uniform("rotation", size, 1, -ROTATION_DEG, ROTATION_DEG)[0]
    kind = np.arange(size) % 3  # the order is random already
    flip["flip_left_right"], flip["flip_up_down"] = kind != 1, kind != 0
    factors = _uniform("resize", size, 2, RESIZE_MIN, RESIZE_MAX)
    resize["width_factor"], resize["height_factor"] = factors
    return {"rotation": rotation, "flip": flip, "resize": resize}


def draw_paper_protocol(num_records: int) -> np.ndarray:
    """Returns the draws of the paper's own test, `DRAW` (num_records,), row i of record i.

    Every image is mirrored left/right and up/down with probability ½ each and rotated by
    U(−30°, 30°).

    Source: the test script of the paper's authors.
    """
    draws = _undistorted(np.arange(num_records))
    draws["flip_left_right"], draws["flip_up_down"] = _uniform("flips", num_records, 2, 0, 1) < 0.5
    draws["angle_deg"] = _uniform("protocol", num_records, 1, -PROTOCOL_DEG, PROTOCOL_DEG)[0]
    return draws


def draw_angles(num_records: int, num_images: int, angles_deg: Sequence[float]) -> np.ndarray:
    """Returns draws that rotate the same images by each angle, `DRAW` (angles, num_images)."""
    draws = np.stack([_undistorted(_shuffled(num_records)[:num_images])] * len(angles_deg))
    draws["angle_deg"] = np.asarray(angles_deg)[:, None]
    return draws


def draw_stretches(num_records: int, num_images: int, ratios: Sequence[float]) -> np.ndarray:
    """Returns draws that change the same images' width over height, `DRAW` (ratios, num_images).

    The width is multiplied by the ratio's root and the height divided by it, so the area stays.
    """
    draws = np.stack([_undistorted(_shuffled(num_records)[:num_images])] * len(ratios))
    root = np.sqrt(ratios)[:, None]
    draws["width_factor"], draws["height_factor"] = root, 1.0 / root
    return draws


def distort(
    bitmap: np.ndarray,
    flip_left_right: bool = False,
    flip_up_down: bool = False,
    angle_deg: float = 0.0,
    width_factor: float = 1.0,
    height_factor: float = 1.0,
) -> np.ndarray:
    """Returns a bitmap mirrored, then rotated, then resized.

    Args:
      bitmap: uint8 (H, W), 255 is paper.
      flip_left_right, flip_up_down: mirrors exactly.
      angle_deg: counter-clockwise, about the centre of the bitmap padded with paper to a square,
        bilinear. The square stays as it is: what leaves it is lost, what comes in is paper.
      width_factor, height_factor: the sides are multiplied and rounded, to at least one pixel. The
        kernel is a triangle, widened when shrinking.

    Returns:
      uint8 (H', W').

    >>> distort(np.array([[0, 128, 255]], np.uint8), flip_left_right=True).tolist()
    [[255, 128, 0]]
    """
    bitmap = bitmap[:, ::-1] if flip_left_right else bitmap
    bitmap = bitmap[::-1] if flip_up_down else bitmap
    if angle_deg:
        image = Image.fromarray(_squared(bitmap))
        bitmap = np.asarray(image.rotate(angle_deg, Image.Resampling.BILINEAR, fillcolor=PAPER))
    height, width = bitmap.shape
    size = max(1, round(width * width_factor)), max(1, round(height * height_factor))
    if size != (width, height):
        bitmap = np.asarray(Image.fromarray(bitmap).resize(size, Image.Resampling.BILINEAR))
    return bitmap


def distorted_images(source: Source, draws: np.ndarray, pool: WorkerPool, name: str) -> np.ndarray:
    """Returns the drawn images in normal form, uint8 (N, image_px, image_px).

    Args:
      source: of the bitmaps.
      draws: `DRAW` (N,).
      pool: does the work.
      name: of the images, for the progress bar.
    """
    starts = range(0, len(draws), _TASK_ROWS)
    tasks = [_Task(source, draws[start : start + _TASK_ROWS]) for start in starts]
    return np.concatenate(pool.run(_make, tasks, len(draws), f"Distorting: {name}", "image"))


class _Task(NamedTuple):
    """The source and the draws of a part of the images."""

    source: Source
    draws: np.ndarray


def _make(task: _Task, advance: Advance) -> np.ndarray:
    """Returns the task's images in normal form."""
    source, rows = task.source, task.draws["row"]
    bitmaps = splits.load_bitmaps(source.name, source.data_dir, source.split, rows)
    images = np.empty((len(rows), source.image_px, source.image_px), np.uint8)
    for place, (bitmap, (_, *how)) in enumerate(zip(bitmaps, task.draws.tolist(), strict=True)):
        distorted = distort(bitmap, *how)
        images[place] = normalize(distorted, source.image_px, source.margin_px, source.aspect)
        advance(1)
    return images


def _squared(bitmap: np.ndarray) -> np.ndarray:
    """Returns a bitmap in the middle of a square of paper."""
    height, width = bitmap.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side), PAPER, np.uint8)
    square[top : top + height, left : left + width] = bitmap
    return square


def _undistorted(rows: np.ndarray) -> np.ndarray:
    draws: Any = np.zeros(len(rows), DRAW)
    draws["row"], draws["width_factor"], draws["height_factor"] = rows, 1.0, 1.0
    return draws


def _shuffled(num_records: int) -> np.ndarray:
    return np.argsort(_uniform("order", num_records, 1, 0, 1)[0], kind="stable")


def _uniform(stream: str, size: int, number: int, low: float, high: float) -> np.ndarray:
    """Returns float64 (number, size) in [low, high); every stream is independent of the others."""
    generator = np.random.Generator(np.random.PCG64([SEED, *stream.encode()]))
    return low + (high - low) * generator.random((size, number)).T
