"""The device mesh: the only place that knows how work is laid out over devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def create_mesh() -> Mesh:
    """Returns a one-dimensional mesh over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_rows(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a pytree of host arrays (B, ...) on the devices, split by rows.

    Args:
      batch: arrays holding this process's rows of the global batch, in order.
      mesh: from `create_mesh`.
    """
    sharding = split_rows(mesh)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), batch
    )
