"""report.html, the report of a run."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from hccr_jax.config import flatten
from hccr_jax.errors import InputError
from hccr_jax.report import html
from hccr_jax.runtime.workdir import replace_text

PLOTS = {
    "accuracy": "Accuracy over the training steps, as a share of the batch or of the split.",
    "loss": "Loss over the training steps.",
    "learning_rate": "Learning rate over the training steps.",
    "augmented": "Training images before and after augmentation.",
    "mistakes": "Mistakes of the highest confidence, with the five best candidates.",
    "robustness": "Accuracy against the angle of rotation and against the aspect.",
    "robustness_sets": "Test images before and after distortion.",
    "robustness_failures": "Mistakes of the highest confidence on distorted images.",
    "rejection": "Characters and other marks rejected by score, and the mistakes avoided.",
    "suspects": "Training characters of the highest loss: the label and the prediction.",
}
# Top-1 on 9,000 distorted images without and with the resize augmentation: section 6 of the paper.
PAPER_ROBUSTNESS = {
    "all": (0.8057, 0.8503),
    "rotation": (0.8213, 0.8113),
    "flip": (0.9360, 0.9160),
    "resize": (0.6597, 0.8237),
}
CARDS = (
    ("top1", "Top-1 accuracy", True),
    ("top5", "Top-5 accuracy", True),
    ("network.top1", "Top-1, network alone, one view", False),
    ("paper_protocol.top1", "Top-1, flipped and turned", False),
    ("robustness.all.top1", "Top-1, distorted", False),
    ("count", "Images", False),
    ("split", "Split", False),
    ("step", "Step", False),
)
REJECTED = ("crossed_out", "unknown", "scrawl")
PACKAGES = ("hccr_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html`: results, pictures and config of a run, in one self-contained file.

    Args:
      workdir: a run's folder. Used where present: `config.json`, `eval.json` and the pictures under
        `plots/` (see `PLOTS`).

    Raises:
      InputError: the folder holds none of these, or a JSON file cannot be read.
    """
    folder = Path(workdir)
    config, evaluated = (_read_json(folder / name) for name in ("config.json", "eval.json"))
    results = {k: v for k, v in flatten(evaluated) if isinstance(v, str | int | float)}
    plots = {name: folder / "plots" / f"{name}.png" for name in PLOTS}
    pictures = {name: path.read_bytes() for name, path in plots.items() if path.is_file()}
    if not (config or results or pictures):
        raise InputError(
            f"{folder}: nothing to report: the folder holds no config.json, eval.json or "
            f"plots/*.png; give the workdir of a run"
        )
    report = folder / "report.html"
    replace_text(report, _render(config, results, pictures))
    return report


def format_value(name: str, value: str | int | float) -> str:
    """Returns a result as text; `…top1`, `…top5` and `…accuracy` in per cent.

    >>> format_value("robustness.flip.top1", 0.96127), format_value("count", 223991)
    ('96.13 %', '223,991')
    >>> format_value("loss", 0.1234567), format_value("split", "test")
    ('0.123457', 'test')
    """
    last = name.rpartition(".")[2]
    if isinstance(value, str | bool):
        return str(value)
    if last.endswith(("top1", "top5", "accuracy")):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file ({error}); remove it or run again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; a JSON object is needed")
    return content


def _render(config: dict[str, Any], results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    leaves = dict(flatten(config))
    names = [str(leaves[key]) for key in ("model.name", "data.name") if leaves.get(key)]
    text = {key: format_value(key, value) for key, value in results.items()}
    share = results.get("rejection.sound_rejected")
    return html.render(
        "run_report.html",
        title=" on ".join(names) or "Training run",
        cards=[html.Card(label, text[key], main) for key, label, main in CARDS if key in text],
        results={k: v for k, v in text.items() if not k.startswith(("robustness.", "rejection."))},
        pictures=pictures,
        captions=PLOTS,
        curves=[name for name in ("accuracy", "loss", "learning_rate") if name in pictures],
        distorted=_distorted(results),
        rejected=_rejected(results),
        sound_rejected="" if share is None else f"{share:.1%}",
        config=json.dumps(config, indent=2, ensure_ascii=False) if config else "",
        versions=_versions(),
    )


def _distorted(results: dict[str, Any]) -> dict[str, list[str]]:
    """Returns top-1, top-5, images and the paper's two figures for each set of distorted images."""
    rows = {}
    for name, paper in PAPER_ROBUSTNESS.items():
        keys = [f"robustness.{name}.{score}" for score in ("top1", "top5", "count")]
        if keys[0] in results:
            cells = [format_value(key, results[key]) for key in keys if key in results]
            rows[name] = cells + [format_value("top1", share) for share in paper]
    return rows


def _rejected(results: dict[str, Any]) -> dict[str, list[str]]:
    """Returns AUROC, AUROC of the probability and the rejected share for each set."""
    rows = {}
    for name in REJECTED:
        keys = [f"rejection.{name}.{key}" for key in ("auroc", "auroc_of_probability")]
        if keys[0] in results:
            cells = [f"{results[key]:.4f}" for key in keys]
            share = results[f"rejection.{name}.rejected"]
            rows[name.replace("_", " ")] = [*cells, f"{share:.1%}"]
    return rows


def _versions() -> dict[str, str]:
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return versions | {"Python": platform.python_version(), "platform": platform.platform()}
