"""The final evaluation of a network: every test that its config names, and the report."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hccr_jax.data.from_config import dataset_name, load, load_training
from hccr_jax.data.splits import Split, rows_spread
from hccr_jax.evaluation import label_errors, robustness
from hccr_jax.evaluation.distortions import Source
from hccr_jax.evaluation.evaluate import Predictions, evaluate, evaluate_stages, read_outputs
from hccr_jax.evaluation.rejection import evaluate_rejection
from hccr_jax.inference.network import Network
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

# What the headline is made of, by its key in eval.json.
COMPONENTS = {
    "network": "network alone, one view",
    "tta": "with test-time augmentation",
    "ensemble": "ensembled with MQDF",
}
# read(images uint8 (N, S, S)) yields batches of [logits (B, K)] or [logits, features (B, F)]
ReadOutputs = Callable[[np.ndarray], Iterator[list[np.ndarray]]]


def run_final_evaluation(pretrained: Pretrained, split: Split, workdir: Path) -> dict[str, Any]:
    """Evaluates a network on the test split and writes its scores, pictures and report.

    Args:
      pretrained: the network; its config names the further tests.
      split: the test split.
      workdir: gets eval.json, plots/ and report.html.

    Returns:
      The content of eval.json.

    Raises:
      InputError: the network was trained on another class list.
    """
    network, config = pretrained.network, pretrained.config
    check_classes(pretrained.classes, split.classes, pretrained.source)
    stages = evaluate_stages(network, split)
    *_, predictions = stages.values()
    results = {"step": pretrained.step, "split": config.data.test_split, **predictions.summary()}
    results |= _components(network, stages)
    sees_validation = config.data.validation_split in config.data.train_split.split("+")
    if pretrained.validation and not sees_validation:
        results["validation_top1"] = pretrained.validation["top1"]
    results["seed"] = config.seed
    results["parameters"] = network.num_parameters
    results["multiply_adds"] = network.multiply_adds
    results["views"] = network.num_tta_views
    results |= _speed(pretrained.source.parent.parent / "metrics.jsonl")
    if not sees_validation:
        results |= _calibrate(pretrained, predictions, split, workdir)
    results |= _evaluate_distorted(pretrained, split, workdir)
    if config.eval.label_errors:
        results |= _find_label_errors(pretrained, workdir)
    if distributed.is_primary():
        _write_results(workdir, results, predictions, split)
    return results


def _components(network: Network, stages: dict[str, Predictions]) -> dict[str, dict[str, Any]]:
    """Returns the scores of the network alone on one view, with TTA, and with the member."""
    settings: dict[str, dict[str, Any]] = {"network": {}, "tta": {"views": network.num_tta_views}}
    if network.member:
        settings["ensemble"] = settings["tta"] | {"mqdf_weight": network.member.weight}
    return {name: settings[name] | stage.summary() for name, stage in stages.items()}


def _calibrate(
    pretrained: Pretrained, predictions: Predictions, split: Split, workdir: Path
) -> dict[str, Any]:
    """Returns the temperature fitted to the validation split, its effect, and the rejection scores.

    Args:
      pretrained: the network, not trained on the validation split.
      predictions: for the test split.
      split: the test split.
      workdir: gets rejector.json and plots/rejection.png, if the config names them.
    """
    network, config = pretrained.network, pretrained.config
    rejects = config.eval.rejection_images > 0 and "classifier" in network.params
    read = _make_read(network, with_features=rejects)
    validation = load(config, config.data.validation_split)
    rows = rows_spread(len(validation.labels), calibration.FIT_IMAGES)
    logits = np.concatenate([logits for logits, *_ in read(validation.images[rows])])
    temperature = calibration.fit_temperature(logits, validation.labels[rows])
    confidence = np.concatenate(
        [calibration.probabilities(logits, temperature).max(1) for logits, *_ in read(split.images)]
    )
    is_right = predictions.is_right
    results: dict[str, Any] = {
        "temperature": temperature,
        "calibration_error": {
            "as_trained": calibration.calibration_error(predictions.probabilities[:, 0], is_right),
            "calibrated": calibration.calibration_error(confidence, is_right),
        },
    }
    if rejects:
        results["rejection"] = _evaluate_rejection(pretrained, read, temperature, is_right, workdir)
    return results


def _make_read(network: Network, with_features: bool) -> ReadOutputs:
    """Returns the function that computes a network's logits, and features, for any images."""
    views, member = network.tta_views, network.member
    step = make_logits_step(network.apply, network.mesh, views, member, with_features)
    variables = network.variables
    if with_features:
        variables = variables._replace(params=expose_features(network.params))
    size, mesh = network.eval_batch_size, network.mesh
    return lambda images: read_outputs(step, variables, images, size, mesh)


