"""The training loop: train or fit, evaluate and save."""

import contextlib
import dataclasses
import functools
import itertools
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
from hccr_jax.inference.pretrained import load_pretrained, set_mqdf_weight
from hccr_jax.inference.steps import to_float
from hccr_jax.report import image_grids, plots
from hccr_jax.runtime import distributed, sharding, signals, watchdog
from hccr_jax.runtime.checkpoints import Checkpoints, find_steps
from hccr_jax.runtime.failpoints import failpoint
from hccr_jax.runtime.rng import AUGMENT, row_keys
from hccr_jax.runtime.run_log import RunLog
from hccr_jax.runtime.sharding import process_rows
from hccr_jax.runtime.startup import Timeline
from hccr_jax.runtime.workdir import check_room, check_writable, find_checkpoints, only_writer
from hccr_jax.train.fit_mqdf import fit_mqdf
from hccr_jax.train.input_pipeline import Chunk, chunk_lengths
from hccr_jax.train.saved_state import checkpoint_items, checkpoint_metadata, restore_state
from hccr_jax.train.setup import TrainingSetup, attach_mqdf, create_training_setup
from hccr_jax.train.state import TrainState, unpack_state
from hccr_jax.train.step_log import StepLog

SHEET_IMAGES = 24
REDRAW_SECONDS = 60  # between drawings of the curves; the end draws them as well
CHECKPOINT_FACTOR = 2  # times a state's size that a save may take: the old step stays until then


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
      The contents of eval.json.

    Raises:
      InputError: the config, the data or the checkpoint does not fit.
      FloatingPointError: the loss is no longer finite; nothing is saved from then on.
      OSError: a checkpoint could not be saved.
      SystemExit: with code 143, stopped by a signal after saving.
    """
    check_writable(workdir)  # what needs no data comes first: normalising them takes minutes
    config_lib.check_devices(config, jax.device_count())
    if (workdir / "config.json").exists():
        config_lib.check_resume(config, workdir / "config.json", jax.device_count())
    with _writing(workdir):
        resumes = _can_resume(workdir / "checkpoints")
        sources = {"teacher.checkpoint": config.teacher.checkpoint}
        if not resumes:
            sources["init_from"] = config.init_from
        for key, path in sources.items():
            if path:
                find_checkpoints(path, f"config.{key}=")
        timeline = timeline or Timeline()
        setup = create_training_setup(config, timeline, resumes)
        if distributed.is_primary():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(setup.initial))
            check_room(workdir, CHECKPOINT_FACTOR * size)
            config_lib.save(config, workdir / "config.json")
        keep = config.checkpoint.keep_latest, config.checkpoint.keep_best
        with watchdog.watching(config.watchdog_seconds):
            with Checkpoints(workdir / "checkpoints", *keep) as checkpoints:
                learn = fit if config.model.name == "mqdf" else train
                learn(setup, workdir, checkpoints, timeline)
            return run_final_evaluation(
                load_pretrained(workdir, config, setup.network), setup.test, workdir
            )


def evaluate_checkpoint(
    config: ConfigDict, workdir: Path, checkpoint: str | None
) -> dict[str, Any]:
    """Evaluates a run's best checkpoint on the test split.

    Args:
      config: for the data. The network and the images' size are the checkpoint's own, but a
        `model.mqdf_weight` above 0 is taken from here, and ensembles a network alone with MQDF.
      workdir: gets eval.json, plots/ and report.html.
      checkpoint: folder of checkpoints, or of a run; None for the workdir's own.

    Returns:
      The contents of eval.json.

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


