"""The main job in small: it writes what it promises, and a stopped run goes on as if it had not."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image

from hccr_jax import main
from hccr_jax.data.splits import load_split
from hccr_jax.job import create_job
from hccr_jax.metrics import MetricsWriter
from hccr_jax.models.registry import create_model, split_model
from hccr_jax.startup import Timeline
from hccr_jax.train import evaluate_checkpoint, train_and_evaluate
from hccr_jax.train_state import AUGMENT
from hccr_jax.train_step import row_keys, to_float

ROOT = Path(__file__).parents[1]
EVERY_STEP = ["--config.checkpoint.every_steps=1", "--config.checkpoint.keep_latest=99"]

# ml_collections loads a config file in a way that Python 3.12 drops.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def train(tiny_job: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Returns a function that runs the tiny job to some step in this process, without a stop."""

    def run(num_steps: int, *flags: str, workdir: Path | None = None) -> Path:
        workdir = workdir or tmp_path_factory.mktemp("run")
        flags = (f"--config.num_steps={num_steps}", *flags)
        train_and_evaluate(main.parse(["main", *tiny_job, *flags]).config, workdir)
        return workdir

    return run


@pytest.fixture(scope="session")
def finished(train: Train) -> Path:
    """Returns the workdir of a run of 8 steps that nothing stopped."""
    return train(8)


