"""Results of named experiments as JSON lines, and the tables and plots made from them.

A page in docs/ marks where a table goes and which it is:

  <!-- table: measured/paper.jsonl; group=Learning rate; gain=validation_top1 -->
  <!-- end -->

`render` writes everything between the two comments. The file is named from the page's folder.
`table` lists scores and costs, `stability` the course of validation top-1, and `curves` draws it
(with picture=FILE). Options: group=HEADING takes the experiments of one group, with the first of
the file above them as the baseline; gain=SCORE adds the points above the baseline.

Where a run uses test-time augmentation or MQDF, a table has test top-1 twice: of the network alone
on one view, as an exported file has it, and as configured, followed by what that includes.
"""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from hccr_jax.config import flatten
from hccr_jax.errors import InputError
from hccr_jax.report import plots
from hccr_jax.report.markdown import Row, read_rows, to_table
from hccr_jax.runtime import run_log
from hccr_jax.runtime.workdir import replace_text

Runs = list[Row]  # of one experiment, by seed

NETWORK = "network.top1"  # test top-1 of the network alone on one view
# (heading, score in eval.json) in per cent, and (heading, cost, format, divisor).
SCORES = (
    ("validation top-1", "validation_top1"),
    ("test top-1, network alone on one view", NETWORK),
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
    ("images/s", "images_per_second", "{:,.0f}", 1),
    ("minutes", "training_seconds", "{:,.1f}", 60),
)
_BLOCK = re.compile(r"<!-- (table|stability|curves): (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def create_row(workdir: Path, metadata: Row) -> Row:
    """Returns the row of a finished run.

    Args:
      workdir: the run's folder.
      metadata: `name`, `seed` and anything else to keep.

    Returns:
      `metadata` with `eval` (the content of eval.json) and `curve`: `step`, `validation_top1` and
      `train_accuracy` of each validation.

    Raises:
      OSError, ValueError: a file is missing or damaged.
    """
    logged = run_log.read_metrics(workdir / "metrics.jsonl")
    validated = {step: row for step, row in logged.items() if "eval/top1" in row}
    curve = {
        "step": list(validated),
        "validation_top1": [_rounded(row["eval/top1"]) for row in validated.values()],
        "train_accuracy": [_rounded(row.get("train/accuracy")) for row in validated.values()],
    }
    results = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    return metadata | {"eval": results, "curve": curve}


def _rounded(share: float | None) -> float | None:  # a fitted classifier logs no training
    return None if share is None else round(share, 5)


def read_runs(path: Path) -> list[Row]:
    """Returns the rows of a file that `hccr sweep` wrote; see `read_rows`."""
    rows = read_rows(path, {"name", "seed", "eval"}, "hccr sweep")
    for row in rows:
        if "course" in row:  # its name in version 0.1
            row["curve"] = row.pop("course")
    return rows


def write_row(path: Path, row: Row, order: Sequence[str]) -> None:
    """Adds a row to a file of JSON lines, replacing one of the same name and seed.

    Args:
      path: the file; created where missing.
      row: from `create_row`.
      order: names; rows of other names come last.
    """
    stored = read_runs(path) if path.exists() else []
    rows = {(old["name"], old["seed"]): old for old in stored}
    rows[row["name"], row["seed"]] = row
    places = {name: place for place, name in enumerate(order)}
    ordered = sorted(rows.values(), key=lambda r: (places.get(r["name"], len(places)), r["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered))


def render(page: Path) -> None:
    """Renders the tables and plots of a page again.

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
            rows = read_runs(page.parent / file)
            experiments = _select(rows, options.pop("group", None))
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
    extended = any(map(_additions, experiments))
    scores = [
        (heading, key)
        for heading, key in SCORES
        if any(_values(runs, key) for runs in experiments) and (extended or key != NETWORK)
    ]
    costs = [column for column in COSTS if any(_values(r, column[1]) for r in experiments)]
    keys = [key for _, key in scores]
    if gain and gain not in keys:
        raise InputError(f"gain={gain}: choose from {', '.join(keys)}")
    several = any(len(runs) > 1 for runs in experiments)
    lines = [["", *["gain, points"] * bool(gain), *["seeds"] * several]]
    for heading, key in scores:
        if key == "top1" and extended:
            lines[0] += ["test top-1 as configured, %", "with"]
        else:
            lines[0].append(f"{heading}, %")
    lines[0] += [heading for heading, *_ in costs]
    for runs in experiments:
        cells = [runs[0]["description"]]
        if gain:
            values, baseline = (_values(r, gain) for r in (runs, experiments[0]))
            known = values and baseline and runs is not experiments[0]
            cells.append(f"{100 * (fmean(values) - fmean(baseline)):+.2f}" if known else "")
        if several:
            cells.append(str(len(runs)))
        for key in keys:
            cells.append(_score(_values(runs, key)) or "–" * (key == NETWORK))
            if key == "top1" and extended:
                cells.append(_additions(runs))
        cells += [_cost(_values(runs, key), form, unit) for _, key, form, unit in costs]
        lines.append(cells)
    return to_table(lines)


def _additions(runs: Runs) -> str:
    """Returns what the configured network has besides one network on one view."""
    results, changes = runs[0]["eval"], runs[0].get("changes", {})
    views = results.get("tta_views", results.get("views", 1))
    has_mqdf = "ensemble" in results or changes.get("model.mqdf_weight", 0.0) > 0.0
    return ", ".join([f"{views} views"] * (views > 1) + ["MQDF"] * has_mqdf)


def _stability(experiments: Sequence[Runs], *, folder: Path) -> str:
    """Returns a table of each run's validation top-1: how far it went up and down."""
    lines = [["validation top-1, %", "best", "last", "lowest of the second half", "largest drop"]]
    for run in (run for runs in experiments for run in runs):
        scores = [100 * score for score in run["curve"]["validation_top1"]]
        drops = [before - after for before, after in itertools.pairwise(scores)]
        figures = max(scores), scores[-1], min(scores[len(scores) // 2 :]), max([0.0, *drops])
        lines.append([_label(run), *(f"{figure:.2f}" for figure in figures)])
    return to_table(lines)


def _curves(experiments: Sequence[Runs], *, folder: Path, picture: str) -> str:
    logged = {_label(run): run["curve"] for runs in experiments for run in runs}
    plots.write_validation_curves(logged, folder / picture)
    return f"![Validation top-1 over the training steps]({picture})"


_KINDS: dict[str, Callable[..., str]] = {
    "table": _table,
    "stability": _stability,
    "curves": _curves,
}


def _label(run: Row) -> str:
    return run["description"] + (f", seed {run['seed']}" if run["seed"] else "")


def _values(runs: Runs, key: str) -> list[float]:
    """Returns a figure of eval.json in each run that has it."""
    found = []
    for run in runs:
        results = dict(flatten(run["eval"]))
        if key == NETWORK and not _additions([run]):
            results.setdefault(NETWORK, results.get("top1"))  # the same figure
        if results.get(key) is not None:
            found.append(results[key])
    return found


def _score(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.2f}{spread}"


def _cost(values: Sequence[float], form: str, unit: float) -> str:
    return form.format(fmean(values) / unit) if values else ""
