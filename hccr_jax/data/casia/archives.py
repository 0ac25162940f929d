"""Finds the GNT members in CASIA archives, folders and loose files, and says whose they are."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hccr_jax.data.casia import gnt
from hccr_jax.errors import InputError

# Source: the official download page, archives under the names in use since 2020.
OFFICIAL_MD5 = {
    "Gnt1.1TrainPart1.zip": "72bac7b6a5ce37f184f277421adfacfd",
    "Gnt1.1TrainPart2.zip": "a8b76e4eccfb1fd8d56c448f6a096c27",
    "Gnt1.1Test.zip": "e74f9a4863e73d8b80ed402452c97448",
}
# Source: the official division of HWDB1.0 (001 to 420) and HWDB1.1 (1001 to 1300) by writer.
OFFICIAL_WRITERS = {
    "train": (range(1, 337), range(1001, 1241)),
    "test": (range(337, 421), range(1241, 1301)),
}
VALIDATION_FRACTION = 0.1
# With this salt the hash picks 24 of the 240 training writers of HWDB1.1 and 32 of the 336 of 1.0.
_VALIDATION_SALT = "validation 4 "
# A word of its own (`HWDB1.1trn_gnt`) or capitalised (`Gnt1.1TrainPart1`), not part of `latest`.
_SPLIT_NAME = re.compile(
    r"(?:(?<![A-Za-z])|(?=T[rse]))(?i:(trn|train)|tst|test)(?:ing|set)?(?![a-z])"
)
# The test set of the ICDAR 2013 competition, `competition-gnt.zip`.
_COMPETITION = re.compile("competition", re.IGNORECASE)
_WRITER = re.compile(r"([A-Za-z]?\d+)(?:-\w+)?")
# What zipfile raises on damaged bytes; the last three for names, offsets and entries that are none.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, OverflowError, KeyError),
)
_CHUNK_BYTES = 1 << 20
# Bounds on what an archive may ask of its reader. CASIA's have some hundred entries and unpack to
# 3 or 4 times their size; deflate reaches a thousand times on blank paper, which a small archive
# may hold.
_MAX_ENTRIES = 10_000
_MAX_DIRECTORY_BYTES = _MAX_ENTRIES << 10
_MAX_RATIO = 100
_ALWAYS_UNPACKED = 256 << 20
_MAX_NAME = 255
_SHOWN_SUFFIXES = 5
_LOCAL_HEADER_BYTES = 30
_END_RECORD = b"PK\x05\x06"
_LOCATOR_OF_ZIP64 = b"PK\x06\x07"

OnFault = Callable[[str, int], None]


@dataclasses.dataclass(frozen=True)
class Member:
    """One GNT file, inside a zip or loose: where it lies, who wrote it, which split it is for.

    Attributes:
      path: the zip, or the loose file itself.
      name: the member's name inside the zip; "" for a loose file.
      writer: from `1001-c.gnt`: "1001".
      split: "train" or "test".
      num_bytes: unpacked size.
      crc32: of the unpacked bytes.
      character: what a picture shows; "" for a GNT file. `path` is then the pictures' root, `name`
        the way from there.
    """

    path: Path
    name: str
    writer: str
    split: str
    num_bytes: int
    crc32: int
    character: str = ""

    @property
    def archive(self) -> str:
        """The archive's file name: that of the zip, or of the folder that a loose file lies in."""
        return self.path.name if self.name else self.path.parent.name

    @property
    def source(self) -> str:
        """Archive and member name, as stored with every record and shown in messages."""
        return f"{self.archive}/{self.name or self.path.name}"


