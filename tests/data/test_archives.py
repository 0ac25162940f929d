"""Archives as CASIA publishes them, old names and new, whole and damaged."""

import os
import re
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hccr_jax.data.casia import archives
from hccr_jax.data.casia.gnt import pack_record
from hccr_jax.errors import InputError

MEMBER = pack_record(b"\xb0\xa1", np.random.default_rng(0).integers(0, 256, (60, 50), np.uint8))


def write_zip(path: Path, *names: str, data: bytes = MEMBER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, data)
    return path


def origins(*paths: Path) -> list[tuple[str, str, str]]:
    members = archives.list_members(paths)
    return [(member.split, member.writer, member.source) for member in members]


def test_older_names(tmp_path: Path) -> None:
    first = write_zip(tmp_path / "HWDB1.1trn_gnt_P1.zip", "1001-c.gnt")
    second = write_zip(tmp_path / "HWDB1.1trn_gnt_P2.zip", "1121-c.gnt")
    test = write_zip(tmp_path / "HWDB1.1tst_gnt.zip", "1241-c.gnt")
    assert origins(second, test, first) == [
        ("test", "1241", "HWDB1.1tst_gnt.zip/1241-c.gnt"),
        ("train", "1001", "HWDB1.1trn_gnt_P1.zip/1001-c.gnt"),
        ("train", "1121", "HWDB1.1trn_gnt_P2.zip/1121-c.gnt"),
    ]


def test_newer_names(tmp_path: Path) -> None:
    write_zip(tmp_path / "a" / "Gnt1.0TrainPart1.zip", "Gnt1.0TrainPart1/001.gnt")
    write_zip(tmp_path / "a" / "b" / "Gnt1.0Test.zip", "Gnt1.0Test/337.gnt", "__MACOSX/._337.gnt")
    assert origins(tmp_path / "a") == [
        ("test", "337", "Gnt1.0Test.zip/Gnt1.0Test/337.gnt"),
        ("train", "001", "Gnt1.0TrainPart1.zip/Gnt1.0TrainPart1/001.gnt"),
    ]


def test_unpacked_members_are_divided_by_folder_then_by_official_number(tmp_path: Path) -> None:
    for name in ("x/Train/7.gnt", "x/tst/8.gnt", "x/1240-c.gnt", "x/1241-c.gnt", "x/400-f.gnt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(MEMBER)
    assert [row[:2] for row in origins(tmp_path / "x")] == [
        ("test", "1241"),
        ("test", "400"),
        ("test", "8"),
        ("train", "1240"),
        ("train", "7"),
    ]
    assert [row[:2] for row in origins(tmp_path / "x" / "1241-c.gnt")] == [("test", "1241")]


def test_an_unknown_split_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "latest" / "mine.zip", "anna.gnt")
    with pytest.raises(InputError, match="unknown split: put `train`"):
        archives.list_members([path])


def test_records_are_read_unchanged(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt", data=MEMBER * 3)
    (member,) = archives.list_members([path])
    records = list(archives.read_member(member))
    assert [record.offset for record in records] == [0, 3010, 6020]
    assert all(pack_record(record.tag, record.bitmap) == MEMBER for record in records)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "the archive is empty"),
        (["HWDB1.1trn_gnt.alz"], "unpack it with `unalz`"),
        (["1001.mpf"], "holds features"),
        (["Gnt1.1Test.zip"], "holds zip archives"),
        (["readme.txt"], "holds no .gnt member, only .txt"),
    ],
)
def test_archives_without_members_are_explained(
    tmp_path: Path, names: list[str], message: str
) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn.zip", *names)
    with pytest.raises(InputError, match=message) as caught:
        archives.list_members([path])
    assert "\n" not in str(caught.value)
    good = write_zip(tmp_path / "HWDB1.1trn_gnt_P1.zip", "1001-c.gnt")
    faults: list[str] = []
    members = archives.list_members([path, good], lambda reason, lost: faults.append(reason))
    assert len(members) == 1
    assert faults == ["unusable file HWDB1.1trn.zip"]


def test_missing_empty_and_foreign_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        archives.list_members([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"no \.gnt member found"):
        archives.list_members([tmp_path])
    (tmp_path / "HWDB1.1tst_gnt.zip").write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="not a zip archive, or damaged"):
        archives.list_members([tmp_path])
    (tmp_path / "HWDB1.1tst_gnt.zip").rename(tmp_path / "HWDB1.1trn_gnt.alz")
    with pytest.raises(InputError, match="unalz"):
        archives.list_members([tmp_path])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    with pytest.raises(InputError, match="closed: cannot be read"):
        archives.list_members([folder])


