"""What runs of named experiments came to: JSON lines, and the tables and plots made from them.

A page in docs/ says where a table goes and what it shows:

  <!-- table: measured/paper.jsonl; group=Learning rate; gain=validation_top1 -->
  <!-- end -->

`render` writes everything between the two comments. The file is named from the page's folder.
`table` shows scores and costs, `swings` how validation went, and `curves` draws it (with
picture=FILE). Options: group=HEADING takes the experiments of one group, with the first of the file
above them as the baseline; gain=SCORE adds the points above the baseline.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hccr_jax.errors import InputError
from hccr_jax.report import plots
from hccr_jax.report.markdown import to_table
from hccr_jax.report.run_report import flatten
from hccr_jax.runtime import run_log
from hccr_jax.runtime.workdir import replace_text

Row = dict[str, Any]
Runs = list[Row]  # of one experiment, by seed

# (heading, score in eval.json) in per cent, and (heading, cost, format, divisor).
SCORES = (
    ("validation top-1", "validation_top1"),
    ("test top-1", "top1"),
    ("top-5", "top5"),
    ("distorted, all", "robustness.all.top1"),
    ("rotation", "robustness.rotation.top1"),
    ("flip", "robustness.flip.top1"),
    ("resize", "robustness.resize.top1"),
)
COSTS = (
    ("parameters", "parameters", "{:,.0f}", 1),
    ("multiply-adds, M", "multiply_adds", "{:,.2f}", 1e6),
    ("views", "views", "{:,.0f}", 1),
    ("images/s", "images_per_second", "{:,.0f}", 1),
    ("minutes", "training_seconds", "{:,.1f}", 60),
)
_BLOCK = re.compile(r"<!-- (table|swings|curves): (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def create_row(workdir: Path, about: Row) -> Row:
    """Returns the row of a finished run.

    Args:
      workdir: the run's folder.
      about: `name`, `seed` and whatever else is known of it.

    Returns:
      `about`, with `eval` (what eval.json holds) and `course`: `step`, `validation_top1` and
      `train_accuracy` of each validation.

    Raises:
      OSError, ValueError: a file is missing or damaged.
    """
    logged = run_log.read_metrics(workdir / "metrics.jsonl")
    validated = {step: row for step, row in logged.items() if "eval/top1" in row}
    course = {
        "step": list(validated),
        "validation_top1": [_rounded(row["eval/top1"]) for row in validated.values()],
        "train_accuracy": [_rounded(row.get("train/accuracy")) for row in validated.values()],
    }
    results = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    return about | {"eval": results, "course": course}


def _rounded(share: float | None) -> float | None:  # what is fitted at once logs no training
    return None if share is None else round(share, 5)


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file of JSON lines.

    Raises:
      InputError: it is not there, or damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows and all({"name", "seed", "eval", "course"} <= set(row) for row in rows):
            return rows
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError):
        pass
    raise InputError(f"{path}: not a file that hccr sweep wrote")


def write_row(path: Path, row: Row, order: Sequence[str]) -> None:
    """Adds a row to a file of JSON lines, in place of one of the same name and seed.

    Args:
      path: the file; made where missing.
      row: from `create_row`.
      order: names; rows of others come last.
    """
    rows = {(old["name"], old["seed"]): old for old in (read_rows(path) if path.exists() else [])}
    rows[row["name"], row["seed"]] = row
    places = {name: place for place, name in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda r: (places.get(r["name"], len(places)), r["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered))


def render(page: Path) -> None:
    """Writes the tables and plots of a page anew.

    Raises:
      InputError: the page or a file it names is missing, or one of its comments is wrong.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{page}: {error.strerror}") from error
    if not _BLOCK.search(text):
        raise InputError(f"{page}: no `<!-- table: FILE -->` with an `<!-- end -->` after it")

    def block(found: re.Match[str]) -> str:
        kind, request = found.groups()
        file, *pairs = (part.strip() for part in request.split(";"))
        options = dict(pair.partition("=")[::2] for pair in pairs)
        try:
            experiments = _select(read_rows(page.parent / file), options.pop("group", None))
            body = _KINDS[kind](experiments, folder=page.parent, **options)
        except (InputError, TypeError) as error:  # TypeError: no such option
            raise InputError(f"{page}, <!-- {kind}: {request} -->: {error}") from error
        return f"<!-- {kind}: {request} -->\n\n{body}\n\n<!-- end -->"

    replace_text(page, _BLOCK.sub(block, text))


