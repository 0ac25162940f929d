"""Analyses the mistakes of a trained network, in one HTML file.

Examples:

  hccr analyse --workdir=runs/v2
  hccr analyse --workdir=runs/v2 --against=runs/v1 --output=v2_v1.html
  hccr analyse --workdir=runs/v2 --split=validation --data_dir=/data

Evaluates the run's best step on the test split and writes the most confused pairs and the hardest
characters with images, accuracy by class, writer and number of strokes, and a calibration plot.
With --against, two runs are compared on the same images: the difference with a 95 % interval.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    for name, text in (
        ("workdir", "Folder of the run to look at."),
        ("against", "Folder of another run, to compare."),
        ("output", "The HTML file; default analysis.html in the workdir."),
        ("data_dir", "Folder of all data sets; default the run's."),
    ):
        command.define_path(name, text, values)
    flags.DEFINE_string("split", None, "Default the run's test split.", flag_values=values)


def run(values: SimpleNamespace) -> None:
    """Runs the command."""
    command.require(values, workdir="the folder of a run, such as runs/v2")
    output = values.output or values.workdir / "analysis.html"
    prepare_process()
    from hccr_jax.report import analysis

    first = predict(values.workdir, values.split, values.data_dir)
    other = predict(values.against, values.split, values.data_dir) if values.against else None
    try:
        replace_text(output, analysis.render_analysis(first, other))
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror or error}") from error
    print(f"report: {output}")


def predict(workdir: Path, split_name: str | None, data_dir: Path | None) -> Any:
    """Returns the predictions of a run's best step for a split, `analysis.Predicted`."""
    import numpy as np

    from hccr_jax.data.from_config import load
    from hccr_jax.evaluation.evaluate import read_outputs
    from hccr_jax.inference.pretrained import load_pretrained
    from hccr_jax.inference.recognizer import read_temperature
    from hccr_jax.inference.steps import make_logits_step
    from hccr_jax.metrics import calibration
    from hccr_jax.report.analysis import Predicted
    from hccr_jax.runtime.checkpoints import check_classes

    pretrained = load_pretrained(workdir)
    network, config = pretrained.network, pretrained.config
    config.data.data_dir = str(data_dir or config.data.data_dir)
    split = load(config, split_name or config.data.test_split)
    check_classes(pretrained.classes, split.classes, pretrained.source)
    temperature = read_temperature(pretrained)
    views, member = network.tta_views, network.member
    step = make_logits_step(network.apply, network.mesh, views, member)
    variables, size = network.variables, network.eval_batch_size
    candidates, confidence = [], []
    for (logits,) in read_outputs(step, variables, split.images, size, network.mesh):
        weights = calibration.probabilities(logits, temperature or 1.0)
        candidates.append(np.argsort(-weights, axis=1, kind="stable")[:, :5])
        confidence.append(weights.max(axis=1))
    return Predicted(
        str(workdir),
        split,
        np.concatenate(candidates),
        np.concatenate(confidence),
        temperature is not None,
    )
