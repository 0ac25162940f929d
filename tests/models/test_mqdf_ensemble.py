"""A network ensembled with MQDF: its scores, training, checkpoints, initialisation and export."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from hccr_jax.inference.pretrained import (
    Pretrained,
    load_pretrained,
    restore_items,
    set_mqdf_weight,
)
from hccr_jax.inference.recognizer import Recognizer
from hccr_jax.inference.steps import make_logits_step, to_float
from hccr_jax.models import mqdf
from hccr_jax.models.functional import expose_features, split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime.checkpoints import Checkpoints
from hccr_jax.runtime.sharding import create_mesh, replicated
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
    """Returns the workdir of that run, ensembled with MQDF."""
    return train(8, AT_THE_END, f"--config.model.mqdf_weight={WEIGHT}")


@pytest.fixture(scope="module")
def pretrained(both: Path) -> Pretrained:
    return load_pretrained(both)


def compute_logits(pretrained: Pretrained, images: np.ndarray) -> np.ndarray:
    network = pretrained.network
    inputs = to_float(jnp.asarray(images))[..., None]
    return np.asarray(jax.jit(network.apply_ensemble)(*network.variables, inputs)[0])


def member_params(pretrained: Pretrained) -> Any:
    member = pretrained.network.member
    assert member is not None
    return member.params


def test_training_is_that_of_the_network_alone_to_the_bit(both: Path, finished: Path) -> None:
    one, other = map(load_pretrained, (both, finished))
    for name in ("params", "batch_stats"):
        trees = getattr(one.network, name), getattr(other.network, name)
        jax.tree.map(np.testing.assert_array_equal, *trees)
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
    alone = compute_logits(load_pretrained(finished), images).astype(np.float64)
    without = set_mqdf_weight(pretrained, 0.0)
    np.testing.assert_allclose(compute_logits(without, images), alone, atol=1e-5)

    apply, _, _ = split_model(create_model("mqdf", num_classes=8, rngs=None))
    classical, _ = apply(member_params(pretrained), {}, to_float(jnp.asarray(images))[..., None])
    classical = np.asarray(classical, np.float64)
    expected = log_softmax(alone, axis=1) + WEIGHT * log_softmax(classical, axis=1)
    np.testing.assert_allclose(compute_logits(pretrained, images), expected, atol=1e-4)


def test_features_come_after_the_logits(pretrained: Pretrained) -> None:
    network, images = pretrained.network, load(pretrained.config, "test").images[:8]
    exposed = network.variables._replace(params=expose_features(network.params))
    step = make_logits_step(network.apply, network.mesh, None, network.member, True)
    logits, features = map(np.asarray, step(exposed, images))
    np.testing.assert_allclose(logits, compute_logits(pretrained, images), rtol=1e-5, atol=1e-5)
    weight, bias = (np.asarray(network.params["classifier"][name]) for name in ("weight", "bias"))
    alone = compute_logits(set_mqdf_weight(pretrained, 0.0), images)
    np.testing.assert_allclose(features @ weight + bias[None], alone, atol=1e-4)


def test_the_fit_and_the_writers_of_its_scale(pretrained: Pretrained) -> None:
    split = load(pretrained.config, "train")
    images = to_float(jnp.asarray(np.asarray(split.images)))
    features = np.asarray(mqdf.extract_features(images))
    fitted = member_params(pretrained)
    lda = fit_mqdf.fit_lda(features, *fit_mqdf.class_rows(split.labels, 8), 7)
    for one, other in zip(
        *(abs(np.asarray(f["weight"])) for f in (fitted["lda"], lda)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-2)  # the signs are anyone's

    # With wrong labels of the writers that the scale is fitted to, it is the smallest possible.
    writers = np.unique(split.writers)
    held = np.isin(split.writers, writers[::10])
    assert 0 < held.sum() < len(held) / 4
    wrong = np.where(held, (split.labels + 1) % 8, split.labels).astype(np.int32)
    misled = fit_mqdf_member(fitted, dataclasses.replace(split, labels=wrong), create_mesh())
    assert float(fitted["discriminant"]["scale"]) > 2**-6
    assert float(misled["discriminant"]["scale"]) == pytest.approx(2**-8)


def test_its_parameters_and_multiply_adds_are_counted(both: Path, finished: Path) -> None:
    one, other = (json.loads((run / "eval.json").read_text()) for run in (both, finished))
    gaussians = 8 * (7 + 7 * 7 + 7)
    assert one["parameters"] - other["parameters"] == 512 * 7 + 7 + gaussians + 2
    features = 2 * 32**3 + 12 * 32**2 + 8 * (8 * 32 * 32 + 8 * 8 * 32)
    assert one["multiply_adds"] - other["multiply_adds"] == features + 512 * 7 + gaussians


def test_it_raises_the_accuracy_of_a_hardly_trained_network(both: Path, finished: Path) -> None:
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


def test_an_evaluation_takes_the_weight_of_its_config(
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


@pytest.mark.slow
def test_a_resumed_run_keeps_the_fitted_member(
    train: Callable[..., Path], both: Path, tmp_path: Path
) -> None:
    flags = AT_THE_END, f"--config.model.mqdf_weight={WEIGHT}"
    train(4, *flags, workdir=tmp_path)
    train(8, *flags, workdir=tmp_path)
    one, other = (member_params(load_pretrained(path)) for path in (tmp_path, both))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_network_starts_from_one_with_and_one_without_a_member(
    pretrained: Pretrained, finished: Path
) -> None:
    alone = load_pretrained(finished)
    for start, target in ((alone, pretrained), (pretrained, alone)):
        fresh = create_network(target.config, 8)
        got = start_from(fresh, target.classes, start)
        jax.tree.map(np.testing.assert_array_equal, got.params, start.network.params)
        assert got.batch_stats.keys() == fresh.batch_stats.keys()
        assert got.member is fresh.member


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


def test_mqdf_itself_has_no_member(tiny_job: list[str]) -> None:
    config = main.parse(["main", *tiny_job]).config
    config.model.name, config.model.width, config.model.dropout_rate = "mqdf", 1.0, 0.0
    config.model.mqdf_weight = 0.5
    with pytest.raises(InputError, match=r"mqdf_weight=0\.5: mqdf has no such option"):
        create_network(config, 8)


def test_eval_json_states_what_the_accuracy_consists_of(
    pretrained: Pretrained, both: Path, finished: Path
) -> None:
    scores, alone = (json.loads((run / "eval.json").read_text()) for run in (both, finished))
    assert set(alone) & {"network", "tta", "ensemble"} == {"network"}
    assert set(scores) & {"network", "tta", "ensemble"} == {"network", "ensemble"}
    assert scores["ensemble"]["mqdf_weight"] == WEIGHT
    split = load(pretrained.config, "test")
    for name, weight in (("network", 0.0), ("ensemble", WEIGHT)):
        logits = compute_logits(set_mqdf_weight(pretrained, weight), split.images)
        logs = log_softmax(logits.astype(np.float64), axis=1)
        loss = -logs[np.arange(len(logs)), split.labels].mean()
        assert scores[name]["count"] == len(split.labels)
        assert scores[name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert scores[name]["top1"] == (logs.argmax(axis=1) == split.labels).mean()
    for key in ("count", "loss", "top1", "top5"):
        assert scores[key] == scores["ensemble"][key]
        assert alone[key] == alone["network"][key]
        assert scores["network"][key] == pytest.approx(alone[key], rel=1e-5)


def test_a_checkpoint_of_version_0_1_is_restored(
    pretrained: Pretrained, both: Path, tmp_path: Path
) -> None:
    """There the member's parameters were stored among the batch statistics."""
    network, step = pretrained.network, pretrained.step
    old_stats = network.batch_stats | {"mqdf": member_params(pretrained)}
    progress = {"step": jnp.int32(step), "batch_stats": old_stats}
    items = {"params": network.params, "eval_batch_stats": old_stats, "progress": progress}
    with Checkpoints(both / "checkpoints") as checkpoints:
        metadata = checkpoints.metadata(step)
    with Checkpoints(tmp_path / "checkpoints", 1, 1) as checkpoints:
        checkpoints.save(step, items, metadata, {"top1": 0.5})
    restored = load_pretrained(tmp_path).network
    jax.tree.map(np.testing.assert_array_equal, restored.variables, network.variables)
    like = {"params": network.params, "eval_batch_stats": network.batch_stats} | {
        "progress": {"step": jnp.int32(0), "batch_stats": network.batch_stats},
        "member": member_params(pretrained),
    }
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        got = restore_items(checkpoints, step, like, replicated(network.mesh))
    expected = items | {"eval_batch_stats": network.batch_stats, "member": old_stats["mqdf"]}
    expected["progress"] = progress | {"batch_stats": network.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, got, expected)