def test_a_truncated_download_is_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "HWDB1.1tst_gnt.zip", "1241-c.gnt")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="download it again"):
        archives.list_members([path])


def test_an_official_name_with_other_content_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "Gnt1.1Test.zip", "1241-c.gnt")
    with pytest.raises(InputError, match="e74f9a4863e73d8b80ed402452c97448"):
        archives.list_members([path])


def test_a_writer_given_twice_is_refused(tmp_path: Path) -> None:
    train = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt")
    test = write_zip(tmp_path / "HWDB1.1tst_gnt.zip", "1001-c.gnt")
    with pytest.raises(InputError, match="writer 1001 occurs twice"):
        archives.list_members([train, test])


def test_a_flipped_bit_fails_the_crc(tmp_path: Path) -> None:
    path = tmp_path / "HWDB1.1tst_gnt.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("1241-c.gnt", MEMBER * 3)
    damaged = bytearray(path.read_bytes())
    damaged[len(MEMBER) * 2] ^= 1
    path.write_bytes(damaged)
    (member,) = archives.list_members([path])
    with pytest.raises(InputError, match=r"1241-c.gnt: cannot be unpacked: Bad CRC-32"):
        list(archives.read_member(member))
    faults: list[tuple[str, int]] = []
    kept = list(archives.read_member(member, lambda reason, lost: faults.append((reason, lost))))
    assert sum(lost for _, lost in faults) + len(kept) * len(MEMBER) == len(MEMBER) * 3
    assert faults[0][0] == "damaged zip member, rest of it lost"


def forge(path: Path, name: str, field: int, layout: str, value: int) -> None:
    """Overwrites a field of the directory's header of one entry, by its offset in the header."""
    data = bytearray(path.read_bytes())
    header = data.rindex(name.encode()) - 46
    struct.pack_into(layout, data, header + field, value)
    path.write_bytes(data)


def refusal(path: Path) -> str:
    """Returns why an archive is refused; when skipped, every lost byte must be counted."""
    with pytest.raises(InputError) as caught:
        [list(archives.read_member(member)) for member in archives.list_members([path])]
    lost: list[int] = []
    kept = 0
    for member in archives.list_members([path], lambda reason, size: lost.append(size)):
        before = len(lost)
        records = archives.read_member(member, lambda reason, size: lost.append(size))
        read = sum(10 + record.bitmap.size for record in records)
        assert sum(lost[before:]) == max(member.num_bytes - read, 0)
        kept += read
    assert kept >= len(MEMBER), "the sound member is kept"
    assert lost
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("../1002-c.gnt", "a/../../1002-c.gnt", "/1002-c.gnt", "\\1002-c.gnt", "a\\..\\1002.gnt"),
        *(
            "C:1002-c.gnt",
            "C:\\1002-c.gnt",
            "..",
            "10\n02-c.gnt",
            "10\x1b[2J02.gnt",
            "9" * 256 + ".gnt",
        ),
    ],
)
def test_names_that_lead_outside_or_cannot_be_shown_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt", name)
    message = refusal(path)
    assert f"HWDB1.1trn_gnt.zip: {name[:255]!r}: its name " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "layout", "value", "message"),
    [
        (38, "<I", 0o120777 << 16, "'1002-c.gnt': a link or a device, not a file"),
        (38, "<I", 0o010644 << 16, "'1002-c.gnt': a link or a device, not a file"),
        (8, "<H", 1, "'1002-c.gnt': encrypted"),
        (10, "<H", 14, "'1002-c.gnt': compressed with method 14: pack it with deflate"),
        (10, "<H", 99, "'1002-c.gnt': compressed with method 99: pack it with deflate"),
        (16, "<I", 7, "1002-c.gnt: cannot be unpacked: Bad CRC-32"),
        (24, "<I", 9999, "1002-c.gnt: cannot be unpacked: 9999 bytes declared, 3010 found"),
        (24, "<I", 3009, "1002-c.gnt: cannot be unpacked: 3009 bytes declared, 3010 found"),
        (24, "<I", 2000, "1002-c.gnt: cannot be unpacked: Bad CRC-32"),
        (24, "<I", 0xFFFFFFF0, "'1002-c.gnt': with it the archive unpacks to over 100 times its"),
        # Before Python 3.13 "Bad magic number", since then of the entry that it would overlap.
        (42, "<I", 9, "-c.gnt': damaged: "),
        (46 + 7, "<B", ord("p"), "'1002-c.pnt': damaged: File name in directory"),
    ],
)
def test_a_forged_header_is_refused_by_name(
    tmp_path: Path, field: int, layout: str, value: int, message: str
) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt", "1002-c.gnt", "1003-c.gnt")
    forge(path, "1002-c.gnt", field, layout, value)
    assert message in refusal(path)


