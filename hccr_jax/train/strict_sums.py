"""Sums over microbatches with the same bits on any number of devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hccr_jax.runtime.sharding import DATA_AXIS


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
