"""Turns CASIA archives into the data set that training reads.

Example:

  python -m hccr_jax.data.prepare --archives=~/casia/HWDB1.1trn_gnt_P1.zip,~/casia/HWDB1.1trn_gnt_P2.zip,~/casia/HWDB1.1tst_gnt.zip --data_dir=~/data

A folder that holds the archives, or unpacked .gnt files, will do as well: --archives=~/casia
"""  # noqa: E501

import collections
import contextlib
import io
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from hccr_jax.data import archives as archives_lib
from hccr_jax.data import store
from hccr_jax.errors import InputError


class Prepared(NamedTuple):
    """A prepared data set: its folder, its manifest, and whether it was made just now."""

    folder: Path
    manifest: dict[str, Any]
    is_new: bool


def prepare(
    archives: Sequence[str | Path],
    data_dir: str | Path,
    name: str = "casia_hwdb",
    on_error: str = "stop",
    overwrite: bool = False,
) -> Prepared:
    """Makes the data set `name` from archives, unless it is there, made from the same archives.

    It appears in its place complete or not at all, whatever ends this process.

    Args:
      archives: zips, folders or `.gnt` files.
      data_dir: folder of all data sets.
      name: the data set's name: lower-case letters, digits and underscores.
      on_error: "stop" at the first damaged file or record, or "skip" and count it.
      overwrite: replace a data set made from other archives.

    Raises:
      InputError: an argument, an archive or a record is wrong, or other archives were used before.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(f"name={name!r}: use lower-case letters, digits and underscores")
    skipped: collections.Counter[Any] = collections.Counter()

    def skip(reason: str, num_bytes: int) -> None:
        skipped.update({(reason, "count"): 1, (reason, "bytes"): num_bytes})

    members = archives_lib.list_members(archives, skip if on_error == "skip" else None)
    folder = store.dataset_folder(name, data_dir)
    with store.exclusive(Path(data_dir, f".{name}.lock")):
        if folder.exists() and not overwrite:
            manifest = store.read_manifest(name, data_dir)
            if manifest["fingerprint"] == archives_lib.fingerprint(members):
                return Prepared(folder, manifest, is_new=False)
            raise InputError(
                f"{folder} was made from other archives: give --overwrite to replace it, or "
                f"another --name or --data_dir to keep both"
            )
        _build(name, data_dir, members, on_error, skipped)
    return Prepared(folder, store.read_manifest(name, data_dir), is_new=True)


def _build(
    name: str,
    data_dir: str | Path,
    members: Sequence[archives_lib.Member],
    on_error: str,
    skipped: collections.Counter[Any],
) -> None:
    """Builds aside, where no reader looks, and renames; what a killed run left there goes first."""
    from hccr_jax.data import casia_hwdb  # slow to import: wrong input should be told at once

    folder = store.dataset_folder(name, data_dir)
    staging = Path(data_dir, f"incomplete.{name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        builder = casia_hwdb.CasiaHwdb(
            data_dir=staging,
            name=name,
            members=members,
            skip_faults=on_error == "skip",
            skipped=skipped,
        )
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download of unknown size
            builder.download_and_prepare(file_format="array_record", download_dir=staging / "none")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rename(staging / "replaced")
        store.dataset_folder(name, staging).rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _summary(prepared: Prepared, seconds: float) -> str:
    manifest = prepared.manifest
    done = f"made in {seconds:.1f} s" if prepared.is_new else "already made from these archives"
    lines = [f"{prepared.folder}: {done}"]
    for split, count in manifest["characters_per_split"].items():
        writers = len(manifest["characters_per_writer"][split])
        classes = len(manifest["characters_per_class"][split])
        lines.append(f"  {split:<10} {count:>9,} characters, {writers} writers, {classes} classes")
    for reason, skipped in manifest["skipped"].items():
        lines.append(f"  passed over {skipped['count']:,} ({skipped['bytes']:,} bytes): {reason}")
    return "\n".join(lines)


def _define_flags() -> flags.FlagValues:
    """Returns the flags in a set of their own, so that importing this module defines none."""
    own = flags.FlagValues()
    flags.DEFINE_list("archives", None, "Zips, folders or .gnt files.", flag_values=own)
    flags.DEFINE_string("data_dir", None, "Folder of all data sets; created.", flag_values=own)
    flags.DEFINE_string("name", "casia_hwdb", "Name of the data set.", flag_values=own)
    flags.DEFINE_enum(
        "on_error",
        "stop",
        ["stop", "skip"],
        "At a damaged file or record: stop, or go on with what is sound and count the rest.",
        flag_values=own,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace a data set made from other archives.", flag_values=own
    )
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    return own


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 wrong input."""
    start, values = time.monotonic(), _define_flags()
    try:
        rest = values(argv)[1:]
        if values.help:
            print(f"{__doc__}\nFlags:{values.get_help()}")
            return 0
        if rest:
            raise InputError(f"unexpected argument {rest[0]!r}: paths go in --archives")
        for required in ("archives", "data_dir"):
            if not values[required].value:
                raise InputError(f"--{required} is missing: see --help")
        prepared = prepare(
            [Path(path).expanduser() for path in values.archives],
            Path(values.data_dir).expanduser(),
            values.name,
            values.on_error,
            values.overwrite,
        )
    except (InputError, flags.Error) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(_summary(prepared, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
