"""The report of a run: one HTML file that needs nothing but a browser."""

import html
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from hccr_jax.errors import InputError
from hccr_jax.report import html_page
from hccr_jax.runtime.workdir import replace_text

PLOTS = {
    "accuracy": "Accuracy over the training steps, as a share of the batch or of the split.",
    "loss": "Loss over the training steps.",
    "learning_rate": "Learning rate over the training steps.",
    "augmented": "Training images before and after augmentation.",
    "mistakes": "Wrong answers of the highest confidence, with the five best candidates.",
    "robustness": "Accuracy against the angle of rotation and against the aspect.",
    "robustness_sets": "Test images before and after distortion.",
    "robustness_failures": "Wrong answers of the highest confidence on distorted images.",
    "rejection": "What a score rejects of sound characters and of others, and what it saves.",
    "suspects": "Training characters of the highest loss: the label and the network's answer.",
}
# Top-1 on 9,000 distorted images without and with the resize augmentation: section 6 of the paper.
PAPER_ROBUSTNESS = {
    "all": (0.8057, 0.8503),
    "rotation": (0.8213, 0.8113),
    "flip": (0.9360, 0.9160),
    "resize": (0.6597, 0.8237),
}
PACKAGES = ("hccr_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_report(workdir: str | Path) -> Path:
    """Writes `report.html`: results, pictures and config of a run, in one self-contained file.

    Args:
      workdir: a run's folder. Used where present: `config.json`, `eval.json` and the pictures under
        `plots/` (see `hccr_jax.plots`).

    Raises:
      InputError: the folder holds none of these, or a JSON file cannot be read.
    """
    folder = Path(workdir)
    config = _read_json(folder / "config.json")
    results = flatten(_read_json(folder / "eval.json"))
    plots = {name: folder / "plots" / f"{name}.png" for name in PLOTS}
    pictures = {name: path.read_bytes() for name, path in plots.items() if path.is_file()}
    if not (config or results or pictures):
        raise InputError(
            f"{folder}: nothing to report: the folder holds no config.json, eval.json or "
            f"plots/*.png; give the workdir of a run"
        )
    page = _page(config, results, pictures)
    report = folder / "report.html"
    replace_text(report, page)
    return report


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns the scalars of nested dictionaries, named by their path.

    >>> flatten({"top1": 0.9, "robustness": {"flip": {"top1": 0.8}}, "per_class": [1, 2]})
    {'top1': 0.9, 'robustness.flip.top1': 0.8}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": scalar for name, scalar in flatten(value).items()}
        elif isinstance(value, str | int | float):
            flat[key] = value
    return flat


def format_value(name: str, value: str | int | float) -> str:
    """Returns a result as a person reads it; `…top1`, `…top5`, `…accuracy` in per cent.

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


def _page(config: dict[str, Any], results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    model, data = (flatten(config).get(key) for key in ("model.name", "data.name"))
    title = " on ".join(str(name) for name in (model, data) if name) or "Training run"
    plain = {k: v for k, v in results.items() if not k.startswith(("robustness.", "rejection."))}
    parts = [
        _headline(title, results),
        html_page.table("Results", {key: format_value(key, value) for key, value in plain.items()}),
        _curves(pictures),
        _sheet("Augmentation", "augmented", pictures),
        _sheet("Mistakes", "mistakes", pictures),
        _sheet("Suspicious training characters", "suspects", pictures),
        _robustness(results, pictures),
        _rejection(results, pictures),
        _config(config),
        html_page.table("Versions", _versions()),
    ]
    return html_page.document(title, parts)


def _headline(title: str, results: dict[str, Any]) -> str:
    cards = "".join(
        f'<div class="{css}"><dt>{label}</dt>'
        f"<dd>{html.escape(format_value(key, results[key]))}</dd></div>"
        for key, label, css in (
            ("top1", "Top-1 accuracy", "main"),
            ("top5", "Top-5 accuracy", "main"),
            ("paper_protocol.top1", "Top-1, flipped and turned", ""),
            ("robustness.all.top1", "Top-1, distorted", ""),
            ("count", "Images", ""),
            ("split", "Split", ""),
            ("step", "Step", ""),
        )
        if key in results
    )
    figures = f'<dl class="figures">{cards}</dl>' if cards else ""
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="quiet">Handwritten-character recognition with hccr_jax</p>{figures}</header>'
    )


def _curves(pictures: dict[str, bytes]) -> str:
    names = [name for name in ("accuracy", "loss", "learning_rate") if name in pictures]
    if not names:
        return ""
    images = "".join(html_page.image(pictures[name], PLOTS[name]) for name in names)
    return f'<section><h2>Training</h2><div class="curves">{images}</div></section>'


def _sheet(heading: str, name: str, pictures: dict[str, bytes]) -> str:
    if name not in pictures:
        return ""
    image = html_page.image(pictures[name], PLOTS[name])
    return f'<section><h2>{heading}</h2><div class="scroll">{image}</div></section>'


def _robustness(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Returns the section on distorted images; pictures of an earlier evaluation do not show."""
    rows: dict[str, list[str]] = {}
    for name, paper in PAPER_ROBUSTNESS.items():
        keys = [f"robustness.{name}.{score}" for score in ("top1", "top5", "count")]
        if keys[0] in results:
            cells = [format_value(key, results[key]) for key in keys if key in results]
            rows[name] = cells + [format_value("top1", share) for share in paper]
    if not rows:
        return ""
    head = ("", "top-1", "top-5", "images", "paper", "paper, with resize")
    images = "".join(
        f'<div class="scroll">{html_page.image(pictures[name], PLOTS[name])}</div>'
        for name in ("robustness", "robustness_sets", "robustness_failures")
        if name in pictures
    )
    return (
        f'<section><h2>Distorted images</h2><div class="scroll">{html_page.grid(head, rows)}</div>'
        f'<p class="quiet">rotation: U(−25°, 25°); flip:'
        f" every image, left/right, up/down or both; resize: width and height by U(0.5, 2.5) each."
        f" The paper's top-1 is on 3,755 characters, without and with its resize augmentation.</p>"
        f"{images}</section>"
    )


def _rejection(results: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Returns the section on what the network should not name."""
    rows = {
        name.replace("_", " "): [
            f"{results[f'rejection.{name}.{key}']:.4f}" for key in ("auroc", "auroc_of_probability")
        ]
        + [f"{results[f'rejection.{name}.rejected']:.1%}"]
        for name in ("crossed_out", "unknown", "scrawl")
        if f"rejection.{name}.auroc" in results
    }
    if not rows:
        return ""
    head = ("", "AUROC", "AUROC of the probability alone", "rejected")
    image = (
        html_page.image(pictures["rejection"], PLOTS["rejection"])
        if "rejection" in pictures
        else ""
    )
    return (
        f'<section><h2>Rejection</h2><div class="scroll">{html_page.grid(head, rows)}</div>'
        f'<p class="quiet">Test characters crossed out; signs and characters that are no class; '
        f"scrawls. Rejected: the share with a p-value of at most 0.05, as "
        f"{results['rejection.sound_rejected']:.1%} of sound test characters have.</p>"
        f'<div class="scroll">{image}</div></section>'
    )


def _config(config: dict[str, Any]) -> str:
    if not config:
        return ""
    text = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"<section><details><summary>Config</summary><pre>{text}</pre></details></section>"


def _versions() -> dict[str, str]:
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in installed}
    return versions | {"Python": platform.python_version(), "platform": platform.platform()}
