"""Shows what a trained network confuses, with whom and how sure it is, in one HTML file.

Examples:

  hccr analyse --workdir=runs/v2
  hccr analyse --workdir=runs/v2 --against=runs/v1 --output=v2_v1.html
  hccr analyse --workdir=runs/v2 --split=validation --data_dir=/data

Evaluates the run's best step on the test split and writes the most confused pairs and the hardest
characters with images, accuracy by class, writer and number of strokes, and a calibration plot.
With --against, two runs are compared on the same images: the difference with a 95 % interval.

Exit codes: 0 done, 2 the request was wrong.
"""

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from hccr_jax.cli import command
from hccr_jax.data.casia import charset
from hccr_jax.data.synthetic import medians
from hccr_jax.errors import InputError
from hccr_jax.metrics import calibration, intervals
from hccr_jax.report import html_page, image_grids, plots
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text

ROWS = 20  # pairs and characters shown with images


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a network says about a split.

    Attributes:
      name: of the run.
      split: what was asked, a `splits.Split`.
      candidates: int (N, 5), best first, or fewer where there are fewer classes.
      confidence: float (N,), the calibrated probability of the best.
      is_calibrated: whether a temperature was fitted.
    """

    name: str
    split: Any
    candidates: np.ndarray
    confidence: np.ndarray
    is_calibrated: bool

    @property
    def is_right(self) -> np.ndarray:
        """bool (N,)."""
        return self.candidates[:, 0] == self.split.labels


def confused_pairs(labels: np.ndarray, answers: np.ndarray) -> list[tuple[int, int, int]]:
    """Returns (class, other class, mistakes in both directions), the most mistakes first.

    >>> confused_pairs(np.array([0, 1, 1, 2, 2]), np.array([1, 0, 1, 0, 2]))
    [(0, 1, 2), (0, 2, 1)]
    """
    wrong = labels != answers
    pairs = np.sort(np.stack([labels[wrong], answers[wrong]], axis=1), axis=1)
    found, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(a), int(b), int(n)) for (a, b), n in zip(found[order], counts[order], strict=True)]


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code."""
    values = _define_flags()
    try:
        command.parse_flags(values, argv)
        if values.help:
            print(f"{__doc__}\nFlags:{values.get_help()}")
            return 0
        if not values.workdir:
            raise InputError("--workdir is missing: the folder of a run, such as runs/v2")
        prepare_process()
        answers = _answer(values.workdir, values.split, values.data_dir)
        parts = [_headline(answers), _accuracy(answers), _confused(answers), _hardest(answers)]
        if values.against:
            other = _answer(values.against, values.split, values.data_dir)
            parts.insert(1, _comparison(answers, other))
        output = Path(values.output or Path(values.workdir, "analysis.html")).expanduser()
        _write(output, html_page.document(f"What {answers.name} confuses", parts))
    except InputError as error:
        return command.report_error(error)
    print(f"report: {output}")
    return 0


def _define_flags() -> flags.FlagValues:
    own = flags.FlagValues()
    for name, text in (
        ("workdir", "Folder of the run to look at."),
        ("against", "Folder of another run, to compare."),
        ("output", "The HTML file; by default analysis.html in the workdir."),
        ("split", "By default the run's test split."),
        ("data_dir", "Folder of all data sets; by default the run's."),
    ):
        flags.DEFINE_string(name, None, text, flag_values=own)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    return own


