"""The entries of an untrusted zip file, each checked before anything is unpacked."""

import itertools
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

from hccr_jax.errors import InputError
from hccr_jax.paths import shown

# The exceptions of zipfile on damaged bytes; the last three for impossible names and offsets.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError),
    *(ValueError, OverflowError, KeyError),
)
# Limits on what an archive may demand of its reader. CASIA's have some hundred entries and unpack
# to 3 or 4 times their size; deflate reaches a factor of a thousand on blank paper, which a small
# archive may hold.
_MAX_ENTRIES = 10_000
_MAX_DIRECTORY_BYTES = _MAX_ENTRIES << 10
_MAX_RATIO = 100
_ALWAYS_UNPACKED = 256 << 20
_MAX_NAME = 255
_SHOWN_SUFFIXES = 5
_LOCAL_HEADER_BYTES = 30
# What to do with a file of another kind, in a folder or in a zip.
FOREIGN = {
    ".alz": "an .alz archive: unpack it with `unalz` and give the folder with its .gnt files",
    ".rar": "a .rar archive: unpack it with `unrar x` and give the folder with its .gnt files",
    ".7z": "a .7z archive: unpack it with `7z x` and give the folder with its .gnt files",
    **dict.fromkeys(
        (".tar", ".tgz", ".gz", ".bz2", ".xz"),
        "a tar archive: unpack it with `tar -xf` and give the folder with its .gnt files",
    ),
    ".mpf": "features (.mpf), not images: take the archive with `gnt` in its name",
    **dict.fromkeys(
        (".pot", ".wptt"),
        "pen strokes (online data), not images: take HWDB's archives, with `gnt` in their name",
    ),
    **dict.fromkeys(
        (".dgr", ".dgrl"),
        "pages of text, not characters: take the archives with `gnt` in their name",
    ),
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".download", ".aria2"),
        "an unfinished download: wait for it, or remove it",
    ),
    ".zip": "zip archives: unpack it and give the folder",
}
_IS_UTF8 = 0x800
_END_RECORD = b"PK\x05\x06"
_LOCATOR_OF_ZIP64 = b"PK\x06\x07"


class UnusableFileError(InputError):
    """A file that is damaged or has no members, which `--on_error=skip` skips."""

    def __init__(self, path: Path, message: str):
        super().__init__(f"{path}: {message}")
        self.num_bytes = path.stat().st_size


def list_gnt_entries(file: Path) -> list[tuple[zipfile.ZipInfo, str]]:
    """Returns the GNT entries of a zip and all faulty entries, in the order of their bytes.

    Every entry must be sound, also one that is no GNT file: a name that stays inside the archive,
    no link, no password, stored or deflated, both its headers agreeing, not overlapping the next
    entry, and the unpacked sizes together within a hundred times the archive's (or 256 MiB).

    Returns:
      Each entry with its fault, "" for none.

    Raises:
      UnusableFileError: the file is no zip, or has no GNT entry.
    """
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
    except DAMAGE as error:
        message = f"not a zip archive, or damaged ({error}): download it again"
        raise UnusableFileError(file, message) from error
    if not any(map(_is_gnt, entries)):
        raise UnusableFileError(file, _why_no_members(entries))
    _check_sizes(entries, faults, max(_ALWAYS_UNPACKED, _MAX_RATIO * file.stat().st_size))
    pairs = zip(entries, faults, strict=True)
    return [(entry, fault) for entry, fault in pairs if fault or _is_gnt(entry)]


def readable_name(entry: zipfile.ZipInfo) -> str:
    """Returns an entry's name as it was packed on Windows too: with / and with GBK characters."""
    name = entry.filename.replace("\\", "/")
    try:
        # Without its flag of UTF-8, zipfile reads the bytes of a name as code page 437.
        data = name.encode("utf-8" if entry.flag_bits & _IS_UTF8 else "cp437")
    except UnicodeEncodeError:  # from an extra field
        return name
    return shown(data.decode("utf-8", "surrogateescape"))


def shown_name(entry: zipfile.ZipInfo) -> str:
    """Returns an entry's name for a message."""
    return repr(entry.filename[:_MAX_NAME])


def has_control_characters(name: str) -> bool:
    """Returns whether a name has characters that garble a message or cannot be encoded.

    These are control and direction characters, and surrogates.
    """
    return any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in name)


def _end_record(file: Path) -> tuple[int, int]:
    """Returns the number of entries that a zip declares and the bytes of their directory.

    zipfile neither limits them nor notices a missing entry. (0, 0) without an end record.
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
    """Returns the fault of an entry by its two headers alone; "" for none."""
    name = entry.orig_filename
    folders = re.split(r"[/\\]", name)
    if not folders[0] or ".." in folders or re.match("[A-Za-z]:", name):
        return "its name leads outside the archive"
    if len(name) > _MAX_NAME or has_control_characters(name):
        return f"its name has more than {_MAX_NAME} characters, or control characters"
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a device, not a file"
    if entry.flag_bits & 1:
        return "encrypted"
    # Other methods unpack whole blocks, of any size.
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed with method {entry.compress_type}: pack it with deflate"
    try:
        archive.open(entry).close()
    except DAMAGE as error:
        return f"damaged: {error}"[:_MAX_NAME]
    return ""


def _check_sizes(entries: list[zipfile.ZipInfo], faults: list[str], room: int) -> None:
    """Adds the faults of overlapping entries, and of those that do not fit in `room` bytes."""
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


def _is_gnt(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.lower().endswith(".gnt") and not _is_shadow(entry)


def _is_shadow(entry: zipfile.ZipInfo) -> bool:
    """Returns whether macOS added an entry, which repeats a member's name."""
    folders = re.split(r"[/\\]", entry.filename)
    return "__MACOSX" in folders or folders[-1].startswith("._")


def _why_no_members(entries: list[zipfile.ZipInfo]) -> str:
    names = [e.filename for e in entries if not (e.is_dir() or _is_shadow(e))]
    if not names:
        return "the archive is empty"
    suffixes = {Path(name).suffix.lower() for name in names}
    for suffix, reason in FOREIGN.items():
        if suffix in suffixes:
            return f"holds {reason}"
    shown = sorted(filter(str.isprintable, suffixes))[:_SHOWN_SUFFIXES]
    return f"holds no .gnt member, only {', '.join(shown)}"
