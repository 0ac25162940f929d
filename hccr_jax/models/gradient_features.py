"""Gradient-direction features, the input of classical recognisers.

Source: Liu, Nakashima, Sako and Fujisawa, "Handwritten digit recognition: investigation of
normalization and feature extraction techniques", Pattern Recognition 37 (2004), section 4; Liu,
"Normalization-cooperated gradient feature extraction for handwritten character recognition", IEEE
TPAMI 29 (2007).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

DIRECTIONS = 8
GRID = 8
NUM_FEATURES = DIRECTIONS * GRID * GRID
TINY = 1e-12
FAINT = 5 / 255  # ink up to this value counts as paper


def gradient_features(images: jax.Array) -> jax.Array:
    """Returns the gradient-direction features of images.

    The strength of the gradient in each direction, blurred and sampled on a grid; divided by their
    sum, against differences of ink and pen width; and the square root of these (a Box-Cox
    transform), which makes their distribution more nearly normal.

    Args:
      images: float32 (B, S, S), ink 1 and paper 0.

    Returns:
      float32 (B, 512): direction, row and column of the grid in row-major order; zeros for an image
      without ink.
    """
    weights = jnp.asarray(sampling_weights(images.shape[1]))
    planes = gradient_directions(images)
    strengths = jnp.einsum("is,jt,bdst->bdij", weights, weights, planes, precision="highest")
    strengths = strengths.reshape(-1, NUM_FEATURES)
    return jnp.sqrt(strengths / jnp.maximum(strengths.sum(1, keepdims=True), TINY))


def equalize_density(images: jax.Array) -> jax.Array:
    """Returns images with equalised line density: crowded strokes get more room, gaps less.

    Along each axis half of the ink's box is distributed evenly over its pixels, the other half in
    proportion to a moving average of the ink edges across the axis. Each axis is then resampled by
    a triangle kernel as wide as the map is steep.

    Args:
      images: float32 (B, S, S), ink 1 and paper 0.

    Returns:
      float32 (B, S, S); the box is unchanged.

    Source: Liu and Marukawa, "Pseudo two-dimensional shape normalization methods for handwritten
    Chinese character recognition", Pattern Recognition 38 (2005), line density projection; here
    from a grey image's gradient instead of runs of black and white.
    """
    rows = _resampling(images)
    columns = _resampling(images.swapaxes(1, 2))
    return jnp.einsum("bis,bst,bjt->bij", rows, images, columns, precision="highest")


def _resampling(images: jax.Array) -> jax.Array:
    """Returns the float32 matrices (B, S, S) that resample the rows of images by their density."""
    size = images.shape[1]
    lines = (images > FAINT).any(2).astype(jnp.float32)
    box = lax.cummax(lines, 1) * lax.cummax(lines, 1, reverse=True)
    padded = jnp.pad(images, ((0, 0), (1, 1), (0, 0)))
    sides = jnp.abs(jnp.diff(padded, axis=1)).sum(2)
    density = _moving_sum((sides[:, 1:] + sides[:, :-1]) * box) / _moving_sum(box + TINY) * box
    pixels = box.sum(1, keepdims=True)
    fractions = density / jnp.maximum(density.sum(1, keepdims=True), TINY)
    room = jnp.where(box > 0, 0.5 + 0.5 * pixels * fractions, 1.0)
    ends = jnp.cumsum(room, 1)
    # The borders of each output pixel in the source: the number of source pixels before them.
    place = jnp.arange(size + 1, dtype=jnp.float32)[None, :, None]
    borders = jnp.clip((place - (ends - room)[:, None]) / room[:, None], 0.0, 1.0).sum(2)
    centre = (borders[:, 1:, None] + borders[:, :-1, None]) / 2
    support = jnp.maximum(jnp.diff(borders, axis=1)[:, :, None], 1.0)
    position = jnp.arange(size, dtype=jnp.float32)[None, None] + 0.5
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(position - centre) / support)
    return weights / weights.sum(2, keepdims=True)


def _moving_sum(lines: jax.Array) -> jax.Array:
    """Returns moving sums (B, S) over the pixels at most S/16 away."""
    reach = lines.shape[1] // 16
    return lax.reduce_window(lines, 0.0, lax.add, (1, 2 * reach + 1), (1, 1), "SAME")


def gradient_directions(images: jax.Array) -> jax.Array:
    """Returns the Sobel gradient of images (B, S, S) along 8 directions, float32 (B, 8, S, S) ≥ 0.

    Direction k is at k · 45° (x to the right, y downwards). Each gradient is decomposed along its
    two nearest directions (the parallelogram rule). The image is padded with paper.
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    columns = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    x, y = rows[:, :, 2:] - rows[:, :, :-2], columns[:, 2:] - columns[:, :-2]
    right, left, down, up = (jnp.maximum(side, 0.0) for side in (x, -x, y, -y))
    across, along = right + left, down + up  # |x| and |y|: one of the sides is zero

    def axis(side: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.maximum(side - other, 0.0)

    def diagonal(one: jax.Array, two: jax.Array) -> jax.Array:
        return math.sqrt(2.0) * jnp.minimum(one, two)

    return jnp.stack(
        [
            axis(right, along), diagonal(right, down), axis(down, across), diagonal(down, left),
            axis(left, along), diagonal(left, up), axis(up, across), diagonal(up, right),
        ],
        axis=1,
    )  # fmt: skip


def sampling_weights(size: int) -> np.ndarray:
    """Returns the float32 (8, size) matrix that blurs one axis and samples it at the grid.

    The Gaussian's standard deviation is √2/π of the sampling distance, by the sampling theorem
    (section 4.3 of Liu et al., 2004).
    """
    distance = size / GRID
    deviation = math.sqrt(2.0) / math.pi * distance
    centres = (np.arange(GRID) + 0.5) * distance
    offsets = (np.arange(size) + 0.5 - centres[:, None]) / deviation
    return (np.exp(-0.5 * offsets**2) / (deviation * math.sqrt(2.0 * math.pi))).astype(np.float32)
