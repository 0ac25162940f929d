"""The plots of runs: training curves, accuracy, rejection, calibration, scaling.

Their look (colours, sizes, spines) is in `plots.mplstyle`.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import (
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
    StrMethodFormatter,
)

from hccr_jax.metrics import intervals
from hccr_jax.metrics.calibration import BINS, calibration_bins
from hccr_jax.metrics.ranking import risk_coverage
from hccr_jax.runtime.run_log import read_metrics

STYLE = Path(__file__).with_name("plots.mplstyle")
_PARAMS = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
BLUE, ORANGE, GREEN, RED = _PARAMS["axes.prop_cycle"].by_key()["color"][:4]
INK, QUIET, RULE = (
    str(to_hex(_PARAMS[key])) for key in ("axes.titlecolor", "axes.labelcolor", "grid.color")
)
styled = matplotlib.rc_context(fname=STYLE)  # a decorator


@styled
def write_curves(workdir: str | Path) -> list[Path]:
    """Draws accuracy, loss and learning rate over the steps, as in the paper's figures 11 to 13.

    Args:
      workdir: a run's folder. Its `metrics.jsonl` holds `train/accuracy`, `eval/top1` and
        `eval/top5` as fractions in [0, 1], and `train/loss`, `eval/loss`, `learning_rate`.

    Returns:
      The files written under `plots/`; none for a quantity that was never logged.
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


@styled
def write_robustness(workdir: str | Path, curves: Mapping[str, Any]) -> Path:
    """Draws accuracy against the angle and against the aspect.

    Args:
      workdir: the run's folder; the picture becomes `plots/robustness.png` there.
      curves: as `robustness.evaluate_robustness` returns them.
    """
    figure = Figure(figsize=(10.0, 4.0))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, curve, varied, label in zip(
        panels,
        (curves["rotation"], curves["aspect"]),
        ("angle_deg", "factor"),
        ("rotation in degrees, counter-clockwise", "factor on width over height"),
        strict=True,
    ):
        for key, name, colour in (("top5", "top 5", GREEN), ("top1", "top 1", ORANGE)):
            axes.plot(curve[varied], curve[key], "o-", color=colour, label=name)
        axes.set_xlabel(label)
    panels[0].xaxis.set_major_locator(MultipleLocator(20))
    panels[1].set_xscale("log")
    panels[1].set_xticks([0.2, 0.5, 1, 2, 5], ["1/5", "1/2", "1", "2", "5"])
    panels[1].xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0, 1.02)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = f"Accuracy on distorted images ({curves['images']:,} at each point)"
    panels[0].set_title(title)
    panels[0].legend(loc="lower center")
    return save(figure, workdir, "robustness")


@styled
def write_rejection(
    workdir: str | Path, sound: np.ndarray, is_right: np.ndarray, others: Mapping[str, np.ndarray]
) -> Path:
    """Draws how well a score separates characters from other marks, and the mistakes avoided.

    Args:
      workdir: the run's folder; the picture becomes `plots/rejection.png` there.
      sound: float (N,), scores of characters, higher for those to accept.
      is_right: bool (N,), whether the network recognises them.
      others: scores of each set that should be rejected; together with the sound characters each
        gives one curve of risk against coverage.
    """
    figure = Figure(figsize=(10.0, 4.0))
    panels = figure.subplots(1, 2)
    colours = (ORANGE, GREEN, RED)
    levels = np.sort(sound)
    shares = np.arange(len(sound) + 1) / len(sound)
    for (name, scores), colour in zip(others.items(), colours, strict=True):
        style: dict[str, Any] = {"color": colour, "label": name.replace("_", " ")}
        caught = np.searchsorted(np.sort(scores), np.append(levels, np.inf)) / len(scores)
        panels[0].plot(shares, caught, **style)
        right = np.append(is_right, np.zeros(len(scores), bool))
        panels[1].plot(*risk_coverage(np.append(sound, scores), right), **style)
    panels[1].plot(*risk_coverage(sound, is_right), color=BLUE, label="characters alone")
    panels[0].set_title("Rejected")
    panels[0].set_xlabel("share of sound characters")
    panels[0].set_ylim(0, 1.02)
    panels[1].set_title("Wrong among accepted")
    panels[1].set_xlabel("share accepted of characters and as many others")
    panels[1].set_ylim(0, None)
    for axes in panels:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].legend(loc="lower right")
    panels[1].legend(loc="upper left")
    return save(figure, workdir, "rejection")


@styled
def draw_calibration(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> Figure:
    """Returns accuracy against probability by bin, above the number of predictions in each bin.

    Args:
      confidence: float (N,), the probability of each prediction.
      is_right: bool (N,).
      bins: of equal width.
    """
    place = calibration_bins(confidence, bins)
    counts = np.bincount(place, minlength=bins)
    filled = counts > 0
    hits = np.bincount(place, weights=is_right, minlength=bins)[filled]
    means = np.bincount(place, weights=confidence, minlength=bins)[filled] / counts[filled]
    figure = Figure(figsize=(6.4, 5.2))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], "--", color=QUIET, linewidth=1.2)
    _draw_shares(upper, means, hits, counts[filled])
    upper.set_ylabel("right")
    upper.set_title("Calibration")
    lower.bar((np.arange(bins) + 0.5) / bins, counts, 0.9 / bins, color=BLUE)
    lower.set_yscale("log")
    lower.set_xlabel("probability of the prediction")
    lower.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.set_ylabel("predictions")
    return figure


