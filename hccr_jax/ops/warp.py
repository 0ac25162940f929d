"""Affine warps of images, by one bilinear resampling."""

import jax
import jax.numpy as jnp


def rotation_matrix(angle: jax.Array) -> jax.Array:
    """Returns the matrices (2, 2, ...) of counter-clockwise rotations, x to the right and y down.

    Args:
      angle: radians, any shape.
    """
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cosine, sine]), jnp.stack([-sine, cosine])])


def warp(
    images: jax.Array, matrices: jax.Array, shifts: jax.Array, bend: jax.Array | None = None
) -> jax.Array:
    """Returns images warped by affine maps, with bilinear sampling and zeros (paper) outside.

    A point at offset p = (x right, y down), in pixels from the image's centre, moves to
    matrices · p + shifts: a push map. Pixel centres are at half-integers, so an image's centre is
    at S/2 and a flip maps pixel i to pixel S − 1 − i.

    Args:
      images: float32 (B, S, S).
      matrices: float32 (B, 2, 2), invertible.
      shifts: float32 (B, 2), pixels.
      bend: float32 (B, 2, S·S), offsets (x, y) in pixels of each output pixel's sampling point.
    """
    batch, size, _ = images.shape
    corner, right_weight, bottom_weight = sampling_grid(matrices, shifts, size, bend)
    line = size + 3
    flat = jnp.pad(images, ((0, 0), (1, 2), (1, 2))).reshape(batch, line * line)

    def tap(offset: int) -> jax.Array:
        return jnp.take_along_axis(flat, corner + offset, axis=1, mode="promise_in_bounds")

    upper = tap(0) * (1 - right_weight) + tap(1) * right_weight
    lower = tap(line) * (1 - right_weight) + tap(line + 1) * right_weight
    return (upper * (1 - bottom_weight) + lower * bottom_weight).reshape(images.shape)


def sampling_grid(
    matrices: jax.Array, shifts: jax.Array, size: int, bend: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns where `warp` samples each output pixel.

    A border of paper, one pixel before the image and two after, keeps all four neighbours of a
    sampling point inside the array.

    Args:
      matrices, shifts, bend: see `warp`.
      size: S.

    Returns:
      (corner, right_weight, bottom_weight), each (B, S·S): index of the upper left neighbour in the
      flattened bordered image (S + 3)², int32, and the weights of the right and lower neighbours.
    """
    (a, b), (c, d) = matrices.transpose(1, 2, 0)[..., None]
    scale = 1.0 / (a * d - b * c)
    grid = jnp.arange(size, dtype=jnp.float32) + 0.5 - size / 2
    to_x, to_y = jnp.tile(grid, size)[None], jnp.repeat(grid, size)[None]
    x, y = to_x - shifts[:, :1], to_y - shifts[:, 1:]
    from_x, from_y = (d * x - b * y) * scale, (a * y - c * x) * scale
    if bend is not None:
        from_x, from_y = from_x + bend[:, 0], from_y + bend[:, 1]
    # Back to pixel indices of the source; more than one pixel outside, all is paper.
    from_x = jnp.clip(from_x + (size / 2 - 0.5), -1.0, size)
    from_y = jnp.clip(from_y + (size / 2 - 0.5), -1.0, size)
    left, top = jnp.floor(from_x), jnp.floor(from_y)
    right_weight, bottom_weight = from_x - left, from_y - top
    corner = (top.astype(jnp.int32) + 1) * (size + 3) + left.astype(jnp.int32) + 1
    return corner, right_weight, bottom_weight
