"""Pure, compiled step functions: training, evaluation, statistics."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.steps import to_float
from hccr_jax.models.registry import Apply
from hccr_jax.runtime import sharding
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.sharding import DATA_AXIS
from hccr_jax.train import losses
from hccr_jax.train.augment import IsMirrored
from hccr_jax.train.state import TrainState

NEVER = 2**31 - 1

Augment = Callable[[jax.Array, jax.Array], jax.Array]  # keys (B,), images (B, S, S) → (B, S, S)
Metrics = dict[str, jax.Array]


def average_statistics(
    averages: Any, batch: Any, step: jax.Array, momentum: float, ramp: bool = True
) -> Any:
    """Returns running averages of the batch statistics after one more batch.

    The weight of the past is min(momentum, t / (t + 9)) at step t: zero at first, so the averages
    are those of the first batch and never biased towards their initial values; then the last tenth
    or so of the run, so early statistics are forgotten as the weights change; at last `momentum`. A
    plain average with the paper's 0.9997 would need some 10,000 steps to forget its start.

    Args:
      averages, batch: pytrees of equal structure.
      step: int scalar, batches averaged so far.
      momentum: the final weight of the past.
      ramp: False for a plain average, whose past weighs `momentum` from the first step on.
    """
    t = step.astype(jnp.float32)
    keep = jnp.minimum(momentum, t / (t + 9.0)) if ramp else jnp.float32(momentum)
    # In this form no digit is lost where old and new agree, nor where keep is 0.
    return jax.tree.map(lambda old, new: new + (old - new) * keep, averages, batch)


def average_params(averages: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """Returns the moving average of the parameters after one more step.

    The weight of the past is min(decay, (t + 1) / (t + 10)) at step t, so that the initial weights
    are soon forgotten.
    """
    t = step.astype(jnp.float32)
    keep = jnp.minimum(decay, (t + 1.0) / (t + 10.0))
    return jax.tree.map(lambda old, new: new + (old - new) * keep, averages, params)


def make_train_step(
    apply: Apply,
    optimizer: optax.GradientTransformation,
    augment: Augment,
    mesh: Mesh,
    *,
    batch_norm_momentum: float = 0.9997,
    batch_norm_ramp: bool = True,
    global_batch_norm: bool = True,
    accumulation_steps: int = 1,
    reduce_dtype: Any = jnp.float32,
    strict_shards: int = 0,
    average_decay: float = 0.0,
    teacher: Apply | None = None,
    has_answers: bool = False,
    is_uniform: IsMirrored | None = None,
    **loss: float,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns the jitted training step.

    Args:
      apply: the network, from `registry.split_model`.
      optimizer: from `optim.make_optimizer`.
      augment: from `augment.make_augment`.
      mesh: from `sharding.create_mesh`.
      batch_norm_momentum, batch_norm_ramp: see `average_statistics`.
      global_batch_norm: statistics of the whole batch; False: of each device's rows alone, which
        needs no communication inside the network and depends on the number of devices.
      accumulation_steps: M, parts of the batch that are computed one after the other, so that only
        one needs memory at a time; part m is rows m, m + M, m + 2M, … on any number of devices.
        The gradient is that of the whole batch's mean loss, but batch norm sees one part at a time.
      reduce_dtype: in which devices add up their gradients.
      strict_shards: N above 0: the same bits on any number of devices that divides N, since the
        batch goes through in N · M parts, each with batch-norm statistics of its own, and their
        results are added up in order.
      average_decay: of the moving average of the parameters, where the state has one.
      teacher: a trained network whose answers to the same augmented images are learnt as well.
      has_answers: a teacher's answers come with the labels.
      is_uniform: tells by the augmentation's keys (B,) which images, bool (B,), are to be taken for
        no character at all.
      **loss: numbers that `losses.training_loss` takes.

    Returns:
      step(state, images uint8 (B, S, S), labels int32 (B,)) -> (state, metrics), B split over the
      devices and the old state given up; with a teacher its (params, batch_stats) are a fourth
      argument, or its logits (B, K) where it has answered before. Augmentation and dropout are
      functions of the state's seed and step and of the row. Metrics are scalars: mean `loss`,
      `accuracy` and `gradient_norm` of the batch.
      Where one of these is not finite, the state stays as it was but for its step, all three
      are 0, `skipped` is 1 instead of 0, and `first_bad` is the step instead of NEVER.
    """
    norm_axis = DATA_AXIS if global_batch_norm and not strict_shards else None

    def local_step(state, teacher_variables, *rows):
        num_devices = lax.axis_size(DATA_AXIS)
        num_parts = (strict_shards // num_devices or 1) * accumulation_steps
        share = 1.0 / (num_devices * num_parts)

        def part(index):
            """Returns a part's share of gradients, metrics and batch statistics on this device."""
            images, labels, augment_keys, dropout_keys, *answers = (
                array.reshape(num_parts, -1, *array.shape[1:])[index]
                if strict_shards
                else array.reshape(-1, num_parts, *array.shape[1:])[:, index]
                for array in rows
            )
            inputs = augment(augment_keys, to_float(images))[..., None]
            unknown = is_uniform(augment_keys) if is_uniform else None
            teacher_logits = answers[0].astype(jnp.float32) if has_answers else None
            if teacher:
                teacher_logits, _ = teacher(*teacher_variables, inputs)

            def loss_fn(params):
                logits, batch_stats = apply(
                    params, state.batch_stats, inputs, True, dropout_keys, norm_axis
                )
                # The mean over the whole batch: each part on each device holds its share of it.
                rows = losses.training_loss(
                    logits, labels, unknown=unknown, teacher_logits=teacher_logits, **loss
                )
                return rows.mean() * share, (logits, batch_stats)

            (share_of_loss, (logits, statistics)), gradients = jax.value_and_grad(
                loss_fn, has_aux=True
            )(state.params)
            correct = losses.hits(logits, labels, unknown).mean(dtype=jnp.float32) * share
            # Global statistics are the same on all devices, others are added up like gradients.
            weight = 1.0 / num_parts if norm_axis else share
            statistics = jax.tree.map(lambda leaf: leaf * weight, statistics)
            return gradients, share_of_loss, correct, statistics

        if strict_shards:
            gradients, mean_loss, correct, statistics = _sum_in_order(part, num_parts, state.step)
        else:
            gradients, mean_loss, correct, statistics = _sum(part, num_parts)
            gradients = jax.tree.map(lambda leaf: leaf.astype(reduce_dtype), gradients)
            gradients, mean_loss, correct = lax.psum((gradients, mean_loss, correct), DATA_AXIS)
            gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
            if not norm_axis:
                statistics = lax.psum(statistics, DATA_AXIS)
        averages = average_statistics(
            state.batch_stats, statistics, state.step, batch_norm_momentum, batch_norm_ramp
        )
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes int steps and float rates
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        average = state.average_params
        if average is not None:
            average = average_params(average, params, state.step, average_decay)
        norm = optax.tree.norm(gradients)
        is_good = jnp.isfinite(mean_loss) & jnp.isfinite(norm)
        new = TrainState(state.step, state.seed, params, averages, opt_state, average)
        new = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new, state)
        metrics = {"loss": mean_loss, "accuracy": correct, "gradient_norm": norm}
        metrics = {name: jnp.where(is_good, value, 0.0) for name, value in metrics.items()}
        metrics["skipped"] = 1.0 - is_good.astype(jnp.float32)
        metrics["first_bad"] = jnp.where(is_good, NEVER, state.step)
        return dataclasses.replace(new, step=state.step + 1), metrics

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded_step = jax.shard_map(
        local_step, mesh=mesh, in_specs=(whole, whole, *[rows] * (4 + has_answers)),
        out_specs=(whole, whole), check_vma=False,
    )  # fmt: skip

    def train_step(state: TrainState, images: jax.Array, labels: jax.Array, *lessons):
        batch = images.shape[0]
        augment_keys = row_keys(state.seed, AUGMENT, state.step, batch)
        dropout_keys = row_keys(state.seed, DROPOUT, state.step, batch)
        teacher_variables = lessons[0] if teacher else ()
        rows = images, labels, augment_keys, dropout_keys
        return sharded_step(state, teacher_variables, *rows, *lessons[: int(has_answers)])

    on_all, by_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        train_step,
        in_shardings=(on_all, by_rows, by_rows)
        + (by_rows,) * has_answers
        + (on_all,) * (teacher is not None),
        out_shardings=(on_all, on_all),
        donate_argnums=0,
    )