def _answer(workdir: str, split_name: str | None, data_dir: str | None) -> Answers:
    """Returns the answers of a run's best step."""
    from hccr_jax.data.from_config import load
    from hccr_jax.evaluation.evaluate import read_outputs
    from hccr_jax.inference.pretrained import load_pretrained
    from hccr_jax.inference.recognizer import read_temperature
    from hccr_jax.inference.steps import make_logits_step
    from hccr_jax.runtime.checkpoints import check_classes  # slow to import

    pretrained = load_pretrained(workdir)
    network, config = pretrained.network, pretrained.config
    config.data.data_dir = data_dir or config.data.data_dir
    split = load(config, split_name or config.data.test_split)
    check_classes(pretrained.classes, split.classes, pretrained.source)
    temperature = read_temperature(pretrained)
    step = make_logits_step(network.apply, network.mesh, network.views)
    variables, size = (network.params, network.batch_stats), network.eval_batch_size
    candidates, confidence = [], []
    for (logits,) in read_outputs(step, *variables, split.images, size, network.mesh):
        weights = calibration.probabilities(logits, temperature or 1.0)
        candidates.append(np.argsort(-weights, axis=1, kind="stable")[:, :5])
        confidence.append(weights.max(axis=1))
    return Answers(
        str(Path(workdir)),
        split,
        np.concatenate(candidates),
        np.concatenate(confidence),
        temperature is not None,
    )


def _headline(answers: Answers) -> str:
    split, right = answers.split, answers.is_right
    top5 = (answers.candidates == split.labels[:, None]).any(axis=1)
    error = calibration.calibration_error(answers.confidence, right)
    low, high = intervals.bootstrap(right, split.writers)
    cards = {
        "Top-1 accuracy": f"{right.mean():.2%}",
        "95 %, over writers": f"{100 * low:.1f} – {100 * high:.1f}",
        "Top-5 accuracy": f"{top5.mean():.2%}",
        "Images": f"{len(right):,}",
        "Writers": f"{len(np.unique(split.writers)):,}",
        "Classes": f"{len(split.classes):,}",
        "Calibration error": f"{error:.2%}",
    }
    figures = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>"
        for name, text in cards.items()
    )
    note = "" if answers.is_calibrated else " Its probabilities are not calibrated."
    return (
        f'<header><h1>{html.escape(answers.name)}</h1><p class="quiet">The interval draws whole '
        f"writers again and again: images of one hand are alike.{note}</p>"
        f'<dl class="figures">{figures}</dl></header>'
    )


def _confused(answers: Answers) -> str:
    split, guesses = answers.split, answers.candidates[:, 0]
    rows = []
    pairs = confused_pairs(split.labels, guesses)
    for one, other, count in pairs[:ROWS]:
        pair = (split.labels == one) & (guesses == other)
        pair |= (split.labels == other) & (guesses == one)
        total = int(((split.labels == one) | (split.labels == other)).sum())
        rows.append(_row(answers, (one, other), f"{count} of {total:,}", np.flatnonzero(pair)))
    if not rows:
        return ""
    title = f"Most confused pairs: {len(rows)} of {len(pairs):,}"
    return _sheet("Most confused pairs", "Each image above the answer to it.", title, rows)


def _hardest(answers: Answers) -> str:
    split, rows = answers.split, list[image_grids.Row]()
    hits, counts = _by_group(split.labels, answers.is_right, len(split.classes))
    shares = hits / np.maximum(counts, 1)
    for index in np.lexsort((-counts, shares)):
        wrong = np.flatnonzero((split.labels == index) & ~answers.is_right)
        if len(wrong) and len(rows) < ROWS:
            text = f"{shares[index]:.1%} of {counts[index]:,.0f}"
            rows.append(_row(answers, (int(index),), text, wrong))
    if not rows:
        return ""
    text = "The characters of the lowest accuracy, their surest mistakes first."
    return _sheet("Hardest characters", text, f"Hardest characters: {len(rows)}", rows)


