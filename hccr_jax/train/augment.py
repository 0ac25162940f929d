"""Augmentation on the device: all geometric changes of an image in one affine map, sampled once."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hccr_jax.ops.warp import rotation_matrix, warp

INK_ABOVE = 0.1  # of full ink: a row or column with more than this belongs to the ink box
ELASTIC_CELLS = 4  # along each side; displacements are drawn at their corners

Augment = Callable[[jax.Array, jax.Array], jax.Array]  # keys (B,), images (B, S, S) → (B, S, S)
IsMirrored = Callable[[jax.Array], jax.Array]  # keys (B,) → bool (B,)


class Draw:
    """Where each use finds its numbers among those drawn for an image.

    Never renumber: runs would change. New ones come last.
    """

    FLIP_LEFT_RIGHT = 0
    FLIP_UP_DOWN = 1
    ANGLE = 2
    IS_ROTATED = 3
    STRETCH = slice(4, 6)
    IS_STRETCHED = 6
    ZOOM = 7
    SHEAR = 8
    SHIFT = slice(9, 11)
    IS_ERASED = 11
    ERASE_SIDES = slice(12, 14)
    ERASE_PLACE = slice(14, 16)
    TRANSPOSE = 16
    CROP_SIDE = 17
    CROP_PLACE = slice(18, 20)
    CONTRAST = 20
    BRIGHTNESS = 21
    STROKE_WIDTH = 22
    COUNT = 23


@dataclasses.dataclass(frozen=True)
class AugmentOptions:
    """Ranges of the augmentation; `configs/default.py` has their neutral values."""

    flip_left_right_prob: float  # of mirroring
    flip_up_down_prob: float
    rotate_prob: float
    rotate_deg: float  # rotates by U(−rotate_deg, rotate_deg)
    # Stretches width and height each by U(resize_min, resize_max). The longer side of the turned
    # ink box is then brought back to its length before, as the normal form would, so that only the
    # aspect changes and nothing leaves the image.
    resize_prob: float
    resize_min: float
    resize_max: float
    zoom: float  # scales by U(1 − zoom, 1 + zoom)
    shear: float  # shifts each row by U(−shear, shear) times its distance from the middle row
    shift_px: float  # shifts by U(−shift_px, shift_px) along each axis
    # Standard deviation, along each axis, of displacements that are drawn at the corners of a
    # coarse grid and smoothly interpolated between them.
    elastic_px: float
    # Goes a fraction U(−stroke_width, stroke_width) of the way to the image whose strokes are one
    # pixel wider on each side (dilated by 3×3), or narrower (eroded).
    stroke_width: float
    # Turns a rectangle to paper whose sides are U(0.05, erase_max_side) of the image's.
    erase_prob: float
    erase_max_side: float
    noise_std: float  # of Gaussian noise added to every pixel; ink is 1
    transpose_prob: float  # of mirroring at the main diagonal
    # Shows a window at a random place in the image, whose side is U(crop_min, 1) of the image's,
    # scaled up to the whole: strokes may be cut.
    crop_min: float
    contrast: float  # stretches grey values about their mean by U(1 − contrast, 1 + contrast)
    brightness: float  # adds U(−brightness, brightness) to every pixel


def make_augment(options: AugmentOptions) -> Augment:
    """Returns the augmentation as a pure function of keys and images.

    Its parts act in this order, composed into one matrix: transposition, flips, rotation, resize,
    shear, zoom, shift, crop. An elastic deformation is part of the same resampling. What comes in
    from outside the image is paper. Then, pixel by pixel: stroke width, erasing, contrast,
    brightness, noise, clipped to [0, 1].

    Returns:
      augment(keys (B,), images float32 (B, S, S) in [0, 1], ink 1) -> float32 (B, S, S). Row i
      depends on keys[i] and images[i] alone.

    Source: section 5 of the paper and its authors' code (ranges); erasing:
    https://arxiv.org/abs/1708.04896; elastic deformation: Simard, Steinkraus and Platt, ICDAR 2003;
    contrast and brightness: tf.image.adjust_contrast and adjust_brightness, the operations of the
    authors' framework.
    """

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        draws = _draw(keys)
        warped = _warp(options, draws, keys, images)
        if options.stroke_width > 0:
            amount = _symmetric(draws[Draw.STROKE_WIDTH], options.stroke_width)
            warped = change_stroke_width(warped, amount)
        if options.erase_prob > 0:
            warped = _erase(options, draws, warped)
        if options.contrast > 0 or options.brightness > 0:
            factor = 1.0 + _symmetric(draws[Draw.CONTRAST], options.contrast)[:, None, None]
            change = _symmetric(draws[Draw.BRIGHTNESS], options.brightness)[:, None, None]
            mean = warped.mean(axis=(1, 2), keepdims=True)
            warped = jnp.clip((warped - mean) * factor + mean + change, 0.0, 1.0)
        if options.noise_std > 0:
            noise = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, 1), images.shape[1:])
            )
            warped = jnp.clip(warped + options.noise_std * noise(keys), 0.0, 1.0)
        return warped

    return augment


def make_is_mirrored(options: AugmentOptions) -> IsMirrored:
    """Returns the function that maps keys (B,) to bool (B,), which images `augment` flips."""

    def is_mirrored(keys: jax.Array) -> jax.Array:
        draws = _draw(keys)
        return (draws[Draw.FLIP_LEFT_RIGHT] < options.flip_left_right_prob) | (
            draws[Draw.FLIP_UP_DOWN] < options.flip_up_down_prob
        )

    return is_mirrored


def _draw(keys: jax.Array) -> jax.Array:
    """Returns the random numbers of each image, uniform in [0, 1), (Draw.COUNT, B)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (Draw.COUNT,)))(keys).T


