"""Grids of character images: augmented, mistaken, distorted, and with likely label errors.

Printed characters are drawn from their stroke medians, because servers seldom have a Chinese font.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hccr_jax.data.synthetic import archives
from hccr_jax.report.plots import GREEN, INK, QUIET, RED, RULE, save

GLYPH_PX = 64
PAIR_SIZE, MISTAKE_SIZE = (250, 112), (340, 150)  # of a cell of a sheet: width, height


def write_augmented_sheet(
    workdir: str | Path,
    before: np.ndarray,
    after: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    *,
    columns: int = 4,
) -> Path:
    """Draws images before and after augmentation, each pair labelled with its character.

    Args:
      workdir: the run's folder; the sheet becomes `plots/augmented.png` there.
      before: (N, S, S), ink high: uint8 0 to 255 or float 0 to 1.
      after: (N, S', S'), the same images in the same form, augmented.
      labels: int (N,), indices into `classes`.
      classes: the characters, in class order.
      columns: pairs in a row.
    """
    width, height = PAIR_SIZE
    rows = -(-len(before) // columns)
    figure, axes = _sheet(columns * width, rows * height, "As stored, and as the network saw it")
    for index, (plain, warped, label) in enumerate(zip(before, after, labels, strict=True)):
        x, y = index % columns * width, index // columns * height
        _draw_pair(axes, classes[int(label)], plain, warped, x, y)
    return save(figure, workdir, "augmented")


def surest_mistakes(
    labels: np.ndarray, predictions: np.ndarray, confidence: np.ndarray
) -> np.ndarray:
    """Returns the indices of the mistakes, the one of the highest confidence first.

    Args:
      labels: int (N,), the true classes.
      predictions: int (N,), the predicted classes.
      confidence: float (N,), the probability of each prediction.

    >>> labels, predictions = np.array([0, 1, 2, 3]), np.array([0, 5, 6, 7])
    >>> surest_mistakes(labels, predictions, np.array([0.9, 0.4, 0.8, 0.6])).tolist()
    [2, 3, 1]
    """
    wrong = np.flatnonzero(predictions != labels)
    return wrong[np.argsort(-confidence[wrong], kind="stable")]


def write_mistakes(
    workdir: str | Path,
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    top5_classes: np.ndarray,
    top5_probabilities: np.ndarray,
    classes: Sequence[str],
    *,
    count: int = 24,
) -> Path | None:
    """Draws the mistakes of the highest confidence, each with its five candidates.

    Args:
      workdir: the run's folder; the sheet becomes `plots/mistakes.png` there.
      images: (N, S, S), ink high: uint8 0 to 255 or float 0 to 1.
      labels: int (N,), the true classes.
      top5_classes: int (N, 5), best first.
      top5_probabilities: float (N, 5), 0 to 1.
      classes: the characters, in class order.
      count: the most mistakes shown.

    Returns:
      The file, or None where nothing is wrong; a sheet of an earlier evaluation is then removed.
    """
    labels, top5_classes = np.asarray(labels), np.asarray(top5_classes)
    confidence = np.asarray(top5_probabilities, np.float64)
    wrong = surest_mistakes(labels, top5_classes[:, 0], confidence[:, 0])
    worst = wrong[:count]
    if not worst.size:
        (Path(workdir) / "plots" / "mistakes.png").unlink(missing_ok=True)
        return None
    columns, (width, height) = 3, MISTAKE_SIZE
    rows = -(-len(worst) // columns)
    title = f"Surest mistakes: {len(worst)} of {len(wrong):,} (true character in green)"
    figure, axes = _sheet(columns * width, rows * height, title)
    for index, item in enumerate(worst):
        x, y = index % columns * width, index // columns * height
        candidates = zip(top5_classes[item], confidence[item], strict=True)
        _draw_mistake(axes, images[item], int(labels[item]), candidates, classes, x, y)
    return save(figure, workdir, "mistakes")


def write_distorted_sheet(
    workdir: str | Path,
    sets: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    *,
    columns: int = 4,
) -> Path:
    """Draws images before and after distortion, set by set.

    Args:
      workdir: the run's folder; the sheet becomes `plots/robustness_sets.png` there.
      sets: by name: images before and after, uint8 (N, S, S), ink high, and labels int (N,).
      classes: the characters, in class order.
      columns: pairs in a row.
    """

    def cell(axes: Axes, item: Any, x: float, y: float) -> None:
        before, after, label = item
        _draw_pair(axes, classes[int(label)], before, after, x, y)

    groups = {name: list(zip(*arrays, strict=True)) for name, arrays in sets.items()}
    title = "Undistorted and distorted, both in normal form"
    figure = _grouped_sheet(title, groups, cell, columns, PAIR_SIZE)
    return save(figure, workdir, "robustness_sets")


class Failures(NamedTuple):
    """Some mistakes of a set of images, out of `total`: arrays as in `write_mistakes`."""

    total: int
    images: np.ndarray
    labels: np.ndarray
    candidates: np.ndarray
    probabilities: np.ndarray


def write_failures(
    workdir: str | Path,
    sets: Mapping[str, Failures],
    classes: Sequence[str],
    *,
    columns: int = 3,
) -> Path:
    """Draws mistakes with their candidates, set by set.

    Args:
      workdir: the run's folder; the sheet becomes `plots/robustness_failures.png` there.
      sets: by name.
      classes: the characters, in class order.
      columns: mistakes in a row.
    """

    def cell(axes: Axes, item: Any, x: float, y: float) -> None:
        image, label, candidates, probabilities = item
        pairs = zip(candidates, probabilities, strict=True)
        _draw_mistake(axes, image, int(label), pairs, classes, x, y)

    groups = {
        f"{name}: {len(failures.labels)} of {failures.total:,}": list(
            zip(*failures[1:], strict=True)
        )
        for name, failures in sets.items()
    }
    title = "Surest mistakes on distorted images (true character in green)"
    figure = _grouped_sheet(title, groups, cell, columns, MISTAKE_SIZE)
    return save(figure, workdir, "robustness_failures")


def write_label_errors(
    workdir: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    confidence: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    columns: int = 8,
) -> Path:
    """Draws characters whose label may be wrong, each above its label and the prediction.

    Args:
      workdir: the run's folder; the sheet becomes `plots/suspects.png` there.
      images: uint8 (N, S, S), ink high.
      labels, predictions: int (N,), classes.
      confidence: float (N,), the probability of each prediction.
      classes: the characters, in class order.
      title: of the sheet.
      columns: characters in a row.
    """
    width, height, side = 128, 156, 112
    rows = -(-len(images) // columns)
    figure, axes = _sheet(columns * width, rows * height, title)
    for index, image in enumerate(images):
        x, y = index % columns * width, index // columns * height
        _draw_image(axes, image, x, y, side)
        _draw_character(axes, classes[int(labels[index])], x, y + 116, 28, INK)
        axes.text(x + 38, y + 130, "→", fontsize=11, color=QUIET, ha="center", va="center")
        _draw_character(axes, classes[int(predictions[index])], x + 48, y + 116, 28, RED)
        text = f"{float(confidence[index]):.0%}".replace("%", " %")
        axes.text(x + 80, y + 130, text, fontsize=8.5, color=INK, va="center")
    return save(figure, workdir, "suspects")


class Row(NamedTuple):
    """A row of examples: one or two characters, a line of text, images and their predictions."""

    characters: Sequence[str]
    text: str
    images: Sequence[np.ndarray]
    predictions: Sequence[str]


def draw_rows(title: str, rows: Sequence[Row], columns: int = 8) -> Figure:
    """Returns a sheet of examples, each image above its prediction.

    Args:
      title: of the sheet.
      rows: their images are uint8 (S, S), ink high.
      columns: the most images of a row that are shown.
    """
    side, height, left = 80, 112, 190
    figure, axes = _sheet(left + columns * (side + 8), len(rows) * height, title)
    for number, row in enumerate(rows):
        y = number * height
        for place, character in enumerate(row.characters):
            _draw_character(axes, character, place * 56, y, 48, INK)
        axes.text(0, y + 66, row.text, fontsize=8.5, color=INK, va="top")
        examples = zip(row.images[:columns], row.predictions, strict=False)
        for place, (image, prediction) in enumerate(examples):
            x = left + place * (side + 8)
            _draw_image(axes, image, x, y, side)
            _draw_character(axes, prediction, x + side / 2 - 11, y + side + 3, 22, RED)
    return figure


def _sheet(width: int, height: int, title: str) -> tuple[Figure, Axes]:
    """Returns a white figure and axes whose unit is a pixel of the sheet, y downwards."""
    head, edge = 44, 16
    full_width, full_height = width + 2 * edge, height + head + edge
    figure = Figure(figsize=(full_width / 100, full_height / 100))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_autoscale_on(False)
    axes.set_xlim(-edge, width + edge)
    axes.set_ylim(height + edge, -head)
    axes.text(0, -head / 2, title, fontsize=13, fontweight="bold", color=INK, va="center")
    return figure, axes


def _grouped_sheet(
    title: str,
    groups: Mapping[str, Sequence[Any]],
    cell: Callable[[Axes, Any, float, float], None],
    columns: int,
    size: tuple[int, int],
) -> Figure:
    """Returns a sheet of cells of one size (width, height), each group under its name."""
    (width, height), head = size, 32
    heights = [head + -(-len(items) // columns) * height for items in groups.values()]
    figure, axes = _sheet(columns * width, sum(heights), title)
    for top, (name, items) in zip(np.cumsum([0, *heights]), groups.items(), strict=False):
        axes.text(0, top + head / 2, name, fontsize=11, color=INK, va="center")
        for index, item in enumerate(items):
            x, y = index % columns * width, top + head + index // columns * height
            cell(axes, item, x, y)
    return figure


def _draw_pair(
    axes: Axes, character: str, before: np.ndarray, after: np.ndarray, x: float, y: float
) -> None:
    side = 96
    _draw_character(axes, character, x, y + 32, 32, INK)
    _draw_image(axes, before, x + 40, y, side)
    _draw_image(axes, after, x + 44 + side, y, side)


def _draw_mistake(
    axes: Axes,
    image: np.ndarray,
    label: int,
    candidates: Iterable[tuple[Any, Any]],
    classes: Sequence[str],
    x: float,
    y: float,
) -> None:
    """Draws an image, its true character and candidates (class, probability), best first."""
    _draw_image(axes, image, x, y, 96)
    _draw_character(axes, classes[label], x + 32, y + 102, 32, GREEN)
    for rank, (guess, probability) in enumerate(candidates):
        colour = GREEN if guess == label else RED if rank == 0 else QUIET
        place = x + 108, y + 27 * rank
        _draw_candidate(axes, classes[int(guess)], float(probability), *place, colour)


def _draw_image(axes: Axes, image: np.ndarray, x: float, y: float, side: float) -> None:
    image = np.asarray(image)
    brightest = 255.0 if image.dtype == np.uint8 else 1.0
    paper = 1.0 - np.clip(image.astype(np.float32) / brightest, 0.0, 1.0)
    _place(axes, paper, x, y, side)
    axes.add_patch(
        Rectangle((x, y), side, side, fill=False, edgecolor=RULE, linewidth=0.8, zorder=2)
    )


def _draw_character(
    axes: Axes, character: str, x: float, y: float, side: float, colour: str
) -> None:
    """Draws a printed character in one colour, or its code point where no strokes are known."""
    glyph = archives.reference_glyph(character, GLYPH_PX)
    if glyph is None:
        code = "\n".join(f"U+{ord(letter):04X}" for letter in character)
        axes.text(
            x + side / 2, y + side / 2, code, fontsize=6, color=colour, ha="center", va="center"
        )
        return
    paper = glyph.astype(np.float32)[..., None] / 255.0
    ink = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], np.float32)
    _place(axes, paper + (1.0 - paper) * ink, x, y, side)


def _draw_candidate(
    axes: Axes, character: str, probability: float, x: float, y: float, colour: str
) -> None:
    track = 120.0
    _draw_character(axes, character, x, y, 24, colour)
    axes.add_patch(Rectangle((x + 32, y + 6), track, 12, color="#eef0f3", linewidth=0))
    axes.add_patch(
        Rectangle((x + 32, y + 6), track * min(probability, 1.0), 12, color=colour, linewidth=0)
    )
    text = f"{probability:.1%}".replace("%", " %")
    axes.text(x + 38 + track, y + 12.5, text, fontsize=8.5, color=INK, va="center")


def _place(axes: Axes, image: np.ndarray, x: float, y: float, side: float) -> None:
    extent = (x, x + side, y + side, y)
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=extent, aspect="auto")
