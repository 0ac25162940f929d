"""GNT files and zips damaged at random: no crash, no hang, and every loss is reported."""

import contextlib
import itertools
import re
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hccr_jax.data.casia import archives
from hccr_jax.data.casia.gnt import OnFault, pack_record, read_records
from hccr_jax.errors import InputError

EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
CASE_CPU_SECONDS = 5


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Ends a case that hangs; CPU time, so that a busy machine ends none."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {CASE_CPU_SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CASE_CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def mutate(data: bytes, headers: list[int], rng: np.random.Generator) -> bytes:
    """Returns the data with one to three damages; `headers` are offsets where fields stand."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        start, other = (int(place) for place in rng.integers(0, len(damaged) + 1, 2))
        length = int(2 ** rng.uniform(0, 8))
        match rng.integers(0, 7):
            case 0 if start < len(damaged):
                damaged[start] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
            case 2:
                del damaged[start:]
            case 3:
                damaged[start:start] = rng.bytes(length)
            case 4:
                del damaged[start : start + length]
            case 5:
                damaged[other:other] = damaged[start : start + length]
            case 6:
                field = headers[rng.integers(len(headers))] + int(rng.integers(0, 46))
                value = EXTREMES[rng.integers(len(EXTREMES))]
                width = int(rng.choice([2, 4]))
                damaged[field : field + width] = struct.pack("<I", value)[:width]
    return bytes(damaged)


def sound_records(data: bytes) -> list[int]:
    """Returns the offsets of the records before the first fault and the offset of that (or end)."""
    offsets = [0]
    while offsets[-1] + 10 <= len(data):
        size, _, width, height = struct.unpack_from("<IHHH", data, offsets[-1])
        end = offsets[-1] + size
        if not 0 < width * height <= 1 << 24 or size != 10 + width * height or end > len(data):
            break
        offsets.append(end)
    return offsets


def check_gnt(data: bytes) -> None:
    *offsets, stop = sound_records(data)
    strict: list[int] = []
    message = ""
    try:
        for record in read_records(data, "x.gnt"):
            strict.append(record.offset)
    except InputError as error:
        message = str(error)
    assert strict == offsets
    assert bool(message) == (stop < len(data))
    assert not message or re.fullmatch(f"x[.]gnt: byte {stop}: .+", message)

    losses: list[int] = []
    end = kept = 0
    starts = []
    for tag, bitmap, offset in read_records(data, "x.gnt", lambda _, lost: losses.append(lost)):
        size, width, height = bitmap.size, *reversed(bitmap.shape)
        assert offset >= end
        assert data[offset + 4 : offset + 10] == tag + struct.pack("<HH", width, height)
        assert data[offset + 10 : offset + 10 + size] == bitmap.tobytes()
        starts.append(offset)
        end = offset + 10 + size
        kept += 10 + size
    assert kept + sum(losses) == len(data)
    assert bool(losses) == (stop < len(data))
    assert starts[: len(offsets)] == offsets


@pytest.mark.parametrize("cases", [4_000, pytest.param(100_000, marks=pytest.mark.faults)])
def test_damaged_gnt_files(cases: int) -> None:
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 14, (8, 2))
    records = [pack_record(rng.bytes(2), rng.integers(0, 256, s, np.uint8)) for s in shapes]
    headers = [0, *itertools.accumulate(map(len, records[:-1]))]
    for case in range(cases):
        data = mutate(b"".join(records), headers, np.random.default_rng([1, case]))
        with limited_time():
            check_gnt(data)


def write_whole_zip(path: Path) -> dict[str, bytes]:
    """Writes a zip with all that one may hold and returns the bytes of each writer."""
    rng = np.random.default_rng(2)
    members = {
        str(writer): b"".join(
            pack_record(b"\xb0\xa1", rng.integers(0, 16, shape, np.uint8))
            for shape in rng.integers(20, 60, (4, 2))
        )
        for writer in range(1001, 1005)
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/", b"")
        for number, (writer, data) in enumerate(members.items()):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(f"set/{writer}-c.gnt", data, method)
        archive.writestr("readme.txt", b"written by hand")
    return members


def read_zip(path: Path, on_fault: OnFault | None = None) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for member in archives.list_members([path], on_fault):
        losses: list[int] = []

        def lose(reason: str, num_bytes: int, losses: list[int] = losses) -> None:
            losses.append(num_bytes)
            assert on_fault is not None
            on_fault(reason, num_bytes)

        records = archives.read_member(member, on_fault and lose)
        data = b"".join(pack_record(record.tag, record.bitmap) for record in records)
        assert sum(losses) == max(member.num_bytes - len(data), 0)
        contents[member.writer] = data
    return contents


def check_zip(path: Path, members: dict[str, bytes]) -> None:
    message, contents = "", members
    try:
        contents = read_zip(path)
    except InputError as error:
        message = str(error)
    assert contents == members
    assert not message or re.fullmatch(f".*{path.name}.*", message)

    faults: list[str] = []
    try:
        contents = read_zip(path, lambda reason, _: faults.append(reason))
    except InputError as error:
        faults.append(str(error))
    assert faults or contents == members
    assert bool(faults) == bool(message)


@pytest.mark.parametrize("cases", [500, pytest.param(10_000, marks=pytest.mark.faults)])
def test_damaged_zips(tmp_path: Path, cases: int) -> None:
    path = tmp_path / "HWDB1.1trn_gnt.zip"
    members = write_whole_zip(path)
    whole = path.read_bytes()
    check_zip(path, members)
    headers = [match.start() for match in re.finditer(b"PK[\1\3\5][\2\4\6]", whole)]
    directory = whole.index(b"PK\1\2")
    for case in range(cases):
        rng = np.random.default_rng([3, case])
        if case % 2:  # most bytes are members': half of the damage goes to the directory
            shifted = [place - directory for place in headers if place >= directory]
            path.write_bytes(whole[:directory] + mutate(whole[directory:], shifted, rng))
        else:
            path.write_bytes(mutate(whole, headers, rng))
        with limited_time():
            check_zip(path, members)


PAPER = pack_record(b"\xb0\xa1", np.full((4096, 4096), 255, np.uint8))
READ_WITH_LITTLE_MEMORY = """
import resource, sys
from hccr_jax.data.casia import archives
from hccr_jax.errors import InputError
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (192 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    members = archives.list_members([sys.argv[1]])
    print(sum(1 for member in members for _ in archives.read_member(member)), "records")
except InputError as error:
    print(error)
"""


def read_with_little_memory(path: Path) -> str:
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    return done.stdout.strip()


def write_bomb(path: Path, kind: str) -> None:
    """Writes a zip that demands much more memory than its size."""
    if kind in ("entries", "directory"):
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(10_001 if kind == "entries" else 160):
                entry = zipfile.ZipInfo(f"{number}-c.gnt")
                entry.comment = b"?" * (0 if kind == "entries" else 65535)
                archive.writestr(entry, b"")
        return
    method = zipfile.ZIP_BZIP2 if kind == "bzip2" else zipfile.ZIP_DEFLATED
    with (
        zipfile.ZipFile(path, "w", method, compresslevel=1) as archive,
        archive.open("1001-c.gnt", "w") as member,
    ):
        for _ in range(17 if kind == "honest" else 2):
            member.write(PAPER)
    if kind == "lying":
        data = bytearray(path.read_bytes())
        header = data.rindex(b"1001-c.gnt") - 46
        struct.pack_into("<I", data, header + 16, zlib.crc32(PAPER))
        struct.pack_into("<I", data, header + 24, len(PAPER))
        path.write_bytes(data)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("small", "2 records"),
        ("honest", "'1001-c.gnt': with it the archive unpacks to over 100 times its size"),
        ("lying", "1001-c.gnt: cannot be unpacked: Bad CRC-32"),
        ("bzip2", "'1001-c.gnt': compressed with method 12: pack it with deflate"),
        ("entries", "10001 entries listed in"),
        ("directory", "at most 10000 in 10240000 are read"),
    ],
)
def test_bombs_are_refused_by_name_in_little_memory(
    tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "HWDB1.1trn_gnt.zip"
    write_bomb(path, kind)
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stderr == ""
    assert message in done.stdout
    assert done.stdout.count("\n") == 1
