"""Lists of labelled pictures: folders named by character, and CSV files."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from hccr_jax.data.casia.charset import parse_character
from hccr_jax.data.casia.divisions import SPLITS, find_split, split_of
from hccr_jax.data.casia.gnt import OnFault
from hccr_jax.data.casia.zip_entries import FOREIGN
from hccr_jax.data.images.files import SUFFIXES
from hccr_jax.errors import InputError, shorten
from hccr_jax.paths import shown, walk

_COLUMNS = ("path", "character", "writer", "split")
_DELIMITERS = ",;\t"
_SHOWN_FOLDERS = 5


class Picture(NamedTuple):
    """A picture's path below the root, its label, its writer and split ("" if not given)."""

    name: str
    character: str
    writer: str
    split: str


def list_folder(root: Path, faults: list[str], on_skip: OnFault) -> list[Picture]:
    """Returns the pictures of a folder; see `labelled_images.list_pictures`."""
    found = list(_walk(root, faults, on_skip))
    above = {Path(picture.name).parents[1] for picture in found}
    if not any(picture.split for picture in found) and len(above) > 1:
        common = Path(os.path.commonpath(above))
        names = sorted({path.relative_to(common).parts[0] for path in above - {common}})
        raise InputError(
            f"{root / common}: characters in several folders that no split is "
            f"named by: {shorten(names, ', ', _SHOWN_FOLDERS)}: name them train, validation and "
            f"test, or put the characters' folders into one, or list the pictures in a CSV file "
            f"with the columns path,character,writer"
        )
    return found


def _walk(root: Path, faults: list[str], on_skip: OnFault) -> Iterator[Picture]:
    for folder, files in walk(root):
        place = folder.relative_to(root)
        if shown(place) != str(place):  # 一 in GBK is һ in UTF-8: reading GBK would be a guess
            raise InputError(
                f"{shown(folder)}: a name that is not UTF-8, perhaps GBK: rename all folders, for "
                f"example by `convmv -f gbk -t utf-8 -r --notest {shown(root)}`"
            )
        character = parse_character(place.name)
        split = find_split([above.name for above in place.parents])
        for name in files:
            file = folder / name
            suffix = file.suffix.lower()
            if suffix not in SUFFIXES:
                kind = f": {suffix}" if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""
                on_skip(f"not a picture file{kind}", file.stat().st_size)
            elif character is None:
                faults.append(f"{shown(file)}: its folder is not named by a character")
            else:
                yield Picture(str(place / name), character, "", split)


def list_csv(path: Path, faults: list[str]) -> Iterator[Picture]:
    """Yields the pictures of a CSV file; see `labelled_images.list_pictures`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            rows = csv.reader(stream, strict=True, delimiter=max(_DELIMITERS, key=first.count))
            names = [name.strip().lower() for name in next(rows, [])]
            while names and not names[-1]:
                names.pop()
            wrong = [name for name in names if name not in _COLUMNS]
            wrong += [name for name in _COLUMNS[:2] if name not in names]
            if wrong or len(set(names)) < len(names):
                raise InputError(
                    f"{shown(path)}: its first line names the columns "
                    f"{', '.join(names) or '(none)'}: path and character are needed, writer and "
                    f"split are optional, no others"
                )
            for row in rows:
                place = f"{shown(path)}, line {rows.line_num}"
                yield from _picture_of_row(path.parent, place, names, row, faults)
    except (UnicodeDecodeError, csv.Error) as error:
        kind = path.suffix.lower()
        if kind in SUFFIXES or kind in FOREIGN:
            remedy = "give a folder of pictures, unpacked, or a CSV file that lists them"
        else:
            remedy = "save it as CSV in UTF-8"
        raise InputError(f"{shown(path)}: not a CSV file in UTF-8 ({error}): {remedy}") from error
    except OSError as error:
        raise InputError(f"{shown(path)}: cannot be read: {error.strerror}") from error


def _picture_of_row(
    root: Path, place: str, names: list[str], row: list[str], faults: list[str]
) -> Iterator[Picture]:
    cells = [cell.strip() for cell in row]
    if not any(cells):
        return
    if any(cells[len(names) :]) or len(cells) < len(names):
        faults.append(f"{place}: not as many values as columns")
        return
    values = dict(zip(names, cells, strict=False))
    character, split = parse_character(values["character"]), values.get("split", "")
    if character is None:
        faults.append(f"{place}: {values['character']!r} is no character")
    elif split and not split_of(split):
        faults.append(f"{place}: split {split!r}: use {', '.join(SPLITS)}")
    else:
        file = Path(values["path"])
        if "\\" in str(file) and not (root / file).exists():
            file = Path(PureWindowsPath(file).as_posix())
        split = split_of(split) or find_split([above.name for above in file.parents])
        yield Picture(str(file), character, values.get("writer", ""), split)