def _accuracy(answers: Answers) -> str:
    """Returns the plots of calibration and of accuracy by strokes, writer and class."""
    split, right = answers.split, answers.is_right
    index, classes = charset.class_index(), np.array(split.classes)
    numbers = np.array(
        [len(medians.class_strokes(index[c])) if c in index else 0 for c in split.classes]
    )[split.labels]
    known, shares = numbers > 0, plots.draw_shares
    figures = [plots.draw_calibration(answers.confidence, right)]
    if known.any():
        figures.append(shares("By number of strokes", "strokes", numbers[known], right[known]))
    figures.append(shares("By writer", "writers, worst first", split.writers, right))
    figures.append(shares("By class", "classes, worst first", classes[split.labels], right))
    images = "".join(
        html_page.image(plots.to_png(figure), figure.axes[0].get_title("left"))
        for figure in figures
    )
    named = np.array([f"{c} U+{ord(c):04X}" for c in split.classes])
    return (
        f'<section><h2>Accuracy</h2><p class="quiet">Lines are 95 % intervals, images taken as '
        f'independent.</p><div class="pairs">{images}</div></section>'
        + _listed("All writers", "writer", split.writers, right)
        + _listed("All classes", "character", named[split.labels], right)
    )


def _listed(heading: str, what: str, names: np.ndarray, is_right: np.ndarray) -> str:
    """Returns a table of groups, the worst first, folded."""
    found, place = np.unique(names, return_inverse=True)
    hits, counts = _by_group(place, is_right, len(found))
    order = np.argsort(hits / counts, kind="stable")
    rows = {str(found[i]): [f"{hits[i] / counts[i]:.1%}", f"{counts[i]:,.0f}"] for i in order}
    table = html_page.grid((what, "top-1", "images"), rows)
    return f"<section><details><summary>{heading}</summary>{table}</details></section>"


def _comparison(answers: Answers, other: Answers) -> str:
    split = answers.split
    if not np.array_equal(split.labels, other.split.labels) or split.classes != other.split.classes:
        raise InputError(
            f"{other.name}: was not evaluated on the same images as {answers.name}: both runs need "
            f"the same data set, split and classes"
        )
    one, two = answers.is_right, other.is_right
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    low, high = intervals.bootstrap(one.astype(float) - two, split.writers)
    rows = {
        answers.name: f"{one.mean():.2%}",
        other.name: f"{two.mean():.2%}",
        "difference": f"{100 * (one.mean() - two.mean()):+.2f} points",
        "95 % interval, over writers": f"{100 * low:+.2f} to {100 * high:+.2f} points",
        "right only in the first": f"{only_one:,}",
        "right only in the second": f"{only_two:,}",
        "wrong in both": f"{int((~one & ~two).sum()):,}",
        "McNemar's test, each image by itself": f"p = {intervals.mcnemar(only_one, only_two):.2g}",
    }
    gains = np.bincount(split.labels, weights=one.astype(float) - two, minlength=len(split.classes))
    changed = sorted(np.flatnonzero(gains), key=lambda i: -abs(gains[i]))[:ROWS]
    listed = {
        f"{split.classes[i]} U+{ord(split.classes[i]):04X}": [f"{gains[i]:+.0f}"] for i in changed
    }
    table = html_page.grid(("most changed", "images more"), listed) if listed else ""
    return html_page.table("Two runs", rows) + (
        f'<section><div class="scroll">{table}</div></section>' if table else ""
    )


def _by_group(place: np.ndarray, is_right: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the right answers and the number of answers of each group."""
    return np.bincount(place, weights=is_right, minlength=size), np.bincount(place, minlength=size)


def _row(
    answers: Answers, characters: Sequence[int], text: str, wrong: np.ndarray
) -> image_grids.Row:
    """Returns a row of the surest mistakes among some."""
    split = answers.split
    surest = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:8]
    return image_grids.Row(
        [split.classes[index] for index in characters],
        text,
        [split.images[index] for index in surest],
        [split.classes[answers.candidates[index, 0]] for index in surest],
    )


def _sheet(heading: str, text: str, title: str, rows: list[image_grids.Row]) -> str:
    image = html_page.image(plots.to_png(image_grids.draw_rows(title, rows)), heading)
    quiet = f'<p class="quiet">{html.escape(text)}</p>'
    return f'<section><h2>{heading}</h2>{quiet}<div class="scroll">{image}</div></section>'


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise InputError(f"--output={path}: {error.strerror or error}") from error
