"""The training step, and several of them in one compiled call.

A step is: `loss_and_grads` of each microbatch, `accumulate` over the microbatches of a device,
`reduce` over devices, `apply_update`, `guard_finite`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.steps import to_float
from hccr_jax.models.functional import Apply
from hccr_jax.runtime import sharding
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.sharding import DATA_AXIS
from hccr_jax.train import losses
from hccr_jax.train.augment import Augment, IsMirrored
from hccr_jax.train.state import TrainState, average_params, average_statistics

NEVER = 2**31 - 1

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a training step computes; without arguments, the plainest one.

    Attributes:
      label_smoothing, noise_rate, teacher_weight, teacher_temperature: see `losses.training_loss`.
      batch_norm_momentum, batch_norm_ramp: see `state.average_statistics`.
      global_batch_norm: statistics of the whole batch; False: of each device's rows alone, which
        needs no communication inside the network and depends on the number of devices.
      accumulation_steps: M, microbatches computed one after the other, so that only one needs
        memory at a time; microbatch m is rows m, m + M, m + 2M, … on any number of devices. The
        gradient is that of the whole batch's mean loss, but batch norm sees one microbatch.
      reduce_dtype: in which devices add up their gradients.
      strict_shards: N above 0: the same bits on any number of devices that divides N, since the
        batch is computed in N · M microbatches, each with batch-norm statistics of its own, whose
        results are added up in order.
      average_decay: of the moving average of the parameters, where the state has one.
      teacher: a trained network, applied to the same augmented images.
      has_teacher_logits: a teacher's logits, computed beforehand, come with the labels.
      is_uniform: maps the augmentation's keys (B,) to bool (B,), which images have a uniform target
        because they are no character at all.
    """

    label_smoothing: float = 0.0
    noise_rate: float = 0.0
    teacher_weight: float = 0.5
    teacher_temperature: float = 1.0
    batch_norm_momentum: float = 0.9997
    batch_norm_ramp: bool = True
    global_batch_norm: bool = True
    accumulation_steps: int = 1
    reduce_dtype: Any = jnp.float32
    strict_shards: int = 0
    average_decay: float = 0.0
    teacher: Apply | None = None
    has_teacher_logits: bool = False
    is_uniform: IsMirrored | None = None

    @property
    def norm_axis(self) -> str | None:
        """The mesh axis over which batch norm takes its statistics; None: each microbatch alone."""
        return DATA_AXIS if self.global_batch_norm and not self.strict_shards else None


class Batch(NamedTuple):
    """Rows of a batch: images uint8 (B, S, S), labels (B,), keys (B,), logits (B, K) or None."""

    images: jax.Array
    labels: jax.Array
    augment_keys: jax.Array
    dropout_keys: jax.Array
    teacher_logits: jax.Array | None = None