def test_entries_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt", "1002-c.gnt", "1003-c.gnt")
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo("1001-c.gnt").compress_size
    forge(path, "1001-c.gnt", 20, "<I", size + 50)
    assert re.search("'1001-c.gnt': .*[Oo]verlap", refusal(path))


def test_an_entry_missing_in_the_directory_is_noticed(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", "1001-c.gnt", "1002-c.gnt", "1003-c.gnt")
    forge(path, "1001-c.gnt", 32, "<H", 46 + len("1002-c.gnt"))  # becomes a comment
    with pytest.raises(InputError, match="3 entries declared, 2 listed"):
        archives.list_members([path])


def test_thousands_of_entries_are_read(tmp_path: Path) -> None:
    names = [f"{number}-c.gnt" for number in range(3000)]
    path = write_zip(tmp_path / "HWDB1.1trn_gnt.zip", *names, data=MEMBER[:0])
    assert len(archives.list_members([path])) == 3000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_files_that_cannot_be_read_or_named_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1001-c.gnt")
    with pytest.raises(InputError, match=r"1001-c.gnt: not a file"):
        archives.list_members([tmp_path])
    (tmp_path / "1001-c.gnt").unlink()
    (tmp_path / "1001-c.gnt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"1001-c.gnt: not a file, or a broken link"):
        archives.list_members([tmp_path])
    (tmp_path / "1001-c.gnt").unlink()
    Path(os.fsdecode(bytes(tmp_path) + b"/\xc1\xb7.gnt")).write_bytes(MEMBER)
    with pytest.raises(InputError, match="a broken encoding in its name: rename it"):
        archives.list_members([tmp_path])


def test_no_byte_is_counted_as_lost_twice(tmp_path: Path) -> None:
    path = tmp_path / "HWDB1.1tst_gnt.zip"
    empty = struct.pack("<I2sHH", 10, b"\xb0\xa2", 0, 5)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("1241-c.gnt", MEMBER + empty + MEMBER)
    data = bytearray(path.read_bytes())
    data[len(MEMBER) * 2] ^= 1  # shows after the first record
    path.write_bytes(data)
    refusal(path)


def test_the_fingerprint_depends_on_content_and_not_on_the_folder(tmp_path: Path) -> None:
    here = write_zip(tmp_path / "here" / "HWDB1.1trn_gnt.zip", "1001-c.gnt")
    there = write_zip(tmp_path / "there" / "HWDB1.1trn_gnt.zip", "1001-c.gnt")
    other = write_zip(tmp_path / "other" / "HWDB1.1trn_gnt.zip", "1001-c.gnt", data=MEMBER * 2)
    digests = [archives.fingerprint(archives.list_members([path])) for path in (here, there, other)]
    assert digests[0] == digests[1] != digests[2]


def test_division_of_writers() -> None:
    def member(writer: str, split: str) -> archives.Member:
        return archives.Member(Path("a.zip"), f"{writer}.gnt", writer, split, 1, 0)

    train = [member(str(writer), "train") for writer in range(1001, 1241)]
    test = [member(str(writer), "test") for writer in range(1241, 1301)]
    whole = archives.divide(train + test)
    half = archives.divide(train[:120])
    assert {split: len(members) for split, members in whole.items()} == {
        "train": 216,
        "validation": 24,
        "test": 60,
    }
    assert set(half["validation"]) == set(whole["validation"]) & set(train[:120])
    assert archives.divide(train[:1])["validation"] == []
    assert len(archives.divide(train[:2])["validation"]) == 1
    assert archives.divide(test)["validation"] == []


def test_the_real_subset(casia_dir: Path) -> None:
    members = archives.list_members(sorted(casia_dir.glob("HWDB1.1-100*.zip"), reverse=True))
    assert [m.writer for m in members] == [
        *map(str, range(1241, 1301)),
        *map(str, range(1001, 1241)),
    ]
    counts = {"train": 0, "test": 0}
    for member in members:
        counts[member.split] += sum(1 for _ in archives.read_member(member))
    assert counts == {"train": 23868, "test": 5973}