def start(flags: list[str], workdir: Path, *more: str) -> subprocess.Popen:
    """Starts the job in a process of its own, on as many devices as this one has."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    command = [sys.executable, "-m", "hccr_jax.main", *flags, f"--workdir={workdir}", *more]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def rows(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_saved(workdir: Path) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def saved(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Returns every array of a checkpoint by its path, read without this package."""
    arrays = {}
    for item in ("params", "eval_batch_stats", "progress"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same_checkpoint(one: Path, other: Path, step: int) -> None:
    first, second = saved(one, step), saved(other, step)
    assert set(first) == set(second)
    assert first["progress['step']"] == step
    different = [name for name in first if first[name].tobytes() != second[name].tobytes()]
    assert different == []


def test_workdir_holds_what_was_promised(finished: Path) -> None:
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
    # Decay by 0.94 every int(88 / 8 · 0.2) = 2 steps, in stairs; a row tells the rate of its step.
    rates = [row["learning_rate"] for row in rows(finished) if "learning_rate" in row]
    np.testing.assert_allclose(rates, [1e-3 * 0.94 ** (s // 2) for s in range(8)], rtol=1e-6)


def test_what_is_augmented_once_looks_the_same_in_every_epoch(tiny_job: list[str]) -> None:
    job = create_job(
        main.parse(["main", *tiny_job, "--config.augment.once=True"]).config, Timeline()
    )
    plain = create_job(main.parse(["main", *tiny_job]).config, Timeline())
    count = len(job.train.labels)
    keys = row_keys(0, AUGMENT, jnp.int32(0), count)
    augmented = jax.jit(plain.augment)(keys, to_float(jnp.array(plain.train.images)))
    stored = job.train.images
    assert (stored.dtype, stored.shape) == (np.uint8, plain.train.images.shape)
    np.testing.assert_allclose(stored / 255, augmented, atol=0.5 / 255 + 1e-5)
    assert (stored != plain.train.images).any(axis=(1, 2)).all()
    epochs: list[list[bytes]] = [[], []]
    for step, call in enumerate(job.feed.calls(0, [1] * (2 * count // 8))):
        images, _ = job.feed.pick(call.arrays, 0)
        seen = job.augment(row_keys(0, AUGMENT, jnp.int32(step), 8), to_float(images))
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
    job = create_job(main.parse(["main", *tiny_job, *rule]).config, Timeline())
    assert float(job.schedule(0)) == pytest.approx(1e-3 * np.sqrt(8 / 2))


def test_the_best_step_is_the_one_that_is_reported(finished: Path) -> None:
    scores = {row["step"]: row["eval/top1"] for row in rows(finished) if "eval/top1" in row}
    results = json.loads((finished / "eval.json").read_text())
    best = max(scores, key=lambda step: (scores[step], step))
    assert (results["step"], results["validation_top1"]) == (best, scores[best])


def test_a_validation_score_on_writers_that_were_learnt_is_not_reported(
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
    split = load_split("strokes_8c_12w_3t_100h", config.data.data_dir, "test", 32, 2)
    forward = jax.jit(lambda image: apply(params, batch_stats, image)[0])
    images = split.images[:, None, :, :, None].astype(np.float32) / np.float32(255)
    logits = np.concatenate([forward(image) for image in images]).astype(np.float64)
    order = np.argsort(-logits, axis=1)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    losses = -np.log(probabilities[np.arange(24), split.labels])
    assert results["top1"] == np.mean(order[:, 0] == split.labels)
    assert results["top5"] == np.mean((order[:, :5] == split.labels[:, None]).any(axis=1))
    assert results["loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, first_step=0, total_steps=9) as writer:
        writer.write(2, {"train/loss": 0.5})
        with pytest.raises(FloatingPointError, match="the loss is nan at step 3"):
            writer.write(3, {"train/loss": math.nan})
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]


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


def test_neither_placement_nor_the_ends_of_calls_change_a_bit(finished: Path, train: Train) -> None:
    long = ("--config.steps_per_call=3", "--config.log_every_steps=4")
    resident = train(8, *long, "--config.data.placement=device")
    streamed = train(2, *long)
    train(8, *long, workdir=streamed)  # its calls end elsewhere: at 2, 4, 7, 8 and not 3, 4, 7, 8
    assert_same_checkpoint(streamed, resident, 8)
    means = [row for row in rows(resident) if "train/loss" in row]
    every = [row["train/loss"] for row in rows(finished) if "train/loss" in row]
    assert [row["step"] for row in means] == [4, 8]
    # Another program, so other rounding, which Adam's first steps (the sign of a gradient) amplify.
    assert means[0]["train/loss"] == pytest.approx(np.mean(every[:4]), rel=1e-3)


def test_resumed_run_keeps_its_average_bit_for_bit(train: Train) -> None:
    flag = "--config.optimizer.average_decay=0.3"
    unbroken, resumed = train(5, flag, *EVERY_STEP), train(3, flag)
    train(5, flag, workdir=resumed)
    for step in (4, 5):
        assert_same_checkpoint(resumed, unbroken, step)
    # What is evaluated and handed on is the average; the weights that move on are kept beside it.
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


def stop(number: signal.Signals, flags: list[str], workdir: Path, ready: Callable[[], bool]) -> int:
    """Starts a run, sends it a signal once it is ready, and returns its exit code."""
    process = start(flags, workdir)
    try:
        wait_for(process, ready)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode


def test_sigterm_saves_the_current_step(tiny_job: list[str], tmp_path: Path, train: Train) -> None:
    never = ("--config.eval.every_steps=100000", "--config.checkpoint.every_steps=100000")
    flags = [*tiny_job, *never, "--config.num_steps=100000"]
    assert stop(signal.SIGTERM, flags, tmp_path, lambda: bool(rows(tmp_path))) == 143
    (step,) = steps_saved(tmp_path)
    assert step == rows(tmp_path)[-1]["step"]
    train(step + 2, *never, workdir=tmp_path)
    assert_same_checkpoint(tmp_path, train(step + 2, *never), step + 2)


def test_sigkill_costs_only_the_steps_since_the_last_save(
    tiny_job: list[str], tmp_path: Path, train: Train, finished: Path
) -> None:
    # Saving goes on all the time, so a save is likely to be cut short.
    flags = [*tiny_job, *EVERY_STEP]
    assert stop(signal.SIGKILL, flags, tmp_path, lambda: 2 in steps_saved(tmp_path)) == -9
    assert steps_saved(tmp_path)[-1] < 8, "it had ended before the kill"
    train(8, workdir=tmp_path)
    assert_same_checkpoint(tmp_path, finished, 8)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", np.linspace(0, 1.4, 8))
def test_sigkill_at_any_moment(
    tiny_job: list[str], tmp_path: Path, train: Train, delay_s: float
) -> None:
    def ready() -> bool:
        if 2 not in steps_saved(tmp_path):
            return False
        time.sleep(delay_s)
        return True

    stop(signal.SIGKILL, [*tiny_job, *EVERY_STEP, "--config.num_steps=999"], tmp_path, ready)
    end = steps_saved(tmp_path)[-1] + 2
    train(end, workdir=tmp_path)
    assert_same_checkpoint(tmp_path, train(end), end)
