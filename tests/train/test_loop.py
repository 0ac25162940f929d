"""A tiny training: its files are complete, and a stopped run resumes bit for bit."""

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image
from runs import EVERY_STEP, assert_same_checkpoint, rows, saved, steps_saved, stop

from hccr_jax import main
from hccr_jax.data.epoch_order import batch_rows
from hccr_jax.data.splits import load_split
from hccr_jax.inference.steps import to_float
from hccr_jax.models.functional import split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.runtime.startup import Timeline
from hccr_jax.train.loop import evaluate_checkpoint
from hccr_jax.train.setup import create_training_setup

Train = Callable[..., Path]


def test_a_workdir_has_all_its_files(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["num_steps"] == 8
    assert config["model"]["width"] == 0.1
    training = [row for row in rows(finished) if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 9))
    for row in training:
        assert row["train/loss"] > 0
        assert 0 <= row["train/accuracy"] <= 1
        assert row["images_per_second"] > 0
    validated = [row for row in rows(finished) if "eval/top1" in row]
    assert [row["step"] for row in validated] == [4, 8]
    assert all(row["eval/top1"] <= row["eval/top5"] <= 1 for row in validated)
    assert list(finished.glob("events.out.tfevents.*"))
    assert steps_saved(finished) == [4, 8]
    results = json.loads((finished / "eval.json").read_text())
    assert {"step", "split", "count", "top1", "top5"} <= set(results)
    assert (results["split"], results["count"]) == ("test", 3 * 8)
    for name in ("accuracy", "loss", "learning_rate", "augmented"):
        with Image.open(finished / "plots" / f"{name}.png") as picture:
            picture.verify()
    assert "top5" in (finished / "report.html").read_text()
    assert not list(finished.rglob("*.part"))


