"""Turns CASIA archives, or pictures of your own, into the data set that training reads.

Examples:

  hccr prepare --archives=~/casia/Gnt1.1TrainPart1.zip,~/casia/Gnt1.1TrainPart2.zip,~/casia/Gnt1.1Test.zip --data_dir=~/data

  hccr prepare --pictures=~/characters --data_dir=~/data --name=mine

  hccr prepare --archives=~/casia --test_archives=~/casia/competition-gnt.zip --data_dir=~/data --name=icdar2013

A folder that holds the archives, or unpacked .gnt files, works as well: --archives=~/casia. In a folder of pictures (PNG, JPEG, BMP, TIFF, WebP), each is in a folder named by its character: 永 or U+6C38, in train/, validation/ and test/ if you like. A CSV file has columns path,character and, if you like, writer,split. Train with --config.data.name=mine.
"""  # noqa: E501

import sys
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError, shorten


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    command.define_paths("archives", "Zips, folders or .gnt files.", values)
    command.define_paths(
        "test_archives", "The test split; all writers of --archives are then to train on.", values
    )
    command.define_path(
        "pictures",
        "Folder of pictures named by character, or a CSV file, in place of archives.",
        values,
    )
    flags.DEFINE_string(
        "charset",
        None,
        "The characters wanted: level1 (archives' default), chinese, or a text file of them.",
        flag_values=values,
    )
    command.define_path("data_dir", "Folder of all data sets; created.", values)
    flags.DEFINE_string(
        "name",
        None,
        "Name of the data set: casia_hwdb, or pictures, if not given.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "on_error",
        "stop",
        ["stop", "skip"],
        "At a damaged file or record: stop, or skip the damaged parts and count them.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "overwrite", False, "Replace a data set made from other archives.", flag_values=values
    )


def run(values: SimpleNamespace) -> None:
    """Runs the command."""
    if values.pictures and (values.archives or values.test_archives):
        raise InputError("--pictures and --archives make two data sets: give one of them")
    if not values.pictures:
        command.require(values, archives="see --help")
    command.require(values, data_dir="see --help")
    start = time.monotonic()
    from hccr_jax.data import labelled_images
    from hccr_jax.data.prepare import prepare

    wanted = values.charset if values.charset != "level1" else None  # that of archives anyway
    prepared = prepare(
        values.archives or (),
        values.data_dir,
        values.name or ("pictures" if values.pictures else "casia_hwdb"),
        values.on_error,
        values.overwrite,
        test_archives=values.test_archives or (),
        pictures=values.pictures,
        characters=labelled_images.read_charset(wanted) if wanted else (),
    )
    print(_summary(prepared, time.monotonic() - start))
    for fault in prepared.manifest.get("faults", []):
        print(f"warning: {fault}", file=sys.stderr)
    if shared := _shared_writers(prepared.manifest):
        print(f"warning: writers in more than one split: {shorten(shared, ', ')}", file=sys.stderr)
    for leak in prepared.manifest.get("leaks", []):
        print(f"warning: {leak}: its scores will be too good", file=sys.stderr)
    for doubt in prepared.manifest.get("doubts", []):  # older manifests have none
        print(f"warning: are the tags right? {doubt}", file=sys.stderr)


def _summary(prepared: Any, seconds: float) -> str:
    from hccr_jax.data.casia.divisions import SPLITS, UNKNOWN_WRITER

    manifest = prepared.manifest
    done = f"made in {seconds:.1f} s" if prepared.is_new else "already made from these archives"
    if manifest.get("faults"):
        done += f", without {len(manifest['faults']):,} unusable pictures"
    lines = [f"{prepared.folder}: {done}"]
    for split, count in manifest["characters_per_split"].items():
        names = manifest["characters_per_writer"][split]
        writers = "unknown" if UNKNOWN_WRITER in names else f"{len(names)}"
        classes = len(manifest["characters_per_class"][split])
        lines.append(f"  {split:<10} {count:>9,} characters, {writers} writers, {classes} classes")
    for split in (split for split in SPLITS if split not in manifest["characters_per_split"]):
        lines.append(f"  {split:<10} none: training needs it: give more images of each character")
    if manifest.get("validation_by_record"):
        lines.append(
            "  validation is a tenth of each class: there are no two training writers to divide"
        )
    for reason, skipped in manifest["skipped"].items():
        lines.append(f"  passed over {skipped['count']:,} ({skipped['bytes']:,} bytes): {reason}")
    if missing := manifest.get("not_trained"):
        lines.append(
            f"  {len(missing):,} of the charset without training images: {shorten(missing, ' ')}"
        )
    return "\n".join(lines)


def _shared_writers(manifest: dict[str, Any]) -> list[str]:
    """Returns the writers of more than one split; a network is to be tested on other people's."""
    from hccr_jax.data.casia.divisions import UNKNOWN_WRITER

    writers = manifest["characters_per_writer"]
    if manifest.get("validation_by_record"):
        writers = {split: names for split, names in writers.items() if split != "validation"}
    times = Counter(name for names in writers.values() for name in names)
    return [name for name, count in times.items() if count > 1 and name != UNKNOWN_WRITER]
