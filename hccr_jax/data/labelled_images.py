"""Labelled pictures, in folders named by character or listed in a CSV file; charset files."""

import collections
import csv
import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hccr_jax.data.casia import charset
from hccr_jax.data.casia.archives import Member
from hccr_jax.data.casia.divisions import hold_out
from hccr_jax.data.casia.gnt import OnFault
from hccr_jax.data.images import ink
from hccr_jax.data.images.files import open_pictures
from hccr_jax.errors import InputError, shorten
from hccr_jax.paths import shown, walk

UNKNOWN_WRITER = "unknown"
SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {"training": "train", "val": "validation", "valid": "validation"}
_COLUMNS = ("path", "character", "writer", "split")
_SUFFIXES = (".png", ".jpg", ".jpeg")
# U+4E00 and u4e00; unzip writes #U4e00 for a name that it cannot encode.
_CODE = re.compile("#?[Uu][+]?([0-9A-Fa-f]{4,6})")
_CHARSETS = {"level1": charset.level1, "chinese": charset.chinese}


class _Picture(NamedTuple):
    """A picture's path below the root, its label, its writer and split ("" if not given)."""

    name: str
    character: str
    writer: str
    split: str


class _Labelled(NamedTuple):
    """A picture with size and checksums of its file; `digest` is SHA-256."""

    picture: _Picture
    num_bytes: int
    crc32: int
    digest: str


def list_pictures(path: str | Path, faults: list[str], on_skip: OnFault) -> list[Member]:
    """Returns the pictures of a folder or of a CSV file, each with its character and its split.

    In a folder, a picture (PNG or JPEG) is labelled by the name of its own folder: 永, U+6C38 or
    u6c38. Folders train, validation and test above it give the split. A CSV file has the columns
    path (relative to the file's folder) and character, and may have writer and split.

    Without splits, about a tenth is held out for the test and a tenth for validation: of the
    writers if there are at least three and each picture has one, else of the pictures of each
    character. If only validation is missing, it is held out of train in the same way. The selection
    is by hashes of the writers' names or of the pictures' bytes, so it is reproducible.

    Args:
      path: the folder, or the CSV file.
      faults: gets a line for each unusable picture.
      on_skip: called with (reason, bytes) for a file that is no picture.

    Raises:
      InputError: there is nothing to read, columns are wrong, or only some pictures have a split.
    """
    path = Path(path).absolute()
    if path.is_dir():
        root, found = path, _walk(path, faults, on_skip)
    elif path.is_file():
        root, found = path.parent, _read_csv(path, faults)
    else:
        raise InputError(f"{path}: no such folder or CSV file")
    labelled = _read(root, found, faults)
    if not labelled:
        reasons = f": {shorten(faults)}" if faults else ""
        raise InputError(
            f"{path}: no usable picture{reasons}; PNG or JPEG files are needed, in folders "
            f"named by their character"
        )
    members = [
        Member(
            path=root,
            name=entry.picture.name,
            writer=entry.picture.writer or UNKNOWN_WRITER,
            split=split,
            num_bytes=entry.num_bytes,
            crc32=entry.crc32,
            character=entry.picture.character,
        )
        for entry, split in zip(labelled, _divide(labelled), strict=True)
    ]
    return sorted(members, key=lambda member: (member.split, member.source))


def read_bitmap(member: Member) -> np.ndarray:
    """Returns the bitmap of a picture, uint8 (H, W): dark ink on paper of 255, cropped.

    Raises:
      InputError: the file is damaged, no picture, or without ink.
    """
    file = member.path / member.name
    picture = next(open_pictures(file))
    if picture.record is not None:
        raise InputError(f"{shown(file)}: a GNT file, not a picture: give it in --archives")
    return ink.to_bitmap(picture.grey, shown(file))


def read_charset(argument: str) -> tuple[str, ...]:
    """Returns a list of characters.

    Args:
      argument: level1, chinese, or a text file of characters (UTF-8), with or without line breaks
        and blanks.

    Raises:
      InputError: there is no such file, or it has a character twice or one that is not allowed.
    """
    if argument in _CHARSETS:
        return _CHARSETS[argument]()
    try:
        text = Path(argument).expanduser().read_text("utf-8-sig")
    except OSError as error:
        names = ", ".join(_CHARSETS)
        message = f"--charset={argument}: {error.strerror}: give {names} or a file"
        raise InputError(message) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--charset={argument}: not UTF-8: save it as UTF-8") from error
    characters = "".join(text.split())
    twice = [c for c, count in collections.Counter(characters).items() if count > 1]
    wrong = [f"U+{ord(c):04X}" for c in dict.fromkeys(characters) if not _is_character(c)]
    for reason, found in (("more than once", twice), ("no characters", wrong)):
        if found:
            raise InputError(f"--charset={argument}: {reason}: {shorten(found, ', ')}")
    if len(characters) < 2:
        raise InputError(f"--charset={argument}: at least two characters are needed")
    return tuple(characters)


def parse_character(name: str) -> str | None:
    """Returns the character that a name denotes, or None.

    >>> [parse_character(name) for name in ("永", "U+6C38", "#U6c38", "A", "ab", "U+D800", "")]
    ['永', '永', '永', 'A', None, None, None]
    """
    if code := _CODE.fullmatch(name):
        name = chr(int(code[1], 16)) if int(code[1], 16) < 0x110000 else ""
    elif len(name) > 1:
        name = unicodedata.normalize("NFC", name)  # macOS decomposes が
    return name if len(name) == 1 and _is_character(name) else None