def list_members(paths: Sequence[str | Path], on_fault: OnFault | None = None) -> list[Member]:
    """Returns the GNT members of zips, folders (searched recursively) and loose files.

    The split comes from the nearest name that says trn/train or tst/test (folders inside the zip,
    the zip, folders up to the one given), else from the official writer numbers.

    Every entry of a zip must be sound, also one that is no GNT file: a name that stays inside, no
    link, no password, stored or deflated, both its headers agreeing, not running over into the
    next entry, and the sizes together within a hundred times the archive's (or 256 MiB).

    Args:
      paths: zips, folders or `.gnt` files.
      on_fault: called with (reason, bytes lost) for a file without usable members and for an
        unsound entry of a zip, which are then passed over; None stops at the first.

    Returns:
      The members ordered by split, writer and source.

    Raises:
      InputError: a path is missing or unreadable, no member is found, a member's split cannot be
        told, or one writer comes from two members; without `on_fault` also a damaged archive, one
        without images, one that needs another program to unpack, one with an unsound entry.
    """
    members: list[Member] = []
    for path in map(Path, paths):
        for root, file in _files(path):
            try:
                members += _members_of_file(root, file, on_fault)
            except _UnusableError as error:
                if on_fault is None:
                    raise
                on_fault(f"unusable file {file.name}", error.num_bytes)
    if not members:
        raise InputError(f"{', '.join(map(str, paths))}: no .gnt member found")
    _check_writers(members)
    return sorted(members, key=lambda member: (member.split, member.writer, member.source))


def read_member(member: Member, on_fault: OnFault | None = None) -> Iterator[gnt.Record]:
    """Yields the records of a member; see `gnt.read_records`.

    Args:
      member: what to read.
      on_fault: as in `gnt.read_records`. Where the zip itself is damaged (a bad CRC or another size
        than declared among others) the records read before the damage shows are kept and the rest
        of the member is lost. Records and losses add up to `member.num_bytes` at least.

    Raises:
      InputError: at a fault, if `on_fault` is None.
    """
    lost: list[int] = []

    def lose(reason: str, num_bytes: int) -> None:
        lost.append(num_bytes)
        if on_fault:
            on_fault(reason, num_bytes)

    kept = 0
    try:
        with _open(member) as stream:
            for record in gnt.read_records(stream, member.source, lose if on_fault else None):
                kept += gnt.HEADER.size + record.bitmap.size
                yield record
        found = kept + sum(lost)
        if found != member.num_bytes:
            raise EOFError(f"{member.num_bytes} bytes declared, {found} found")
    except InputError as error:
        raise InputError(f"{error}; --on_error=skip goes on without it") from None
    except _DAMAGE as error:
        if on_fault is None:
            message = f"{member.source}: cannot be unpacked: {error}"
            raise InputError(f"{message}; --on_error=skip goes on without it") from error
        on_fault("damaged zip member, rest of it lost", max(member.num_bytes - kept - sum(lost), 0))


def validation_writers(writers: Sequence[str]) -> frozenset[str]:
    """Returns the training writers set aside for validation, see `set_aside`.

    >>> len(validation_writers([str(i) for i in range(1001, 1241)]))
    24
    >>> validation_writers(["1001"]), len(validation_writers(["1001", "1002"]))
    (frozenset(), 1)
    """
    return set_aside(writers, _VALIDATION_SALT)


