"""The pictures of a run: training curves, augmented examples, worst mistakes, distorted images.

Characters are drawn from their stroke medians, never set in a font: a server seldom has a Chinese
one.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import (
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from hccr_jax.data import strokes

BLUE, ORANGE, GREEN, RED = "#2f6db5", "#e07b00", "#2e8b57", "#c8453b"
INK, QUIET, RULE = "#22262b", "#6b737c", "#d9dde2"
GLYPH_PX = 64
PAIR_SIZE, MISTAKE_SIZE = (250, 112), (340, 150)  # of a cell of a sheet: width, height
DPI = 150


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """Returns the logged values of each step, in the order of the steps.

    Args:
      path: a `metrics.jsonl`: one JSON object a line, each with an integer `step`. A resumed run
        repeats steps; the value written last wins.
    """
    rows: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.setdefault(int(row["step"]), {}).update(row)
        except (ValueError, KeyError, TypeError):
            # A run that was killed while it wrote leaves half a line; the rest is still good.
            logging.warning("%s: line %d is not a logged step; left out", path, number)
    return dict(sorted(rows.items()))


def write_curves(workdir: str | Path) -> list[Path]:
    """Draws accuracy, loss and learning rate over the steps, as in the paper's figures 11 to 13.

    Args:
      workdir: a run's folder. Its `metrics.jsonl` holds `train/accuracy`, `eval/top1` and
        `eval/top5` as fractions in [0, 1], and `train/loss`, `eval/loss`, `learning_rate`.

    Returns:
      The files written under `plots/`; none for what was never logged.
    """
    source = Path(workdir) / "metrics.jsonl"
    if not source.is_file():
        return []
    rows = read_metrics(source)
    written = []
    for name, keys in (
        ("accuracy", ("train/accuracy", "eval/top1", "eval/top5")),
        ("loss", ("train/loss", "eval/loss")),
        ("learning_rate", ("learning_rate",)),
    ):
        series = {key: _series(rows, key) for key in keys}
        if any(len(steps) for steps, _ in series.values()):
            figure = _curve_figure(name.replace("_", " ").capitalize(), series)
            written.append(_save(figure, workdir, name))
    return written


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean over a centred window of `width` values, shorter at both ends.

    Args:
      values: float (N,), no NaN.
      width: an odd number of values.

    >>> [float(x) for x in running_mean(np.array([0.0, 3.0, 6.0, 3.0]), width=3)]
    [1.5, 3.0, 4.0, 4.5]
    """
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    middle = np.arange(len(values))
    start = np.maximum(middle - width // 2, 0)
    stop = np.minimum(middle + width // 2 + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def write_augmented_sheet(
    workdir: str | Path,
    before: np.ndarray,
    after: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    classes: Sequence[str],
    *,
    columns: int = 4,
) -> Path:
    """Draws images beside what augmentation made of them, each pair named by its character.

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
    return _save(figure, workdir, "augmented")


def surest_mistakes(labels: np.ndarray, answers: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Returns the places of the wrong answers, the one of the highest confidence first.

    Args:
      labels: int (N,), the true classes.
      answers: int (N,), the classes answered.
      confidence: float (N,), the probability given to each answer.

    >>> labels, answers = np.array([0, 1, 2, 3]), np.array([0, 5, 6, 7])
    >>> surest_mistakes(labels, answers, np.array([0.9, 0.4, 0.8, 0.6])).tolist()
    [2, 3, 1]
    """
    wrong = np.flatnonzero(answers != labels)
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
    """Draws the mistakes the model was surest of, each with its five candidates.

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
        answers = zip(top5_classes[item], confidence[item], strict=True)
        _draw_mistake(axes, images[item], int(labels[item]), answers, classes, x, y)
    return _save(figure, workdir, "mistakes")


def write_distorted_sheet(
    workdir: str | Path,
    sets: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    *,
    columns: int = 4,
) -> Path:
    """Draws images beside what distortions made of them, set by set.

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
    return _save(figure, workdir, "robustness_sets")


class Failures(NamedTuple):
    """Some wrong answers of a set of images, out of `total`: arrays as in `write_mistakes`."""

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
    """Draws wrong answers with their candidates, set by set.

    Args:
      workdir: the run's folder; the sheet becomes `plots/robustness_failures.png` there.
      sets: by name.
      classes: the characters, in class order.
      columns: mistakes in a row.
    """

    def cell(axes: Axes, item: Any, x: float, y: float) -> None:
        image, label, candidates, probabilities = item
        answers = zip(candidates, probabilities, strict=True)
        _draw_mistake(axes, image, int(label), answers, classes, x, y)

    groups = {
        f"{name}: {len(failures.labels)} of {failures.total:,}": list(
            zip(*failures[1:], strict=True)
        )
        for name, failures in sets.items()
    }
    title = "Surest mistakes on distorted images (true character in green)"
    figure = _grouped_sheet(title, groups, cell, columns, MISTAKE_SIZE)
    return _save(figure, workdir, "robustness_failures")


def write_robustness(workdir: str | Path, curves: Mapping[str, Any]) -> Path:
    """Draws accuracy against the angle and against the aspect.

    Args:
      workdir: the run's folder; the picture becomes `plots/robustness.png` there.
      curves: as `robustness.evaluate_robustness` returns them.
    """
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, curve, varied, label in zip(
        panels,
        (curves["rotation"], curves["aspect"]),
        ("angle_deg", "factor"),
        ("rotation in degrees, counter-clockwise", "factor on width over height"),
        strict=True,
    ):
        for key, name, colour in (("top5", "top 5", GREEN), ("top1", "top 1", ORANGE)):
            axes.plot(curve[varied], curve[key], "o-", color=colour, linewidth=2, label=name)
        axes.set_xlabel(label, fontsize=13, color=QUIET)
        _dress(axes)
    panels[0].xaxis.set_major_locator(MultipleLocator(20))
    panels[1].set_xscale("log")
    panels[1].set_xticks([0.2, 0.5, 1, 2, 5], ["1/5", "1/2", "1", "2", "5"])
    panels[1].xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0, 1.02)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = f"Accuracy on distorted images ({curves['images']:,} at each point)"
    panels[0].set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK)
    panels[0].legend(fontsize=12, frameon=False, labelcolor=INK)
    return _save(figure, workdir, "robustness")


