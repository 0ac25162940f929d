"""Finds the GNT members in CASIA archives, folders and single files, with writer and split."""

import dataclasses
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from hccr_jax.data.casia import gnt
from hccr_jax.data.casia.divisions import (
    UNKNOWN_WRITER,
    find_split,
    split_of,
    validation_writers,
)
from hccr_jax.data.casia.zip_entries import (
    DAMAGE,
    FOREIGN,
    UnusableFileError,
    has_control_characters,
    list_gnt_entries,
    readable_name,
    shown_name,
)
from hccr_jax.errors import InputError
from hccr_jax.paths import shown, walk

# Source: the official download page, archives under the names in use since 2020.
OFFICIAL_MD5 = {
    "Gnt1.1TrainPart1.zip": "72bac7b6a5ce37f184f277421adfacfd",
    "Gnt1.1TrainPart2.zip": "a8b76e4eccfb1fd8d56c448f6a096c27",
    "Gnt1.1Test.zip": "e74f9a4863e73d8b80ed402452c97448",
}
_WRITER = re.compile(r"([A-Za-z]?\d+)(?:-\w+)?")
_CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Member:
    """One GNT file, inside a zip or on its own: its place, its writer, its split.

    Attributes:
      path: the zip, or the GNT file itself.
      name: the member's name inside the zip; "" for a file of its own.
      writer: from `1001-c.gnt`: "1001"; `UNKNOWN_WRITER` for a file that holds several.
      split: "train", "validation" or "test".
      num_bytes: unpacked size.
      crc32: of the unpacked bytes.
      character: the label of a picture; "" for a GNT file. `path` is then the pictures' root and
        `name` the path relative to it.
      digest: SHA-256 of a picture's bytes; "" for a GNT file.
    """

    path: Path
    name: str
    writer: str
    split: str
    num_bytes: int
    crc32: int
    character: str = ""
    digest: str = ""

    @property
    def archive(self) -> str:
        """The file name of the zip, or the name of the folder around a single file."""
        return shown(self.path.name if self.name else self.path.parent.name)

    @property
    def source(self) -> str:
        """Archive and member name, as stored with every record and shown in messages."""
        return f"{self.archive}/{shown(self.name or self.path.name)}"


def list_members(paths: Sequence[str | Path], on_fault: gnt.OnFault | None = None) -> list[Member]:
    """Returns the GNT members of zips, folders (searched recursively) and single files.

    The split comes from the nearest name that denotes one, see `divisions.split_of` (the file's own
    unless it is a writer's number, folders inside the zip, the zip, folders up to the given one),
    else from the official writer numbers.

    Args:
      paths: zips, folders or `.gnt` files.
      on_fault: called with (reason, bytes lost) for a file without usable members and for an
        unsound entry of a zip (see `list_gnt_entries`), which are then skipped; None stops at the
        first.

    Returns:
      The members ordered by split, writer and source.

    Raises:
      InputError: a path is missing or unreadable, no member is found, a member's split is unknown,
        or one writer comes from two members; without `on_fault` also a damaged archive, one
        without images, one that needs another program to unpack, one with an unsound entry.
    """
    members: list[Member] = []
    for path in map(Path, paths):
        for root, file in _files(path):
            try:
                members += _members_of_file(root, file, on_fault)
            except UnusableFileError as error:
                if on_fault is None:
                    raise
                on_fault(f"unusable file {file.name}", error.num_bytes)
    if not members:
        raise InputError(
            f"{', '.join(map(str, paths))}: no .gnt member found; pictures are for --pictures"
        )
    _check_writers(members)
    return sorted(members, key=lambda member: (member.split, member.writer, member.source))


def read_member(member: Member, on_fault: gnt.OnFault | None = None) -> Iterator[gnt.Record]:
    """Yields the records of a member; see `gnt.read_records`.

    Args:
      member: the member to read.
      on_fault: as in `gnt.read_records`. If the zip itself is damaged (a bad CRC or another size
        than declared among others), the records before the damage are kept and the rest of the
        member is lost. Records and losses add up to `member.num_bytes` at least.

    Raises:
      InputError: at a fault, if `on_fault` is None.
    """
    lost: list[int] = []

    def lose(reason: str, num_bytes: int) -> None:
        lost.append(num_bytes)
        if on_fault:
            on_fault(reason, num_bytes)

    kept = 0
    if not member.num_bytes:
        lose("empty file", 0)
        if on_fault is None:
            raise InputError(f"{member.source}: empty; --on_error=skip skips it")
    try:
        with _open(member) as stream:
            for record in gnt.read_records(stream, member.source, lose if on_fault else None):
                kept += gnt.HEADER.size + record.bitmap.size
                yield record
        found = kept + sum(lost)
        if found != member.num_bytes:
            raise EOFError(f"{member.num_bytes} bytes declared, {found} found")
    except InputError as error:
        raise InputError(f"{error}; --on_error=skip skips it") from None
    except DAMAGE as error:
        if on_fault is None:
            message = f"{member.source}: cannot be unpacked: {error}"
            raise InputError(f"{message}; --on_error=skip skips it") from error
        on_fault("damaged zip member, rest of it lost", max(member.num_bytes - kept - sum(lost), 0))


