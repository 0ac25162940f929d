"""The main job: train or fit, evaluate and save."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax.data.epoch_order import batch_rows
from hccr_jax.data.from_config import load
from hccr_jax.data.splits import gather
from hccr_jax.evaluation.evaluate import evaluate
from hccr_jax.evaluation.final import run_final_evaluation
from hccr_jax.inference.pretrained import find_checkpoints, load_pretrained, set_mqdf_weight
from hccr_jax.inference.steps import to_float
from hccr_jax.report import image_grids, plots
from hccr_jax.runtime import distributed, sharding, signals, watchdog
from hccr_jax.runtime.checkpoints import Checkpoints, check_classes, find_steps
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.runtime.run_log import MetricsWriter
from hccr_jax.runtime.sharding import process_rows
from hccr_jax.runtime.startup import Timeline
from hccr_jax.runtime.workdir import check_room, check_writable, only_writer, replace_text
from hccr_jax.train.fit_mqdf import fit_mqdf
from hccr_jax.train.input_pipeline import Chunk, chunk_lengths
from hccr_jax.train.setup import TrainingSetup, attach_mqdf, create_training_setup
from hccr_jax.train.state import TrainState
from hccr_jax.train.step import NEVER

SHEET_IMAGES = 24
REDRAW_SECONDS = 60  # between drawings of the curves; the end draws them as well
CHECKPOINT_FACTOR = 2  # times a state's size that a save may take: the new step beside the old one


def train_and_evaluate(
    config: ConfigDict, workdir: Path, timeline: Timeline | None = None
) -> dict[str, Any]:
    """Trains a network, evaluating and saving on the way, and evaluates the best step at the end.

    A workdir that holds a checkpoint is resumed; a finished one is evaluated again. The workdir
    gets config.json, metrics.jsonl, TensorBoard events, checkpoints/, eval.json, plots/ and
    report.html.

    Args:
      config: passed by `config.check`.
      workdir: made where missing.
      timeline: of the process so far; printed, with what follows, after the first step.

    Returns:
      What eval.json holds.

    Raises:
      InputError: the config, the data or the checkpoint does not fit.
      FloatingPointError: the loss is no longer finite; nothing is saved from then on.
      OSError: a checkpoint could not be saved.
      SystemExit: with code 143, stopped by a signal after saving.
    """
    check_writable(workdir)  # first what needs no data: their normal form takes minutes
    config_lib.check_devices(config, jax.device_count())
    if (workdir / "config.json").exists():
        config_lib.check_resume(config, workdir / "config.json")
    with _writing(workdir):
        resumes = _can_resume(workdir / "checkpoints")
        starts = {"teacher.checkpoint": config.teacher.checkpoint}
        if not resumes:
            starts["init_from"] = config.init_from
        for key, path in starts.items():
            if path:
                find_checkpoints(path, f"config.{key}=")
        timeline = timeline or Timeline()
        job = create_training_setup(config, timeline, resumes)
        if distributed.is_primary():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(job.initial))
            check_room(workdir, CHECKPOINT_FACTOR * size)
            config_lib.save(config, workdir / "config.json")
        kept = config.checkpoint.keep_latest, config.checkpoint.keep_best
        with watchdog.watching(config.watchdog_seconds):
            with Checkpoints(workdir / "checkpoints", *kept) as checkpoints:
                learn = fit if config.model.name == "mqdf" else train
                learn(job, workdir, checkpoints, timeline)
            return run_final_evaluation(
                load_pretrained(workdir, config, job.network), job.test, workdir
            )


def evaluate_checkpoint(
    config: ConfigDict, workdir: Path, checkpoint: str | None
) -> dict[str, Any]:
    """Evaluates a run's best checkpoint on the test split.

    Args:
      config: tells the data; the network and the images' size are the checkpoint's own, but a
        `model.mqdf_weight` above 0 is taken from here, and adds the classical recogniser where the
        network has none beside it.
      workdir: gets eval.json, plots/ and report.html.
      checkpoint: folder of checkpoints, or of a run; None for the workdir's own.

    Returns:
      What eval.json holds.

    Raises:
      InputError: there is no checkpoint, or it was trained on another class list.
    """
    check_writable(workdir)
    config_lib.check_devices(config, jax.device_count())
    pretrained = load_pretrained(checkpoint or workdir, config)
    weight, own = config.model.mqdf_weight, pretrained.config.model.mqdf_weight
    if weight > 0.0 and own == 0.0:
        pretrained = attach_mqdf(pretrained, weight)
    elif weight not in (0.0, own):
        print(f"{pretrained.source}: MQDF has the weight {weight:g} instead of {own:g}")
        pretrained = set_mqdf_weight(pretrained, weight)
    split = load(pretrained.config, config.data.test_split)
    with _writing(workdir):
        return run_final_evaluation(pretrained, split, workdir)


def train(job: TrainingSetup, workdir: Path, checkpoints: Checkpoints, timeline: Timeline) -> None:
    """Runs the steps that are left; inside the loop: log, evaluate, save, only then go on."""
    config, steps = job.config, job.steps
    state = _restore(job, checkpoints)
    step = int(state.step)
    # A run that was to end while it evaluated has saved its step without the scores.
    owes_scores = step > 0 and steps.evaluates(step) and not checkpoints.metrics(step)
    if step >= steps.total and not owes_scores:
        return
    if distributed.is_primary():
        (workdir / "eval.json").unlink(missing_ok=True)  # it would tell of a shorter run
    calls, train_chunk = _prepare(job, state, timeline)
    pending: list[dict[str, jax.Array]] = []
    with MetricsWriter(workdir, step, steps.total) as writer, signals.saving() as asked:
        leaves = sharding.make_any_process(asked, job.network.mesh)
        keep = functools.partial(_keep, job, workdir, checkpoints, writer, leaves)
        if owes_scores and not keep(step, state, True):
            sys.exit(signals.EXIT_CODE)
        logged, clock, is_first = step, time.monotonic(), True
        watchdog.beat("the first call", watchdog.SLOW)
        for call in calls:
            state, sums = train_chunk(
                state, np.int32(call.num_steps), call.arrays, *job.teacher_variables
            )
            if is_first:
                is_first = False
                jax.block_until_ready(sums)
                timeline.lap("first call")
                print(timeline)
                start = time.monotonic()
                _write_augmented_sheet(job, workdir)
                clock += time.monotonic() - start  # no part of the images a second
            step += call.num_steps
            jax.block_until_ready(pending[-1:])  # the host is one call ahead, no more
            pending.append(sums)
            watchdog.beat(f"the steps after {step:,}")
            checkpoints.check()
            leaving = leaves()  # asked once: between saving and leaving no step may be lost
            evaluates = steps.evaluates(step)
            saves = evaluates or leaving or step % config.checkpoint.every_steps == 0
            if saves or step % config.log_every_steps == 0:
                row = _mean(pending, step - logged)
                _check_finite(job, workdir, row, step)  # before anything is saved
                now = time.monotonic()
                row["images_per_second"] = (step - logged) * config.batch_size / (now - clock)
                row["train/seconds"] = now - clock
                row["learning_rate"] = float(job.schedule(step - 1))
                pending, logged, clock = [], step, now
                writer.write(step, row)
            if saves:
                if not keep(step, state, evaluates and not leaving) or leaving:
                    sys.exit(signals.EXIT_CODE)
                watchdog.beat(f"the steps after {step:,}")
                clock = time.monotonic()
        checkpoints.wait()


def _keep(
    job: TrainingSetup, workdir: Path, checkpoints: Checkpoints, writer: MetricsWriter,
    leaves: Callable[[], bool], step: int, state: TrainState, evaluates: bool,
) -> bool:  # fmt: skip
    """Saves a step, evaluated first where asked for; returns whether the run is to go on."""
    watchdog.beat(f"evaluating and saving step {step:,}", watchdog.SLOW)
    start, scores, statistics = time.monotonic(), None, state.batch_stats
    stays = True
    if evaluates:
        try:
            statistics = _fresh_statistics(job, state)
            scores = _validate(job, state, statistics, leaves)
            row = {f"eval/{name}": score for name, score in scores.items()}
            writer.write(step, row | {"eval/seconds": time.monotonic() - start})
        except signals.Stopped:
            stays, statistics = False, state.batch_stats
    checkpoints.save(step, _items(state, statistics), _about(job), scores)
    if distributed.is_primary() and _is_old(workdir / "plots" / "loss.png"):
        plots.write_curves(workdir)
    if not stays:
        checkpoints.wait()
    return stays


def _is_old(picture: Path) -> bool:
    """Returns whether a plot is worth the second that drawing takes."""
    return not picture.is_file() or time.time() - picture.stat().st_mtime > REDRAW_SECONDS


def _prepare(
    job: TrainingSetup, state: TrainState, timeline: Timeline
) -> tuple[Iterator[Chunk], Callable[..., Any]]:
    """Returns the calls that are left, and the compiled training program."""
    config, steps = job.config, job.steps
    every = [config.log_every_steps, steps.eval_every, config.checkpoint.every_steps]
    lengths = list(chunk_lengths(int(state.step), steps.total, job.batches.max_steps, every))
    if not lengths:
        return iter(()), job.train_chunk
    calls = job.batches.chunks(int(state.step), lengths)
    head = next(calls)
    timeline.lap("first batch")
    train_chunk = _compile(job, state, head)
    timeline.lap("compile")
    return itertools.chain([head], calls), train_chunk


def fit(job: TrainingSetup, workdir: Path, checkpoints: Checkpoints, timeline: Timeline) -> None:
    """Fits the classical recogniser to the batches of the whole run and saves its last step."""
    config, network, total = job.config, job.network, job.steps.total
    if (checkpoints.latest_step() or 0) >= total:
        return
    print(network.summary)
    _write_augmented_sheet(job, workdir)
    start = time.monotonic()
    params = fit_mqdf(network.params, job.batches, total, job.augment, job.validation)
    seconds = time.monotonic() - start
    timeline.lap("fit")
    print(timeline)
    scores = _validate(job, dataclasses.replace(job.initial, params=params), network.batch_stats)
    row = {f"eval/{name}": score for name, score in scores.items()}
    with MetricsWriter(workdir, 0, total) as writer:
        writer.write(total, {"images_per_second": total * config.batch_size / seconds, **row})
    items = {"params": params, "eval_batch_stats": network.batch_stats}
    checkpoints.save(total, items, _about(job), scores)


def _about(job: TrainingSetup) -> dict[str, Any]:
    """Returns what travels with a checkpoint's arrays."""
    return {"classes": list(job.train.classes), "config": job.config.to_dict()}


