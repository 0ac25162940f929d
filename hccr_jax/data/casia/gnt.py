"""The GNT format of CASIA-HWDB: a file is a sequence of tagged grey bitmaps.

Source: CASIA-HWDB file format description. A record is a uint32 size (10 + width * height), the two
bytes of the tag (high byte first), a uint16 width, a uint16 height, then the rows from the top; the
numbers are little-endian, 255 is paper.
"""

import io
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from hccr_jax.errors import InputError

HEADER = struct.Struct("<I2sHH")
# A scanned character has some ten thousand pixels; a header that declares more than this is
# damaged, and must not make the reader allocate gigabytes.
MAX_PIXELS = 1 << 24
_CHUNK_BYTES = 1 << 20

OnFault = Callable[[str, int], None]


class Record(NamedTuple):
    """One record: its tag as stored, its uint8 (H, W) bitmap, its byte offset in the file."""

    tag: bytes
    bitmap: np.ndarray
    offset: int


def pack_record(tag: bytes, bitmap: np.ndarray) -> bytes:
    """Returns the bytes of one record: the inverse of `read_records`.

    Args:
      tag: two bytes, high byte first.
      bitmap: uint8 (H, W), both from 1 to 65535, 255 is paper.

    Raises:
      ValueError: the tag or the bitmap does not fit the format.

    >>> pack_record(bytes.fromhex("b0a1"), np.array([[255, 0, 7]], np.uint8)).hex(" ")
    '0d 00 00 00 b0 a1 03 00 01 00 ff 00 07'
    """
    if len(tag) != 2:
        raise ValueError(f"a tag has 2 bytes, got {len(tag)}")
    if bitmap.dtype != np.uint8 or bitmap.ndim != 2 or not 0 < bitmap.size <= MAX_PIXELS:
        raise ValueError(f"a bitmap is uint8 (H, W), got {bitmap.dtype} {bitmap.shape}")
    height, width = bitmap.shape
    return HEADER.pack(HEADER.size + bitmap.size, tag, width, height) + bitmap.tobytes()


def read_records(
    data: BinaryIO | bytes, source: str, on_fault: OnFault | None = None
) -> Iterator[Record]:
    """Yields the records of one GNT file, holding one record in memory at a time.

    Args:
      data: the whole file as bytes, or a binary file whose `read(n)` is short only at the end.
      source: the file's name, for error messages.
      on_fault: called with (reason, bytes lost) at a fault, after which reading continues if
        possible; None stops at the first fault. A record of which only the size field is wrong is
        still yielded, and an empty bitmap skipped, if the header that follows width * height bytes
        later is sound (or the file ends there); after any other fault the rest of the file is lost.

    Raises:
      InputError: at a fault, naming file and byte offset, if `on_fault` is None.

    >>> one = pack_record(b"A\\0", np.full((2, 3), 9, np.uint8))
    >>> [(r.tag, r.bitmap.shape, r.offset) for r in read_records(one + one, "a.gnt")]
    [(b'A\\x00', (2, 3), 0), (b'A\\x00', (2, 3), 16)]
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    offset, header = 0, stream.read(HEADER.size)
    while header:
        fault, pixels = _header_fault(header)
        body = stream.read(pixels)
        if len(body) < pixels:
            fault = f"truncated bitmap: {pixels} bytes expected, {len(body)} left"
        following = stream.read(HEADER.size)
        if fault:
            if on_fault is None:
                raise InputError(f"{source}: byte {offset}: {fault}")
            usable = len(body) == pixels and len(header) == HEADER.size
            if not usable or (following and _header_fault(following)[0]):
                rest = len(header) + len(body) + len(following) + _count_rest(stream)
                on_fault(f"{_kind(fault)}, rest of the file lost", rest)
                return
            on_fault(_kind(fault), 0 if pixels else HEADER.size)
        if pixels:
            _, tag, width, height = HEADER.unpack(header)
            yield Record(tag, np.frombuffer(body, np.uint8).reshape(height, width), offset)
        offset, header = offset + HEADER.size + pixels, following


def _header_fault(header: bytes) -> tuple[str, int]:
    """Returns the fault of a header ("" if none) and the number of pixels to read after it."""
    if len(header) < HEADER.size:
        return f"truncated header: {HEADER.size} bytes expected, {len(header)} left", 0
    size, _, width, height = HEADER.unpack(header)
    pixels = width * height
    if not pixels:
        return f"empty bitmap: width {width}, height {height}", 0
    if size != HEADER.size + pixels:
        fault = f"wrong size field: {size}, expected 10 + {width} * {height}"
        return fault, pixels if pixels <= MAX_PIXELS else 0
    if pixels > MAX_PIXELS:
        return f"oversized bitmap: {width} x {height}, at most {MAX_PIXELS} pixels allowed", 0
    return "", pixels


def _kind(fault: str) -> str:
    return fault.partition(":")[0]


def _count_rest(stream: BinaryIO) -> int:
    return sum(map(len, iter(lambda: stream.read(_CHUNK_BYTES), b"")))