def _select(rows: Sequence[Row], group: str | None) -> list[Runs]:
    """Returns the runs of each experiment: all, or the baseline and those of a group."""
    experiments: dict[str, Runs] = {}
    for row in rows:
        experiments.setdefault(row["name"], []).append(row)
    baseline, *others = experiments.values()
    if group is not None:
        others = [runs for runs in others if runs[0]["group"] == group]
        if not others:
            groups = sorted({row["group"] for row in rows} - {""})
            raise InputError(f"no group {group!r}; there are {', '.join(groups)}")
    return [baseline, *others]


def _table(experiments: Sequence[Runs], *, folder: Path, gain: str | None = None) -> str:
    scores = [column for column in SCORES if any(_values(r, column[1]) for r in experiments)]
    costs = [column for column in COSTS if any(_values(r, column[1]) for r in experiments)]
    keys = [key for _, key in scores]
    if gain and gain not in keys:
        raise InputError(f"gain={gain}: choose from {', '.join(keys)}")
    several = any(len(runs) > 1 for runs in experiments)
    headings = [f"{heading}, %" for heading, _ in scores] + [heading for heading, *_ in costs]
    lines = [["", *["gain, points"] * bool(gain), *["seeds"] * several, *headings]]
    for runs in experiments:
        cells = [runs[0]["description"]]
        if gain:
            values, baseline = (_values(r, gain) for r in (runs, experiments[0]))
            known = values and baseline and runs is not experiments[0]
            cells.append(f"{100 * (fmean(values) - fmean(baseline)):+.2f}" if known else "")
        if several:
            cells.append(str(len(runs)))
        cells += [_score(_values(runs, key)) for _, key in scores]
        cells += [_cost(_values(runs, key), form, unit) for _, key, form, unit in costs]
        lines.append(cells)
    return to_table(lines)


def _stability(experiments: Sequence[Runs], *, folder: Path) -> str:
    """Returns a line for each run: its validation top-1 from epoch to epoch."""
    lines = [["validation top-1, %", "best", "last", "lowest of the second half", "largest drop"]]
    for run in (run for runs in experiments for run in runs):
        scores = [100 * score for score in run["course"]["validation_top1"]]
        drops = [before - after for before, after in itertools.pairwise(scores)]
        figures = max(scores), scores[-1], min(scores[len(scores) // 2 :]), max([0.0, *drops])
        lines.append([_label(run), *(f"{figure:.2f}" for figure in figures)])
    return to_table(lines)


def _curves(experiments: Sequence[Runs], *, folder: Path, picture: str) -> str:
    courses = {_label(run): run["course"] for runs in experiments for run in runs}
    plots.write_validation_curves(courses, folder / picture)
    return f"![Validation top-1 over the training steps]({picture})"


_KINDS: dict[str, Callable[..., str]] = {"table": _table, "swings": _stability, "curves": _curves}


def _label(run: Row) -> str:
    return run["description"] + (f", seed {run['seed']}" if run["seed"] else "")


def _values(runs: Runs, key: str) -> list[float]:
    """Returns a figure of eval.json in each run that has it."""
    return [results[key] for results in (flatten(run["eval"]) for run in runs) if key in results]


def _score(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread}"


def _cost(values: Sequence[float], form: str, unit: float) -> str:
    return form.format(fmean(values) / unit) if values else ""