def write_suspects(
    workdir: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    answers: np.ndarray,
    confidence: np.ndarray,
    classes: Sequence[str],
    *,
    title: str,
    columns: int = 8,
) -> Path:
    """Draws characters whose label is in doubt, each above its label and the answer given.

    Args:
      workdir: the run's folder; the sheet becomes `plots/suspects.png` there.
      images: uint8 (N, S, S), ink high.
      labels, answers: int (N,), classes.
      confidence: float (N,), the probability given to each answer.
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
        _draw_character(axes, classes[int(answers[index])], x + 48, y + 116, 28, RED)
        text = f"{float(confidence[index]):.0%}".replace("%", " %")
        axes.text(x + 80, y + 130, text, fontsize=8.5, color=INK, va="center")
    return _save(figure, workdir, "suspects")


def _series(rows: dict[int, dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(step, row[key]) for step, row in rows.items() if np.isfinite(row.get(key, np.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def _curve_figure(title: str, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for key, (steps, values) in series.items():
        if len(steps) and key.startswith("eval/"):
            _plot_evaluation(axes, key, steps, values)
        elif len(steps):
            _plot_training(axes, key, steps, values)
    if title == "Accuracy":
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif title == "Learning rate":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK)
    axes.set_xlabel("step", fontsize=13, color=QUIET)
    _dress(axes)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=12, frameon=False, labelcolor=INK)
    return figure


def _dress(axes: Axes) -> None:
    """Gives a curve's axes their quiet look."""
    axes.tick_params(labelsize=12, colors=QUIET, length=0)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _plot_training(axes: Axes, key: str, steps: np.ndarray, values: np.ndarray) -> None:
    # One logged step is one batch, so the bare curve is mostly noise: show it, but read the mean.
    width = len(values) // 50 * 2 + 1
    if width > 1 and key.startswith("train/"):
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3)
        values = running_mean(values, width)
    axes.plot(steps, values, color=BLUE, linewidth=2, label="training")


def _plot_evaluation(axes: Axes, key: str, steps: np.ndarray, values: np.ndarray) -> None:
    colour = GREEN if key == "eval/top5" else ORANGE
    label = {"eval/top1": "evaluation, top 1", "eval/top5": "evaluation, top 5"}.get(
        key, "evaluation"
    )
    size = 6 if len(steps) <= 40 else 3
    axes.plot(
        steps, values, "o-", color=colour, linewidth=1, markersize=size, label=label, zorder=3
    )


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
    answers: Iterable[tuple[Any, Any]],
    classes: Sequence[str],
    x: float,
    y: float,
) -> None:
    """Draws an image, its true character and the answers (class, probability), best first."""
    _draw_image(axes, image, x, y, 96)
    _draw_character(axes, classes[label], x + 32, y + 102, 32, GREEN)
    for rank, (guess, probability) in enumerate(answers):
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
    glyph = strokes.reference_glyph(character, GLYPH_PX)
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


def _save(figure: Figure, workdir: str | Path, name: str) -> Path:
    path = Path(workdir) / "plots" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the library's version the same run gives the same bytes.
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def write_scaling(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], folder: str | Path
) -> Path:
    """Draws the speed of the training step against what was varied, one panel each.

    Args:
      panels: by what was varied ("batch size", …) and by network: points of its value, images a
        second and the roofline's images a second, in order.
      folder: gets `scaling.png`.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained")
    for place, (varied, networks) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for colour, (name, points) in zip(
            (BLUE, ORANGE, GREEN, RED), networks.items(), strict=False
        ):
            values, speeds, limits = zip(*points, strict=True)
            axes.plot(values, limits, "--", color=colour, linewidth=1.2, label=f"{name}, roofline")
            axes.plot(values, speeds, "o-", color=colour, linewidth=2, label=name)
        if varied == "batch size":
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.tick_params(axis="x", rotation=45 if len(values) > 4 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel(varied, fontsize=12, color=QUIET)
        axes.tick_params(labelsize=10, colors=QUIET, length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
    figure.axes[0].set_ylabel("images/s", fontsize=12, color=QUIET)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), fontsize=11, frameon=False,
        labelcolor=INK,
    )  # fmt: skip
    path = Path(folder) / "scaling.png"
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def write_courses(courses: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draws validation top-1 of several runs over the steps; training accuracy in thin lines.

    Args:
      courses: by the names of the runs: `step`, `validation_top1` and `train_accuracy` of each
        validation, shares of 1.
      path: gets the picture; its folder is made where missing.
    """
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, course) in enumerate(courses.items()):
        colour = f"C{place}"
        steps = course["step"]
        axes.plot(steps, course["train_accuracy"], ":", color=colour, linewidth=1.2)
        axes.plot(
            steps, course["validation_top1"], "o-", color=colour, linewidth=2, markersize=5,
            label=name,
        )  # fmt: skip
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step", fontsize=12, color=QUIET)
    axes.set_title("Validation top-1 (dotted: training)", loc="left", fontsize=13, color=INK)
    axes.tick_params(labelsize=10, colors=QUIET, length=0)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    figure.legend(loc="outside lower left", fontsize=10, frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