def _evaluate_rejection(
    pretrained: Pretrained,
    read: ReadOutputs,
    temperature: float,
    is_right: np.ndarray,
    workdir: Path,
) -> dict[str, Any]:
    """Fits a rejector, writes it to rejector.json, and returns its scores.

    Args:
      pretrained: the network, not trained on the validation split.
      read: from `_make_read`, with features.
      temperature: divisor of the logits.
      is_right: bool (N,), whether the network's prediction for each test character is right.
      workdir: gets rejector.json and plots/rejection.png.
    """
    config = pretrained.config

    def read_traits(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        outputs = list(read(images))
        sure = [calibration.probabilities(logits, temperature).max(1) for logits, _ in outputs]
        return np.concatenate([to_traits(*output) for output in outputs]), np.concatenate(sure)

    form = [config.data[key] for key in NORMAL_FORM]
    validation, test = (
        Source(dataset_name(config), config.data.data_dir, name, *form)
        for name in (config.data.validation_split, config.data.test_split)
    )
    results, rejector = evaluate_rejection(
        read_traits, validation, test, pretrained.classes, is_right, config.eval.rejection_images,
        workdir,
    )  # fmt: skip
    if distributed.is_primary():
        weights = {"step": pretrained.step, "views": pretrained.network.num_tta_views}
        replace_text(workdir / REJECTOR, json.dumps(weights | rejector.to_json()) + "\n")
    return results


def _evaluate_distorted(pretrained: Pretrained, split: Split, workdir: Path) -> dict[str, Any]:
    """Returns the scores on distorted test images, those that the config names."""
    config, results = pretrained.config, {}
    form = [config.data[key] for key in NORMAL_FORM]
    source = Source(dataset_name(config), config.data.data_dir, config.data.test_split, *form)
    if config.eval.paper_protocol:
        results["paper_protocol"] = robustness.evaluate_paper_protocol(
            pretrained.network, split, source
        )
    if config.eval.robustness:
        results["robustness"] = robustness.evaluate_robustness(
            pretrained.network, split, source, config.eval.robustness_images, workdir
        )
    return results


def _find_label_errors(pretrained: Pretrained, workdir: Path) -> dict[str, Any]:
    """Writes the likeliest label errors of the training split; returns how many are found.

    Where the config shuffles labels, the shuffled ones are the known errors.
    """
    config = pretrained.config
    train = load_training(config)
    predictions = evaluate(pretrained.network, train)
    if distributed.is_primary():
        count, step = config.eval.label_errors, pretrained.step
        label_errors.write_label_errors(workdir, predictions, train, count, step)
    if config.data.label_noise == 0.0:
        return {}
    right = load(config, config.data.train_split).labels
    wrong = np.zeros(len(train.labels), bool)
    wrong[: len(right)] = train.labels[: len(right)] != right
    return {"shuffled_labels": ranking.detection(predictions.losses, wrong)}


def _speed(path: Path) -> dict[str, float]:
    """Returns a run's speed from its metrics.jsonl; nothing if the file is missing.

    `training_seconds` counts every step and validation once, however often the run was stopped,
    without start-up, compilation and saving.
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
    workdir: Path, results: dict[str, Any], predictions: Predictions, split: Split
) -> None:
    """Writes eval.json, the pictures and the report, and prints the scores."""
    replace_text(workdir / "eval.json", json.dumps(results, indent=2) + "\n")
    failpoint("while results are written")
    candidates, probabilities = predictions.candidates, predictions.probabilities
    if candidates.shape[1] == 5:  # the sheet shows five candidates; fewer classes have fewer
        image_grids.write_mistakes(
            workdir, split.images, split.labels, candidates, probabilities, split.classes
        )
    plots.write_curves(workdir)
    page = run_report.write_report(workdir)
    print(
        f"{results['split']}: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, "
        f"{results['count']:,} characters, step {results['step']:,}"
    )
    if results.keys() & {"tta", "ensemble"}:
        for name, label in COMPONENTS.items():
            if scores := results.get(name):
                print(f"  {label}: top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}")
    if sets := results.get("robustness"):
        scores = ", ".join(
            f"{name} {sets[name]['top1']:.2%}" for name in run_report.PAPER_ROBUSTNESS
        )
        print(f"distorted: top-1 {scores}")
    print(f"report: {page}")