def set_aside(names: Sequence[str], salt: str) -> frozenset[str]:
    """Returns the names whose hash is below a tenth.

    Whether a name belongs does not depend on the others, except that of two or more names at least
    one is chosen and at least one is left.

    Args:
      names: of writers or others.
      salt: hashed with each name; another one chooses others.
    """

    def place(name: str) -> float:
        digest = hashlib.sha256(f"{salt}{name}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    ranked = sorted(set(names), key=place)
    chosen = max(sum(place(name) < VALIDATION_FRACTION for name in ranked), 1)
    return frozenset(ranked[: max(min(chosen, len(ranked) - 1), 0)])


def divide(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Returns the members of each split, `validation` split off from `train` but for pictures."""
    if any(member.character for member in members):
        splits = ("train", "validation", "test")
        return {split: [member for member in members if member.split == split] for split in splits}
    train = [member for member in members if member.split == "train"]
    aside = validation_writers([member.writer for member in train])
    return {
        "train": [member for member in train if member.writer not in aside],
        "validation": [member for member in train if member.writer in aside],
        "test": [member for member in members if member.split == "test"],
    }


def fingerprint(members: Sequence[Member], characters: Sequence[str] = ()) -> str:
    """Returns a digest of what the members are (names, sizes and CRCs), wherever they lie.

    Args:
      members: of a data set.
      characters: its charset, where it is not the usual one.
    """
    rows: list[Any] = sorted(
        (m.source, m.writer, m.split, m.num_bytes, m.crc32, *m.character) for m in members
    )
    rows += [list(characters)] if characters else []
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _open(member: Member) -> BinaryIO:
    if not member.name:
        return open(member.path, "rb")
    with zipfile.ZipFile(member.path) as archive:
        entry = archive.getinfo(member.name)
        entry.file_size += 1  # else zipfile would cut off in silence what goes beyond
        # The member keeps the file open by itself until it is closed.
        return archive.open(entry)  # type: ignore[return-value]


class _UnusableError(InputError):
    """A file that can be passed over when asked to: no members, or damaged."""

    def __init__(self, path: Path, message: str):
        super().__init__(f"{path}: {message}")
        self.num_bytes = path.stat().st_size


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yields (folder in whose name a split may stand, file) for what lies at or below a path."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        yield path.absolute().parent, path.absolute()
        return

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(path.absolute(), onerror=stop):
        folders.sort()
        for name in sorted(files):
            if Path(name).suffix.lower() in (".zip", ".gnt", ".alz"):
                yield path.absolute(), Path(folder, name)


def _members_of_file(root: Path, file: Path, on_fault: OnFault | None) -> list[Member]:
    if not file.is_file():
        raise InputError(f"{file}: not a file, or a link that leads nowhere")
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}: cannot be read: permission denied")
    if _has_control_characters(f"{file.parent.name}/{file.name}"):
        raise _UnusableError(file, "control characters or a broken encoding in its name: rename it")
    if file.suffix.lower() == ".alz":
        raise _UnusableError(file, "unpack it with `unalz` and give the folder with its .gnt files")
    above = [file.parent, *file.parent.parents]
    names = [folder.name for folder in above[: above.index(root) + 1]]
    if file.suffix.lower() == ".gnt":
        return [_member(file, "", names, file.stat().st_size, _file_crc32(file))]
    _check_md5(file)
    names.insert(0, file.stem)
    members = []
    for entry, fault in _entries(file):
        if not fault:
            if _is_wanted(entry):
                members.append(_member(file, entry.filename, names, entry.file_size, entry.CRC))
        elif on_fault is None:
            name = entry.filename[:_MAX_NAME]
            raise InputError(f"{file}: {name!r}: {fault}; --on_error=skip passes it over")
        else:
            on_fault(f"unusable entry of {file.name}", entry.file_size)
    return members


def _entries(file: Path) -> list[tuple[zipfile.ZipInfo, str]]:
    """Returns the entries of a zip in the order of their bytes, with what is wrong with each."""
    try:
        count, directory_bytes = _end_record(file)
        if count > _MAX_ENTRIES or directory_bytes > _MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(
                f"{count} entries listed in {directory_bytes} bytes, at most {_MAX_ENTRIES} in "
                f"{_MAX_DIRECTORY_BYTES} are read"
            )
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            if len(entries) != count:
                raise zipfile.BadZipFile(f"{count} entries declared, {len(entries)} listed")
            faults = [_entry_fault(archive, entry) for entry in entries]
    except _DAMAGE as error:
        message = f"not a zip archive, or damaged ({error}): download it again"
        raise _UnusableError(file, message) from error
    if not any(map(_is_wanted, entries)):
        raise _UnusableError(file, _why_no_members(entries))
    room = max(_ALWAYS_UNPACKED, _MAX_RATIO * file.stat().st_size)
    sound = [index for index, fault in enumerate(faults) if not fault]
    for index, following in itertools.zip_longest(sound, sound[1:]):
        entry = entries[index]
        end = entry.header_offset + _LOCAL_HEADER_BYTES + entry.compress_size
        if following is not None and end > entries[following].header_offset:
            faults[index] = f"overlaps {entries[following].filename!r}"
        elif entry.file_size > room:
            faults[index] = f"with it the archive unpacks to over {_MAX_RATIO} times its size"
        else:
            room -= entry.file_size
    return list(zip(entries, faults, strict=True))


def _end_record(file: Path) -> tuple[int, int]:
    """Returns how many entries a zip declares and the bytes of their directory.

    zipfile bounds neither, nor does it miss what the directory lacks. (0, 0) where there is no end
    record.
    """
    with open(file, "rb") as stream:
        stream.seek(-min(file.stat().st_size, 1 << 17), os.SEEK_END)
        tail = stream.read()
    place = tail.rfind(_END_RECORD)
    if not 0 <= place <= len(tail) - 22:
        return 0, 0
    if place >= 76 and tail[place - 20 : place - 16] == _LOCATOR_OF_ZIP64:
        return struct.unpack_from("<QQ", tail, place - 44)
    return struct.unpack_from("<HI", tail, place + 10)


def _entry_fault(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> str:
    """Returns what is wrong with an entry, seen alone, by its two headers; "" if nothing."""
    name = entry.orig_filename
    folders = re.split(r"[/\\]", name)
    if not folders[0] or ".." in folders or re.match("[A-Za-z]:", name):
        return "its name leads outside the archive"
    if len(name) > _MAX_NAME or _has_control_characters(name):
        return f"its name has more than {_MAX_NAME} characters, or control characters"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device, not a file"
    if entry.flag_bits & 1:
        return "encrypted"
    # Other methods unpack whole blocks, however large they come out.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed with method {entry.compress_type}: pack it with deflate"
    try:
        archive.open(entry).close()
    except _DAMAGE as error:
        return f"damaged: {error}"[:_MAX_NAME]
    return ""


def _is_wanted(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.lower().endswith(".gnt") and not _is_shadow(entry)


def _is_shadow(entry: zipfile.ZipInfo) -> bool:
    """Tells the entries that macOS adds, which repeat the members' names."""
    return entry.filename.startswith("__MACOSX/")


def _has_control_characters(name: str) -> bool:
    """Tells what can garble a message (control, direction) or has no encoding (surrogates)."""
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in name)


def _why_no_members(entries: list[zipfile.ZipInfo]) -> str:
    names = [e.filename for e in entries if not (e.is_dir() or _is_shadow(e))]
    if not names:
        return "the archive is empty"
    suffixes = {Path(name).suffix.lower() for name in names}
    if ".alz" in suffixes:
        return (
            "holds an .alz archive: unpack it with `unalz` and give the folder with its .gnt files"
        )
    if ".mpf" in suffixes:
        return "holds features (.mpf), not images: take the archive with `gnt` in its name"
    if ".zip" in suffixes:
        return "holds zip archives: unpack it and give the folder"
    shown = sorted(filter(str.isprintable, suffixes))[:_SHOWN_SUFFIXES]
    return f"holds no .gnt member, only {', '.join(shown)}"


def _member(file: Path, name: str, names: list[str], num_bytes: int, crc32: int) -> Member:
    inner = Path(name or file.name)
    match = _WRITER.fullmatch(inner.stem)
    writer = match.group(1) if match else inner.stem
    folders = [] if not name else [folder.name for folder in inner.parents]
    split = _split([*folders, *names], writer)
    if split is None:
        raise InputError(
            f"{file}{f': {name}' if name else ''}: cannot tell train from test: put `train` or "
            f"`test` in the name of the archive or of its folder, or name the file as CASIA does "
            f"(1001-c.gnt to 1300-c.gnt for HWDB1.1)"
        )
    return Member(file, name, writer, split, num_bytes, crc32)


def _split(names: list[str], writer: str) -> str | None:
    """Returns the split that the first telling name gives, else the official one of the writer.

    >>> _split(["", "HWDB1.1trn_gnt_P1"], "1"), _split(["Gnt1.1Test"], "1"), _split(["latest"], "1")
    ('train', 'test', 'train')
    """
    for name in names:
        found = {"train" if trn else "test" for trn in _SPLIT_NAME.findall(name)}
        found |= {"test" for _ in _COMPETITION.findall(name)}
        if len(found) == 1:
            return found.pop()
    for split, ranges in OFFICIAL_WRITERS.items():
        if writer.isdecimal() and any(int(writer) in numbers for numbers in ranges):
            return split
    return None


def _check_writers(members: list[Member]) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        first = seen.setdefault(member.writer, member)
        if first is not member:
            raise InputError(
                f"writer {member.writer} comes twice, from {first.path} ({first.source}) and "
                f"{member.path} ({member.source}): give each writer once"
            )


def _check_md5(file: Path) -> None:
    expected = OFFICIAL_MD5.get(file.name)
    if expected is None:
        return
    with open(file, "rb") as stream:
        actual = hashlib.file_digest(stream, "md5").hexdigest()
    if actual != expected:
        message = f"MD5 {actual}, the official archive of this name has {expected}"
        raise _UnusableError(file, f"{message}: download it again, or rename it if it is another")


def _file_crc32(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