def _sum(part: Callable[[Any], Any], num_parts: int) -> Any:
    """Returns the sum of some pytrees, made one after the other."""
    if num_parts == 1:
        return part(0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, 0))
    return lax.fori_loop(
        0, num_parts, lambda index, sums: jax.tree.map(jnp.add, sums, part(index)), zeros
    )


def _sum_in_order(part: Callable[[Any], Any], num_parts: int, step: jax.Array) -> Any:
    """Returns the sum of all devices' parts, added up in their order, whatever their layout."""
    room = jax.tree.map(
        lambda x: jnp.zeros((num_parts, *x.shape), x.dtype), jax.eval_shape(part, 0)
    )
    # The compiler cannot know this number, so that it compiles the same loop for any.
    rounds = jnp.where(step < 0, 0, num_parts)
    parts = lax.fori_loop(
        0,
        rounds,
        lambda index, parts: jax.tree.map(lambda a, x: a.at[index].set(x), parts, part(index)),
        room,
    )
    parts = lax.all_gather(parts, DATA_AXIS, tiled=True)
    sums = jax.tree.map(lambda leaf: functools.reduce(jnp.add, list(leaf)), parts)
    return lax.optimization_barrier(sums)


def make_train_chunk(
    step: Callable[..., Any], pick: Callable[..., Any], longest: int
) -> Callable[..., Any]:
    """Returns the jitted function that runs several training steps in one call.

    Args:
      step: from `make_train_step`.
      pick: finds a step's batch in the arrays of a call, see `data.input_pipeline.BatchSource`.
      longest: most steps of a call; 1 compiles to the bare step, without a loop.

    Returns:
      call(state, num_steps, arrays, *teachers) -> (state, sums of the steps' metrics, but the
      smallest first_bad), 1 ≤ num_steps ≤ longest, the old state given up, teachers as the step has
      them. One program for any number of steps, so that a run's bits do not depend on where it was
      stopped and resumed.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def train_chunk(
        state: TrainState, num_steps: jax.Array, arrays: tuple[jax.Array, ...], *teachers: Any
    ):
        def another(index, carry):
            state, sums = carry
            state, metrics = step(state, *pick(arrays, index), *teachers)
            first_bad = jnp.minimum(sums["first_bad"], metrics["first_bad"])
            sums = jax.tree.map(jnp.add, sums, metrics)
            return state, sums | {"first_bad": first_bad}

        if longest == 1:
            return step(state, *pick(arrays, 0), *teachers)
        batch = jax.eval_shape(lambda: pick(arrays, 0))
        metrics = jax.eval_shape(step, state, *batch, *teachers)[1]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), metrics)
        zeros["first_bad"] = jnp.int32(NEVER)
        return lax.fori_loop(0, num_steps, another, (state, zeros))

    return train_chunk


def make_statistics_step(
    apply: Apply, augment: Augment, mesh: Mesh, *, strict_shards: int = 0
) -> Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Any]:
    """Returns a jitted step that adds one batch to an equal-weight average of batch statistics.

    Args:
      apply, augment, mesh, strict_shards: as for `make_train_step`.

    Returns:
      step(params, averages, images uint8 (B, S, S), count int32 scalar, seed uint32 scalar) ->
      averages, where count batches are already in `averages`; the batch is augmented as training
      step `count` of that seed would.
    """

    def local_step(params, averages, count, *rows):
        def statistics(images, augment_keys, dropout_keys):
            inputs = augment(augment_keys, to_float(images))[..., None]
            axis = None if strict_shards else DATA_AXIS
            return apply(params, averages, inputs, True, dropout_keys, axis)[1]

        def part(index):
            shard = (array.reshape(num_parts, -1, *array.shape[1:])[index] for array in rows)
            return jax.tree.map(lambda leaf: leaf / strict_shards, statistics(*shard))

        num_parts = strict_shards // lax.axis_size(DATA_AXIS)
        batch = _sum_in_order(part, num_parts, count) if strict_shards else statistics(*rows)
        weight = 1.0 / (count.astype(jnp.float32) + 1.0)
        return jax.tree.map(lambda old, new: old + (new - old) * weight, averages, batch)

    whole, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded_step = jax.shard_map(
        local_step, mesh=mesh, in_specs=(whole, whole, whole, rows, rows, rows),
        out_specs=whole, check_vma=False,
    )  # fmt: skip

    @jax.jit
    def statistics_step(params, averages, images, count, seed):
        rows = images.shape[0]
        augment_keys = row_keys(seed, AUGMENT, count, rows)
        dropout_keys = row_keys(seed, DROPOUT, count, rows)
        return sharded_step(params, averages, count, images, augment_keys, dropout_keys)

    return statistics_step
