"""Analyses the mistakes of a trained network, in one HTML file.

Examples:

  hccr analyse --workdir=runs/v2
  hccr analyse --workdir=runs/v2 --against=runs/v1 --output=v2_v1.html
  hccr analyse --workdir=runs/v2 --split=validation --data_dir=/data

Evaluates the run's best step on the test split and writes the most confused pairs and the hardest
characters with images, accuracy by class, writer and number of strokes, and a calibration plot.
With --against, two runs are compared on the same images: the difference with a 95 % interval.

Exit codes: 0 done, 2 the request was wrong.
"""

from pathlib import Path

import numpy as np
from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.metrics import calibration
from hccr_jax.report import analysis
from hccr_jax.runtime.startup import prepare_process
from hccr_jax.runtime.workdir import replace_text


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
        wanted = values.split, values.data_dir
        predicted = _predict(values.workdir, *wanted)
        other = _predict(values.against, *wanted) if values.against else None
        output = Path(values.output or Path(values.workdir, "analysis.html")).expanduser()
        _write(output, analysis.render_analysis(predicted, other))
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


def _predict(workdir: str, split_name: str | None, data_dir: str | None) -> analysis.Predicted:
    """Returns the predictions of a run's best step."""
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
    return analysis.Predicted(
        str(Path(workdir)),
        split,
        np.concatenate(candidates),
        np.concatenate(confidence),
        temperature is not None,
    )


def _write(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise InputError(f"--output={path}: {error.strerror or error}") from error
