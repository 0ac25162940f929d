"""Distorted test images: exact where geometry is exact, SciPy elsewhere; every record counted."""

import hashlib

import numpy as np
import pytest
from scipy import ndimage

from hccr_jax import main
from hccr_jax.data import splits
from hccr_jax.data.from_config import dataset_name, load
from hccr_jax.data.images.normalize import PAPER, ink_box, normalize
from hccr_jax.evaluation import distortions
from hccr_jax.evaluation.distortions import DRAW, Source, distort, distorted_images
from hccr_jax.runtime.worker_pool import WorkerPool


def blob(height: int, width: int, paper: int = 0) -> np.ndarray:
    """Returns smooth ink, inside a border of `paper` pixels of paper."""
    noise = np.random.default_rng(0).random((height, width))
    ink = ndimage.gaussian_filter(noise, 2.0)
    ink = 255 * (ink - ink.min()) / (ink.max() - ink.min())
    return np.pad(ink.astype(np.uint8), paper, constant_values=PAPER)


def bar(height: int, width: int) -> np.ndarray:
    """Returns a black rectangle inside ten pixels of paper."""
    return np.pad(np.zeros((height, width), np.uint8), 10, constant_values=PAPER)


def dark_box(bitmap: np.ndarray) -> tuple[int, int, int, int] | None:
    """Returns the box of what is darker than half."""
    return ink_box(np.where(bitmap < 128, 0, 255).astype(np.uint8))


def test_flips_reverse_the_array() -> None:
    bitmap = blob(7, 12)
    np.testing.assert_array_equal(distort(bitmap, flip_left_right=True), bitmap[:, ::-1])
    np.testing.assert_array_equal(distort(bitmap, flip_up_down=True), bitmap[::-1])
    np.testing.assert_array_equal(distort(bitmap, True, True), np.rot90(bitmap, 2))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_quarter_turn_is_exact_and_counter_clockwise(quarters: int) -> None:
    bitmap = blob(20, 20)
    turned = distort(bitmap, angle_deg=90.0 * quarters)
    np.testing.assert_array_equal(turned, np.rot90(bitmap, quarters))


def test_what_is_not_square_is_padded_with_paper_before_it_is_turned() -> None:
    bitmap = blob(8, 20)
    square = np.pad(bitmap, ((6, 6), (0, 0)), constant_values=PAPER)
    np.testing.assert_array_equal(distort(bitmap, angle_deg=90.0), np.rot90(square))


@pytest.mark.parametrize("angle", [-60.0, -17.3, 25.0])
def test_rotation_is_scipys(angle: float) -> None:
    bitmap = blob(40, 40, paper=20)
    expected = ndimage.rotate(bitmap.astype(np.float64), angle, reshape=False, order=1, cval=PAPER)
    np.testing.assert_allclose(distort(bitmap, angle_deg=angle), expected, atol=1.01)


def test_ink_that_leaves_the_square_is_lost_and_paper_comes_in() -> None:
    turned = distort(np.zeros((40, 40), np.uint8), angle_deg=45.0)
    assert turned.shape == (40, 40)
    assert (turned[[0, 0, -1, -1], [0, -1, 0, -1]] == PAPER).all()
    # A square turned by 45° in its own frame: the regular octagon, 2(√2 − 1) of it.
    assert (turned == 0).mean() == pytest.approx(2 * (2**0.5 - 1), abs=0.03)


def test_no_distortion_gives_the_bitmap() -> None:
    bitmap = blob(31, 18)
    assert distort(bitmap) is bitmap


@pytest.mark.parametrize(("width_factor", "height_factor"), [(2.0, 1.0), (0.5, 2.5), (2.5, 0.5)])
def test_resize_moves_the_edges_of_a_bar(width_factor: float, height_factor: float) -> None:
    resized = distort(bar(30, 60), width_factor=width_factor, height_factor=height_factor)
    assert resized.shape == (round(50 * height_factor), round(80 * width_factor))
    edges = np.array([10, 40]) * height_factor, np.array([10, 70]) * width_factor
    assert dark_box(resized) == tuple(np.concatenate(edges).astype(int))


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (40, 40))
    shrunk = distort(stripes, width_factor=0.5)
    assert shrunk[:, 2:-2].min() > 120
    assert shrunk[:, 2:-2].max() < 135