def train(
    setup: TrainingSetup, workdir: Path, checkpoints: Checkpoints, timeline: Timeline
) -> None:
    """Runs the remaining steps.

    The order inside the loop must not change: log, evaluate, save, only then go on. Logging ends a
    run whose numbers are not finite before they are saved; a step is saved with its scores; and a
    run that is stopped resumes after the very step that it saved.
    """
    config, steps = setup.config, setup.steps
    setup, state = restore_state(setup, checkpoints)
    first_step = step = int(state.step)
    # A run that was stopped during its evaluation has saved the step without the scores.
    lacks_scores = step > 0 and steps.evaluates(step) and not checkpoints.metrics(step)
    if step >= steps.total and not lacks_scores:
        return
    if distributed.is_primary():
        (workdir / "eval.json").unlink(missing_ok=True)  # of a shorter run
    chunks, train_chunk = _prepare(setup, state, timeline)
    with RunLog(workdir, step, steps.total) as writer, signals.saving() as stop_requested:
        should_stop = sharding.make_any_process(stop_requested, setup.network.mesh)
        save = functools.partial(
            evaluate_and_save, setup, workdir, checkpoints, writer, should_stop
        )
        if lacks_scores and not save(step, state, evaluates=True):
            sys.exit(signals.EXIT_CODE)
        log = StepLog(setup, workdir, writer, step)
        watchdog.beat("the first chunk", watchdog.SLOW)
        for chunk in chunks:
            state, metric_sums = train_chunk(
                state, np.int32(chunk.num_steps), chunk.arrays, *setup.teacher_variables
            )
            if step == first_step:
                jax.block_until_ready(metric_sums)
                timeline.lap("first call")
                print(timeline)
                failpoint("after the first step")
                with log.stopped_clock():
                    _write_augmented_sheet(setup, workdir)
            step += chunk.num_steps
            log.add(metric_sums)
            watchdog.beat(f"the steps after {step:,}")
            checkpoints.check()
            stops = should_stop()  # called once: no step may come between saving and stopping
            evaluates = steps.evaluates(step)
            saves = evaluates or stops or step % config.checkpoint.every_steps == 0
            if saves or step % config.log_every_steps == 0:
                failpoint("between steps")
                log.write(step)
            if saves:
                if not save(step, state, evaluates=evaluates and not stops) or stops:
                    sys.exit(signals.EXIT_CODE)
                watchdog.beat(f"the steps after {step:,}")
                log.start_clock()
        checkpoints.wait()


def evaluate_and_save(
    setup: TrainingSetup, workdir: Path, checkpoints: Checkpoints, writer: RunLog,
    should_stop: Callable[[], bool], step: int, state: TrainState, evaluates: bool,
) -> bool:  # fmt: skip
    """Evaluates the state if it is due, saves it, and returns whether the run may go on.

    It may not where it was to stop during the evaluation; the step is then saved without scores.
    """
    watchdog.beat(f"evaluating and saving step {step:,}", watchdog.SLOW)
    state = unpack_state(state)
    start, scores, batch_stats, goes_on = time.monotonic(), None, state.batch_stats, True
    if evaluates:
        failpoint("before an evaluation")
        try:
            batch_stats = _fresh_batch_stats(setup, state)
            failpoint("in an evaluation")
            scores = _validate(setup, state.eval_params, batch_stats, should_stop)
            row = {f"eval/{name}": score for name, score in scores.items()}
            writer.write(step, row | {"eval/seconds": time.monotonic() - start})
        except signals.Stopped:
            goes_on, batch_stats = False, state.batch_stats
    failpoint("before a save")
    items = checkpoint_items(setup, state, batch_stats)
    checkpoints.save(step, items, checkpoint_metadata(setup), scores)
    if distributed.is_primary() and _is_old(workdir / "plots" / "loss.png"):
        plots.write_curves(workdir)
    if not goes_on:
        checkpoints.wait()
    return goes_on


def _is_old(picture: Path) -> bool:
    """Returns whether a plot is worth the second that drawing takes."""
    return not picture.is_file() or time.time() - picture.stat().st_mtime > REDRAW_SECONDS


def _prepare(
    setup: TrainingSetup, state: TrainState, timeline: Timeline
) -> tuple[Iterator[Chunk], Callable[..., Any]]:
    """Returns the remaining chunks, and the compiled training program."""
    config, steps, batches = setup.config, setup.steps, setup.batches
    every = [config.log_every_steps, steps.eval_every, config.checkpoint.every_steps]
    lengths = list(chunk_lengths(int(state.step), steps.total, batches.max_steps, every))
    if not lengths:
        return iter(()), setup.train_chunk
    chunks = batches.chunks(int(state.step), lengths)
    head = next(chunks)
    timeline.lap("first batch")
    failpoint("before compiling")
    train_chunk = _compile(setup, state, head)
    timeline.lap("compile")
    return itertools.chain([head], chunks), train_chunk


