"""The normal form against SciPy's resampling, and the aspect ratio of the ink."""

import numpy as np
import pytest
from scipy import ndimage

from hccr_jax.data.images.normalize import ink_box, normalize, squared_aspect

IMAGE_PX, MARGIN_PX = 64, 4
INSIDE_PX = IMAGE_PX - 2 * MARGIN_PX


def rectangle(height: int, width: int) -> np.ndarray:
    """Returns a bitmap with a full rectangle of ink, off its centre."""
    bitmap = np.full((height + 20, width + 9), 255, np.uint8)
    bitmap[13 : 13 + height, 2 : 2 + width] = 0
    return bitmap


def drawing(height: int, width: int) -> np.ndarray:
    """Returns a bitmap of random greys that is ink to its edges."""
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 250, (height, width)).astype(np.uint8)


def sides(form: np.ndarray) -> tuple[int, int]:
    """Returns height and width of the pixels that are at least half ink."""
    box = ink_box(np.where(form > 127, 0, 255))
    assert box is not None
    top, bottom, left, right = box
    assert abs(top + bottom - IMAGE_PX) <= 1, "centred"
    assert abs(left + right - IMAGE_PX) <= 1, "centred"
    return bottom - top, right - left


def new_ratio(height: int, width: int, aspect: str) -> float:
    """Returns the shorter side of the result over the longer, by the published formula."""
    ratio = min(height, width) / max(height, width)
    return np.sqrt(np.sin(np.pi / 2 * ratio)) if aspect == "adaptive" else ratio


def test_an_elongated_character_comes_nearer_to_a_square() -> None:
    ratios = np.linspace(0.001, 1, 200)
    ours = np.array([squared_aspect(ratio) for ratio in ratios])
    np.testing.assert_allclose(ours, np.sqrt(np.sin(np.pi / 2 * ratios)))
    assert (np.diff(ours) > 0).all()
    assert (ours[:-1] > ratios[:-1]).all()
    assert ours[-1] == 1.0


@pytest.mark.parametrize(("height", "width"), [
    (40, 20), (30, 90), (150, 10), (120, 119), (50, 50), (9, 7), (1, 60), (200, 1), (1, 1)
])  # fmt: skip
def test_the_sides_are_those_of_the_adaptive_rule(height: int, width: int) -> None:
    form = normalize(rectangle(height, width), IMAGE_PX, MARGIN_PX, "adaptive")
    expected = np.full(2, float(INSIDE_PX))
    expected[int(height > width)] *= new_ratio(height, width, "adaptive")
    np.testing.assert_allclose(sides(form), expected, atol=1.0)


@pytest.mark.parametrize(("height", "width"), [(40, 20), (30, 90), (150, 50), (50, 50)])
def test_kept_sides_keep_their_ratio(height: int, width: int) -> None:
    form = normalize(rectangle(height, width), IMAGE_PX, MARGIN_PX)
    np.testing.assert_array_equal(
        form, normalize(rectangle(height, width), IMAGE_PX, MARGIN_PX, "keep")
    )
    expected = INSIDE_PX * np.array([height, width]) / max(height, width)
    np.testing.assert_allclose(sides(form), expected, atol=1.0)


@pytest.mark.parametrize("aspect", ["keep", "adaptive"])
@pytest.mark.parametrize(("height", "width"), [(31, 50), (50, 9), (20, 20), (1, 40), (55, 2)])
def test_enlarging_is_scipys_linear_interpolation(height: int, width: int, aspect: str) -> None:
    bitmap, longer = drawing(height, width), max(height, width)
    results = np.full(2, float(INSIDE_PX))  # the sides of the ink in the result
    results[int(height > width)] *= new_ratio(height, width, aspect)
    scale = np.array([height, width]) / results
    # Between pixel indices; in both images the centre of the ink stays the centre.
    offset = (np.array([height, width]) - 1) / 2 - scale * (IMAGE_PX - 1) / 2
    exact = ndimage.affine_transform(
        255.0 - bitmap, scale, offset, (IMAGE_PX, IMAGE_PX), order=1, mode="grid-constant"
    )
    assert longer <= INSIDE_PX, "it is enlarged"
    form = normalize(bitmap, IMAGE_PX, MARGIN_PX, aspect)
    np.testing.assert_allclose(form, exact, atol=0.51)


@pytest.mark.parametrize("aspect", ["keep", "adaptive"])
@pytest.mark.parametrize(("height", "width"), [(31, 50), (90, 17), (140, 120), (1, 70)])
def test_a_transposed_bitmap_has_the_transposed_form(height: int, width: int, aspect: str) -> None:
    bitmap = drawing(height, width)
    form = normalize(bitmap, IMAGE_PX, MARGIN_PX, aspect).astype(int)
    transposed = normalize(bitmap.T, IMAGE_PX, MARGIN_PX, aspect)
    np.testing.assert_allclose(transposed.T, form, atol=1)  # sums in another order


def test_a_square_is_the_same_in_both_aspects() -> None:
    for side in (5, 40, 100):
        forms = [normalize(drawing(side, side), 32, 2, aspect) for aspect in ("keep", "adaptive")]
        np.testing.assert_array_equal(*forms)


@pytest.mark.parametrize("aspect", ["keep", "adaptive"])
def test_paper_alone_gives_zeros(aspect: str) -> None:
    blank = np.full((7, 90), 255, np.uint8)
    np.testing.assert_array_equal(normalize(blank, 32, 2, aspect), np.zeros((32, 32)))
