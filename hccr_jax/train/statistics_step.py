"""Batch-norm statistics taken again with the weights at hand, from training batches."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from hccr_jax.inference.steps import to_float
from hccr_jax.models.functional import Apply
from hccr_jax.runtime.rng import AUGMENT, DROPOUT, row_keys
from hccr_jax.runtime.sharding import DATA_AXIS
from hccr_jax.train.augment import Augment
from hccr_jax.train.strict_sums import reduce_in_order, stack_microbatches


def make_statistics_step(
    apply: Apply, augment: Augment, mesh: Mesh, *, strict_shards: int = 0
) -> Callable[[Any, Any, jax.Array, jax.Array, jax.Array], Any]:
    """Returns a jitted step that adds one batch to an equal-weight average of batch statistics.

    Args:
      apply, augment, mesh: as for `step.make_train_step`.
      strict_shards: see `step.StepOptions`.

    Returns:
      step(params, averages, images uint8 (B, S, S), count int32 scalar, seed uint32 scalar) ->
      averages, where count batches are already in `averages`; the batch is augmented as training
      step `count` of that seed would.
    """

    def local_step(params, averages, count, *rows):
        def compute(rows):
            images, augment_keys, dropout_keys = rows
            inputs = augment(augment_keys, to_float(images))[..., None]
            axis = None if strict_shards else DATA_AXIS
            return apply(params, averages, inputs, True, dropout_keys, axis)[1]

        def compute_weighted(rows):
            return jax.tree.map(lambda leaf: leaf / strict_shards, compute(rows))

        if strict_shards:
            num_microbatches = strict_shards // lax.axis_size(DATA_AXIS)
            stacked = stack_microbatches(compute_weighted, rows, num_microbatches, count)
            batch_stats = reduce_in_order(stacked)
        else:
            batch_stats = compute(rows)
        weight = 1.0 / (count.astype(jnp.float32) + 1.0)
        return jax.tree.map(lambda old, new: old + (new - old) * weight, averages, batch_stats)

    replicated, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    sharded_step = jax.shard_map(
        local_step, mesh=mesh, in_specs=(replicated, replicated, replicated, rows, rows, rows),
        out_specs=replicated, check_vma=False,
    )  # fmt: skip

    @jax.jit
    def statistics_step(params, averages, images, count, seed):
        keys = (row_keys(seed, stream, count, len(images)) for stream in (AUGMENT, DROPOUT))
        return sharded_step(params, averages, count, images, *keys)

    return statistics_step
