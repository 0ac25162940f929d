"""Makes `medians.npz` from the npm package hanzi-writer-data 2.0.1.

Usage, with the package fetched by `npm pack hanzi-writer-data@2.0.1` and unpacked:

  python build_medians.py PATH_OF_PACKAGE

Notice of changes, as the Arphic Public License (ARPHICPL.TXT in this folder) requires: see
`NOTICE`, which is also stored in `medians.npz`.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from hccr_jax.data.casia import charset

NOTICE = (
    "Derived from the fonts AR PL KaitiM GB and AR PL UKai by way of Make Me a Hanzi and the npm "
    "package hanzi-writer-data 2.0.1. Changed for hccr_jax on 23 November 2026: kept the medians "
    "of the strokes of the 3,755 level-1 characters of GB2312 only, as int16; removed the stroke "
    "outlines, all other characters and the indices of radical strokes. Licence: Arphic Public "
    "License, in ARPHICPL.TXT."
)


def collect_medians(package: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of `medians.npz`.

    Args:
      package: the unpacked npm package: a folder with one JSON file a character.

    Returns:
      points: int16 (N, 2), x to the right and y upwards in a box of 1024.
      stroke_offsets: int32 (S + 1,), stroke s has the points from offset s to offset s + 1.
      character_offsets: int32 (3756,), character c, in the order of `charset.level1()`, has the
        strokes from offset c to offset c + 1.
      notice: the notice of changes, one string.
    """
    points: list[list[int]] = []
    stroke_offsets, character_offsets = [0], [0]
    for character in charset.level1():
        glyph = json.loads((package / f"{character}.json").read_text(encoding="utf-8"))
        for stroke in glyph["medians"]:
            points.extend(stroke)
            stroke_offsets.append(len(points))
        character_offsets.append(len(stroke_offsets) - 1)
    return {
        "points": np.asarray(points, np.int16),
        "stroke_offsets": np.asarray(stroke_offsets, np.int32),
        "character_offsets": np.asarray(character_offsets, np.int32),
        "notice": np.asarray(NOTICE),
    }


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file for `numpy.load` with fixed dates: equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(
                zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 9
            )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_npz(Path(__file__).with_name("medians.npz"), collect_medians(Path(sys.argv[1])))
