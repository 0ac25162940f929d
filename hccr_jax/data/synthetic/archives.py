"""The synthetic data set: archives like CASIA's by simulated writers; glyphs to label plots."""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from hccr_jax.data.casia import charset
from hccr_jax.data.casia.gnt import pack_record
from hccr_jax.data.synthetic import medians
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError
from hccr_jax.runtime.worker_pool import WorkerPool

FIRST_WRITER = 1001  # CASIA-HWDB1.1 numbers its writers from here, those of the test split last
# A full member has 20 MB, mostly paper: higher levels take longer than the drawing.
COMPRESS_LEVEL = 1


def reference_glyph(character: str, size_px: int) -> np.ndarray | None:
    """Returns a clean upright drawing of a character, to label plots without a CJK font.

    Args:
      character: one character.
      size_px: side S of the drawing in pixels.

    Returns:
      uint8 (S, S), 255 is paper, ink 0; None for a character beyond level 1.

    >>> bar = reference_glyph("一", 32) < 128
    >>> bool(bar.any(axis=0).sum() > 4 * bar.any(axis=1).sum()), reference_glyph("A", 32)
    (True, None)
    """
    index = charset.class_index().get(character)
    if index is None:
        return None
    zoom = 4
    side = size_px * zoom
    width = max(zoom, round(0.045 * side))
    image = Image.new("L", (side, side), 255)
    canvas = ImageDraw.Draw(image)
    for stroke in medians.class_strokes(index):
        pixels = (stroke + 0.5) * side
        canvas.line([tuple(point) for point in pixels.tolist()], 0, width, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 0)
    return np.asarray(image.reduce(zoom))


def write_gnt_archives(
    directory: Path,
    characters: Sequence[str],
    num_train_writers: int,
    num_test_writers: int,
    seed: int = 0,
    cursiveness: float = 1.0,
    processes: int | None = None,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Writes the data set as two zip archives, one `.gnt` member a writer, on all cores.

    The bytes depend only on the arguments but the last two. An archive gets its name when it is
    complete.

    Args:
      directory: of the archives; created if missing.
      characters: of level 1; every writer writes each of them once, in this order.
      num_train_writers: members 1001-c.gnt and on, at least 1.
      num_test_writers: the members that follow, in the second archive, at least 1.
      seed: of all writers.
      cursiveness: of all writers, see `writer.create_writer`.
      processes: worker processes; None for one a core.
      progress: show a progress bar on stderr.

    Returns:
      The paths of `synthetic_trn_gnt.zip` and `synthetic_tst_gnt.zip`.

    Raises:
      InputError: a number below 1, no characters, or one that is not of level 1.
    """
    _check_request(characters, num_train_writers, num_test_writers, seed)
    first_test = FIRST_WRITER + num_train_writers
    archives = (
        (directory / "synthetic_trn_gnt.zip", range(FIRST_WRITER, first_test)),
        (directory / "synthetic_tst_gnt.zip", range(first_test, first_test + num_test_writers)),
    )
    directory.mkdir(parents=True, exist_ok=True)
    total = (num_train_writers + num_test_writers) * len(characters)
    bar = tqdm(total=total, desc="synthetic", unit=" characters", disable=not progress)
    with WorkerPool(processes) as pool, bar:
        for path, writers in archives:
            tasks = [("".join(characters), writer, seed, cursiveness) for writer in writers]
            members = pool.stream(write_member, tasks)
            _write_archive(path, writers, members, lambda: bar.update(len(characters)))
    return archives[0][0], archives[1][0]


def write_member(characters: str, writer_number: int, seed: int, cursiveness: float = 1.0) -> bytes:
    """Returns the `.gnt` file of one simulated writer: each character once.

    >>> write_member("一", 1001, seed=0)[4:6].decode("gbk")
    '一'
    """
    writer = create_writer([seed, writer_number], cursiveness)
    # The third number separates this stream from that of the writer's habits.
    rng = np.random.default_rng([seed, writer_number, 1])
    return b"".join(
        pack_record(charset.character_to_tag(character), draw(character, writer, rng))
        for character in characters
    )


def _check_request(
    characters: Sequence[str], num_train_writers: int, num_test_writers: int, seed: int
) -> None:
    counts = {
        "num_train_writers": (num_train_writers, 1),
        "num_test_writers": (num_test_writers, 1),
        "number of characters": (len(characters), 1),
        "seed": (seed, 0),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise InputError(f"synthetic: {name}: got {value}, at least {least} is needed")
    unknown = [character for character in characters if character not in charset.class_index()]
    if unknown:
        raise InputError(f"synthetic: character {unknown[0]!r}: not of GB2312 level 1")


def _write_archive(
    path: Path, writers: range, members: Iterator[bytes], on_member: Callable[[], object]
) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            for writer, content in zip(writers, members, strict=True):
                # A new ZipInfo has a fixed date, so that equal content gives equal bytes.
                entry = zipfile.ZipInfo(f"{writer}-c.gnt")
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED, COMPRESS_LEVEL)
                on_member()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
