"""The last evaluation of a network: every test that its config asks for, and the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hccr_jax.data.from_config import dataset_name, load, load_training
from hccr_jax.data.splits import Split, rows_spread
from hccr_jax.evaluation import label_errors, robustness
from hccr_jax.evaluation.distortions import Source
from hccr_jax.evaluation.evaluate import Predictions, evaluate, read_outputs
from hccr_jax.evaluation.rejection import evaluate_rejection
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained
from hccr_jax.inference.rejector import REJECTOR, to_traits
from hccr_jax.inference.steps import make_logits_step
from hccr_jax.metrics import calibration, ranking
from hccr_jax.models.functional import expose_features
from hccr_jax.report import image_grids, plots, run_report
from hccr_jax.runtime import distributed, run_log
from hccr_jax.runtime.checkpoints import check_classes
from hccr_jax.runtime.failpoints import failpoint
from hccr_jax.runtime.workdir import replace_text


def run_final_evaluation(pretrained: Pretrained, split: Split, workdir: Path) -> dict[str, Any]:
    """Evaluates a network on the test split and writes everything that a person looks at.

    Args:
      pretrained: the network; its config tells which further tests there are.
      split: the test split.
      workdir: gets eval.json, plots/ and report.html.

    Returns:
      What eval.json holds.

    Raises:
      InputError: the network was trained on another class list.
    """
    network, config = pretrained.network, pretrained.config
    check_classes(pretrained.classes, split.classes, pretrained.source)

    def answer(split: Split) -> Predictions:
        variables, size = (network.params, network.batch_stats), network.eval_batch_size
        return evaluate(network.eval_step, *variables, split, size, network.mesh)

    answers = answer(split)
    results = {"step": pretrained.step, "split": config.data.test_split, **answers.summary()}
    learnt = config.data.train_split.split("+")
    if pretrained.validation and config.data.validation_split not in learnt:
        results["validation_top1"] = pretrained.validation["top1"]
    results["seed"] = config.seed
    results["parameters"] = network.num_parameters
    results["multiply_adds"] = network.multiply_adds
    results["views"] = network.num_tta_views
    results |= _speed(pretrained.source.parent.parent / "metrics.jsonl")
    if config.data.validation_split not in learnt:
        results |= _calibrate(pretrained, answers, split, workdir)
    results |= _evaluate_distorted(config, answer, split, workdir)
    if config.eval.label_errors:
        results |= _find_suspects(config, answer, workdir, pretrained.step)
    if distributed.is_primary():
        _write_results(workdir, results, answers, split)
    return results


def _calibrate(
    pretrained: Pretrained, answers: Predictions, split: Split, workdir: Path
) -> dict[str, Any]:
    """Returns what the validation split teaches about probabilities and about what to reject.

    Args:
      pretrained: the network; it has not seen the validation split.
      answers: to the test split.
      split: the test split.
      workdir: gets rejector.json and plots/rejection.png, where the config asks for them.
    """
    network, config = pretrained.network, pretrained.config
    rejects = config.eval.rejection_images > 0 and "classifier" in network.params
    params = expose_features(network.params) if rejects else network.params
    step = make_logits_step(network.apply, network.mesh, network.views, with_features=rejects)

    def read(images: np.ndarray) -> Iterator[list[np.ndarray]]:
        size = network.eval_batch_size
        return read_outputs(step, params, network.batch_stats, images, size, network.mesh)

    validation = load(config, config.data.validation_split)
    rows = rows_spread(len(validation.labels), calibration.FIT_IMAGES)
    logits = np.concatenate([logits for logits, *_ in read(validation.images[rows])])
    temperature = calibration.fit_temperature(logits, validation.labels[rows])
    confidence = np.concatenate(
        [calibration.probabilities(logits, temperature).max(1) for logits, *_ in read(split.images)]
    )
    is_right = answers.candidates[:, 0] == answers.labels
    results: dict[str, Any] = {
        "temperature": temperature,
        "calibration_error": {
            "as_trained": calibration.calibration_error(answers.probabilities[:, 0], is_right),
            "calibrated": calibration.calibration_error(confidence, is_right),
        },
    }
    if not rejects:
        return results

    def read_traits(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = list(read(images))
        sure = [calibration.probabilities(logits, temperature).max(1) for logits, _ in outputs]
        return np.concatenate([to_traits(*output) for output in outputs]), np.concatenate(sure)

    form = [config.data[key] for key in NORMAL_FORM]
    validated, tested = (
        Source(dataset_name(config), config.data.data_dir, name, *form)
        for name in (config.data.validation_split, config.data.test_split)
    )
    results["rejection"], rejector = evaluate_rejection(
        read_traits, validated, tested, pretrained.classes, is_right,
        config.eval.rejection_images, workdir,
    )  # fmt: skip
    if distributed.is_primary():
        which = {"step": pretrained.step, "views": network.num_tta_views}
        replace_text(workdir / REJECTOR, json.dumps(which | rejector.to_json()) + "\n")
    return results


def _evaluate_distorted(
    config: ConfigDict, answer: robustness.Answer, split: Split, workdir: Path
) -> dict[str, Any]:
    """Returns the results on distorted test images, those that the config asks for."""
    data, options, results = config.data, config.eval, {}
    form = [data[key] for key in NORMAL_FORM]
    source = Source(dataset_name(config), data.data_dir, data.test_split, *form)
    if options.paper_protocol:
        results["paper_protocol"] = robustness.evaluate_paper_protocol(answer, split, source)
    if options.robustness:
        results["robustness"] = robustness.evaluate_robustness(
            answer, split, source, options.robustness_images, workdir
        )
    return results


def _find_suspects(
    config: ConfigDict, answer: robustness.Answer, workdir: Path, step: int
) -> dict[str, Any]:
    """Writes the most suspicious training characters; tells how well shuffled labels are found."""
    train = load_training(config)
    answers = answer(train)
    if distributed.is_primary():
        label_errors.write_label_errors(workdir, answers, train, config.eval.label_errors, step)
    if config.data.label_noise == 0.0:
        return {}
    right = load(config, config.data.train_split).labels
    wrong = np.zeros(len(train.labels), bool)
    wrong[: len(right)] = train.labels[: len(right)] != right
    return {"shuffled_labels": ranking.detection(answers.losses, wrong)}


def _speed(path: Path) -> dict[str, float]:
    """Returns what a run's metrics.jsonl tells of its speed; nothing where there is none.

    `training_seconds` counts every step and validation once, however often the run was stopped;
    starting, compiling and saving are no part of it.
    """
    rows = list(run_log.read_metrics(path).values()) if path.is_file() else []
    rates = [row["images_per_second"] for row in rows if "images_per_second" in row]
    seconds = sum(row.get("train/seconds", 0.0) + row.get("eval/seconds", 0.0) for row in rows)
    if not rates:
        return {}
    return {
        "images_per_second": round(median(rates), 1),
        "training_seconds": round(seconds, 1),
    }


def _write_results(
    workdir: Path, results: dict[str, Any], answers: Predictions, split: Split
) -> None:
    replace_text(workdir / "eval.json", json.dumps(results, indent=2) + "\n")
    failpoint("while results are written")
    if answers.candidates.shape[1] == 5:  # fewer than five classes give no such sheet
        image_grids.write_mistakes(
            workdir,
            split.images,
            split.labels,
            answers.candidates,
            answers.probabilities,
            split.classes,
        )
    plots.write_curves(workdir)
    page = run_report.write_report(workdir)
    print(
        f"{results['split']}: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, "
        f"{results['count']:,} characters, step {results['step']:,}"
    )
    if sets := results.get("robustness"):
        scores = ", ".join(
            f"{name} {sets[name]['top1']:.2%}" for name in run_report.PAPER_ROBUSTNESS
        )
        print(f"distorted: top-1 {scores}")
    print(f"report: {page}")
