"""Labelled pictures: listed, divided and read; charset files."""

import collections
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hccr_jax.data.casia import charset
from hccr_jax.data.casia.archives import Member
from hccr_jax.data.casia.divisions import UNKNOWN_WRITER, hold_out
from hccr_jax.data.casia.gnt import OnFault
from hccr_jax.data.images import ink
from hccr_jax.data.images.files import SUFFIXES, open_pictures
from hccr_jax.data.picture_lists import Picture, list_csv, list_folder
from hccr_jax.errors import InputError, shorten
from hccr_jax.paths import expand, shown

_SHOWN_FAULTS = 3
_CHARSETS = {"level1": charset.level1, "chinese": charset.chinese}


class _Labelled(NamedTuple):
    """A picture with size and checksums of its file; `digest` is SHA-256."""

    picture: Picture
    num_bytes: int
    crc32: int
    digest: str


def list_pictures(path: str | Path, faults: list[str], on_skip: OnFault) -> list[Member]:
    """Returns the pictures of a folder or of a CSV file, each with its character and its split.

    In a folder, a picture is labelled by the name of its own folder: 永, U+6C38 or
    u6c38. A CSV file has the columns path (relative to the file's folder) and character, and may
    have writer and split. Without that, the nearest folder above that is named by a split counts,
    see `divisions.split_of`.

    Without splits, about a tenth is held out for the test and a tenth for validation: of the
    writers if there are at least three and each picture has one, else of the pictures of each
    character. If only validation is missing, it is held out of train in the same way. The selection
    is by hashes of the writers' names or of the pictures' bytes, so it is reproducible.

    Args:
      path: the folder, or the CSV file.
      faults: gets a line for each unusable picture.
      on_skip: called with (reason, bytes) for a file that is no picture.

    Raises:
      InputError: there is nothing to read, columns are wrong, only some pictures have a split, or
        none and the characters are in several folders.
    """
    path = Path(path).absolute()
    found: Iterable[Picture]
    if path.is_dir():
        root, found = path, list_folder(path, faults, on_skip)
    elif path.is_file():
        root, found = path.parent, list_csv(path, faults)
    else:
        raise InputError(f"{path}: no such folder or CSV file")
    labelled = _read(root, found, faults)
    if not labelled:
        reasons = f": {shorten(faults, limit=_SHOWN_FAULTS)}" if faults else ""
        raise InputError(
            f"{shown(path)}: no usable picture{reasons}; needed are {', '.join(SUFFIXES)} files, "
            f"in folders named by their character (永 or U+6C38), or a CSV file that lists them; "
            f".gnt files are for --archives"
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
            digest=entry.digest,
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
        text = expand(argument).read_text("utf-8-sig")
    except OSError as error:
        names = ", ".join(_CHARSETS)
        message = f"--charset={argument}: {error.strerror}: give {names} or a file"
        raise InputError(message) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--charset={argument}: not UTF-8: save it as UTF-8") from error
    characters = charset.canonical("".join(text.split()))
    twice = [c for c, count in collections.Counter(characters).items() if count > 1]
    wrong = [f"U+{ord(c):04X}" for c in dict.fromkeys(characters) if not charset.is_character(c)]
    for reason, found in (("more than once", twice), ("no characters", wrong)):
        if found:
            raise InputError(f"--charset={argument}: {reason}: {shorten(found, ', ')}")
    if len(characters) < 2:
        raise InputError(f"--charset={argument}: at least two characters are needed")
    return tuple(characters)


def check_faults(faults: Sequence[str]) -> None:
    """Checks that no picture was unusable.

    Raises:
      InputError: names the unusable ones.
    """
    if faults:
        raise InputError(
            f"unusable pictures: {len(faults):,}: {shorten(faults)}; --on_error=skip skips them"
        )


def _read(root: Path, pictures: Iterable[Picture], faults: list[str]) -> list[_Labelled]:
    """Returns the readable pictures of one label."""
    first: dict[str, Picture] = {}
    labelled = []
    for picture in pictures:
        file = shown(root / picture.name)
        try:
            data = (root / picture.name).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            faults.append(f"{file}: cannot be read: {reason}")
            continue
        digest = hashlib.sha256(data).hexdigest()
        same = first.setdefault(digest, picture)
        if same.character != picture.character:
            faults.append(
                f"{file}: the same picture as {shown(same.name)}, which is labelled "
                f"{same.character} and not {picture.character}"
            )
        else:
            labelled.append(_Labelled(picture, len(data), zlib.crc32(data), digest))
    return labelled


def _divide(labelled: Sequence[_Labelled]) -> list[str]:
    """Returns the split of each picture."""
    splits = [entry.picture.split for entry in labelled]
    if any(splits) and not all(splits):
        name = shown(labelled[splits.index("")].picture.name)
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