def check_faults(faults: Sequence[str]) -> None:
    """Checks that no picture was unusable.

    Raises:
      InputError: names the unusable ones.
    """
    if faults:
        raise InputError(
            f"unusable pictures: {len(faults):,}: {shorten(faults)}; --on_error=skip skips them"
        )


def _is_character(character: str) -> bool:
    """Returns whether it is a letter, number, mark or symbol: no control, blank or unassigned."""
    return unicodedata.category(character)[0] in "LNPSM"


def _walk(root: Path, faults: list[str], on_skip: OnFault) -> Iterator[_Picture]:
    for folder, files in walk(root):
        place = folder.relative_to(root)
        parts = place.parts
        if shown(place) != str(place):  # 一 in GBK is һ in UTF-8: reading GBK would be a guess
            raise InputError(
                f"{shown(folder)}: a name that is not UTF-8, perhaps GBK: rename all folders, for "
                f"example by `convmv -f gbk -t utf-8 -r --notest {shown(root)}`"
            )
        character = parse_character(parts[-1]) if parts else None
        split = next(filter(None, map(_split, parts[:-1])), "")
        for name in files:
            file = folder / name
            if Path(name).suffix.lower() not in _SUFFIXES:
                on_skip("neither a .png nor a .jpg file", file.lstat().st_size)
            elif character is None:
                faults.append(f"{shown(file)}: its folder is not named by a character")
            else:
                yield _Picture(str(file.relative_to(root)), character, "", split)


def _read_csv(path: Path, faults: list[str]) -> Iterator[_Picture]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, strict=True)
            names = rows.fieldnames or []
            wrong = [name for name in names if name not in _COLUMNS]
            wrong += [name for name in _COLUMNS[:2] if name not in names]
            if wrong or len(set(names)) < len(names):
                raise InputError(
                    f"{path}: its first line names the columns {', '.join(names) or '(none)'}: "
                    f"path and character are needed, writer and split are optional, no others"
                )
            for row in rows:
                yield from _picture_of_row(f"{path}, line {rows.line_num}", row, faults)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _picture_of_row(place: str, row: dict[str, str], faults: list[str]) -> Iterator[_Picture]:
    if None in row or None in row.values():
        faults.append(f"{place}: not as many values as columns")
        return
    values = {key: value.strip() for key, value in row.items()}
    character, split = parse_character(values["character"]), values.get("split", "")
    if character is None:
        faults.append(f"{place}: {values['character']!r} is no character")
    elif split and not _split(split):
        faults.append(f"{place}: split {split!r}: use {', '.join(SPLITS)}")
    else:
        yield _Picture(values["path"], character, values.get("writer", ""), _split(split))


def _split(name: str) -> str:
    """Returns the split that a name denotes, "" if none."""
    name = name.lower()
    name = _SPLIT_NAMES.get(name, name)
    return name if name in SPLITS else ""


def _read(root: Path, pictures: Iterator[_Picture], faults: list[str]) -> list[_Labelled]:
    """Returns the readable pictures of one label, each once."""
    first: dict[str, _Picture] = {}
    names: set[str] = set()
    labelled = []
    for picture in pictures:
        try:
            data = (root / picture.name).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            faults.append(f"{root / picture.name}: cannot be read: {reason}")
            continue
        digest = hashlib.sha256(data).hexdigest()
        same = first.setdefault(digest, picture)
        if picture.name in names:
            faults.append(f"{root / picture.name}: listed twice")
        elif same.character != picture.character:
            faults.append(
                f"{root / picture.name}: the same picture as {same.name}, which is labelled "
                f"{same.character} and not {picture.character}"
            )
        else:
            names.add(picture.name)
            labelled.append(_Labelled(picture, len(data), zlib.crc32(data), digest))
    return labelled


def _divide(labelled: Sequence[_Labelled]) -> list[str]:
    """Returns the split of each picture."""
    splits = [entry.picture.split for entry in labelled]
    if any(splits) and not all(splits):
        name = labelled[splits.index("")].picture.name
        raise InputError(f"{name}: has no split, others have: give all or none")
    if not any(splits):
        splits = ["train"] * len(labelled)
        _hold_out("test", labelled, splits)
    if "validation" not in splits:
        _hold_out("validation", labelled, splits)
    return splits


def _hold_out(split: str, labelled: Sequence[_Labelled], splits: list[str]) -> None:
    """Moves a part of the training pictures to another split."""
    writers = {entry.picture.writer for entry in labelled}
    by_writer = len(writers) >= 3 and "" not in writers
    units: dict[str, dict[int, str]] = {}
    for index, (picture, _, _, digest) in enumerate(labelled):
        if splits[index] == "train":
            group = "" if by_writer else picture.character
            units.setdefault(group, {})[index] = picture.writer if by_writer else digest
    for unit_of in units.values():
        held_out = hold_out(sorted(set(unit_of.values())), f"{split} ")
        for index, unit in unit_of.items():
            if unit in held_out:
                splits[index] = split
