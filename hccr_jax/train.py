"""The main job: train, evaluate and save."""

import contextlib
import dataclasses
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from hccr_jax import config as config_lib
from hccr_jax import optim, plots, report, sharding
from hccr_jax.augment import make_augment
from hccr_jax.checkpoint import Checkpoints, check_classes
from hccr_jax.config import Steps
from hccr_jax.data.dataset import prepare_strokes
from hccr_jax.data.input_pipeline import gather, process_rows, stream_batches
from hccr_jax.data.order import batch_rows
from hccr_jax.data.splits import Split, load_split
from hccr_jax.errors import InputError
from hccr_jax.evaluate import Evaluation, evaluate
from hccr_jax.metrics import MetricsWriter
from hccr_jax.models.registry import Apply, create_model, split_model, summarize
from hccr_jax.ops import native
from hccr_jax.train_state import AUGMENT, INIT, TrainState, create_train_state, stream_key
from hccr_jax.train_step import (
    Augment,
    make_eval_step,
    make_statistics_step,
    make_train_step,
    row_keys,
    to_float,
)

SIGTERM_EXIT = 143


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains a network, evaluating and saving on the way, and evaluates the best step at the end.

    A workdir that holds a checkpoint is resumed; a finished one is evaluated again. The workdir gets
    config.json, metrics.jsonl, TensorBoard events, checkpoints/, eval.json, plots/ and report.html.

    Args:
      config: passed by `config.check`.
      workdir: made where missing.

    Returns:
      What eval.json holds.

    Raises:
      InputError: the config, the data or the checkpoint does not fit.
      SystemExit: with code 143, stopped by SIGTERM after saving.
    """
    job = _Job.create(config)
    _claim(config, workdir)
    plots_images, plots_labels = gather(job.train, np.arange(0, len(job.train.labels), 997)[:24])
    keys = row_keys(config.seed, AUGMENT, jnp.int32(0), len(plots_images))
    augmented = jax.jit(job.augment)(keys, to_float(jnp.asarray(plots_images)))
    plots.write_augmented_sheet(
        workdir, plots_images, np.asarray(augmented), plots_labels, job.train.classes
    )
    with Checkpoints(
        workdir / "checkpoints", config.checkpoint.keep_latest, config.checkpoint.keep_best
    ) as checkpoints:
        _train(job, workdir, checkpoints)
        step = checkpoints.best_step()
        assert step is not None
        return _report(job, workdir, checkpoints, step)


def evaluate_checkpoint(config: ConfigDict, workdir: Path, checkpoint: str | None) -> dict[str, Any]:
    """Evaluates a run's best checkpoint on the test split.

    Args:
      config: tells the data; the network is the checkpoint's own.
      workdir: gets eval.json, plots/ and report.html.
      checkpoint: folder of checkpoints, or of a run; None for the workdir's own.

    Returns:
      What eval.json holds.

    Raises:
      InputError: there is no checkpoint, or it was trained on another class list.
    """
    folder = Path(checkpoint).expanduser() if checkpoint else workdir
    folder = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; --checkpoint or --workdir must hold checkpoints")
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise InputError(f"{folder}: no checkpoint in this folder")
        about = checkpoints.about(step)
        for key in ("image_px", "margin_px"):
            config.data[key] = about["config"]["data"][key]
        config.model.update(about["config"]["model"])
        job = _Job.create(config)
        workdir.mkdir(parents=True, exist_ok=True)
        return _report(job, workdir, checkpoints, step)


@dataclasses.dataclass(frozen=True)
class _Job:
    """A config made concrete: data, network and functions."""

    config: ConfigDict
    train: Split
    steps: Steps
    mesh: Mesh
    apply: Apply
    augment: Augment
    schedule: Callable[[Any], Any]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    initial: TrainState
    summary: str

    @classmethod
    def create(cls, config: ConfigDict) -> "_Job":
        native.keep_memory()
        mesh = sharding.create_mesh()
        config_lib.check_devices(config, mesh.size)
        train = _load(config, config.data.train_split)
        steps = config_lib.resolve(config, len(train.labels))
        with config.model.unlocked():
            options = dict(config.model)
        name = options.pop("name")
        options.pop("batch_norm_momentum")
        options["dtype"] = _dtype(options["dtype"])
        model = create_model(
            name, num_classes=len(train.classes), rngs=nnx.Rngs(stream_key(config.seed, INIT)), **options
        )
        apply, params, batch_stats = split_model(model)
        schedule = _schedule(config, steps)
        optimizer = optim.make_optimizer(
            config.optimizer.name,
            schedule,
            weight_decay=config.optimizer.weight_decay,
            clip_norm=config.optimizer.clip_norm,
        )
        augment = make_augment(**config.augment)
        train_step = make_train_step(
            apply,
            optimizer,
            augment,
            mesh,
            seed=config.seed,
            label_smoothing=config.loss.label_smoothing,
            batch_norm_momentum=config.model.batch_norm_momentum,
        )
        initial = jax.device_put(
            create_train_state(params, batch_stats, optimizer), sharding.replicated(mesh)
        )
        return cls(
            config,
            train,
            steps,
            mesh,
            apply,
            augment,
            schedule,
            train_step,
            make_eval_step(apply, mesh),
            initial,
            summarize(model, config.data.image_px)[0],
        )

    def items(self, state: TrainState, eval_batch_stats: Any) -> dict[str, Any]:
        """Returns what a checkpoint holds, by name."""
        progress = {
            "step": state.step,
            "batch_stats": state.batch_stats,
            "opt_state": state.opt_state,
        }
        return {"params": state.params, "eval_batch_stats": eval_batch_stats, "progress": progress}


def _train(job: _Job, workdir: Path, checkpoints: Checkpoints) -> None:
    """Runs the steps that are left; the order inside the loop is evaluate, save, then the next batch."""
    config, steps = job.config, job.steps
    state = _restore(job, checkpoints)
    first = int(state.step)
    if first >= steps.total:
        return
    train_step = _compile(job, state)
    validation = _load(config, config.data.validation_split)
    about = {"classes": list(job.train.classes), "config": config.to_dict()}
    batches = stream_batches(
        job.train,
        seed=config.seed,
        batch_size=config.batch_size,
        first_step=first,
        last_step=steps.total,
    )
    pending: list[Any] = []
    with MetricsWriter(workdir, first, steps.total) as writer, _sigterm() as stopped:
        clock = time.monotonic()
        for step, batch in enumerate(batches, first + 1):
            state, metrics = train_step(state, *sharding.put_batch(batch, job.mesh))
            pending.append(metrics)
            is_last = step == steps.total
            if step % config.log_every_steps == 0 or is_last:
                row = _mean(pending)
                seconds = time.monotonic() - clock
                row["images_per_second"] = len(pending) * config.batch_size / seconds
                row["learning_rate"] = float(job.schedule(step - 1))
                writer.write(step, row)
                pending, clock = [], time.monotonic()
            scores, statistics = None, state.batch_stats
            if step % steps.eval_every == 0 or is_last:
                statistics = _fresh_statistics(job, state)
                scores = _validate(job, state, statistics, validation)
                writer.write(step, {f"eval/{name}": value for name, value in scores.items()})
            if scores or step % config.checkpoint.every_steps == 0 or stopped():
                checkpoints.save(step, job.items(state, statistics), about, scores)
                plots.write_curves(workdir)
            if stopped() and not is_last:
                raise SystemExit(SIGTERM_EXIT)
            if scores:
                clock, pending = time.monotonic(), []


def _restore(job: _Job, checkpoints: Checkpoints) -> TrainState:
    """Returns the state of the newest checkpoint, or the initial one."""
    step = checkpoints.latest_step()
    if step is None:
        return job.initial
    check_classes(checkpoints.about(step)["classes"], job.train.classes, checkpoints.folder)
    like = job.items(job.initial, job.initial.batch_stats)
    items = checkpoints.restore(step, like, sharding.replicated(job.mesh))
    print(f"resuming at step {step}")
    return TrainState(params=items["params"], **items["progress"])


def _compile(job: _Job, state: TrainState) -> Callable[..., Any]:
    """Compiles the step ahead of the loop and says what the run is and needs."""
    config, size = job.config, job.config.data.image_px
    images = jax.ShapeDtypeStruct((config.batch_size, size, size), jnp.uint8)
    labels = jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)
    print(job.summary)
    print(
        f"{config.model.name}, {len(job.train.classes):,} classes; {len(job.train.labels):,} images of "
        f"{len(set(job.train.writers)):,} writers; {job.steps.total:,} steps of {config.batch_size} "
        f"({job.steps.per_epoch:,} an epoch) on {job.mesh.size} × {jax.devices()[0].device_kind}"
    )
    start = time.monotonic()
    compiled = job.train_step.lower(state, images, labels).compile()
    memory = compiled.memory_analysis()
    needs = memory.temp_size_in_bytes + memory.argument_size_in_bytes if memory else 0
    print(f"compiled in {time.monotonic() - start:.1f} s; a step needs {needs / 2**20:,.0f} MiB")
    return compiled


def _fresh_statistics(job: _Job, state: TrainState) -> Any:
    """Returns batch-norm statistics to evaluate with: the averages, or taken anew if configured."""
    config = job.config
    if config.eval.batch_norm_batches == 0:
        return state.batch_stats
    statistics_step = _statistics_step(job)
    averages, mine = state.batch_stats, process_rows(config.batch_size)
    for count in range(config.eval.batch_norm_batches):
        rows = batch_rows(config.seed, count, config.batch_size, len(job.train.labels))
        batch = sharding.put_batch(gather(job.train, rows[mine]), job.mesh)
        averages = statistics_step(state.params, averages, batch.images, jnp.int32(count))
    return averages


@functools.cache
def _statistics_step(job: _Job) -> Callable[..., Any]:
    return make_statistics_step(job.apply, job.augment, job.mesh, seed=job.config.seed)


def _validate(job: _Job, state: TrainState, statistics: Any, split: Split) -> dict[str, float]:
    size = job.config.eval.batch_size
    scores = evaluate(job.eval_step, state.params, statistics, split, size, job.mesh).summary()
    return {name: scores[name] for name in ("loss", "top1", "top5")}


def _report(job: _Job, workdir: Path, checkpoints: Checkpoints, step: int) -> dict[str, Any]:
    """Evaluates one step on the test split and writes everything that a person looks at."""
    config = job.config
    about = checkpoints.about(step)
    check_classes(about["classes"], job.train.classes, checkpoints.folder / str(step))
    like = {"params": job.initial.params, "eval_batch_stats": job.initial.batch_stats}
    items = checkpoints.restore(step, like, sharding.replicated(job.mesh))
    split = _load(config, config.data.test_split)
    answers = evaluate(
        job.eval_step,
        items["params"],
        items["eval_batch_stats"],
        split,
        config.eval.batch_size,
        job.mesh,
    )
    results = {"step": step, "split": config.data.test_split, **answers.summary()}
    if validated := checkpoints.metrics(step):
        results["validation_top1"] = validated["top1"]
    if jax.process_index() == 0:
        _write_results(workdir, results, answers, split)
    return results


def _write_results(
    workdir: Path, results: dict[str, Any], answers: Evaluation, split: Split
) -> None:
    (workdir / "eval.json").write_text(json.dumps(results, indent=2) + "\n")
    if answers.candidates.shape[1] == 5:
        plots.write_mistakes(
            workdir, split.images, split.labels, answers.candidates, answers.probabilities, split.classes
        )  # fmt: skip
    plots.write_curves(workdir)
    page = report.write_report(workdir)
    print(
        f"{results['split']}: top-1 {results['top1']:.2%}, top-5 {results['top5']:.2%}, "
        f"{results['count']:,} characters, step {results['step']:,}\nreport: {page}"
    )


def _claim(config: ConfigDict, workdir: Path) -> None:
    """Makes the workdir, or checks that it is a run of this config."""
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            config_lib.check_resume(config, path)
        config_lib.save(config, path)
    except OSError as error:
        raise InputError(f"--workdir={workdir}: cannot be written: {error.strerror}") from error


def _load(config: ConfigDict, split: str) -> Split:
    """Returns a split in normal form, making the embedded data set where it is asked for."""
    data = config.data
    name = data.name
    if name == "strokes":
        name = prepare_strokes(data.data_dir, **data.strokes)
    return load_split(name, data.data_dir, split, data.image_px, data.margin_px)


def _schedule(config: ConfigDict, steps: Steps) -> Callable[[Any], Any]:
    options = config.optimizer
    return optim.make_schedule(
        options.schedule,
        options.learning_rate,
        total_steps=steps.total,
        warmup_steps=steps.warmup,
        decay_rate=options.decay_rate,
        decay_steps=steps.decay,
        staircase=options.staircase,
        end_learning_rate=options.end_learning_rate,
    )


def _dtype(name: str) -> Any:
    """Returns the dtype of the arithmetic; "auto" is bfloat16 where the device computes in it."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Returns the mean of each metric over some steps: the only place where the loop waits."""
    rows = jax.device_get(metrics)
    return {f"train/{name}": float(np.mean([row[name] for row in rows])) for name in rows[0]}


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGTERM has come since."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
