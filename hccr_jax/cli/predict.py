"""Recognises handwritten characters with a trained network.

Examples:

  hccr predict --checkpoint=runs/v2 character.png
  hccr predict --checkpoint=runs/v2 folder/ more.jpg 1241-c.gnt --top=3 --table
  hccr predict --checkpoint=runs/v2 - < character.png
  hccr predict --checkpoint=runs/v2 folder/ --reject_at=0.01 --time
  hccr predict --checkpoint=runs/v2 --page page.jpg --annotate=page_read.png

Reads PNG, JPEG, BMP, TIFF, WebP and GNT files, folders with all that is below them, and "-" for
what comes on stdin. A picture shows one character, dark on light or light on dark, of any size and
colour; with --page, lines of characters that do not touch. Prints one JSON object a line for each
picture, GNT record or page. An unreadable picture is reported on stderr, and the others are still
read.

With --reject_at, anything crossed out, outside the class list or scrawled is marked as rejected.
p_value is the share of properly written characters that look less like a character:
--reject_at=0.01 rejects about one good character in a hundred.

Exit codes: 0 done, 2 the request or a picture was wrong.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError, shorten
from hccr_jax.paths import expand, shown, walk
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import find_checkpoints

TAKES_ARGUMENTS = True
TIMED = 20  # repetitions


class _File(NamedTuple):
    """A file to read: its name in the output, and its path, or None for stdin."""

    name: str
    path: Path | None


class _Item(NamedTuple):
    """A picture to recognise: what its line begins with, and its normal form."""

    head: dict[str, Any]
    form: np.ndarray


class _Reader:
    """Reads what the command line names; says on stderr what cannot be read."""

    def __init__(self) -> None:
        self.num_errors = 0

    def pictures(self, files: list[_File]) -> Iterator[tuple[dict[str, Any], Any]]:
        """Yields the head of a picture's line and the picture."""
        from hccr_jax.data.images.files import open_pictures, read_pictures

        for file in files:
            try:
                found = (
                    read_pictures(sys.stdin.buffer, "stdin")
                    if file.path is None
                    else open_pictures(file.path)
                )
                for picture in found:
                    head: dict[str, Any] = {"file": file.name}
                    if picture.record is not None:
                        head |= {"record": picture.record, "label": picture.label}
                    yield head, picture
            except InputError as error:
                self.report(error)

    def report(self, error: InputError) -> None:
        """Reports a picture that cannot be read."""
        self.num_errors += 1
        command.report_error(error)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    command.define_path("checkpoint", "Folder of a run, or its folder checkpoints.", values)
    flags.DEFINE_integer(
        "top", 5, "Candidates of each character.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_bool("table", False, "Print a table instead of JSON.", flag_values=values)
    flags.DEFINE_float(
        "reject_at", None, "Marks as rejected what looks less like a character than this share of "
        "properly written ones: 0.01 to 0.1.",
        lower_bound=0.0, upper_bound=1.0, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("page", False, "Each picture is a page of characters.", flag_values=values)
    flags.DEFINE_bool(
        "vertical", False, "With --page: lines are columns from right to left.", flag_values=values
    )
    command.define_path(
        "annotate",
        "With --page: a PNG file to draw the one page into, with boxes and predictions.",
        values,
    )
    flags.DEFINE_bool("time", False, "Report speed and latency on stderr.", flag_values=values)


def run(values: SimpleNamespace) -> int:
    """Runs the command and returns its exit code."""
    files = _check(values)
    prepare_process()
    from hccr_jax.inference.recognizer import Recognizer

    recognizer = Recognizer.load(values.checkpoint)
    if not recognizer.is_calibrated:
        print(
            f"note: {values.checkpoint} holds no temperature of these weights, fitted to writers "
            f"they have not seen: the probabilities are not calibrated",
            file=sys.stderr,
        )
    if values.reject_at is not None and not recognizer.can_reject:
        raise InputError(
            f"--reject_at: {values.checkpoint} holds no rejector of these weights and "
            f"{recognizer.num_tta_views} views of an image: hccr train --mode=eval makes one, "
            f"with the config of the run and --config.eval.rejection_images=2000"
        )
    reader = _Reader()
    if values.time:
        recognizer.warm_up()
    start = time.perf_counter()
    read = _read_pages if values.page else _read_characters
    count = read(recognizer, reader, files, values)
    if values.time:
        _print_speed(recognizer, count, time.perf_counter() - start)
    return 2 if reader.num_errors else 0


def _check(values: SimpleNamespace) -> list[_File]:
    """Checks the request and returns the files to read, those of folders one by one."""
    command.require(values, checkpoint="for example --checkpoint=runs/v2")
    if not values.arguments:
        raise InputError("no picture is named: give files or folders, or - for stdin")
    if (values.vertical or values.annotate) and not values.page:
        raise InputError("--vertical and --annotate go with --page")
    files, faults = list[_File](), list[str]()
    for name in values.arguments:
        try:
            files += _find_files(name)
        except InputError as error:
            faults.append(str(error))
    try:
        find_checkpoints(values.checkpoint)
    except InputError as error:
        faults.append(str(error))
    if faults:
        raise InputError(shorten(faults))
    if values.annotate and len(files) > 1:
        raise InputError(f"--annotate={values.annotate}: takes one page, got {len(files)}")
    page = files[0].path
    if values.annotate and page and values.annotate.exists() and page.samefile(values.annotate):
        raise InputError(f"--annotate={values.annotate}: is the page itself: choose another")
    return files


def _find_files(name: str) -> list[_File]:
    """Returns a file, or the pictures in a folder and all below it, and reports its other files."""
    from hccr_jax.data.images.files import SUFFIXES

    if name == "-":
        return [_File(name, None)]
    path = expand(name)
    if not path.exists():
        raise InputError(f"{shown(name)}: no such file or folder")
    if not path.is_dir():
        return [_File(shown(name), path)]
    known = (*SUFFIXES, ".gnt")
    found = [folder / name for folder, names in walk(path) for name in names]
    files = [_File(shown(file), file) for file in found if file.suffix.lower() in known]
    others = [shown(file.name) for file in found if file.suffix.lower() not in known]
    if not files:
        raise InputError(f"{shown(name)}: no file in this folder ends with {', '.join(known)}")
    if others:
        text = f"note: {shown(name)}: passed over {len(others):,} files that are no pictures: "
        print(text + shorten(others, ", ", 3), file=sys.stderr)
    return files


def _read_characters(
    recognizer: Any, reader: _Reader, files: list[_File], values: SimpleNamespace
) -> int:
    """Prints the candidates for each picture and returns their number."""
    from hccr_jax.data.images.ink import to_bitmap
    from hccr_jax.inference.recognizer import in_batches

    def items() -> Iterator[_Item]:
        for head, (grey, record, _) in reader.pictures(files):
            try:
                name = head["file"] if record is None else f"{head['file']}, record {record}"
                # The bitmaps of a GNT file are like the training images.
                bitmap = to_bitmap(grey, name) if record is None else grey
                yield _Item(head, recognizer.to_normal_form(bitmap))
            except InputError as error:
                reader.report(error)

    count = 0
    for batch in in_batches(items(), recognizer.batch_size):
        recognitions = recognizer.judge(np.stack([item.form for item in batch]), values.top)
        for item, recognition in zip(batch, recognitions, strict=True):
            _write(item.head, _describe(recognition, values), values)
        count += len(batch)
    return count


def _read_pages(
    recognizer: Any, reader: _Reader, files: list[_File], values: SimpleNamespace
) -> int:
    """Prints the lines of each page and returns the number of its characters."""
    from hccr_jax.inference.pages import draw_page, read_page

    count = 0
    for head, (grey, *_) in reader.pictures(files):
        lines = read_page(grey, values.vertical)
        characters = [character for line in lines for character in line]
        if not characters:
            reader.report(InputError(f"{head['file']}: no ink found"))
            continue
        forms = np.stack([recognizer.to_normal_form(c.bitmap) for c in characters])
        recognitions = iter(recognizer.judge(forms, values.top))
        described = [
            [{"box": list(c.box), **_describe(next(recognitions), values)} for c in line]
            for line in lines
        ]
        _write_page(head | {"width": grey.shape[1], "height": grey.shape[0]}, described, values)
        if values.annotate:
            marks = [
                [(tuple(c["box"]), _best(c), not c.get("rejected")) for c in line]
                for line in described
            ]
            _save(draw_page(grey, marks), values.annotate)
        count += len(characters)
    return count


def _describe(recognition: Any, values: SimpleNamespace) -> dict[str, Any]:
    described: dict[str, Any] = {"candidates": [c._asdict() for c in recognition.candidates]}
    if values.reject_at is not None:
        described["p_value"] = recognition.p_value
        described["rejected"] = recognition.p_value <= values.reject_at
    return described


def _best(recognition: dict[str, Any]) -> str:
    return recognition["candidates"][0]["character"]


def _write(head: dict[str, Any], recognition: dict[str, Any], values: SimpleNamespace) -> None:
    if not values.table:
        command.print_json(head | recognition)
        return
    name = head["file"] + (f", record {head['record']}" if "record" in head else "")
    print(f"{name}  {_to_cells(recognition)}")


def _write_page(
    head: dict[str, Any], lines: list[list[dict[str, Any]]], values: SimpleNamespace
) -> None:
    described: list[dict[str, Any]] = []
    for line in lines:
        lefts, tops, rights, bottoms = zip(*(c["box"] for c in line), strict=True)
        box = [min(lefts), min(tops), max(rights), max(bottoms)]
        text = "".join(_best(character) for character in line)
        described.append({"text": text, "box": box, "characters": line})
    if not values.table:
        command.print_json(head | {"lines": described})
        return
    for number, found in enumerate(described, 1):
        print(f"{head['file']}, line {number}: {found['text']}")
        for character in found["characters"]:
            print(f"  {_to_cells(character)}")


def _to_cells(recognition: dict[str, Any]) -> str:
    cells = [f"{c['character']} {100 * c['probability']:6.2f} %" for c in recognition["candidates"]]
    return "  ".join(cells + ["rejected"] * bool(recognition.get("rejected")))


def _save(picture: Any, path: Path) -> None:
    try:
        picture.save(path, "PNG")
    except OSError as error:
        raise InputError(f"--annotate={path}: {error.strerror or error}") from error


def _print_speed(recognizer: Any, count: int, seconds: float) -> None:
    side = recognizer.to_normal_form(np.zeros((1, 1), np.uint8)).shape
    alone = []
    for _ in range(TIMED):
        start = time.perf_counter()
        recognizer.classify(np.zeros((1, *side), np.uint8))
        alone.append(time.perf_counter() - start)
    print(
        f"{count:,} characters in {seconds:.2f} s: {count / seconds:,.0f} a second, reading "
        f"included; one alone takes {1e3 * median(alone):.1f} ms",
        file=sys.stderr,
    )
