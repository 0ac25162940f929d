"""The warp against SciPy, directions, ranges, and independence of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from hccr_jax.configs import default
from hccr_jax.inference.tta import create_tta_views
from hccr_jax.ops.warp import rotation_matrix, warp
from hccr_jax.train.augment import (
    ELASTIC_CELLS,
    Augment,
    AugmentOptions,
    Draw,
    change_stroke_width,
    ink_extents,
    make_augment,
    make_is_mirrored,
)
from hccr_jax.train.setup import augment_options

SIZE = 64


def blobs(count: int) -> np.ndarray:
    noise = np.random.default_rng(0).random((count, SIZE, SIZE), np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2))
    smooth[:, :10] = smooth[:, -10:] = 0
    smooth[:, :, :10] = smooth[:, :, -10:] = 0
    return np.clip(smooth, 0, 1)


def options(**changes: float) -> AugmentOptions:
    """Returns the defaults, which change nothing, but for some."""
    config = default.get_config()
    config.augment.update(changes)
    return augment_options(config)


def augmentation(**changes: float) -> Augment:
    return make_augment(options(**changes))


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), count)


def test_warp_agrees_with_scipy_for_random_affine_maps():
    rng = np.random.default_rng(1)
    images = blobs(16)
    matrices = rng.normal(0, 0.4, (16, 2, 2)) + np.eye(2)
    shifts = rng.uniform(-9, 9, (16, 2))
    ours = warp(jnp.array(images), jnp.array(matrices, jnp.float32), jnp.array(shifts, jnp.float32))
    for image, matrix, shift, result in zip(images, matrices, shifts, ours, strict=True):
        pull = np.linalg.inv(matrix)[::-1, ::-1]  # SciPy's axes are (y, x)
        centre = (SIZE - 1) / 2
        offset = centre - pull @ (centre + shift[::-1])
        expected = ndimage.affine_transform(
            image.astype(np.float64), pull, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(result, expected, atol=2e-4)


@pytest.mark.parametrize("degrees", [90, -90, 180])
def test_a_positive_angle_turns_counter_clockwise(degrees):
    images = blobs(1)
    angle = jnp.deg2rad(jnp.array([float(degrees)]))
    ours = warp(jnp.array(images), rotation_matrix(angle).transpose(2, 0, 1), jnp.zeros((1, 2)))
    np.testing.assert_allclose(ours[0], np.rot90(images[0], degrees // 90), atol=1e-4)


def test_a_certain_flip_is_exact():
    images = blobs(3)
    left_right = augmentation(flip_left_right_prob=1.0)(keys(3), jnp.array(images))
    up_down = augmentation(flip_up_down_prob=1.0)(keys(3), jnp.array(images))
    np.testing.assert_allclose(left_right, images[:, :, ::-1], atol=1e-6)
    np.testing.assert_allclose(up_down, images[:, ::-1], atol=1e-6)


def test_no_augmentation_is_the_identity():
    images = blobs(3)
    np.testing.assert_allclose(augmentation()(keys(3), jnp.array(images)), images, atol=1e-6)


def test_flips_come_as_often_as_asked():
    images = jnp.zeros((4000, 8, 8)).at[:, 3:5, 2].set(1.0)
    flipped = augmentation(flip_left_right_prob=0.3)(keys(4000), images)[:, 3, 5] > 0.5
    assert abs(float(flipped.mean()) - 0.3) < 0.03  # four standard deviations


def test_rotation_stays_in_range_and_uses_it():
    # The ink's principal axis, by second moments, gives the angle back.
    bar = jnp.zeros((500, SIZE, SIZE)).at[:, 31:33, 12:52].set(1.0)
    turned = np.asarray(augmentation(rotate_deg=30.0)(keys(500), bar))
    grid = np.arange(SIZE) - (SIZE - 1) / 2
    xx = (turned * grid[None, None] ** 2).sum((1, 2))
    yy = (turned * grid[None, :, None] ** 2).sum((1, 2))
    xy = (turned * grid[None, :, None] * grid[None, None]).sum((1, 2))
    degrees = np.rad2deg(0.5 * np.arctan2(2 * xy, xx - yy))
    assert np.abs(degrees).max() < 30.5
    assert np.abs(degrees).max() > 28
    assert abs(degrees.std() - 30 / np.sqrt(3)) < 1.5


def test_resize_changes_the_aspect_and_keeps_the_longer_side():
    box = jnp.zeros((300, SIZE, SIZE)).at[:, 12:52, 20:44].set(1.0)  # 24 wide, 40 high
    resized = augmentation(resize_min=0.5, resize_max=2.5)(keys(300), box)
    width, height = (np.asarray(v) for v in ink_extents(resized))
    assert np.abs(np.maximum(width, height) - 40).max() <= 2
    aspect = width / height
    assert aspect.min() < 0.25  # 24/40 · 0.5/2.5 = 0.12 at the extreme
    assert aspect.max() > 1.5  # 24/40 · 2.5/0.5 = 3


def test_the_paper_augmentation_crops_nothing():
    bar = (
        jnp.zeros((500, SIZE, SIZE)).at[:, 12:52, 30:34].set(1.0)
    )  # narrow: stretching it is worst
    augment = augmentation(
        flip_left_right_prob=0.5, rotate_deg=30.0, resize_min=0.5, resize_max=2.5
    )
    border = np.ones((SIZE, SIZE), bool)
    border[1:-1, 1:-1] = False
    assert np.asarray(augment(keys(500), bar))[:, border].max() == 0


def test_a_row_depends_on_its_own_key_and_image_alone():
    augment = jax.jit(
        augmentation(
            rotate_deg=30.0, zoom=0.2, shear=0.2, shift_px=3.0, elastic_px=1.0, stroke_width=0.5,
            erase_prob=0.5, noise_std=0.05,
        )
    )  # fmt: skip
    images = jnp.array(blobs(8))
    whole = augment(keys(8), images)
    half = augment(keys(8)[4:], images[4:])
    np.testing.assert_array_equal(whole[4:], half)
    assert not np.allclose(whole[0], augment(keys(8)[::-1], images)[0])


def test_erasing_turns_one_rectangle_to_paper():
    images = jnp.ones((200, 40, 40))
    erased = np.asarray(augmentation(erase_prob=1.0, erase_max_side=0.4)(keys(200), images)) == 0
    for gap in erased:
        rows, columns = np.flatnonzero(gap.any(1)), np.flatnonzero(gap.any(0))
        assert gap.sum() == rows.size * columns.size  # a full rectangle
        assert 1 <= rows.size <= 17
        assert 1 <= columns.size <= 17


def test_a_certain_transposition_is_exact():
    images = blobs(3)
    transposed = augmentation(transpose_prob=1.0)(keys(3), jnp.array(images))
    np.testing.assert_allclose(transposed, np.swapaxes(images, 1, 2), atol=1e-6)


def test_a_transposed_image_keeps_its_longer_side_when_resized():
    box = jnp.zeros((50, SIZE, SIZE)).at[:, 12:52, 20:44].set(1.0)  # 24 wide, 40 high
    augment = augmentation(transpose_prob=1.0, resize_min=0.5, resize_max=2.5)
    width, height = (np.asarray(v) for v in ink_extents(augment(keys(50), box)))
    assert np.abs(np.maximum(width, height) - 40).max() <= 2


def test_a_crop_shows_a_window_that_lies_inside_the_image():
    # Each pixel holds its own place, so what is shown gives the place of the window.
    place = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE
    across = jnp.array(np.broadcast_to(place, (2000, SIZE, SIZE)))
    augment = augmentation(crop_min=0.6)
    for images, axis in ((across, 2), (across.swapaxes(1, 2), 1)):
        shown = np.asarray(augment(keys(2000), images))
        line = np.take(shown, SIZE // 2, axis=3 - axis)
        sides = (line[:, 40] - line[:, 20]) / 20 * SIZE
        starts = line[:, 20] - sides * 20.5 / SIZE
        np.testing.assert_allclose(
            line[:, 2:-2], (starts[:, None] + sides[:, None] * place)[:, 2:-2], atol=1e-5
        )
        assert 0.6 - 1e-5 <= sides.min() < 0.602
        assert 0.998 < sides.max() <= 1 + 1e-5
        assert starts.min() > -1e-5
        assert (starts + sides).max() < 1 + 1e-5
        shares = starts[sides < 0.9] / (1 - sides[sides < 0.9])
        assert shares.min() < 0.01
        assert shares.max() > 0.99


def test_contrast_and_brightness_follow_their_formulas():
    images = jnp.array(0.4 + 0.2 * np.random.default_rng(0).random((400, 8, 8), np.float32))
    mean = np.asarray(images).mean((1, 2), keepdims=True)
    changed = np.asarray(augmentation(contrast=0.5)(keys(400), images))
    factors = (changed - mean) / (images - mean)
    np.testing.assert_allclose(changed.mean((1, 2), keepdims=True), mean, atol=1e-6)
    factor = np.median(factors, (1, 2))
    np.testing.assert_allclose(changed, mean + factor[:, None, None] * (images - mean), atol=1e-5)
    assert 0.5 <= factor.min() < 0.52
    assert 1.48 < factor.max() <= 1.5
    change = np.asarray(augmentation(brightness=0.3)(keys(400), images) - images)
    assert np.ptp(change, (1, 2)).max() < 1e-6
    assert -0.3 <= change.min() < -0.29
    assert 0.29 < change.max() <= 0.3


def test_contrast_and_brightness_stay_between_paper_and_ink():
    images = jnp.array(np.random.default_rng(0).random((100, 8, 8), np.float32))
    changed = augmentation(contrast=1.0, brightness=1.0)(keys(100), images)
    assert changed.min() == 0
    assert changed.max() == 1


@pytest.mark.parametrize("fewer", [16, 20, 22])  # as many as there were before something came
def test_new_draws_leave_those_before_them_alone(fewer):
    whole = jax.random.uniform(jax.random.key(5), (Draw.COUNT,))
    np.testing.assert_array_equal(jax.random.uniform(jax.random.key(5), (fewer,)), whole[:fewer])


def test_every_number_is_drawn_for_one_use():
    places = [place for name, place in vars(Draw).items() if name.isupper() and name != "COUNT"]
    numbers = [np.arange(Draw.COUNT)[place].ravel() for place in places]
    np.testing.assert_array_equal(np.sort(np.concatenate(numbers)), np.arange(Draw.COUNT))


def displacements(count: int, size: int, elastic_px: float) -> np.ndarray:
    """Returns where each pixel is read from, (2, B, S, S) pixels (x, y) away from its own place."""
    # Each pixel holds its own place, so what is shown is where it was read.
    place = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
    across = jnp.broadcast_to(place, (count, size, size))
    augment = jax.jit(augmentation(elastic_px=elastic_px))
    moved = [augment(keys(count), images) - images for images in (across, across.swapaxes(1, 2))]
    return size * np.asarray(moved)


def test_an_elastic_field_has_its_size_and_no_jumps():
    size, elastic_px = 48, 1.5
    field = displacements(500, size, elastic_px)
    cell = size // ELASTIC_CELLS
    corners = np.arange(1, ELASTIC_CELLS) * cell  # those of the edge read paper from outside

    def spread(places):
        """The standard deviation at some places between two pixels."""
        around = [field[..., places - i, :][..., places - j] for i in (0, 1) for j in (0, 1)]
        return np.mean(around, axis=0).std()

    assert spread(corners) == pytest.approx(elastic_px, rel=0.04)
    # Halfway between four corners that were drawn independently.
    assert spread(corners[:-1] + cell // 2) == pytest.approx(elastic_px / 2, rel=0.04)
    inner = field[..., corners[0] : corners[-1], corners[0] : corners[-1]]
    across, down = inner.reshape(2, -1)
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.05
    # Half a cosine wave over a cell is at most so steep.
    reach = np.ptp(inner, axis=(2, 3))
    for axis in (2, 3):
        steepest = np.abs(np.diff(inner, axis=axis)).max(axis=(2, 3))
        assert (steepest < np.pi / 2 / cell * reach * 1.02).all()


def test_strokes_grow_to_the_dilated_image_and_shrink_to_the_eroded():
    images = blobs(3)
    wider, narrower = (
        morphology(images, size=(1, 3, 3), mode="nearest")
        for morphology in (ndimage.grey_dilation, ndimage.grey_erosion)
    )
    change = jax.jit(lambda amount: change_stroke_width(jnp.array(images), jnp.full(3, amount)))
    np.testing.assert_array_equal(change(0.0), images)
    for share in (0.3, 1.0):
        expected = images + share * (wider - images), images + share * (narrower - images)
        np.testing.assert_allclose(change(share), expected[0], atol=1e-6)
        np.testing.assert_allclose(change(-share), expected[1], atol=1e-6)


def test_stroke_widths_stay_in_range_and_use_it():
    images = jnp.zeros((500, 8, 8)).at[:, 2:6, 2:6].set(0.5).at[:, 3:5, 3:5].set(1.0)
    changed = np.asarray(jax.jit(augmentation(stroke_width=0.6))(keys(500), images))
    # Around the middle 0.5 grows to 1, and shrinks to 0.
    amounts = (changed[:, 2, 2] - 0.5) / 0.5
    np.testing.assert_allclose(changed[:, 3, 3], np.minimum(1, 1 + amounts / 2), atol=1e-6)
    assert -0.6 <= amounts.min() < -0.59
    assert 0.59 < amounts.max() <= 0.6
    assert abs(amounts.mean()) < 0.06  # four standard deviations


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_views_turn_zoom_and_mirror(count, flips):
    views, weights = create_tta_views(count, flips, upright_prior=0.4)
    assert views.dtype == weights.dtype == np.float32
    expected = np.repeat([0.4, 0.2, 0.2, 0.2] if flips else [1.0], count)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert len(views) == count * (4 if flips else 1)
    np.testing.assert_array_equal(views[0], np.eye(2))
    # A turn or a mirroring keeps areas, a zoom by z multiplies them by z².
    areas = np.array([1, 1, 1, 0.92**2, 1.08**2])[:count]
    handed = [1, -1, -1, 1] if flips else [1]
    determinants = np.linalg.det(views).reshape(-1, count)
    np.testing.assert_allclose(determinants, np.outer(handed, areas), atol=1e-6)
    angles = np.rad2deg(np.arctan2(views[:count, 0, 1], views[:count, 0, 0]))
    np.testing.assert_allclose(angles, [0, 6, -6, 0, 0][:count], atol=1e-4)

    def as_set(maps):
        return {tuple(row) for row in maps.astype(float).round(5).reshape(-1, 4).tolist()}

    assert len(as_set(views)) == len(views)
    if flips:  # a mirrored image is seen under the same views
        for mirror in (np.diag([-1, 1]), np.diag([1, -1]), -np.eye(2)):
            assert as_set(views @ mirror) == as_set(views)


def test_mirrored_images_are_known_by_their_keys():
    mark = jnp.zeros((400, 8, 8)).at[:, 1, 2].set(1.0)
    flips = options(flip_left_right_prob=0.3, flip_up_down_prob=0.2)
    augmented = np.asarray(make_augment(flips)(keys(400), mark))
    mirrored = np.asarray(make_is_mirrored(flips)(keys(400)))
    np.testing.assert_array_equal(mirrored, augmented[:, 1, 2] == 0)
    assert 0.34 < mirrored.mean() < 0.54  # 1 - 0.7 * 0.8 = 0.44, four standard deviations
