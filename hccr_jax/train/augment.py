"""Augmentation on the device: all geometric changes of an image in one affine map, sampled once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hccr_jax.ops.warp import rotation_matrix, warp

INK_ABOVE = 0.1  # of full ink: a row or column with more than this belongs to the ink box
NUM_DRAWS = 23
IsMirrored = Callable[[jax.Array], jax.Array]
ELASTIC_CELLS = 4  # to a side: displacements are drawn at the corners of so many cells


def make_augment(
    *,
    flip_left_right_prob: float = 0.0,
    flip_up_down_prob: float = 0.0,
    rotate_prob: float = 1.0,
    rotate_deg: float = 0.0,
    resize_prob: float = 1.0,
    resize_min: float = 1.0,
    resize_max: float = 1.0,
    zoom: float = 0.0,
    shear: float = 0.0,
    shift_px: float = 0.0,
    elastic_px: float = 0.0,
    stroke_width: float = 0.0,
    erase_prob: float = 0.0,
    erase_max_side: float = 0.3,
    noise_std: float = 0.0,
    transpose_prob: float = 0.0,
    crop_min: float = 1.0,
    contrast: float = 0.0,
    brightness: float = 0.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the augmentation as a pure function of keys and images.

    The parts act in this order, composed into one matrix: transposition, flips, rotation, resize,
    shear, zoom, shift, crop. An elastic deformation is part of the same resampling. What comes in
    from outside the image is paper. Then, pixel by pixel: stroke width, erasing, contrast,
    brightness, noise.

    Args:
      flip_left_right_prob, flip_up_down_prob: probability of each mirroring.
      rotate_prob, rotate_deg: with this probability rotates by U(−rotate_deg, rotate_deg).
      resize_prob, resize_min, resize_max: with this probability stretches width and height each by
        U(resize_min, resize_max); the longer side of the turned ink box is then brought back to
        its length before, as the normal form would, so that only the aspect changes and nothing
        leaves the image.
      zoom: scales by U(1 − zoom, 1 + zoom).
      shear: shifts each row by U(−shear, shear) times its distance from the middle row.
      shift_px: shifts by U(−shift_px, shift_px) along each axis.
      elastic_px: standard deviation, in pixels and along each axis, of displacements that are drawn
        at the corners of a coarse grid and smoothly interpolated between them.
      stroke_width: goes a share U(−stroke_width, stroke_width) of the way to the image whose
        strokes are one pixel wider on each side (dilated by 3×3), or narrower (eroded).
      erase_prob, erase_max_side: with this probability turns a rectangle to paper whose sides are
        U(0.05, erase_max_side) of the image's.
      noise_std: standard deviation of Gaussian noise added to every pixel (ink is 1).
      transpose_prob: probability of mirroring at the main diagonal.
      crop_min: shows a window at a random place in the image, whose side is U(crop_min, 1) of the
        image's, scaled up to the whole: strokes may be cut.
      contrast: stretches the grey values about their mean by U(1 − contrast, 1 + contrast).
      brightness: adds U(−brightness, brightness) to every pixel. Both are clipped to [0, 1].

    Returns:
      augment(keys (B,), images float32 (B, S, S) in [0, 1], ink 1) -> float32 (B, S, S). Row i
      depends on keys[i] and images[i] alone.

    Source: section 5 of the paper and its authors' code (ranges); erasing:
    https://arxiv.org/abs/1708.04896; elastic deformation: Simard, Steinkraus and Platt, ICDAR 2003;
    contrast and brightness: tf.image.adjust_contrast and adjust_brightness, the operations of the
    authors' framework.
    """

    def linear(draws: jax.Array, images: jax.Array) -> jax.Array:
        flip_x = _chosen(draws[0], flip_left_right_prob, -1.0, 1.0)
        flip_y = _chosen(draws[1], flip_up_down_prob, -1.0, 1.0)
        angle = _spread(draws[2], jnp.deg2rad(rotate_deg))
        angle = _chosen(draws[3], rotate_prob, angle, 0.0)
        stretch = resize_min + (resize_max - resize_min) * draws[4:6]
        stretch_x, stretch_y = _chosen(draws[6], resize_prob, stretch, 1.0)
        turn = rotation_matrix(angle)
        transposed = draws[16] < transpose_prob
        extents = jnp.stack(ink_extents(images))
        extents = jnp.where(transposed[None], extents[::-1], extents)
        # The box around the turned ink box: what is stretched may be narrow before, not after.
        width, height = jnp.einsum("ijb,jb->ib", jnp.abs(turn), extents)
        refit = jnp.maximum(width, height) / jnp.maximum(stretch_x * width, stretch_y * height)
        scale = refit * (1.0 + _spread(draws[7], zoom))
        slope = _spread(draws[8], shear)
        matrix = turn * jnp.stack([flip_x, flip_y])[None]
        matrix = jnp.where(transposed[None, None], matrix[:, ::-1], matrix)
        matrix = matrix * jnp.stack([stretch_x * scale, stretch_y * scale])[:, None]
        return jnp.stack([matrix[0] + slope[None] * matrix[1], matrix[1]])

    def augment(keys: jax.Array, images: jax.Array) -> jax.Array:
        draws = _draw(keys)
        matrices = linear(draws, images).transpose(2, 0, 1)
        shifts = _spread(draws[9:11], shift_px).T
        side = crop_min + (1.0 - crop_min) * draws[17][:, None]
        centre = (draws[18:20].T - 0.5) * (1.0 - side) * images.shape[1]
        bend = _elastic_field(keys, images.shape[1], elastic_px) if elastic_px > 0 else None
        warped = warp(images, matrices / side[..., None], (shifts - centre) / side, bend)
        if stroke_width > 0:
            warped = change_stroke_width(warped, _spread(draws[22], stroke_width))
        if erase_prob > 0:
            warped = _erase(warped, draws[11:16], erase_prob, erase_max_side)
        if contrast > 0 or brightness > 0:
            factor = 1.0 + _spread(draws[20], contrast)[:, None, None]
            change = _spread(draws[21], brightness)[:, None, None]
            mean = warped.mean(axis=(1, 2), keepdims=True)
            warped = jnp.clip((warped - mean) * factor + mean + change, 0.0, 1.0)
        if noise_std > 0:
            noise = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, 1), images.shape[1:])
            )
            warped = jnp.clip(warped + noise_std * noise(keys), 0.0, 1.0)
        return warped

    return augment