@styled
def draw_shares(title: str, label: str, names: np.ndarray, is_right: np.ndarray) -> Figure:
    """Returns the accuracy of each group of predictions with its 95 % interval.

    Args:
      title: of the plot.
      label: of the axis of the names.
      names: (N,), the group of each prediction; numbers are placed by value, others by rank.
      is_right: bool (N,).
    """
    values, place = np.unique(names, return_inverse=True)
    counts, hits = np.bincount(place), np.bincount(place, weights=is_right)
    where: np.ndarray = values
    if values.dtype.kind not in "iuf":
        order = np.argsort(hits / counts, kind="stable")
        counts, hits, where = counts[order], hits[order], np.arange(1, len(values) + 1)
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_subplot()
    _draw_shares(axes, where, hits, counts)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return figure


def _draw_shares(axes: Axes, where: np.ndarray, hits: np.ndarray, counts: np.ndarray) -> None:
    low, high = intervals.wilson(hits, counts)
    axes.vlines(where, low, high, color=BLUE, linewidth=1.2, alpha=0.5)
    axes.plot(where, hits / counts, "o", color=BLUE, markersize=4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


@styled
def to_png(figure: Figure) -> bytes:
    """Returns a figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _series(rows: dict[int, dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(step, row[key]) for step, row in rows.items() if np.isfinite(row.get(key, np.nan))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)


def _curve_figure(title: str, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(6.4, 4.0))
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
    axes.set_title(title)
    axes.set_xlabel("step")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        # Not "best", whose search warns where it takes a second.
        axes.legend(loc="lower right" if title == "Accuracy" else "upper right")
    return figure


def _plot_training(axes: Axes, key: str, steps: np.ndarray, values: np.ndarray) -> None:
    # One logged step is one batch: the raw curve is mostly noise, so its mean is drawn above it.
    width = len(values) // 50 * 2 + 1
    if width > 1 and key.startswith("train/"):
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3)
        values = running_mean(values, width)
    axes.plot(steps, values, color=BLUE, label="training")


def _plot_evaluation(axes: Axes, key: str, steps: np.ndarray, values: np.ndarray) -> None:
    colour = GREEN if key == "eval/top5" else ORANGE
    label = {"eval/top1": "evaluation, top 1", "eval/top5": "evaluation, top 5"}.get(
        key, "evaluation"
    )
    size = 6 if len(steps) <= 40 else 3
    axes.plot(
        steps, values, "o-", color=colour, linewidth=1, markersize=size, label=label, zorder=3
    )


@styled
def save(figure: Figure, workdir: str | Path, name: str) -> Path:
    """Writes a figure to plots/NAME.png in a workdir and returns the file's path."""
    path = Path(workdir) / "plots" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the library's version the same run gives the same bytes.
    figure.savefig(path, metadata={"Software": None})
    return path


@styled
def write_scaling(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]], folder: str | Path
) -> Path:
    """Draws the speed of the training step against each setting that was varied, one panel each.

    Args:
      panels: by setting ("batch size", …) and network: points (value, images/s, the roofline's
        images/s), in order.
      folder: gets `scaling.png`.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.4))
    for place, (varied, networks) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, (name, points) in enumerate(networks.items()):
            colour = f"C{number}"
            values, speeds, limits = zip(*points, strict=True)
            axes.plot(values, limits, "--", color=colour, linewidth=1.2, label=f"{name}, roofline")
            axes.plot(values, speeds, "o-", color=colour, label=name)
        if varied == "batch size":
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.tick_params(axis="x", rotation=45 if len(values) > 4 else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel(varied)
        axes.grid(visible=False, axis="x")
    figure.axes[0].set_ylabel("images/s")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=11)
    path = Path(folder) / "scaling.png"
    figure.savefig(path, metadata={"Software": None})
    return path


@styled
def write_validation_curves(
    curves: Mapping[str, Mapping[str, Sequence[float]]], path: Path
) -> None:
    """Draws validation top-1 of several runs over the steps; training accuracy in thin lines.

    Args:
      curves: by the names of the runs: `step`, and `validation_top1` and `train_accuracy` (0 to 1)
        at each validation.
      path: of the picture; its folder is created where missing.
    """
    figure = Figure(figsize=(8.0, 5.0))
    axes = figure.add_subplot()
    for place, (name, curve) in enumerate(curves.items()):
        colour, steps = f"C{place}", curve["step"]
        axes.plot(steps, curve["train_accuracy"], ":", color=colour, linewidth=1.2)
        axes.plot(steps, curve["validation_top1"], "o-", color=colour, markersize=5, label=name)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("step")
    axes.set_title("Validation top-1 (dotted: training)")
    figure.legend(loc="outside lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
