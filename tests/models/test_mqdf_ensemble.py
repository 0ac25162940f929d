"""A network beside which the classical recogniser is asked: what it answers, and all it goes
through: training, checkpoints, start from other weights, export."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from hccr_jax import main
from hccr_jax.cli import command
from hccr_jax.data.from_config import load
from hccr_jax.errors import InputError
from hccr_jax.export import exporter
from hccr_jax.inference.network import create_network
from hccr_jax.inference.pretrained import Pretrained, load_pretrained, set_mqdf_weight
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.inference.steps import to_float
from hccr_jax.models import mqdf
from hccr_jax.models.functional import expose_features, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime.sharding import create_mesh
from hccr_jax.train import fit_mqdf
from hccr_jax.train.fit_mqdf import fit_mqdf_member
from hccr_jax.train.init_from import start_from

WEIGHT = 0.5


AT_THE_END = "--config.eval.every_steps=8"  # so that the last step is the best


@pytest.fixture(scope="module")
def finished(train: Callable[..., Path]) -> Path:
    """Returns the workdir of the tiny run."""
    return train(8, AT_THE_END)


@pytest.fixture(scope="module")
def both(train: Callable[..., Path]) -> Path:
    """Returns the workdir of that run with the classical recogniser beside the network."""
    return train(8, AT_THE_END, f"--config.model.mqdf_weight={WEIGHT}")


@pytest.fixture(scope="module")
def pretrained(both: Path) -> Pretrained:
    return load_pretrained(both)


def answers(pretrained: Pretrained, images: np.ndarray) -> np.ndarray:
    network = pretrained.network
    seen = to_float(jnp.asarray(images))[..., None]
    return np.asarray(jax.jit(network.apply)(network.params, network.batch_stats, seen)[0])


def test_training_is_that_of_the_network_alone_to_the_bit(both: Path, finished: Path) -> None:
    one, other = map(load_pretrained, (both, finished))
    jax.tree.map(np.testing.assert_array_equal, one.network.params, other.network.params)
    own = {k: v for k, v in one.network.batch_stats.items() if k != "mqdf"}
    jax.tree.map(np.testing.assert_array_equal, own, other.network.batch_stats)
    rows = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (both, finished)
    ]
    losses, scores = (
        [[row[key] for row in rows if key in row] for rows in rows]
        for key in ("train/loss", "eval/loss")
    )
    assert losses[0] == losses[1]
    assert scores[0] != scores[1]


def test_log_probabilities_are_added(pretrained: Pretrained, finished: Path) -> None:
    images = load(pretrained.config, "test").images[:9]
    alone = answers(load_pretrained(finished), images).astype(np.float64)
    np.testing.assert_allclose(answers(set_mqdf_weight(pretrained, 0.0), images), alone, atol=1e-5)

    apply, _, _ = split_model(create_model("mqdf", num_classes=8, rngs=None))
    fitted = pretrained.network.batch_stats["mqdf"]
    second, _ = apply(fitted, {}, to_float(jnp.asarray(images))[..., None])
    second = np.asarray(second, np.float64)
    expected = log_softmax(alone, axis=1) + WEIGHT * log_softmax(second, axis=1)
    np.testing.assert_allclose(answers(pretrained, images), expected, atol=1e-4)


def test_features_come_after_the_logits(pretrained: Pretrained) -> None:
    network = pretrained.network
    seen = to_float(jnp.asarray(load(pretrained.config, "test").images[:5]))[..., None]
    logits, _ = network.apply(network.params, network.batch_stats, seen)
    exposed, _ = network.apply(expose_features(network.params), network.batch_stats, seen)
    np.testing.assert_allclose(exposed[:, :8], logits, atol=1e-5)
    weight, bias = (network.params["classifier"][name] for name in ("weight", "bias"))
    own, _ = set_mqdf_weight(pretrained, 0.0).network.apply(
        network.params, {k: v for k, v in network.batch_stats.items() if k != "mqdf"}, seen
    )
    np.testing.assert_allclose(exposed[:, 8:] @ weight + bias[None], own, atol=1e-4)


def test_what_is_fitted_and_on_whom_its_scale(pretrained: Pretrained) -> None:
    split = load(pretrained.config, "train")
    images = to_float(jnp.asarray(np.asarray(split.images)))
    features = np.asarray(mqdf.extract_features(images))
    fitted = pretrained.network.batch_stats["mqdf"]
    lda = fit_mqdf.fit_lda(features, *fit_mqdf.class_rows(split.labels, 8), 7)
    for one, other in zip(
        *(abs(np.asarray(f["weight"])) for f in (fitted["lda"], lda)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-2)  # the signs are anyone's

    # Labels of the writers on whom the scale is fitted are made wrong: it trusts nothing any more.
    writers = np.unique(split.writers)
    held = np.isin(split.writers, writers[::10])
    assert 0 < held.sum() < len(held) / 4
    wrong = np.where(held, (split.labels + 1) % 8, split.labels).astype(np.int32)
    misled = fit_mqdf_member(fitted, dataclasses.replace(split, labels=wrong), create_mesh())
    assert float(fitted["discriminant"]["scale"]) > 2**-6
    assert float(misled["discriminant"]["scale"]) == pytest.approx(2**-8)


def test_it_is_counted(both: Path, finished: Path) -> None:
    one, other = (json.loads((run / "eval.json").read_text()) for run in (both, finished))
    gaussians = 8 * (7 + 7 * 7 + 7)
    assert one["parameters"] - other["parameters"] == 512 * 7 + 7 + gaussians + 2
    features = 2 * 32**3 + 12 * 32**2 + 8 * (8 * 32 * 32 + 8 * 8 * 32)
    assert one["multiply_adds"] - other["multiply_adds"] == features + 512 * 7 + gaussians


def test_it_reads_where_hardly_anything_is_learnt(both: Path, finished: Path) -> None:
    one, other = (json.loads((run / "eval.json").read_text()) for run in (both, finished))
    assert one["top1"] > other["top1"] + 0.2
    assert Recognizer.load(both).classes == Recognizer.load(finished).classes


def test_a_finished_run_is_evaluated_with_it_as_if_trained_with_it(
    both: Path, finished: Path, tiny_job: list[str], tmp_path: Path
) -> None:
    flags = [f"--config.model.mqdf_weight={WEIGHT}", "--mode=eval", f"--checkpoint={finished}"]
    assert main.main(["main", *tiny_job, *flags, f"--workdir={tmp_path}"]) == 0
    one, other = (json.loads((run / "eval.json").read_text()) for run in (tmp_path, both))
    for key in ("top1", "top5", "parameters", "multiply_adds"):
        assert one[key] == other[key]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


def test_a_weight_that_an_evaluation_names_is_taken(
    both: Path, finished: Path, tiny_job: list[str], tmp_path: Path
) -> None:
    losses = [json.loads((both / "eval.json").read_text())["loss"]]
    for run in (both, finished):
        flags = [f"--config.model.mqdf_weight={WEIGHT / 4}", "--mode=eval", f"--checkpoint={run}"]
        workdir = tmp_path / run.name
        assert main.main(["main", *tiny_job, *flags, f"--workdir={workdir}"]) == 0
        losses.append(json.loads((workdir / "eval.json").read_text())["loss"])
    trained_with, named, added = losses
    assert named == pytest.approx(added, rel=1e-6)
    assert abs(named - trained_with) > 0.01


def test_a_run_goes_on_with_what_it_has_fitted(
    train: Callable[..., Path], both: Path, tmp_path: Path
) -> None:
    flags = AT_THE_END, f"--config.model.mqdf_weight={WEIGHT}"
    train(4, *flags, workdir=tmp_path)
    train(8, *flags, workdir=tmp_path)
    one, other = (load_pretrained(path).network.batch_stats["mqdf"] for path in (tmp_path, both))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_network_starts_from_one_with_and_from_one_without(
    pretrained: Pretrained, finished: Path
) -> None:
    alone = load_pretrained(finished)
    for start, target in ((alone, pretrained), (pretrained, alone)):
        fresh = create_network(target.config, 8)
        got = start_from(fresh, target.classes, start)
        jax.tree.map(np.testing.assert_array_equal, got.params, start.network.params)
        assert got.batch_stats.keys() == fresh.batch_stats.keys()
        if "mqdf" in fresh.batch_stats:
            own = got.batch_stats["mqdf"], fresh.batch_stats["mqdf"]
            jax.tree.map(np.testing.assert_array_equal, *own)


def test_a_file_holds_the_network_alone(
    both: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (both, finished):
        output = f"--output={tmp_path / run.name}"
        flags = [f"--checkpoint={run}", "--format=safetensors", output]
        assert command.main(["export", *flags]) == 0
        told = "the network alone: no file holds the MQDF that it is ensembled with"
        assert (told in capsys.readouterr().out) == (run == both)
    one, other = (exporter.read_golden(tmp_path / run.name) for run in (both, finished))
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-5)
    assert one.description["multiply_adds"] == other.description["multiply_adds"]


def test_the_classical_recogniser_has_none_beside_it(tiny_job: list[str]) -> None:
    config = main.parse(["main", *tiny_job]).config
    config.model.name, config.model.width, config.model.dropout_rate = "mqdf", 1.0, 0.0
    config.model.mqdf_weight = 0.5
    with pytest.raises(InputError, match=r"mqdf_weight=0\.5: mqdf has no such option"):
        create_network(config, 8)
