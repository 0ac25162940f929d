"""The plots of runs: training curves, accuracy of many kinds, scaling, experiments."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from hccr_jax.metrics import intervals
from hccr_jax.metrics.calibration import BINS
from hccr_jax.metrics.ranking import risk_coverage
from hccr_jax.runtime.run_log import read_metrics

BLUE, ORANGE, GREEN, RED = "#2f6db5", "#e07b00", "#2e8b57", "#c8453b"
INK, QUIET, RULE = "#22262b", "#6b737c", "#d9dde2"
DPI = 150


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
            written.append(save(figure, workdir, name))
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
    panels[0].legend(loc="lower center", fontsize=12, frameon=False, labelcolor=INK)
    return save(figure, workdir, "robustness")


def write_rejection(
    workdir: str | Path, sound: np.ndarray, is_right: np.ndarray, others: Mapping[str, np.ndarray]
) -> Path:
    """Draws how well a score tells sound characters from others, and what it saves from mistakes.

    Args:
      workdir: the run's folder; the picture becomes `plots/rejection.png` there.
      sound: float (N,), scores of characters, higher for those to accept.
      is_right: bool (N,), whether the network names them.
      others: scores of each set of what should be rejected; beside the sound ones each is part of
        one curve of risk against coverage.
    """
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = (ORANGE, GREEN, RED)
    levels = np.sort(sound)
    shares = np.arange(len(sound) + 1) / len(sound)
    for (name, scores), colour in zip(others.items(), colours, strict=True):
        style: dict[str, Any] = {"color": colour, "linewidth": 2, "label": name.replace("_", " ")}
        caught = np.searchsorted(np.sort(scores), np.append(levels, np.inf)) / len(scores)
        panels[0].plot(shares, caught, **style)
        right = np.append(is_right, np.zeros(len(scores), bool))
        panels[1].plot(*risk_coverage(np.append(sound, scores), right), **style)
    panels[1].plot(
        *risk_coverage(sound, is_right), color=BLUE, linewidth=2, label="characters alone"
    )
    panels[0].set_title("Rejected", loc="left", fontsize=15, fontweight="bold", color=INK)
    panels[0].set_xlabel("share of sound characters", fontsize=13, color=QUIET)
    panels[0].set_ylim(0, 1.02)
    panels[1].set_title(
        "Wrong among accepted", loc="left", fontsize=15, fontweight="bold", color=INK
    )
    panels[1].set_xlabel(
        "share accepted of characters and as many others", fontsize=13, color=QUIET
    )
    panels[1].set_ylim(0, None)
    for axes in panels:
        _dress(axes)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].legend(loc="lower right", fontsize=12, frameon=False, labelcolor=INK)
    panels[1].legend(loc="upper left", fontsize=12, frameon=False, labelcolor=INK)
    return save(figure, workdir, "rejection")


def draw_calibration(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> Figure:
    """Returns accuracy against probability, bin by bin, above how many answers each bin has.

    Args:
      confidence: float (N,), the probability given to each answer.
      is_right: bool (N,).
      bins: of equal width.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = counts > 0
    hits = np.bincount(place, weights=is_right, minlength=bins)[filled]
    means = np.bincount(place, weights=confidence, minlength=bins)[filled] / counts[filled]
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=1.2)
    _draw_shares(upper, means, hits, counts[filled])
    upper.set_ylabel("right", fontsize=13, color=QUIET)
    upper.set_title("Calibration", loc="left", fontsize=15, fontweight="bold", color=INK)
    lower.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color=BLUE)
    lower.set_yscale("log")
    lower.set_xlabel("probability of the answer", fontsize=13, color=QUIET)
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.set_ylabel("answers", fontsize=13, color=QUIET)
    for axes in (upper, lower):
        _dress(axes)
    return figure


def draw_shares(title: str, label: str, names: np.ndarray, is_right: np.ndarray) -> Figure:
    """Returns the accuracy of each group of answers with its 95 % interval.

    Args:
      title: of the plot.
      label: of the axis of the names.
      names: (N,), the group of each answer; numbers lie at their values, others by rank.
      is_right: bool (N,).
    """
    values, place = np.unique(names, return_inverse=True)
    counts, hits = np.bincount(place), np.bincount(place, weights=is_right)
    where: np.ndarray = values
    if values.dtype.kind not in "iuf":
        order = np.argsort(hits / counts, kind="stable")
        counts, hits, where = counts[order], hits[order], np.arange(1, len(values) + 1)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    _draw_shares(axes, where, hits, counts)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK)
    axes.set_xlabel(label, fontsize=13, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _dress(axes)
    return figure


def _draw_shares(axes: Axes, where: np.ndarray, hits: np.ndarray, counts: np.ndarray) -> None:
    low, high = intervals.wilson(hits, counts)
    axes.vlines(where, low, high, color=BLUE, linewidth=1.2, alpha=0.5)
    axes.plot(where, hits / counts, "o", color=BLUE, markersize=4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()


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
        # Matplotlib's search for the best place warns where it takes a second.
        axes.legend(
            loc="lower right" if title == "Accuracy" else "upper right",
            fontsize=12, frameon=False, labelcolor=INK,
        )  # fmt: skip
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


def save(figure: Figure, workdir: str | Path, name: str) -> Path:
    """Writes a figure to plots/NAME.png in a workdir and returns the file's path."""
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


def write_validation_curves(
    courses: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> None:
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