def make_is_mirrored(flip_left_right_prob: float, flip_up_down_prob: float) -> IsMirrored:
    """Returns the function of keys (B,) that tells, bool (B,), which images `augment` mirrors."""

    def is_mirrored(keys: jax.Array) -> jax.Array:
        draws = _draw(keys)
        return (draws[0] < flip_left_right_prob) | (draws[1] < flip_up_down_prob)

    return is_mirrored


def _draw(keys: jax.Array) -> jax.Array:
    """Returns the numbers of each image, uniform in [0, 1), (NUM_DRAWS, B)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (NUM_DRAWS,)))(keys).T


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
      amount: float32 (B,), the share of the way to the dilated image, where negative to the eroded.
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


def _erase(images: jax.Array, draws: jax.Array, probability: float, max_side: float) -> jax.Array:
    """Returns images with a random rectangle turned to paper; draws is (5, B) uniform."""
    size = images.shape[1]
    sides = size * (0.05 + (max_side - 0.05) * draws[1:3])
    starts = draws[3:5] * (size - sides)
    starts = jnp.where(draws[0][None] < probability, starts, 2.0 * size)
    centre = jnp.arange(size, dtype=jnp.float32)[None, None] + 0.5
    inside = (centre >= starts[..., None]) & (centre < (starts + sides)[..., None])
    return jnp.where(inside[0][:, None, :] & inside[1][:, :, None], 0.0, images)


def _chosen(
    draw: jax.Array, probability: float, value: jax.Array | float, otherwise: float
) -> jax.Array:
    return jnp.where(draw < probability, value, otherwise)


def _spread(draw: jax.Array, reach: jax.Array | float) -> jax.Array:
    return (2.0 * draw - 1.0) * reach
