"""Wrong labels: made on purpose, borne by the loss, found afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.special import log_softmax, softmax

from hccr_jax import main
from hccr_jax.data.label_noise import shuffle_labels
from hccr_jax.data.splits import load_split
from hccr_jax.ops.cross_entropy import cross_entropy
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train.setup import create_training_setup

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.333, 1.0])
def test_as_many_labels_are_wrong_as_asked_for(share):
    labels = np.arange(21_480, dtype=np.int32) % 100
    before = labels.copy()
    shuffled = shuffle_labels(labels, share, 100, seed=3)
    assert (shuffled != labels).sum() == round(share * 21_480)
    assert shuffled.dtype == np.int32
    assert 0 <= shuffled.min() <= shuffled.max() < 100
    np.testing.assert_array_equal(labels, before)


def test_the_seed_tells_which_labels_are_wrong():
    labels = np.arange(1000, dtype=np.int32) % 10
    one, again, other = (shuffle_labels(labels, 0.2, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).sum() > 200


def test_rows_and_wrong_classes_are_drawn_evenly():
    labels = np.arange(90_000, dtype=np.int32) % 10
    shuffled = shuffle_labels(labels, 0.5, 10, seed=0)
    wrong = shuffled != labels
    shifts = np.bincount((shuffled - labels)[wrong] % 10, minlength=10)
    assert shifts[0] == 0
    assert stats.chisquare(shifts[1:]).pvalue > 1e-3
    for drawn in (labels[wrong], np.flatnonzero(wrong) // 1000):  # by class, by place
        assert stats.chisquare(np.bincount(drawn)).pvalue > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_loss_is_that_of_labels_drawn_with_noise(smoothing, rate):
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(64, 10)), rng.integers(0, 10, 64)
    logs = log_softmax(logits, axis=1)
    transition = (1 - rate) * np.eye(10) + rate / 10  # from the true class to the label
    noisy = np.log(np.exp(logs) @ transition)[np.arange(64), labels]
    exact = -(1 - smoothing) * noisy - smoothing * logs.mean(1)
    ours = cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels), smoothing, rate)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_gradient_is_weighed_by_the_probability_that_the_label_is_right():
    rng = np.random.default_rng(1)
    logits = jnp.array(4 * rng.normal(size=(64, 10)), jnp.float32)
    labels = jnp.array(rng.integers(0, 10, 64))

    def gradient(rate):
        return jax.grad(lambda x: cross_entropy(x, labels, 0.0, rate).sum())(logits)

    p = softmax(np.array(logits, np.float64), axis=1)[np.arange(64), labels]
    right = 0.7 * p / (0.7 * p + 0.3 / 10)
    plain = np.array(gradient(0.0), np.float64)
    np.testing.assert_allclose(gradient(0.3), right[:, None] * plain, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient(1e-12), plain, rtol=1e-5, atol=1e-7)  # rate → 0


def test_a_label_that_is_ruled_out_pulls_at_nothing():
    logits = jnp.array([[200.0, 0.0, 0.0], [1e4, -1e4, 0.0]])
    labels = jnp.array([1, 1])
    losses = cross_entropy(logits, labels, 0.0, 0.3)
    np.testing.assert_allclose(losses, -np.log(0.1), rtol=1e-6)  # ε/K: the loss has an upper bound
    gradient = jax.grad(lambda x: cross_entropy(x, labels, 0.0, 0.3).sum())(logits)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


def test_only_training_labels_are_shuffled(tiny_job: list[str]):
    config = main.parse(["main", *tiny_job, "--config.data.label_noise=0.25"]).config
    job = create_training_setup(config, Timeline())
    name, folder = "synthetic_8c_12w_3t_cursive100", config.data.data_dir
    for split in ("train", "validation", "test"):
        clean = load_split(name, folder, split, 32, 2)
        ours = getattr(job, split)
        np.testing.assert_array_equal(ours.images, clean.images)
        share = 0.25 if split == "train" else 0.0
        assert (ours.labels != clean.labels).sum() == round(share * len(clean.labels))
    # The batches come from the split of the setup.
    chunk = next(job.batches.chunks(0, [1]))
    images, labels = map(np.asarray, job.batches.get_batch(chunk.arrays, 0))
    for image, label in zip(images, labels, strict=True):
        same = (job.train.images == image).all(axis=(1, 2))
        assert label in job.train.labels[same]


def test_the_command_lists_the_likeliest_label_errors(tiny_job: list[str], tmp_path: Path):
    flags = [*tiny_job, f"--workdir={tmp_path}"]
    noise = ["--config.num_steps=4", "--config.data.label_noise=0.25", "--config.seed=5"]
    assert main.main(["main", *flags, *noise]) == 0
    assert not (tmp_path / "suspects.json").exists()
    # The shuffled labels are those of the run, whatever the config says.
    command = [sys.executable, "-m", "hccr_jax.main", *flags, "--mode=eval"]
    result = subprocess.run(
        [*command, "--config.eval.label_errors=10"],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "suspects.json").read_text("utf-8"))
    rows = content["suspects"]
    assert (content["step"], content["characters"], len(rows)) == (4, 88, 10)
    config = main.parse(["main", *tiny_job]).config
    train = load_split("synthetic_8c_12w_3t_cursive100", config.data.data_dir, "train", 32, 2)
    labels = shuffle_labels(train.labels, 0.25, 8, seed=5)
    for row in rows:
        place = row["row"]
        assert row["label"] == train.classes[labels[place]]
        assert (row["source"], row["record"], row["writer"]) == (
            train.sources[place],
            train.record_numbers[place],
            train.writers[place],
        )
        assert row["label_probability"] == pytest.approx(np.exp(-row["loss"]))
        assert row["label_probability"] <= row["prediction_probability"] + 1e-6
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    shuffled = json.loads((tmp_path / "eval.json").read_text())["shuffled_labels"]
    assert shuffled["count"] == 22
    assert 0 <= shuffled["found"] <= 1
    with Image.open(tmp_path / "plots" / "suspects.png") as sheet:
        assert sheet.width > 8 * 112
    assert "Likely label errors" in (tmp_path / "report.html").read_text("utf-8")