def _items(state: TrainState, eval_batch_stats: Any) -> dict[str, Any]:
    """Returns what a checkpoint holds, by name."""
    progress = {"step": state.step, "batch_stats": state.batch_stats, "opt_state": state.opt_state}
    if state.average_params is not None:
        progress["params"] = state.params
    items = {"params": state.eval_params, "eval_batch_stats": eval_batch_stats}
    return items | {"progress": progress}


def _restore(job: TrainingSetup, checkpoints: Checkpoints) -> TrainState:
    """Returns the state of the newest checkpoint, or the initial one."""
    step = checkpoints.latest_step()
    if step is None:
        return job.initial
    check_classes(checkpoints.metadata(step)["classes"], job.train.classes, checkpoints.folder)
    like = _items(job.initial, job.initial.batch_stats)
    items = checkpoints.restore(step, like, sharding.replicated(job.network.mesh))
    print(f"resuming at step {step}")
    if job.initial.average_params is None:
        params = {"params": items["params"]}
    else:
        params = {"average_params": items["params"]}
    return TrainState(seed=job.initial.seed, **params, **items["progress"])


def _compile(job: TrainingSetup, state: TrainState, call: Chunk) -> Callable[..., Any]:
    """Compiles the training program ahead of the loop and says what the run is and needs."""
    config = job.config
    print(job.network.summary)
    print(
        f"{config.model.name}, {len(job.train.classes):,} classes; "
        f"{len(job.train.labels):,} images of {len(set(job.train.writers)):,} writers; "
        f"{job.steps.total:,} steps of {config.batch_size} ({job.steps.per_epoch:,} an epoch) on "
        f"{job.network.mesh.size} × {jax.devices()[0].device_kind}, "
        f"{job.batches.max_steps} a call, data: {job.batches.name}"
    )
    start = time.monotonic()
    compiled = job.train_chunk.lower(
        state, np.int32(call.num_steps), call.arrays, *job.teacher_variables
    ).compile()
    memory = compiled.memory_analysis()
    needs = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    print(f"compiled in {time.monotonic() - start:.1f} s; a step needs {needs / 2**20:,.0f} MiB")
    return compiled