def _warp(
    options: AugmentOptions, draws: jax.Array, keys: jax.Array, images: jax.Array
) -> jax.Array:
    """Returns images after all geometric changes."""
    size = images.shape[1]
    matrices = _linear_maps(options, draws, images).transpose(2, 0, 1)
    shifts = _symmetric(draws[Draw.SHIFT], options.shift_px).T
    side = options.crop_min + (1.0 - options.crop_min) * draws[Draw.CROP_SIDE][:, None]
    centre = (draws[Draw.CROP_PLACE].T - 0.5) * (1.0 - side) * size
    bend = _elastic_field(keys, size, options.elastic_px) if options.elastic_px > 0 else None
    return warp(images, matrices / side[..., None], (shifts - centre) / side, bend)


def _linear_maps(options: AugmentOptions, draws: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the linear part of each image's map, float32 (2, 2, B), crop excluded."""
    flip_x = _chosen(draws[Draw.FLIP_LEFT_RIGHT], options.flip_left_right_prob, -1.0, 1.0)
    flip_y = _chosen(draws[Draw.FLIP_UP_DOWN], options.flip_up_down_prob, -1.0, 1.0)
    angle = _symmetric(draws[Draw.ANGLE], jnp.deg2rad(options.rotate_deg))
    angle = _chosen(draws[Draw.IS_ROTATED], options.rotate_prob, angle, 0.0)
    stretch = options.resize_min + (options.resize_max - options.resize_min) * draws[Draw.STRETCH]
    stretch_x, stretch_y = _chosen(draws[Draw.IS_STRETCHED], options.resize_prob, stretch, 1.0)
    turn = rotation_matrix(angle)
    transposed = draws[Draw.TRANSPOSE] < options.transpose_prob
    extents = jnp.stack(ink_extents(images))
    extents = jnp.where(transposed[None], extents[::-1], extents)
    # The box around the turned ink box: what is stretched may be narrow before, not after.
    width, height = jnp.einsum("ijb,jb->ib", jnp.abs(turn), extents)
    refit = jnp.maximum(width, height) / jnp.maximum(stretch_x * width, stretch_y * height)
    scale = refit * (1.0 + _symmetric(draws[Draw.ZOOM], options.zoom))
    slope = _symmetric(draws[Draw.SHEAR], options.shear)
    matrix = turn * jnp.stack([flip_x, flip_y])[None]
    matrix = jnp.where(transposed[None, None], matrix[:, ::-1], matrix)
    matrix = matrix * jnp.stack([stretch_x * scale, stretch_y * scale])[:, None]
    return jnp.stack([matrix[0] + slope[None] * matrix[1], matrix[1]])


def ink_extents(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns width and height, float32 (B,) pixels, of the ink of images (B, S, S); at least 1."""
    ink = images > INK_ABOVE

    def extent(lines: jax.Array) -> jax.Array:
        size = lines.shape[1]
        length = size - lines.argmax(axis=1) - lines[:, ::-1].argmax(axis=1)
        return jnp.where(lines.any(axis=1), length, 1).astype(jnp.float32)

    return extent(ink.any(axis=1)), extent(ink.any(axis=2))


def _elastic_field(keys: jax.Array, size: int, elastic_px: float) -> jax.Array:
    """Returns smooth random displacements, float32 (B, 2, S·S), for `warp`."""
    shape = (2, ELASTIC_CELLS + 1, ELASTIC_CELLS + 1)
    corners = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 2), shape))(keys)
    place = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (ELASTIC_CELLS / size)
    distance = jnp.abs(place[:, None] - jnp.arange(ELASTIC_CELLS + 1, dtype=jnp.float32)[None])
    # Half a cosine wave from one corner to the next: the field has no creases.
    weights = jnp.where(distance < 1, 0.5 + 0.5 * jnp.cos(jnp.pi * distance), 0.0)
    field = elastic_px * jnp.einsum("yi,bcij,xj->bcyx", weights, corners, weights)
    return field.reshape(*field.shape[:2], size * size)


def change_stroke_width(images: jax.Array, amount: jax.Array) -> jax.Array:
    """Returns images with wider or narrower strokes.

    Args:
      images: float32 (B, S, S), ink 1.
      amount: float32 (B,), from −1 (the eroded image) over 0 (the image) to 1 (the dilated one).
    """

    def reach(x: jax.Array, best: Callable[..., jax.Array]) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="edge")
        rows = best(best(padded[:, :-2], padded[:, 2:]), padded[:, 1:-1])
        return best(best(rows[..., :-2], rows[..., 2:]), rows[..., 1:-1])

    amount = amount[:, None, None]
    wider, narrower = reach(images, jnp.maximum), reach(images, jnp.minimum)
    return jnp.where(
        amount > 0, images + amount * (wider - images), images + amount * (images - narrower)
    )


def _erase(options: AugmentOptions, draws: jax.Array, images: jax.Array) -> jax.Array:
    """Returns images with a random rectangle turned to paper."""
    size = images.shape[1]
    sides = size * (0.05 + (options.erase_max_side - 0.05) * draws[Draw.ERASE_SIDES])
    starts = draws[Draw.ERASE_PLACE] * (size - sides)
    starts = jnp.where(draws[Draw.IS_ERASED][None] < options.erase_prob, starts, 2.0 * size)
    centre = jnp.arange(size, dtype=jnp.float32)[None, None] + 0.5
    inside = (centre >= starts[..., None]) & (centre < (starts + sides)[..., None])
    return jnp.where(inside[0][:, None, :] & inside[1][:, :, None], 0.0, images)


def _chosen(
    draw: jax.Array, probability: float, value: jax.Array | float, otherwise: float
) -> jax.Array:
    return jnp.where(draw < probability, value, otherwise)


def _symmetric(draw: jax.Array, reach: jax.Array | float) -> jax.Array:
    return (2.0 * draw - 1.0) * reach
