"""The device mesh, and the layout of arrays over its devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def create_mesh() -> Mesh:
    """Returns a one-dimensional mesh over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value of which every device has a full copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of an array split along one axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA_AXIS))


def replicate(values: Any, mesh: Mesh) -> Any:
    """Places a pytree of host arrays, equal in all processes, on every device."""
    return _put(values, replicated(mesh))


def shard_batch(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """Places a pytree of host arrays on the devices, split by rows.

    Args:
      batch: arrays of this process's rows of the global batch, in order.
      mesh: from `create_mesh`.
      axis: the axis of the rows.
    """
    return _put(batch, batch_sharding(mesh, axis))


def make_any_process(condition: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """Returns a function that returns whether `condition()` is true in any process.

    With several processes all must call it, in step; it waits for the devices.
    """
    if jax.process_count() == 1:
        return condition
    reduce = jax.jit(jnp.any, out_shardings=replicated(mesh))
    return lambda: bool(reduce(shard_batch(np.full(jax.local_device_count(), condition()), mesh)))


def _put(values: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), values
    )


def process_rows(batch_size: int) -> slice:
    """Returns the slice of a global batch that this process loads."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)