def _compile(setup: TrainingSetup, state: TrainState, chunk: Chunk) -> Callable[..., Any]:
    """Compiles the training program ahead of the loop; prints what the run is and needs."""
    config, train, steps = setup.config, setup.train, setup.steps
    print(setup.network.summary)
    print(
        f"{config.model.name}, {len(train.classes):,} classes; "
        f"{len(train.labels):,} images of {len(set(train.writers)):,} writers; "
        f"{steps.total:,} steps of {config.batch_size} ({steps.per_epoch:,} an epoch) on "
        f"{setup.network.mesh.size} × {jax.devices()[0].device_kind}, "
        f"{setup.batches.max_steps} per execution, data: {setup.batches.name}"
    )
    start = time.monotonic()
    compiled = setup.train_chunk.lower(
        state, np.int32(chunk.num_steps), chunk.arrays, *setup.teacher_variables
    ).compile()
    memory = compiled.memory_analysis()
    needs = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    print(f"compiled in {time.monotonic() - start:.1f} s; a step needs {needs / 2**20:,.0f} MiB")
    return compiled


def fit(setup: TrainingSetup, workdir: Path, checkpoints: Checkpoints, timeline: Timeline) -> None:
    """Fits MQDF to the batches of the whole run, evaluates it and saves it as the last step."""
    config, network, total = setup.config, setup.network, setup.steps.total
    if (checkpoints.latest_step() or 0) >= total:
        return
    print(network.summary)
    _write_augmented_sheet(setup, workdir)
    start = time.monotonic()
    params = fit_mqdf(network.params, setup.batches, total, setup.augment, setup.validation)
    seconds = time.monotonic() - start
    timeline.lap("fit")
    print(timeline)
    scores = _validate(setup, params, network.batch_stats)
    row = {f"eval/{name}": score for name, score in scores.items()}
    with RunLog(workdir, 0, total) as writer:
        writer.write(total, {"images_per_second": total * config.batch_size / seconds, **row})
    items = {"params": params, "eval_batch_stats": network.batch_stats}
    checkpoints.save(total, items, checkpoint_metadata(setup), scores)


def _fresh_batch_stats(setup: TrainingSetup, state: TrainState) -> Any:
    """Returns batch-norm statistics to evaluate with: of fresh batches, or the running averages."""
    config = setup.config
    batch_stats, own_rows = state.batch_stats, process_rows(config.batch_size)
    for count in range(config.eval.batch_norm_batches):
        rows = batch_rows(config.seed, count, config.batch_size, len(setup.train.labels))
        batch = sharding.shard_batch(gather(setup.train, rows[own_rows]), setup.network.mesh)
        batch_stats = setup.statistics_step(
            state.eval_params, batch_stats, batch.images, jnp.int32(count), state.seed
        )
    return batch_stats


def _validate(
    setup: TrainingSetup,
    params: Any,
    batch_stats: Any,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Returns the scores on the validation split."""
    network = dataclasses.replace(setup.network, params=params, batch_stats=batch_stats)
    scores = evaluate(network, setup.validation, should_stop).summary()
    return {name: scores[name] for name in ("loss", "top1", "top5")}


def _write_augmented_sheet(setup: TrainingSetup, workdir: Path) -> None:
    """Draws some training images before and after augmentation."""
    if not distributed.is_primary():
        return
    train, seed = setup.train, setup.config.seed
    count = min(SHEET_IMAGES, len(train.labels))
    images, labels = gather(train, batch_rows(seed, 0, count, len(train.labels)))
    keys = row_keys(seed, AUGMENT, jnp.int32(0), count)
    augmented = jax.jit(setup.augment)(keys, to_float(jnp.asarray(images)))
    image_grids.write_augmented_sheet(workdir, images, np.asarray(augmented), labels, train.classes)


def _can_resume(folder: Path) -> bool:
    """Returns whether a folder, which may be missing, holds a step to resume from."""
    if not find_steps(folder):
        return False
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest_step() is not None


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    """Makes a workdir and locks it against other runs; of several processes the primary does."""
    with only_writer(workdir) if distributed.is_primary() else contextlib.nullcontext():
        yield
