"""The GNT reader against records assembled by hand from the format's description."""

import io
import struct

import numpy as np
import pytest

from hccr_jax.data.casia.gnt import pack_record, read_records
from hccr_jax.errors import InputError


def hand_made(tag: bytes, width: int, height: int, pixels: bytes, size: int | None = None) -> bytes:
    size = 10 + width * height if size is None else size
    return struct.pack("<I", size) + tag + struct.pack("<HH", width, height) + pixels


FIRST = hand_made(b"\xb0\xa1", 3, 2, bytes(range(6)))
SECOND = hand_made(b"\xb0\xa2", 1, 2, b"\xff\x00")


def read_with_faults(data: bytes) -> tuple[list[bytes], list[tuple[str, int]]]:
    faults: list[tuple[str, int]] = []
    records = read_records(data, "x.gnt", lambda reason, lost: faults.append((reason, lost)))
    return [record.tag for record in records], faults


def test_fields_are_read_as_the_format_defines() -> None:
    first, second = read_records(io.BytesIO(FIRST + SECOND), "x.gnt")
    assert first.tag == b"\xb0\xa1"
    assert first.bitmap.dtype == np.uint8
    assert first.bitmap.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first.offset == 0
    assert second.bitmap.tolist() == [[255], [0]]
    assert second.offset == 16


def test_pack_record_gives_the_same_bytes() -> None:
    assert pack_record(b"\xb0\xa1", np.arange(6, dtype=np.uint8).reshape(2, 3)) == FIRST


@pytest.mark.parametrize(
    ("tag", "bitmap"),
    [
        (b"\xb0", np.zeros((2, 2), np.uint8)),
        (b"\xb0\xa1", np.zeros((0, 2), np.uint8)),
        (b"\xb0\xa1", np.zeros((2, 2), np.float32)),
    ],
)
def test_pack_record_refuses_what_the_format_cannot_hold(tag: bytes, bitmap: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a tag has 2 bytes|a bitmap is uint8"):
        pack_record(tag, bitmap)


def test_an_empty_file_has_no_records() -> None:
    assert list(read_records(b"", "x.gnt")) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FIRST + SECOND[:7], "x.gnt: byte 16: truncated header: 10 bytes expected, 7 left"),
        (FIRST + SECOND[:-1], "x.gnt: byte 16: truncated bitmap: 2 bytes expected, 1 left"),
        (
            FIRST + hand_made(b"\xb0\xa2", 1, 2, b"\xff\x00", size=13),
            r"x.gnt: byte 16: wrong size field: 13, expected 10 \+ 1 \* 2",
        ),
        (FIRST + hand_made(b"\xb0\xa2", 0, 5, b""), "x.gnt: byte 16: empty bitmap: width 0"),
        (
            hand_made(b"\xb0\xa2", 65535, 65535, b""),
            "x.gnt: byte 0: oversized bitmap: 65535 x 65535",
        ),
    ],
)
def test_a_fault_is_named_with_file_and_byte(data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_records(data, "x.gnt"))


def test_a_wrong_size_field_is_recovered_from() -> None:
    wrong = hand_made(b"\xb0\xa2", 1, 2, b"\xff\x00", size=999)
    tags, faults = read_with_faults(wrong + FIRST)
    assert tags == [b"\xb0\xa2", b"\xb0\xa1"]
    assert faults == [("wrong size field", 0)]
    assert read_with_faults(wrong) == ([b"\xb0\xa2"], [("wrong size field", 0)])


def test_an_empty_bitmap_is_skipped() -> None:
    tags, faults = read_with_faults(hand_made(b"\xb0\xa2", 0, 5, b"") + FIRST)
    assert tags == [b"\xb0\xa1"]
    assert faults == [("empty bitmap", 10)]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (FIRST[:4], "truncated header"),
        (FIRST[:12], "truncated bitmap"),
        (hand_made(b"\xb0\xa2", 1, 3, b"\xff\x00", size=12) + FIRST, "wrong size field"),
        (hand_made(b"\xb0\xa2", 60000, 60000, b"\xff\x00") + FIRST, "oversized bitmap"),
    ],
)
def test_other_damage_loses_the_rest_and_counts_every_byte(damage: bytes, reason: str) -> None:
    tags, faults = read_with_faults(SECOND + damage)
    assert tags == [b"\xb0\xa2"]
    assert faults == [(f"{reason}, rest of the file lost", len(damage))]


def test_reading_holds_one_record_at_a_time() -> None:
    stream = io.BytesIO(FIRST * 100)
    records = read_records(stream, "x.gnt")
    next(records)
    assert stream.tell() <= len(FIRST) + 10
