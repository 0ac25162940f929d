"""Writes golden_drawings.json: strokes, and the normalised images that Python makes of them."""

import base64
import json
from pathlib import Path

import numpy as np

from hccr_jax.data.casia import charset
from hccr_jax.data.images import strokes
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.synthetic import medians

PATH = Path(__file__).parent / "golden_drawings.json"
FORMS = ((64, 4, "keep"), (64, 4, "adaptive"), (32, 2, "adaptive"))


def character_strokes(character: str, unit: float = 800.0) -> list[list[list[float]]]:
    """Returns a character as the page sends it."""
    paths = medians.class_strokes(charset.class_index()[character])
    return [np.round((path.astype(float) + 0.5) * unit, 1).tolist() for path in paths]


DRAWINGS = [
    *map(character_strokes, "永一鼎我"),
    [[[5.0, 5.0]]],
    [[[0, 0], [0.1, 250.3]], [[3.25, 7.5]]],
    [[[-4e5, 1e6], [9e5, -1e6], [-4e5, 1e6]]],
]


def golden() -> list[dict]:
    """Returns each drawing with its normalised image, whose bytes are in base 64."""
    rows = []
    for index, drawing in enumerate(DRAWINGS):
        form = FORMS[index % len(FORMS)]
        bitmap = strokes.rasterize(strokes.parse_strokes(drawing))
        image = normalize(bitmap, *form)
        data = base64.b64encode(image.tobytes()).decode()
        rows.append({"strokes": drawing, "form": form, "image": data})
    return rows


if __name__ == "__main__":
    PATH.write_text(json.dumps(golden(), indent=1) + "\n", "utf-8")