def divide(members: Sequence[Member]) -> dict[str, list[Member]]:
    """Returns the members of each split; validation is held out of train where none is given."""
    held_out: frozenset[str] = frozenset()
    if not any(member.character or member.split == "validation" for member in members):
        held_out = validation_writers([m.writer for m in members if m.split == "train"])
    splits: dict[str, list[Member]] = {"train": [], "validation": [], "test": []}
    for member in members:
        validates = member.split == "train" and member.writer in held_out
        splits["validation" if validates else member.split].append(member)
    return splits


def fingerprint(members: Sequence[Member], characters: Sequence[str] = ()) -> str:
    """Returns a digest of the members' names, sizes and CRCs, independent of their folder.

    Args:
      members: of a data set.
      characters: its charset, if not the default.
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
        entry.file_size += 1  # otherwise zipfile silently cuts off any bytes beyond it
        # The member keeps the file open until it is closed itself.
        return archive.open(entry)  # type: ignore[return-value]


def _files(path: Path) -> Iterator[tuple[Path, Path]]:
    """Yields (outermost folder whose name may give a split, file) for the files in a path."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_file():
        yield path.absolute().parent, path.absolute()
        return
    for folder, names in walk(path.absolute()):
        for name in names:
            if Path(name).suffix.lower() in (".gnt", *FOREIGN):
                yield path.absolute(), folder / name


def _members_of_file(root: Path, file: Path, on_fault: gnt.OnFault | None) -> list[Member]:
    if not os.access(file, os.R_OK):
        raise InputError(f"{file}: cannot be read: permission denied")
    if has_control_characters(f"{file.parent.name}/{file.name}"):
        message = "control characters or a broken encoding in its name: rename it"
        raise UnusableFileError(file, message)
    kind = file.suffix.lower()
    if kind in FOREIGN and kind != ".zip":
        raise UnusableFileError(file, FOREIGN[kind])
    above = [file.parent, *file.parent.parents]
    names = [folder.name for folder in above[: above.index(root) + 1]]
    if kind == ".gnt":
        return [_member(file, "", names, file.stat().st_size, _file_crc32(file))]
    _check_md5(file)
    names.insert(0, file.stem)
    members = []
    for entry, fault in list_gnt_entries(file):
        if not fault:
            member = _member(file, readable_name(entry), names, entry.file_size, entry.CRC)
            members.append(dataclasses.replace(member, name=entry.filename))
        elif on_fault is None:
            raise InputError(f"{file}: {shown_name(entry)}: {fault}; --on_error=skip skips it")
        else:
            on_fault(f"unusable entry of {file.name}", entry.file_size)
    return members


def _member(file: Path, name: str, names: list[str], num_bytes: int, crc32: int) -> Member:
    inner = PurePosixPath(name or file.name)
    if number := _WRITER.fullmatch(inner.stem):
        writer = number.group(1)
    elif split_of(inner.stem):  # `1.1train-gb1.gnt`: all writers joined, as in older distributions
        writer = UNKNOWN_WRITER
    else:
        writer = inner.stem
    inside = [] if number else [inner.stem]
    inside += [folder.name for folder in inner.parents] if name else []
    split = find_split([*inside, *names], writer)
    if not split:
        raise InputError(
            f"{file}{f': {name}' if name else ''}: unknown split: put `train` or "
            f"`test` in the name of the archive or of its folder, or name the file as CASIA does "
            f"(1001-c.gnt to 1300-c.gnt for HWDB1.1)"
        )
    return Member(file, name, writer, split, num_bytes, crc32)


def _check_writers(members: list[Member]) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        first = seen.setdefault(member.writer, member)
        if first is not member and member.writer != UNKNOWN_WRITER:
            raise InputError(
                f"writer {member.writer} occurs twice, in {first.path} ({first.source}) and "
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
        raise UnusableFileError(file, f"{message}: download it again, or rename another archive")


def _file_crc32(file: Path) -> int:
    crc = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
