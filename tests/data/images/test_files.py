"""Picture files of every kind have the grey values that they were saved with, or are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from hccr_jax.data.images import files, ink
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError

BITMAP = draw("永", create_writer(1), np.random.default_rng(1))
GREY = np.pad(BITMAP, 20, constant_values=255)


def save(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def read(data: bytes) -> np.ndarray:
    (picture,) = files.read_pictures(io.BytesIO(data), "picture")
    return picture.grey


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_lossless_kinds_are_read_exactly(kind: str, options: dict, mode: str):
    np.testing.assert_array_equal(
        read(save(Image.fromarray(GREY).convert(mode), kind, **options)), GREY
    )


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_kinds_are_read_nearly(kind: str):
    difference = read(save(Image.fromarray(GREY), kind, quality=95)).astype(int) - GREY
    assert np.abs(difference).mean() < 3


def test_every_suffix_is_of_a_kind_that_is_read():
    for suffix in files.SUFFIXES:
        kind = Image.registered_extensions()[suffix]
        assert read(save(Image.fromarray(GREY), kind)).shape == GREY.shape


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("PNG", GREY.astype(np.uint16)),  # of 16 bits, 8 are used
        ("PNG", GREY.astype(np.uint16) * 257),
        ("TIFF", GREY.astype(np.uint16)),
        ("TIFF", GREY.astype(np.int32) * 257),
        ("TIFF", GREY.astype(np.float32)),
        ("TIFF", GREY.astype(np.float32) / 255),
        ("TIFF", np.where(GREY < 255, GREY.astype(np.float32), np.inf).clip(0, 255)),
    ],
)
def test_wider_numbers_have_the_values_of_8_bits(kind: str, values: np.ndarray):
    np.testing.assert_array_equal(read(save(Image.fromarray(values), kind)), GREY)


@pytest.mark.parametrize("value", [0, 30, 255])
def test_ink_without_paper_is_found_whatever_its_colour(value: int):
    pixels = np.full((*GREY.shape, 4), value, np.uint8)
    pixels[..., 3] = 255 - GREY
    form = normalize(ink.to_bitmap(read(save(Image.fromarray(pixels), "PNG"))), 64, 4)
    expected = normalize(BITMAP, 64, 4)
    assert np.corrcoef(form.ravel(), expected.ravel())[0, 1] > 0.98


def test_a_photograph_of_48_megapixels_is_read():
    photograph = np.full((6000, 8000), 230, np.uint8)
    large = np.asarray(Image.fromarray(GREY).resize((3000, 3000)))
    photograph[1500:4500, 2500:5500] = np.minimum(large, 230)
    form = normalize(ink.to_bitmap(files.to_grey(photograph)), 64, 4)
    expected = normalize(ink.to_bitmap(large), 64, 4)
    assert np.corrcoef(form.ravel(), expected.ravel())[0, 1] > 0.98


def test_what_is_too_large_is_refused_with_a_remedy():
    with pytest.raises(InputError, match="reduce it"):
        files.to_grey(np.broadcast_to(np.uint8(255), (9000, 9000)))


def test_several_pages_are_refused():
    pages = [Image.fromarray(GREY)] * 2
    data = save(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(InputError, match=r"^picture: 2 pages: save each as a file$"):
        read(data)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "WEBP"])
def test_damaged_bytes_are_read_or_refused(kind: str):
    data, rng = save(Image.fromarray(GREY), kind), np.random.default_rng(0)
    messages = []
    for cut in [None, *rng.integers(12, len(data), 30)]:
        damaged = bytearray(data[:cut])
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] = rng.integers(256)
        try:
            read(bytes(damaged))
        except InputError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def test_a_gnt_file_is_not_mistaken_for_another_kind():
    """A record begins with its size, which may read "BM"."""
    width, height = next(
        (w, h)
        for w in range(1, 200)
        for h in range(1, 2000)
        if (10 + w * h) & 0xFFFF == int.from_bytes(b"BM", "little")
    )
    head = (10 + width * height).to_bytes(4, "little") + "永".encode("gb2312")
    head += width.to_bytes(2, "little") + height.to_bytes(2, "little")
    (picture,) = files.read_pictures(io.BytesIO(head + bytes(width * height)), "x")
    assert (picture.label, picture.grey.shape) == ("永", (height, width))
