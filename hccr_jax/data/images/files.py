"""Pictures from files, streams and arrays, converted to grey values.

The bytes are untrusted: a file's type follows from its first bytes, its size is checked before it
is decoded, and any fault is an `InputError` of one line.
"""

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageOps

from hccr_jax.data.casia import charset, gnt
from hccr_jax.data.images.normalize import PAPER
from hccr_jax.data.images.strays import has_lines
from hccr_jax.errors import InputError
from hccr_jax.paths import shown

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")  # of picture files
KINDS = "PNG, JPEG, BMP, TIFF or WebP"
MAX_PIXELS = 1 << 26  # of a picture; above that it is not decoded
MAX_BYTES = 1 << 28
WHITE_INK = 200  # above this grey value, ink without paper is white
LINES_PX = 1024  # longer side of a picture in which coloured lines are looked for
MIN_CHROMA = 60  # between the channels of a pixel that has a colour

_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WEBP",
}


class Picture(NamedTuple):
    """A grey picture.

    Attributes:
      grey: uint8 (H, W).
      record: its number in a GNT file; None for other files.
      label: the character by its tag in a GNT file, or None.
    """

    grey: np.ndarray
    record: int | None = None
    label: str | None = None


def read_pictures(stream: BinaryIO, name: str) -> Iterator[Picture]:
    """Yields the picture of a file of one of `KINDS`, or those of a GNT file.

    Args:
      stream: the file, opened to read bytes; need not be seekable.
      name: the file's name, for messages.

    Raises:
      InputError: the file is of another type, damaged, or too large.
    """
    head = stream.read(gnt.HEADER.size)
    kind = next((kind for start, kind in _SIGNATURES.items() if head.startswith(start)), "")
    if _is_gnt(head):
        records = gnt.read_records(_Rejoined(head, stream), name)  # type: ignore[arg-type]
        for number, record in enumerate(records):
            yield Picture(record.bitmap, number, charset.tag_to_character(record.tag))
    elif kind:
        data = head + stream.read(MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise InputError(f"{name}: more than {MAX_BYTES >> 20} MiB")
        yield Picture(_decode(data, kind, name))
    else:
        raise InputError(f"{name}: {f'no {KINDS} and no GNT file' if head else 'empty'}")


def to_grey(image: Image.Image | np.ndarray, name: str = "image") -> np.ndarray:
    """Returns a picture as grey values, composited on white where it is transparent.

    White ink is composited on black.

    Args:
      image: of Pillow, in any mode, rotated by its EXIF data; or an array (H, W), (H, W, 1), or
        (H, W, 3) or (H, W, 4) of red, green, blue and alpha: uint8, bool, or float from 0 to 1.
      name: for messages.

    Returns:
      uint8 (H, W).

    Raises:
      InputError: another shape or dtype, no pixel, too many, or damaged data.

    >>> to_grey(np.array([[[255, 255, 255, 255], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)).tolist()
    [[255, 255, 0]]
    """
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    _check_size(image.size, name)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            return _to_8_bits(np.asarray(image))
        if image.has_transparency_data:
            image = _on_paper(image.convert("RGBA"))
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"))
        return _to_grey(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, struct.error, KeyError) as error:
        raise _damaged(name, error) from error


def _on_paper(image: Image.Image) -> Image.Image:
    """Returns a transparent picture on white, or on black if its ink is white."""
    opaque = np.asarray(image.convert("LA"))[np.asarray(image.getchannel("A")) > 127, 0]
    ground = 0 if opaque.size and opaque.min() > WHITE_INK else PAPER
    return Image.alpha_composite(Image.new("RGBA", image.size, (ground,) * 3 + (255,)), image)


def _to_grey(image: Image.Image) -> np.ndarray:
    """Returns a colour picture as grey values, uint8 (H, W), without a coloured grid or frame.

    Where printed lines run all across the picture, but not in red, green or blue light alone, that
    is used instead, and what has this colour is paper.
    """
    grey = image.convert("L")
    small = np.asarray(image.reduce(-(-max(image.size) // LINES_PX)))
    if np.ptp(small.astype(np.int16), axis=2).max() > MIN_CHROMA and _has_lines(small.mean(axis=2)):
        for channel in range(3):
            if not _has_lines(small[..., channel]):
                light = image.getchannel(channel)
                is_coloured = np.asarray(ImageChops.subtract(light, grey)) > MIN_CHROMA // 2
                values = np.asarray(light)
                return np.where(is_coloured, np.median(values), values).astype(np.uint8)
    return np.asarray(grey)


def _has_lines(values: np.ndarray) -> bool:
    return has_lines(values < (np.median(values) + np.percentile(values, 0.1)) / 2)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Returns values of 16 or 32 bits, or floats, as uint8 of the smallest range they fit into."""
    values = np.maximum(np.nan_to_num(values.astype(np.float32)), 0.0)
    largest = float(values.max())
    ranges = (255.0, 65535.0, largest) if largest > 1 else (max(largest, 1.0),)
    limit = next(limit for limit in ranges if largest <= limit)
    return np.rint(values * (PAPER / limit)).astype(np.uint8)


class _Rejoined:
    """A stream whose first bytes have been read."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int = -1) -> bytes:
        head, self._head = self._head, b""
        if not head:
            return self._stream.read(size)
        if size < len(head):
            head, self._head = head[:size], head[size:]
            return head
        return head + self._stream.read(size - len(head))


def open_pictures(path: Path) -> Iterator[Picture]:
    """Yields the pictures of a file, see `read_pictures`.

    Raises:
      InputError: also if the file cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            yield from read_pictures(stream, shown(path))
    except OSError as error:
        raise InputError(f"{shown(path)}: {error.strerror or error}") from error


def _is_gnt(head: bytes) -> bool:
    if len(head) < gnt.HEADER.size:
        return False
    size, _, width, height = gnt.HEADER.unpack(head)
    return 0 < width * height == size - gnt.HEADER.size


def _decode(data: bytes, kind: str, name: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of sizes that are refused below, and of unusual metadata
            image = Image.open(io.BytesIO(data), formats=[kind])
            _check_size(image.size, name)
            pages = 1 if kind == "JPEG" else getattr(image, "n_frames", 1)
            if pages > 1:
                raise InputError(f"{name}: {pages} pages: save each as a file")
            image.load()
            return to_grey(image, name)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{name}: more than {MAX_PIXELS // 10**6} million pixels: reduce it"
        ) from error
    except InputError:
        raise
    except Exception as error:  # a decoder may raise anything on damaged bytes
        raise _damaged(name, error) from error


def _damaged(name: str, error: Exception) -> InputError:
    return InputError(f"{name}: damaged: {error or type(error).__name__}")


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if not width * height:
        raise InputError(f"{name}: {width} × {height} pixels: empty")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name}: {width} × {height} pixels: at most {MAX_PIXELS // 10**6} million are read: "
            f"reduce it"
        )


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2:]
    if array.ndim not in (2, 3) or channels not in ((), (1,), (3,), (4,)):
        raise InputError(
            f"{name}: an array of shape {array.shape}: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) "
            f"is needed"
        )
    _check_size((array.shape[1], array.shape[0]), name)
    values: Any = array[..., 0] if channels == (1,) else array
    if values.dtype == bool:
        values = values * np.uint8(PAPER)
    elif np.issubdtype(values.dtype, np.floating) and values.min() >= 0 and values.max() <= 1:
        values = np.rint(values * PAPER).astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(
            f"{name}: an array of {array.dtype}: uint8, bool or float from 0 to 1 is needed"
        )
    return Image.fromarray(np.ascontiguousarray(values))
