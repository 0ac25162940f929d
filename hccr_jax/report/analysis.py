"""The page of `hccr analyse`: what a network confuses, with whom and how confident it is."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from hccr_jax.data.casia import charset
from hccr_jax.data.splits import Split
from hccr_jax.data.synthetic import medians
from hccr_jax.errors import InputError
from hccr_jax.metrics import calibration, intervals
from hccr_jax.report import html, image_grids, plots

ROWS = 20  # pairs and characters shown with images
COLUMNS = 8  # images of a row


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The predictions of a run for a split.

    Attributes:
      name: of the run.
      split: N records.
      candidates: int (N, 5), best first, or fewer where there are fewer classes.
      confidence: float (N,), the calibrated probability of the best.
      is_calibrated: whether a temperature was fitted.
    """

    name: str
    split: Split
    candidates: np.ndarray
    confidence: np.ndarray
    is_calibrated: bool

    @property
    def is_right(self) -> np.ndarray:
        """bool (N,)."""
        return self.candidates[:, 0] == self.split.labels


def confused_pairs(labels: np.ndarray, predictions: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (class, other class, mistakes in both directions), the most mistakes first.

    >>> confused_pairs(np.array([0, 1, 1, 2, 2]), np.array([1, 0, 1, 0, 2]))
    [(0, 1, 2), (0, 2, 1)]
    """
    wrong = labels != predictions
    pairs = np.sort(np.stack([labels[wrong], predictions[wrong]], axis=1), axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(a), int(b), int(n)) for (a, b), n in zip(found[order], counts[order], strict=True)]


def render_analysis(predicted: Predicted, other: Predicted | None) -> str:
    """Returns the page on a run's predictions.

    Args:
      predicted: of the run.
      other: of a run to compare with, for the same split.

    Raises:
      InputError: the two runs were not evaluated on the same images.
    """
    split, right = predicted.split, predicted.is_right
    classes = np.array([f"{c} U+{ord(c):04X}" for c in split.classes])
    return html.render(
        "analysis.html",
        title=f"Analysis of {predicted.name}",
        is_calibrated=predicted.is_calibrated,
        cards=_cards(predicted),
        comparison=_comparison(predicted, other) if other else {},
        most_changed=_most_changed(predicted, other) if other else {},
        plots=_plots(predicted),
        writers=_by_group(split.writers, right),
        characters=_by_group(classes[split.labels], right),
        confused=_confused(predicted),
        hardest=_hardest(predicted),
    )


def _cards(predicted: Predicted) -> list[html.Card]:
    split, right = predicted.split, predicted.is_right
    top5 = (predicted.candidates == split.labels[:, None]).any(axis=1)
    low, high = intervals.bootstrap(right, split.writers)
    error = calibration.calibration_error(predicted.confidence, right)
    return [
        html.Card("Top-1 accuracy", f"{right.mean():.2%}"),
        html.Card("95 %, over writers", f"{100 * low:.1f} – {100 * high:.1f}"),
        html.Card("Top-5 accuracy", f"{top5.mean():.2%}"),
        html.Card("Images", f"{len(right):,}"),
        html.Card("Writers", f"{len(np.unique(split.writers)):,}"),
        html.Card("Classes", f"{len(split.classes):,}"),
        html.Card("Calibration error", f"{error:.2%}"),
    ]


def _plots(predicted: Predicted) -> dict[str, bytes]:
    """Returns the plots of calibration and of accuracy by strokes, writer and class."""
    split, right = predicted.split, predicted.is_right
    index, classes = charset.class_index(), np.array(split.classes)
    strokes = np.array(
        [len(medians.class_strokes(index[c])) if c in index else 0 for c in split.classes]
    )[split.labels]
    known, shares = strokes > 0, plots.draw_shares
    figures = [plots.draw_calibration(predicted.confidence, right)]
    if known.any():
        figures.append(shares("By number of strokes", "strokes", strokes[known], right[known]))
    figures.append(shares("By writer", "writers, worst first", split.writers, right))
    figures.append(shares("By class", "classes, worst first", classes[split.labels], right))
    return {figure.axes[0].get_title("left"): plots.to_png(figure) for figure in figures}


def _by_group(names: np.ndarray, is_right: np.ndarray) -> dict[str, Sequence[str]]:
    """Returns top-1 and the number of images by group, the worst first."""
    found, place = np.unique(names, return_inverse=True)
    hits, counts = _count(place, is_right, len(found))
    order = np.argsort(hits / counts, kind="stable")
    return {str(found[i]): [f"{hits[i] / counts[i]:.1%}", f"{counts[i]:,.0f}"] for i in order}


def _comparison(predicted: Predicted, other: Predicted) -> dict[str, str]:
    split = predicted.split
    if not np.array_equal(split.labels, other.split.labels) or split.classes != other.split.classes:
        raise InputError(
            f"{other.name}: was not evaluated on the same images as {predicted.name}: both runs "
            f"need the same data set, split and classes"
        )
    one, two = predicted.is_right, other.is_right
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    low, high = intervals.bootstrap(one.astype(float) - two, split.writers)
    return {
        predicted.name: f"{one.mean():.2%}",
        other.name: f"{two.mean():.2%}",
        "difference": f"{100 * (one.mean() - two.mean()):+.2f} points",
        "95 % interval, over writers": f"{100 * low:+.2f} to {100 * high:+.2f} points",
        "right only in the first": f"{only_one:,}",
        "right only in the second": f"{only_two:,}",
        "wrong in both": f"{int((~one & ~two).sum()):,}",
        "McNemar's test, each image by itself": f"p = {intervals.mcnemar(only_one, only_two):.2g}",
    }


def _most_changed(predicted: Predicted, other: Predicted) -> dict[str, Sequence[str]]:
    """Returns by how many images the first run is better, for the characters that differ most."""
    split = predicted.split
    gains = np.bincount(
        split.labels,
        weights=predicted.is_right.astype(float) - other.is_right,
        minlength=len(split.classes),
    )
    changed = sorted(np.flatnonzero(gains), key=lambda i: -abs(gains[i]))[:ROWS]
    return {
        f"{split.classes[i]} U+{ord(split.classes[i]):04X}": [f"{gains[i]:+.0f}"] for i in changed
    }


def _confused(predicted: Predicted) -> bytes | None:
    split, best = predicted.split, predicted.candidates[:, 0]
    rows = []
    pairs = confused_pairs(split.labels, best)
    for one, other, count in pairs[:ROWS]:
        mistakes = (split.labels == one) & (best == other)
        mistakes |= (split.labels == other) & (best == one)
        total = int(((split.labels == one) | (split.labels == other)).sum())
        text = f"{count} of {total:,}"
        rows.append(_row(predicted, (one, other), text, np.flatnonzero(mistakes)))
    return _sheet(f"Most confused pairs: {len(rows)} of {len(pairs):,}", rows)


def _hardest(predicted: Predicted) -> bytes | None:
    split, rows = predicted.split, list[image_grids.Row]()
    hits, counts = _count(split.labels, predicted.is_right, len(split.classes))
    shares = hits / np.maximum(counts, 1)
    for index in np.lexsort((-counts, shares)):
        wrong = np.flatnonzero((split.labels == index) & ~predicted.is_right)
        if len(wrong) and len(rows) < ROWS:
            text = f"{shares[index]:.1%} of {counts[index]:,.0f}"
            rows.append(_row(predicted, (int(index),), text, wrong))
    return _sheet(f"Hardest characters: {len(rows)}", rows)


def _count(place: np.ndarray, is_right: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the right predictions and all predictions of each group."""
    return np.bincount(place, weights=is_right, minlength=size), np.bincount(place, minlength=size)


def _row(predicted: Predicted, characters: Sequence[int], text: str, wrong: Any) -> image_grids.Row:
    """Returns a row of the most confident mistakes among some."""
    split = predicted.split
    worst = wrong[np.argsort(-predicted.confidence[wrong], kind="stable")][:COLUMNS]
    return image_grids.Row(
        [split.classes[index] for index in characters],
        text,
        [split.images[index] for index in worst],
        [split.classes[predicted.candidates[index, 0]] for index in worst],
    )


def _sheet(title: str, rows: Sequence[image_grids.Row]) -> bytes | None:
    return plots.to_png(image_grids.draw_rows(title, rows, COLUMNS)) if rows else None