def test_logged_learning_rate_is_the_schedules(finished: Path) -> None:
    # Decay by 0.94 every int(88 / 8 · 0.2) = 2 steps, in stairs; a row has the rate of its step.
    rates = [row["learning_rate"] for row in rows(finished) if "learning_rate" in row]
    np.testing.assert_allclose(rates, [1e-4 * 0.94 ** (s // 2) for s in range(8)], rtol=1e-6)


def test_images_augmented_once_are_the_same_in_every_epoch(tiny_job: list[str]) -> None:
    setup = create_training_setup(
        main.parse(["main", *tiny_job, "--config.augment.once=True"]).config, Timeline()
    )
    plain = create_training_setup(main.parse(["main", *tiny_job]).config, Timeline())
    count = len(setup.train.labels)
    keys = row_keys(0, AUGMENT, jnp.int32(0), count)
    augmented = jax.jit(plain.augment)(keys, to_float(jnp.array(plain.train.images)))
    stored = setup.train.images
    assert (stored.dtype, stored.shape) == (np.uint8, plain.train.images.shape)
    np.testing.assert_allclose(stored / 255, augmented, atol=0.5 / 255 + 1e-5)
    assert (stored != plain.train.images).any(axis=(1, 2)).all()
    epochs: list[list[bytes]] = [[], []]
    for step, chunk in enumerate(setup.batches.chunks(0, [1] * (2 * count // 8))):
        images, _ = setup.batches.get_batch(chunk.arrays, 0)
        seen = setup.augment(row_keys(0, AUGMENT, jnp.int32(step), 8), to_float(images))
        epochs[step * 8 // count] += [image.tobytes() for image in np.asarray(seen)]
    assert len(set(epochs[0])) == count
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_speed_counts_each_step_once(finished: Path) -> None:
    results = json.loads((finished / "eval.json").read_text())
    rates = [row["images_per_second"] for row in rows(finished) if "images_per_second" in row]
    seconds = [row.get("train/seconds", 0) + row.get("eval/seconds", 0) for row in rows(finished)]
    assert results["images_per_second"] == pytest.approx(np.median(rates), abs=0.05)
    assert results["training_seconds"] == pytest.approx(sum(seconds), abs=0.05)
    for row in rows(finished):
        if "train/seconds" in row:
            assert row["train/seconds"] * row["images_per_second"] == pytest.approx(8)
    assert results["parameters"] == sum(
        a.size for k, a in saved(finished, 8).items() if k.startswith("params")
    )


def test_the_batch_rule_scales_the_learning_rate(tiny_job: list[str]) -> None:
    rule = ["--config.optimizer.batch_rule=sqrt", "--config.optimizer.reference_batch_size=2"]
    setup = create_training_setup(main.parse(["main", *tiny_job, *rule]).config, Timeline())
    assert float(setup.schedule(0)) == pytest.approx(1e-4 * np.sqrt(8 / 2))


def test_the_best_step_is_the_one_that_is_reported(finished: Path) -> None:
    scores = {row["step"]: row["eval/top1"] for row in rows(finished) if "eval/top1" in row}
    results = json.loads((finished / "eval.json").read_text())
    best = max(scores, key=lambda step: (scores[step], step))
    assert (results["step"], results["validation_top1"]) == (best, scores[best])


@pytest.mark.slow
def test_a_validation_score_on_training_writers_is_not_reported(
    train: Train, tiny_job: list[str], tmp_path: Path
) -> None:
    workdir = train(1, "--config.data.train_split=train+validation")
    evaluate_checkpoint(main.parse(["main", *tiny_job]).config, tmp_path, str(workdir))
    for folder in (workdir, tmp_path):
        results = json.loads((folder / "eval.json").read_text())
        assert "top1" in results
        assert "validation_top1" not in results


def test_evaluation_is_that_of_one_image_at_a_time(finished: Path, tiny_job: list[str]) -> None:
    # 24 images in batches of 20 over 4 devices: the last batch is filled up.
    config = main.parse(["main", *tiny_job]).config
    results = json.loads((finished / "eval.json").read_text())
    arrays = ocp.StandardCheckpointer()
    folder = finished / "checkpoints" / str(results["step"])
    model = create_model(
        "mobilenet_v1", num_classes=8, width=0.1, batch_norm_epsilon=1e-3, rngs=nnx.Rngs(0)
    )
    apply, params, batch_stats = split_model(model)
    params = arrays.restore(folder / "params", params)
    batch_stats = arrays.restore(folder / "eval_batch_stats", batch_stats)
    split = load_split("synthetic_8c_12w_3t_cursive100", config.data.data_dir, "test", 32, 2)
    forward = jax.jit(lambda image: apply(params, batch_stats, image)[0])
    images = split.images[:, None, :, :, None].astype(np.float32) / np.float32(255)
    logits = np.concatenate([forward(image) for image in images]).astype(np.float64)
    order = np.argsort(-logits, axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -np.log(probabilities[np.arange(24), split.labels])
    assert results["top1"] == np.mean(order[:, 0] == split.labels)
    assert results["top5"] == np.mean((order[:, :5] == split.labels[:, None]).any(axis=1))
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_numbers_that_are_not_finite_end_the_run(
    tiny_job: list[str], finished: Path, train: Train
) -> None:
    too_fast = "--config.optimizer.learning_rate=1000.0", "--config.optimizer.name=sgd"
    workdir = finished.parent / "not_finite"
    every = "--config.checkpoint.every_steps=1", "--config.checkpoint.keep_latest=99"
    with pytest.raises(
        FloatingPointError, match=r"^step \d+: the loss or its gradient is not finite"
    ):
        train(200, *too_fast, *every, "--config.log_every_steps=3", workdir=workdir)
    found = json.loads((workdir / "non_finite.json").read_text())
    assert found["step"] > 1
    assert steps_saved(workdir)[-1] < found["step"], "nothing poisoned is saved"
    for array in saved(workdir, steps_saved(workdir)[-1]).values():
        assert np.isfinite(array).all()
    # The records are those of the step, by the order that the run is known to have.
    config = main.parse(["main", *tiny_job]).config
    split = create_training_setup(config, Timeline()).train
    wanted = batch_rows(config.seed, found["step"] - 1, 8, len(split.labels))
    assert [(r["source"], r["record"]) for r in found["records"]] == [
        (split.sources[row], split.record_numbers[row]) for row in wanted
    ]
    once = "--config.log_every_steps=8", "--config.eval.every_steps=8"
    skipping = train(8, *too_fast, *once, "--config.skip_non_finite=True")
    assert 0 < rows(skipping)[0]["skipped_batches"] < 8
    assert all(np.isfinite(array).all() for array in saved(skipping, 8).values())


def test_resumed_run_is_bit_for_bit_the_unbroken_one(finished: Path, train: Train) -> None:
    workdir = train(3)
    assert steps_saved(workdir) == [3]
    train(8, workdir=workdir)
    for step in (4, 8):
        assert_same_checkpoint(workdir, finished, step)

    def course(run: Path) -> list[dict[str, float]]:
        late = [row for row in rows(run) if row["step"] > 3]
        return [{k: v for k, v in row.items() if "second" not in k} for row in late]

    assert course(workdir) == course(finished)
    one, other = (json.loads((run / "eval.json").read_text()) for run in (workdir, finished))
    assert one["top1"] == other["top1"] or one["step"] == 3


@pytest.mark.slow
def test_neither_placement_nor_the_ends_of_chunks_change_a_bit(
    finished: Path, train: Train
) -> None:
    long = ("--config.steps_per_execution=3", "--config.log_every_steps=4")
    resident = train(8, *long, "--config.data.placement=device")
    streamed = train(2, *long)
    train(8, *long, workdir=streamed)  # its chunks end elsewhere: at 2, 4, 7, 8 and not 3, 4, 7, 8
    assert_same_checkpoint(streamed, resident, 8)
    means = [row for row in rows(resident) if "train/loss" in row]
    every = [row["train/loss"] for row in rows(finished) if "train/loss" in row]
    assert [row["step"] for row in means] == [4, 8]
    # Another program, so other rounding, which Adam's first steps (the sign of a gradient) amplify.
    assert means[0]["train/loss"] == pytest.approx(np.mean(every[:4]), rel=1e-3)


@pytest.mark.slow
def test_resumed_run_keeps_momentum_and_average_bit_for_bit(train: Train) -> None:
    flags = "--config.optimizer.name=muon", "--config.optimizer.average_decay=0.3"
    unbroken, resumed = train(5, *flags, *EVERY_STEP), train(3, *flags)
    train(5, *flags, workdir=resumed)
    for step in (4, 5):
        assert_same_checkpoint(resumed, unbroken, step)
    # `params` are the average, which is evaluated; the weights being trained are in `progress`.
    checkpoints = [saved(unbroken, step) for step in range(1, 6)]
    names = [name for name in checkpoints[0] if name.startswith("params")]
    for t, (before, after) in enumerate(itertools.pairwise(checkpoints), start=1):
        keep = min(0.3, (t + 1) / (t + 10))
        for name in names:
            moving = after[f"progress['params']{name.removeprefix('params')}"]
            exact = keep * before[name].astype(np.float64) + (1 - keep) * moving
            np.testing.assert_allclose(after[name], exact, atol=1e-6)
            assert before[name].size == 1 or (after[name] != moving).any()


def test_finished_run_is_evaluated_again_without_a_step(finished: Path, train: Train) -> None:
    before = (finished / "metrics.jsonl").read_bytes(), (finished / "eval.json").read_bytes()
    (finished / "eval.json").unlink()
    train(8, workdir=finished)
    assert before == (
        (finished / "metrics.jsonl").read_bytes(),
        (finished / "eval.json").read_bytes(),
    )


def test_sigterm_saves_the_current_step(tiny_job: list[str], tmp_path: Path, train: Train) -> None:
    never = ("--config.eval.every_steps=100000", "--config.checkpoint.every_steps=100000")
    flags = [*tiny_job, *never, "--config.num_steps=100000"]
    assert stop(signal.SIGTERM, flags, tmp_path, lambda: bool(rows(tmp_path))) == 143
    (step,) = steps_saved(tmp_path)
    assert step == rows(tmp_path)[-1]["step"]
    train(step + 2, *never, workdir=tmp_path)
    assert_same_checkpoint(tmp_path, train(step + 2, *never), step + 2)


@pytest.mark.slow
def test_sigkill_costs_only_the_steps_since_the_last_save(
    tiny_job: list[str], tmp_path: Path, train: Train, finished: Path
) -> None:
    # Saving goes on all the time, so a save is likely to be cut short.
    flags = [*tiny_job, *EVERY_STEP]
    assert stop(signal.SIGKILL, flags, tmp_path, lambda: 2 in steps_saved(tmp_path)) == -9
    assert steps_saved(tmp_path)[-1] < 8, "it had ended before the kill"
    train(8, workdir=tmp_path)
    assert_same_checkpoint(tmp_path, finished, 8)