@pytest.mark.parametrize(
    ("count", "requested", "size"),
    [(5973, 3000, 3000), (9000, 3000, 3000), (24, 3000, 24), (50, 0, 50)],
)
def test_sets_have_their_sizes_and_no_image_twice(count: int, requested: int, size: int) -> None:
    sets = distortions.draw_sets(count, requested)
    assert list(sets) == ["rotation", "flip", "resize"]
    for draws in sets.values():
        assert len(np.unique(draws["row"])) == len(draws) == size
    different = np.unique(np.concatenate([draws["row"] for draws in sets.values()]))
    assert len(different) == min(count, 3 * size)


def test_draws_are_those_of_the_paper() -> None:
    sets = distortions.draw_sets(9000, 3000)
    changed = {
        name: {field for field in DRAW.names or () if len(np.unique(draws[field])) > 1} - {"row"}
        for name, draws in sets.items()
    }
    assert changed == {
        "rotation": {"angle_deg"},
        "flip": {"flip_left_right", "flip_up_down"},
        "resize": {"width_factor", "height_factor"},
    }
    flip, resize = sets["flip"], sets["resize"]
    kinds = 2 * flip["flip_left_right"] + flip["flip_up_down"]
    assert np.bincount(kinds).tolist() == [0, 1000, 1000, 1000]
    protocol = distortions.draw_paper_protocol(9000)
    for values, low, high in (
        (sets["rotation"]["angle_deg"], -25, 25),
        (resize["width_factor"], 0.5, 2.5),
        (resize["height_factor"], 0.5, 2.5),
        (protocol["angle_deg"], -30, 30),
    ):
        deciles = np.quantile(values, np.linspace(0, 1, 11))
        np.testing.assert_allclose(deciles, np.linspace(low, high, 11), atol=0.03 * (high - low))
        assert low <= values.min() <= values.max() <= high
    assert abs(np.corrcoef(resize["width_factor"], resize["height_factor"])[0, 1]) < 0.05
    assert np.array_equal(protocol["row"], np.arange(9000))
    kinds = 2 * protocol["flip_left_right"] + protocol["flip_up_down"]
    np.testing.assert_allclose(np.bincount(kinds) / 9000, 0.25, atol=0.02)


def test_stretches_change_the_aspect_and_keep_the_area() -> None:
    draws = distortions.draw_stretches(100, 7, [0.2, 1.0, 5.0])
    assert draws.shape == (3, 7)
    aspect = draws["width_factor"] / draws["height_factor"]
    np.testing.assert_allclose(aspect, np.tile([[0.2], [1.0], [5.0]], 7))
    np.testing.assert_allclose(draws["width_factor"] * draws["height_factor"], 1.0)
    assert (draws["row"] == draws["row"][:1]).all()


def test_draws_never_change() -> None:
    """Results of different versions are compared: the images must stay the same."""
    sets = distortions.draw_sets(5973, 3000)
    draws = np.concatenate([*sets.values(), distortions.draw_paper_protocol(5973)])
    assert hashlib.sha256(draws.tobytes()).hexdigest()[:16] == "9f8ecb2cbbd5d4b1"


def test_images_are_in_the_normal_form_of_the_run(tiny_job: list[str]) -> None:
    config = main.parse(["main", *tiny_job]).config
    split = load(config, "train")
    source = Source(dataset_name(config), config.data.data_dir, "train", 48, 3, "adaptive")
    draws = np.tile(distortions.draw_sets(len(split.labels), 0)["rotation"], 4)  # several tasks
    with WorkerPool() as pool:
        images = distorted_images(source, draws, pool, "rotation")
    bitmaps = splits.load_bitmaps(source.name, source.data_dir, "train", draws["row"])
    for image, bitmap, angle in zip(images, bitmaps, draws["angle_deg"].tolist(), strict=True):
        distorted = distort(bitmap, angle_deg=angle)
        np.testing.assert_array_equal(image, normalize(distorted, 48, 3, "adaptive"))
