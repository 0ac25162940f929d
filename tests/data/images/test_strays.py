"""Lines, grids, specks and holes are removed, and pens evened, before a character is read."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from hccr_jax.data.images import files
from hccr_jax.data.images.ink import is_light_on_dark, to_bitmap
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.images.strays import distance, stroke_width
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError

CHARACTERS = "永国我中森口一"
RED, GREEN, GREY = (220, 40, 40), (90, 190, 90), (60, 60, 60)


def character(index: int) -> np.ndarray:
    """Returns a simulated character on paper, uint8 (H, W)."""
    bitmap = draw(CHARACTERS[index], create_writer(index), np.random.default_rng(index))
    return np.pad(bitmap, 12, constant_values=255)


def form(picture: np.ndarray) -> np.ndarray:
    return normalize(to_bitmap(files.to_grey(picture)), 64, 4, "keep").astype(float)


def line_at_the_left(picture: np.ndarray) -> np.ndarray:
    picture[:, :3] = 0
    return picture


def frame(width: int) -> Callable[[np.ndarray], np.ndarray]:
    def add(picture: np.ndarray) -> np.ndarray:
        return np.pad(picture[width:-width, width:-width], width, constant_values=0)

    return add


def speck(picture: np.ndarray) -> np.ndarray:
    picture[1:4, 1:4] = 0
    return picture


def hole(picture: np.ndarray) -> np.ndarray:
    picture = np.pad(picture, ((0, 0), (24, 0)), constant_values=255)
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    picture[(y - picture.shape[0] // 2) ** 2 + (x - 12) ** 2 <= 100] = 20
    return picture


def grid(colour: tuple[int, int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that prints a rice grid (米字格) under the writing."""

    def add(picture: np.ndarray) -> np.ndarray:
        (height, width), lines = picture.shape, np.zeros(picture.shape, bool)
        lines[[0, -1, height // 2]] = lines[:, [0, -1, width // 2]] = True
        for x in range(width):
            y = min(x * height // width, height - 1)
            lines[[y, height - 1 - y], x] = True
        coloured = np.repeat(picture[..., None], 3, axis=2)
        coloured[lines] = np.minimum(coloured[lines], colour)
        return coloured

    return add


STRAYS = {
    "line at the left edge": line_at_the_left, "frame of 1 px": frame(1), "frame of 3 px": frame(3),
    "speck": speck, "punched hole": hole, "red rice grid": grid(RED),
    "green rice grid": grid(GREEN), "black rice grid": grid(GREY),
}  # fmt: skip


@pytest.mark.parametrize("index", range(len(CHARACTERS)), ids=list(CHARACTERS))
@pytest.mark.parametrize("name", STRAYS)
def test_a_character_is_read_as_without(name: str, index: int) -> None:
    clean = form(character(index))
    got = form(STRAYS[name](character(index)))
    # Mean of 4,096 pixels, of 255; with what was added left in, 7 to 48. A grid as dark as the
    # writing takes along the pixels where both run side by side.
    limit = 8 if name.startswith("black") else 2 if "grid" in name else 0.01
    assert np.abs(got - clean).mean() <= limit


@pytest.mark.parametrize("index", range(len(CHARACTERS)), ids=list(CHARACTERS))
def test_a_clean_bitmap_of_casia_keeps_its_pixels(index: int) -> None:
    bitmap = draw(CHARACTERS[index], create_writer(index), np.random.default_rng(index))
    got = to_bitmap(np.pad(bitmap, 12, constant_values=255)).astype(float)
    assert np.abs(np.subtract(got.shape, bitmap.shape)).max() <= 2
    ink = (got < 250).sum() / (bitmap < 250).sum()
    assert 0.9 < ink < 1.1


@pytest.mark.parametrize("side", [(60, 60), (200, 300)])
def test_the_ink_of_a_straight_box_is_dark(side: tuple[int, int]) -> None:
    # 口 drawn straight and cropped: ink all round, as of a frame.
    box = np.full(side, 255, np.uint8)
    box[:4] = box[-4:] = 0
    box[:, :4] = box[:, -4:] = 0
    assert not is_light_on_dark(box)
    assert is_light_on_dark(255 - box)
    bitmap = to_bitmap(box)
    assert bitmap[0, bitmap.shape[1] // 2] < 200
    assert bitmap[bitmap.shape[0] // 2, bitmap.shape[1] // 2] == 255


def test_a_bar_that_fills_its_picture_is_ink() -> None:
    assert to_bitmap(np.zeros((9, 60), np.uint8)).max() < 200  # 一, bilevel


@pytest.mark.parametrize(("side", "pen"), [(1000, 1), (1000, 2), (1000, 8), (4000, 3)])
def test_strokes_of_a_thin_pen_get_the_width_of_casias(side: int, pen: int) -> None:
    # 1 and 99 % of CASIA-HWDB1.1: 0.015 and 0.096 of the longer side of the ink.
    image = Image.new("L", (side, side), 255)
    for start, stop in (
        ((0.2, 0.3), (0.8, 0.3)),
        ((0.5, 0.1), (0.5, 0.9)),
        ((0.2, 0.9), (0.7, 0.5)),
    ):
        points = [tuple(round(side * c) for c in point) for point in (start, stop)]
        ImageDraw.Draw(image).line(points, fill=0, width=pen)
    bitmap = to_bitmap(np.asarray(image))
    width = stroke_width(distance(bitmap < 200))
    assert 0.013 < width / max(bitmap.shape) < 0.096


@pytest.mark.parametrize("width", [1, 3, 9])
def test_the_width_of_a_bar_is_its_width(width: int) -> None:
    bar = np.zeros((40, 40), bool)
    bar[10 : 10 + width, 5:35] = True
    assert stroke_width(distance(bar)) == pytest.approx(width, abs=1)
    expected = ndimage.distance_transform_edt(bar)
    np.testing.assert_array_equal(distance(bar), expected)  # SciPy's, where nothing is at the edge


def test_blank_paper_in_shadow_has_no_ink() -> None:
    y, x = np.mgrid[-1:1:200j, -1:1:300j]
    light = 255 * (0.65 + 0.15 * x - 0.1 * y + 0.2 * np.exp(-8 * (x**2 + y**2)))
    with pytest.raises(InputError, match="no ink found"):
        to_bitmap(np.rint(light).astype(np.uint8))


def test_a_picture_of_three_pixels_is_refused_with_its_size() -> None:
    with pytest.raises(InputError, match="3 × 1 pixels: too few"):
        to_bitmap(np.zeros((1, 3), np.uint8))