class Results(NamedTuple):
    """Gradients, mean loss, accuracy and batch statistics, or a microbatch's addends of them."""

    gradients: Any
    loss: jax.Array
    accuracy: jax.Array
    batch_stats: Any


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    augment: Augment,
    mesh: Mesh,
    options: StepOptions = StepOptions(),
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted training step.

    Args:
      apply: the network, from `functional.split_model`.
      optimizer: from `optim.make_optimizer`.
      augment: from `augment.make_augment`.
      mesh: from `sharding.create_mesh`.
      options: see there.

    Returns:
      step(state, images uint8 (B, S, S), labels int32 (B,)) -> (state, metrics), B split over the
      devices and the old state donated; a fourth argument is the teacher's (params, batch_stats),
      or its logits (B, K) where it `has_teacher_logits`. Augmentation and dropout are functions of
      the state's seed and step and of the row. Metrics: see `guard_finite`.
    """

    def local_step(state: TrainState, teacher_variables: Any, batch: Batch):
        num_shards = options.strict_shards // lax.axis_size(DATA_AXIS) or 1  # on this device
        num_microbatches = num_shards * options.accumulation_steps
        grads_of = functools.partial(
            loss_and_grads, apply, augment, options, num_microbatches, state, teacher_variables
        )  # fmt: skip
        if options.strict_shards:
            stacked = stack_microbatches(grads_of, batch, num_microbatches, state.step)
            results = reduce_in_order(stacked)
        else:
            results = reduce(accumulate(grads_of, batch, num_microbatches), options)
        new = apply_update(optimizer, options, state, results)
        return guard_finite(state, new, results)

    replicated, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded_step = jax.shard_map(
        local_step, mesh=mesh, in_specs=(replicated, replicated, rows), out_specs=replicated,
        check_vma=False,
    )  # fmt: skip

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array, *teaching: Any):
        keys = (row_keys(state.seed, s, state.step, len(images)) for s in (AUGMENT, DROPOUT))
        batch = Batch(images, labels, *keys, *teaching[: int(options.has_teacher_logits)])
        return sharded_step(state, teaching[0] if options.teacher else (), batch)

    on_all, by_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    teaching = (by_rows,) * options.has_teacher_logits + (on_all,) * (options.teacher is not None)
    return jax.jit(
        train_step, in_shardings=(on_all, by_rows, by_rows, *teaching),
        out_shardings=(on_all, on_all), donate_argnums=0,
    )  # fmt: skip


def loss_and_grads(
    apply: Apply,
    augment: Augment,
    options: StepOptions,
    num_microbatches: int,
    state: TrainState,
    teacher_variables: Any,
    batch: Batch,
) -> Results:
    """Returns what one microbatch on one device adds to the results of the whole batch."""
    weight = 1.0 / (lax.axis_size(DATA_AXIS) * num_microbatches)  # of its mean in the batch's
    inputs = augment(batch.augment_keys, to_float(batch.images))[..., None]
    uniform_target = options.is_uniform(batch.augment_keys) if options.is_uniform else None
    teacher_logits = None
    if batch.teacher_logits is not None:
        teacher_logits = batch.teacher_logits.astype(jnp.float32)
    if options.teacher:
        teacher_logits, _ = options.teacher(*teacher_variables, inputs)

    def loss_fn(params: Any):
        logits, batch_stats = apply(
            params, state.batch_stats, inputs, True, batch.dropout_keys, options.norm_axis
        )
        row_losses = losses.training_loss(
            logits,
            batch.labels,
            label_smoothing=options.label_smoothing,
            noise_rate=options.noise_rate,
            uniform_target=uniform_target,
            teacher_logits=teacher_logits,
            teacher_weight=options.teacher_weight,
            teacher_temperature=options.teacher_temperature,
        )
        return row_losses.mean() * weight, (logits, batch_stats)

    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params
    )
    correct = losses.is_correct(logits, batch.labels, uniform_target)
    accuracy = correct.mean(dtype=jnp.float32) * weight
    # Global statistics are the same on all devices, others are added up like gradients.
    stats_weight = 1.0 / num_microbatches if options.norm_axis else weight
    batch_stats = jax.tree.map(lambda leaf: leaf * stats_weight, batch_stats)
    return Results(gradients, loss, accuracy, batch_stats)


def accumulate(compute: Callable[[Any], Any], batch: Any, num_microbatches: int) -> Any:
    """Returns the sum of a device's microbatches, computed one after the other.

    Args:
      compute: maps the rows of a microbatch to a pytree.
      batch: a pytree of arrays (B, …); microbatch m is rows m, m + num_microbatches, ….
    """

    def one(index: Any) -> Any:
        return compute(
            jax.tree.map(lambda a: a.reshape(-1, num_microbatches, *a.shape[1:])[:, index], batch)
        )

    if num_microbatches == 1:
        return one(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, 0))
    return lax.fori_loop(
        0, num_microbatches, lambda index, sums: jax.tree.map(jnp.add, sums, one(index)), zeros
    )


def reduce(results: Results, options: StepOptions) -> Results:
    """Returns the sum over devices."""
    gradients, loss, accuracy, batch_stats = results
    gradients = jax.tree.map(lambda leaf: leaf.astype(options.reduce_dtype), gradients)
    gradients, loss, accuracy = lax.psum((gradients, loss, accuracy), DATA_AXIS)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
    if not options.norm_axis:
        batch_stats = lax.psum(batch_stats, DATA_AXIS)
    return Results(gradients, loss, accuracy, batch_stats)


def stack_microbatches(
    compute: Callable[[Any], Any], batch: Any, num_microbatches: int, step: jax.Array
) -> Any:
    """Returns the results of a device's microbatches, one after the other, along a new first axis.

    Args:
      compute, num_microbatches: as for `accumulate`.
      batch: a pytree of arrays (B, …); a microbatch is consecutive rows.
      step: int scalar, not negative.
    """

    def one(index: Any) -> Any:
        return compute(
            jax.tree.map(lambda a: a.reshape(num_microbatches, -1, *a.shape[1:])[index], batch)
        )

    empty = jax.tree.map(
        lambda x: jnp.zeros((num_microbatches, *x.shape), x.dtype), jax.eval_shape(one, 0)
    )
    # The compiler cannot know this number, so that it compiles the same loop for any.
    count = jnp.where(step < 0, 0, num_microbatches)
    return lax.fori_loop(
        0,
        count,
        lambda index, stack: jax.tree.map(lambda a, x: a.at[index].set(x), stack, one(index)),
        empty,
    )


def reduce_in_order(stacked: Any) -> Any:
    """Returns the sum of all devices' microbatches, added in their order, whatever their layout."""
    stacked = lax.all_gather(stacked, DATA_AXIS, tiled=True)
    sums = jax.tree.map(lambda leaf: functools.reduce(jnp.add, list(leaf)), stacked)
    return lax.optimization_barrier(sums)


