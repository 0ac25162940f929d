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
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.steps import to_float
from hccr_jax.models.functional import Apply
from hccr_jax.models.packing import Packed
from hccr_jax.runtime import sharding
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.sharding import DATA_AXIS
from hccr_jax.train import losses
from hccr_jax.train.augment import Augment, IsMirrored
from hccr_jax.train.state import TrainState, average_params, average_statistics
from hccr_jax.train.strict_sums import reduce_in_order, stack_microbatches

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
    """Gradients, batch statistics, mean loss and accuracy of a batch."""

    gradients: Packed
    batch_stats: Packed
    loss: jax.Array
    accuracy: jax.Array

    @classmethod
    def of(cls, vector: jax.Array, state: TrainState) -> "Results":
        """Returns the parts of a vector, the sum of those of `loss_and_grads`."""
        params, batch_stats = state.params.layout, state.batch_stats.layout
        ends = [params.size, params.size + batch_stats.size]
        first, second, (loss, accuracy) = jnp.split(vector, ends)
        return cls(Packed(first, params), Packed(second, batch_stats), loss, accuracy)


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
            sums = reduce_in_order(stacked)
        else:
            sums = accumulate(grads_of, batch, num_microbatches)
            sums = reduce(sums, state.params.layout.size, options.reduce_dtype)
        results = Results.of(sums, state)
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
) -> jax.Array:
    """Returns what one microbatch on one device adds to `Results`, as one vector."""
    weight = 1.0 / (lax.axis_size(DATA_AXIS) * num_microbatches)  # of its mean in the batch's
    inputs = augment(batch.augment_keys, to_float(batch.images))[..., None]
    uniform_target = options.is_uniform(batch.augment_keys) if options.is_uniform else None
    teacher_logits = None
    if batch.teacher_logits is not None:
        teacher_logits = batch.teacher_logits.astype(jnp.float32)
    if options.teacher:
        teacher_logits, _ = options.teacher(*teacher_variables, inputs)

    old_stats = state.batch_stats.unpack()

    def loss_fn(params: Any):
        logits, batch_stats = apply(
            params, old_stats, inputs, True, batch.dropout_keys, options.norm_axis, state.params
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

    # Of the arrays, and packed afterwards: the gradient of a slice is a whole vector of zeros.
    (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params.unpack()
    )
    correct = losses.is_correct(logits, batch.labels, uniform_target)
    accuracy = correct.mean(dtype=jnp.float32) * weight
    batch_stats = jax.tree.map(lambda leaf: leaf * weight, batch_stats)
    vector = jnp.concatenate(
        [
            *state.params.layout.parts(gradients),
            *state.batch_stats.layout.parts(batch_stats),
            jnp.stack([loss, accuracy]),
        ]
    )
    # Or XLA puts the parts together again in each kernel that reads them.
    return lax.optimization_barrier(vector)


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


def reduce(sums: jax.Array, num_gradients: int, dtype: Any) -> jax.Array:
    """Returns the sum over devices, in one reduction; in two where gradients have their own dtype.

    Args:
      sums: of a device, from `accumulate`; first the gradients.
      num_gradients: how many.
      dtype: in which gradients are added up.
    """
    if lax.axis_size(DATA_AXIS) == 1:
        return sums  # on a CPU, XLA would copy them
    if dtype == jnp.float32:
        return lax.psum(sums, DATA_AXIS)
    gradients = lax.psum(sums[:num_gradients].astype(dtype), DATA_AXIS).astype(jnp.float32)
    return jnp.concatenate([gradients, lax.psum(sums[num_gradients:], DATA_AXIS)])


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
            state, sums, first_bad = carry
            state, metrics = step(state, *get_batch(arrays, index), *teaching)
            first_bad = jnp.minimum(first_bad, metrics.pop("first_bad"))
            return state, sums + ravel_pytree(metrics)[0], first_bad

        if max_steps == 1:
            return step(state, *get_batch(arrays, 0), *teaching)
        batch = jax.eval_shape(lambda: get_batch(arrays, 0))
        metrics = jax.eval_shape(step, state, *batch, *teaching)[1]
        zeros = {name: jnp.zeros(()) for name in metrics if name != "first_bad"}
        vector, restore = ravel_pytree(zeros)
        carry = state, vector, jnp.int32(NEVER)
        state, sums, first_bad = lax.fori_loop(0, num_steps, one_step, carry)
        return state, restore(sums) | {"first_bad": first_bad}

    return train_chunk
