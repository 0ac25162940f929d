"""Gradient-direction features: what classical recognisers see of a character.

Source: Liu, Nakashima, Sako and Fujisawa, "Handwritten digit recognition: investigation of
normalization and feature extraction techniques", Pattern Recognition 37 (2004), section 4; Liu,
"Normalization-cooperated gradient feature extraction for handwritten character recognition", IEEE
TPAMI 29 (2007).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

DIRECTIONS = 8
GRID = 8
NUM_FEATURES = DIRECTIONS * GRID * GRID
TINY = 1e-12


def gradient_features(images: jax.Array) -> jax.Array:
    """Returns the features of images: how much of the ink's outline runs which way, and where.

    The strength of the gradient in each direction, blurred and sampled on a grid; as shares of the
    whole, so that pale ink and a narrow pen look like others; and the square root of these (a
    Box-Cox transform), which makes their distribution more nearly normal.

    Args:
      images: float32 (B, S, S), ink 1 and paper 0.

    Returns:
      float32 (B, 512): direction, row and column of the grid, the last one running fastest. An
      image without ink gives zeros.
    """
    weights = jnp.asarray(sampling_weights(images.shape[1]))
    planes = gradient_directions(images)
    strengths = jnp.einsum("is,jt,bdst->bdij", weights, weights, planes, precision="highest")
    strengths = strengths.reshape(-1, NUM_FEATURES)
    return jnp.sqrt(strengths / jnp.maximum(strengths.sum(1, keepdims=True), TINY))


def gradient_directions(images: jax.Array) -> jax.Array:
    """Returns the Sobel gradient of images (B, S, S) along 8 directions, float32 (B, 8, S, S) ≥ 0.

    Direction k is at k · 45° (x to the right, y downwards). Each gradient is the sum of its parts
    along the two directions next to it (the parallelogram rule). Around the image is paper.
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
    """Returns the float32 (8, size) matrix that blurs one axis and samples it at the grid's places.

    The Gaussian's standard deviation is √2/π of the distance between samples, which so lose little
    of what the blur leaves (section 4.3 of Liu et al., 2004).
    """
    distance = size / GRID
    deviation = math.sqrt(2.0) / math.pi * distance
    centres = (np.arange(GRID) + 0.5) * distance
    offsets = (np.arange(size) + 0.5 - centres[:, None]) / deviation
    return (np.exp(-0.5 * offsets**2) / (deviation * math.sqrt(2.0 * math.pi))).astype(np.float32)
