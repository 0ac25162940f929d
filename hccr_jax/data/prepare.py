"""Makes data sets: from CASIA archives, labelled pictures, or the embedded simulated writers."""

import collections
import contextlib
import dataclasses
import io
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hccr_jax.data import labelled_images, store
from hccr_jax.data.casia import charset
from hccr_jax.data.casia.archives import Member, fingerprint, list_members
from hccr_jax.data.casia.gnt import OnFault
from hccr_jax.data.synthetic.archives import write_gnt_archives
from hccr_jax.errors import InputError, shorten
from hccr_jax.paths import shown

_SHOWN_COPIES = 5


class Prepared(NamedTuple):
    """A prepared data set: its folder, its manifest, and whether this call made it."""

    folder: Path
    manifest: dict[str, Any]
    is_new: bool


def prepare(
    archives: Sequence[str | Path],
    data_dir: str | Path,
    name: str = "casia_hwdb",
    on_error: str = "stop",
    overwrite: bool = False,
    *,
    test_archives: Sequence[str | Path] = (),
    pictures: str | Path | None = None,
    characters: Sequence[str] = (),
) -> Prepared:
    """Makes the data set `name`, unless it was already made from the same archives or pictures.

    It appears in its folder complete or not at all, even if this process is killed.

    Args:
      archives: zips, folders or `.gnt` files; none with `pictures`.
      data_dir: folder of all data sets.
      name: the data set's name: lower-case letters, digits and underscores.
      on_error: "stop" at the first damaged file or record, or "skip" and count it.
      overwrite: replace a data set made from other archives.
      test_archives: if given, they are the test split, and all others are for training.
      pictures: a folder or a CSV file of labelled pictures, see `labelled_images.list_pictures`.
      characters: the charset; by default level 1 for archives, and all characters of pictures.

    Raises:
      InputError: an argument, an archive or a record is wrong, two splits have a file in common, or
        other archives were used before.
    """
    _check_name(name)
    skipped: collections.Counter[Any] = collections.Counter()
    skips, faults = on_error == "skip", list[str]()

    def skip(reason: str, num_bytes: int) -> None:
        skipped.update({(reason, "count"): 1, (reason, "bytes"): num_bytes})

    if pictures is not None:
        members = labelled_images.list_pictures(pictures, faults, skip)
        characters = characters or sorted({member.character for member in members})
    else:
        members = _list_members(archives, test_archives, skip if skips else None)
    members = drop_copies(members, skips, skip)
    folder = store.dataset_folder(name, data_dir)
    with store.exclusive(Path(data_dir, f".{name}.lock")):
        if folder.exists() and not overwrite:
            manifest = store.read_manifest(name, data_dir)
            if manifest["fingerprint"] != fingerprint(members, characters):
                raise InputError(
                    f"{folder} was made from other archives or pictures: give --overwrite to "
                    f"replace it, or another --name or --data_dir to keep both"
                )
            if not skips:
                labelled_images.check_faults(faults or manifest.get("faults", []))
            return Prepared(folder, manifest, is_new=False)
        _build(data_dir, name, members, skips, skipped, characters, faults)
    return Prepared(folder, store.read_manifest(name, data_dir), is_new=True)


def _check_name(name: str) -> None:
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(
            f"name={name!r}: use lower-case letters, digits and underscores, a letter first"
        )
    if name == "synthetic":
        raise InputError("name='synthetic': it is the data set of simulated writers: take another")


def _list_members(
    archives: Sequence[str | Path],
    test_archives: Sequence[str | Path],
    on_fault: OnFault | None,
) -> list[Member]:
    """Returns the members of archives, split by their names, or by the two lists if given."""
    members = list_members(archives, on_fault)
    if not test_archives:
        return members
    test = list_members(test_archives, on_fault)
    # `archives` may be a folder that contains the test archives too.
    test_contents = {(member.num_bytes, member.crc32) for member in test}
    train = [member for member in members if (member.num_bytes, member.crc32) not in test_contents]
    return [dataclasses.replace(member, split="train") for member in train] + [
        dataclasses.replace(member, split="test") for member in test
    ]


def drop_copies(members: Sequence[Member], skips: bool, on_skip: OnFault) -> list[Member]:
    """Returns the members without files of the same content; those of test and validation stay.

    Raises:
      InputError: one is in two splits, unless `skips`.
    """
    first: dict[tuple[int, int, str], Member] = {}
    copies, leaks = set[int](), list[str]()
    for index in sorted(range(len(members)), key=lambda i: members[i].split == "train"):
        member = members[index]
        same = first.setdefault((member.num_bytes, member.crc32, member.digest), member)
        if same is member or not member.num_bytes:
            continue
        copies.add(index)
        if same.split == member.split:
            on_skip("copy of another file", member.num_bytes)
        else:
            on_skip("copy of a file of another split", member.num_bytes)
            leaks.append(f"{_place(member)} ({member.split}) and {_place(same)} ({same.split})")
    if leaks and not skips:
        raise InputError(
            f"the same content in two splits, which must have none in common: "
            f"{shorten(leaks, limit=_SHOWN_COPIES)}: remove one of each; --on_error=skip leaves "
            f"it out of train"
        )
    return [member for index, member in enumerate(members) if index not in copies]


def _place(member: Member) -> str:
    return shown(member.path / member.name)


def _build(data_dir: str | Path, name: str, *options: Any) -> None:
    """Builds in a staging folder and renames it; first removes what a killed run left there."""
    from hccr_jax.data import tfds_builder  # slow to import: wrong input is reported before

    folder = store.dataset_folder(name, data_dir)
    staging = Path(data_dir, f"incomplete.{name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        builder = tfds_builder.CasiaHwdb(staging, name, *options)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size
            builder.download_and_prepare(file_format="array_record", download_dir=staging / "none")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(staging / "replaced")
        store.dataset_folder(name, staging).rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def prepare_synthetic(
    data_dir: str | Path,
    num_characters: int,
    num_train_writers: int,
    num_test_writers: int,
    cursiveness: float,
) -> str:
    """Makes the embedded data set of simulated writers, unless it exists.

    It takes the path of real data: GNT archives are written, and prepared like CASIA's.

    Args:
      data_dir: folder of all data sets.
      num_characters: the first so many level-1 characters in Unicode order.
      num_train_writers, num_test_writers: writers, each of whom writes every character once.
      cursiveness: of the writers, from 0 to 1 in steps of 0.01: see `writer.create_writer`.

    Returns:
      The data set's name, which contains these numbers.
    """
    sizes = f"{num_characters}c_{num_train_writers}w_{num_test_writers}t"
    name = f"synthetic_{sizes}_cursive{100 * cursiveness:.0f}"
    folder, lock = store.dataset_folder(name, data_dir), Path(data_dir, f".archives.{name}.lock")
    with contextlib.nullcontext() if folder.exists() else store.exclusive(lock):
        if folder.exists():
            return name
        scratch = Path(data_dir, f"archives.{name}")
        characters = sorted(charset.level1())[:num_characters]
        write_gnt_archives(
            scratch,
            characters,
            num_train_writers,
            num_test_writers,
            cursiveness=round(cursiveness, 2),
        )
        prepare([scratch], data_dir, name)
        shutil.rmtree(scratch)
    return name