def apply_update(
    optimizer: optax.GradientTransformation,
    options: StepOptions,
    state: TrainState,
    results: Results,
) -> TrainState:
    """Returns the state with new parameters and averages, its step as it was."""
    batch_stats = average_statistics(
        state.batch_stats, results.batch_stats, state.step,
        options.batch_norm_momentum, options.batch_norm_ramp,
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes int steps and float rates
        updates, opt_state = optimizer.update(results.gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    average = state.average_params
    if average is not None:
        average = average_params(average, params, state.step, options.average_decay)
    return TrainState(state.step, state.seed, params, batch_stats, opt_state, average)


def guard_finite(old: TrainState, new: TrainState, results: Results) -> tuple[TrainState, Metrics]:
    """Returns the state after the step, and its metrics.

    Metrics are scalars: mean `loss`, `accuracy` and `gradient_norm` of the batch. Where one of
    these is not finite, the state stays as it was but for its step, all three are 0, `skipped` is 1
    instead of 0, and `first_bad` is the step instead of NEVER.
    """
    norm = optax.tree.norm(results.gradients)
    is_good = jnp.isfinite(results.loss) & jnp.isfinite(norm)
    state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, old)
    metrics = {"loss": results.loss, "accuracy": results.accuracy, "gradient_norm": norm}
    metrics = {name: jnp.where(is_good, value, 0.0) for name, value in metrics.items()}
    metrics["skipped"] = 1.0 - is_good.astype(jnp.float32)
    metrics["first_bad"] = jnp.where(is_good, NEVER, old.step)
    return dataclasses.replace(state, step=old.step + 1), metrics


def make_train_chunk(
    step: Callable[..., Any], get_batch: Callable[..., Any], max_steps: int
) -> Callable[..., Any]:
    """Returns the jitted function that runs several training steps in one call.

    Args:
      step: from `make_train_step`.
      get_batch: finds a step's batch in the arrays of a chunk, see `input_pipeline.BatchSource`.
      max_steps: most steps of a chunk; 1 compiles to the bare step, without a loop.

    Returns:
      train_chunk(state, num_steps, arrays, *teaching) -> (state, sums of the steps' metrics, but
      the smallest first_bad), 1 ≤ num_steps ≤ max_steps, the old state donated, `teaching` as the
      step has it. One program for any number of steps, so that a run's bits do not depend on where
      it was stopped and resumed.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(
        state: TrainState, num_steps: jax.Array, arrays: tuple[jax.Array, ...], *teaching: Any
    ):
        def one_step(index, carry):
            state, sums = carry
            state, metrics = step(state, *get_batch(arrays, index), *teaching)
            first_bad = jnp.minimum(sums["first_bad"], metrics["first_bad"])
            sums = jax.tree.map(jnp.add, sums, metrics)
            return state, sums | {"first_bad": first_bad}

        if max_steps == 1:
            return step(state, *get_batch(arrays, 0), *teaching)
        batch = jax.eval_shape(lambda: get_batch(arrays, 0))
        metrics = jax.eval_shape(step, state, *batch, *teaching)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
        zeros["first_bad"] = jnp.int32(NEVER)
        return lax.fori_loop(0, num_steps, one_step, (state, zeros))

    return train_chunk