def _fresh_statistics(job: TrainingSetup, state: TrainState) -> Any:
    """Returns batch-norm statistics to evaluate with: taken anew, or the running averages."""
    config = job.config
    averages, mine = state.batch_stats, process_rows(config.batch_size)
    for count in range(config.eval.batch_norm_batches):
        rows = batch_rows(config.seed, count, config.batch_size, len(job.train.labels))
        batch = sharding.shard_batch(gather(job.train, rows[mine]), job.network.mesh)
        averages = job.statistics_step(
            state.eval_params, averages, batch.images, jnp.int32(count), state.seed
        )
    return averages


def _validate(
    job: TrainingSetup,
    state: TrainState,
    statistics: Any,
    leaves: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    size, network = job.network.eval_batch_size, job.network
    answers = evaluate(
        network.eval_step, state.eval_params, statistics, job.validation, size, network.mesh, leaves
    )
    scores = answers.summary()
    return {name: scores[name] for name in ("loss", "top1", "top5")}


def _write_augmented_sheet(job: TrainingSetup, workdir: Path) -> None:
    """Draws some training images before and after augmentation."""
    if not distributed.is_primary():
        return
    count = min(SHEET_IMAGES, len(job.train.labels))
    images, labels = gather(job.train, batch_rows(job.config.seed, 0, count, len(job.train.labels)))
    keys = row_keys(job.config.seed, AUGMENT, jnp.int32(0), count)
    augmented = jax.jit(job.augment)(keys, to_float(jnp.asarray(images)))
    image_grids.write_augmented_sheet(
        workdir, images, np.asarray(augmented), labels, job.train.classes
    )


def _can_resume(folder: Path) -> bool:
    """Returns whether a folder, which may be missing, holds a step to go on from."""
    if not find_steps(folder):
        return False
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest_step() is not None


def _mean(sums: list[dict[str, jax.Array]], num_steps: int) -> dict[str, float]:
    """Returns the mean of each metric over those of some steps that counted, and what was not so.

    Args:
      sums: of each call, see `train_step.make_train_chunk`.
      num_steps: of all of them.
    """
    rows = jax.device_get(sums)
    counted = num_steps - sum(float(row["skipped"]) for row in rows)
    means = {
        f"train/{name}": sum(float(row[name]) for row in rows) / max(counted, 1.0)
        for name in ("loss", "accuracy", "gradient_norm")
    }
    first_bad = min(int(row["first_bad"]) for row in rows)
    return means | (
        {"skipped_batches": num_steps - counted, "first_bad": first_bad}
        if first_bad < NEVER
        else {}
    )


def _check_finite(job: TrainingSetup, workdir: Path, row: dict[str, float], step: int) -> None:
    """Checks that the numbers of all steps since the last row were finite, or may be passed over.

    Args:
      row: from `_mean`; loses what is not to be logged.
      step: that the run is at.

    Raises:
      FloatingPointError: names the step; its records stand in workdir/non_finite.json.
    """
    if "first_bad" not in row:
        return
    bad = int(row.pop("first_bad"))
    if distributed.is_primary():
        split, config = job.train, job.config
        rows = batch_rows(config.seed, bad, config.batch_size, len(split.labels))
        records = [
            {
                "character": split.classes[split.labels[row]],
                "writer": str(split.writers[row]),
                "source": str(split.sources[row]),
                "record": int(split.record_numbers[row]),
            }
            for row in rows
        ]
        text = json.dumps({"step": bad + 1, "records": records}, ensure_ascii=False, indent=1)
        replace_text(workdir / "non_finite.json", text + "\n")
    if job.config.skip_non_finite and any(row[key] for key in row if key != "skipped_batches"):
        return
    raise FloatingPointError(
        f"step {bad + 1:,}: the loss or its gradient is not finite (found at step {step:,}; the "
        f"step's records: {workdir / 'non_finite.json'}); nothing is saved from there on: resume "
        f"with a lower learning rate, --config.optimizer.clip_norm=1 or "
        f"--config.skip_non_finite=True"
    )


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    """Makes a workdir and holds it against other runs; among several processes the first does."""
    with only_writer(workdir) if distributed.is_primary() else contextlib.nullcontext():
        yield
