"""Turns CASIA archives into the data set that training reads.

Example:

  python -m hccr_jax.data.prepare --archives=~/casia/HWDB1.1trn_gnt_P1.zip,~/casia/HWDB1.1trn_gnt_P2.zip,~/casia/HWDB1.1tst_gnt.zip --data_dir=~/data

A folder that holds the archives, or unpacked .gnt files, will do as well: --archives=~/casia
"""  # noqa: E501

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from hccr_jax.data.dataset import Prepared, prepare
from hccr_jax.errors import InputError


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
    for doubt in prepared.manifest.get("doubts", []):  # older manifests have none
        print(f"warning: are the tags right? {doubt}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
