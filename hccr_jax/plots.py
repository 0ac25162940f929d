"""The pictures of a run: training curves, augmented examples, worst mistakes.

Characters are drawn from their stroke medians, never set in a font: a server seldom has a Chinese
one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

from hccr_jax.data import strokes

BLUE, ORANGE, GREEN, RED = "#2f6db5", "#e07b00", "#2e8b57", "#c8453b"
INK, QUIET, RULE = "#22262b", "#6b737c", "#d9dde2"
GLYPH_PX = 64
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
    width, height, side = 250, 112, 96
    rows = -(-len(before) // columns)
    figure, axes = _sheet(columns * width, rows * height, "As stored, and as the network saw it")
    for index, (plain, warped, label) in enumerate(zip(before, after, labels, strict=True)):
        x, y = index % columns * width, index // columns * height
        _draw_character(axes, classes[int(label)], x, y + 32, 32, INK)
        _draw_image(axes, plain, x + 40, y, side)
        _draw_image(axes, warped, x + 44 + side, y, side)
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
    columns, width, height = 3, 340, 150
    rows = -(-len(worst) // columns)
    title = f"Surest mistakes: {len(worst)} of {len(wrong):,} (true character in green)"
    figure, axes = _sheet(columns * width, rows * height, title)
    for index, item in enumerate(worst):
        x, y = index % columns * width, index // columns * height
        _draw_image(axes, images[item], x, y, 96)
        _draw_character(axes, classes[int(labels[item])], x + 32, y + 102, 32, GREEN)
        for rank, (guess, p) in enumerate(zip(top5_classes[item], confidence[item], strict=True)):
            colour = GREEN if guess == labels[item] else RED if rank == 0 else QUIET
            _draw_candidate(axes, classes[int(guess)], float(p), x + 108, y + 27 * rank, colour)
    return _save(figure, workdir, "mistakes")


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
    axes.tick_params(labelsize=12, colors=QUIET, length=0)
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=12, frameon=False, labelcolor=INK)
    return figure


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
