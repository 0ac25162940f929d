"""Everything that changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from hccr_jax.models.packing import Packed, pack, pack_like, unpack_nodes


@struct.dataclass
class TrainState:
    """One training run at one moment; a pytree.

    It is packed, each field one vector, except where a checkpoint or an evaluation needs its arrays
    (`unpack_state`).

    Attributes:
      step: int32 scalar, updates done.
      seed: uint32 scalar, of the run. An argument of the compiled programs and no part of them, so
        that runs of other seeds need no compilation of their own.
      params: `Packed`, or a nested dict of float32 arrays.
      batch_stats: like params, running averages of the batch-norm statistics.
      opt_state: the optimiser's; what it keeps of each parameter is like params.
      average_params: a moving average of params, None where none is kept.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    average_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate with."""
        return self.params if self.average_params is None else self.average_params


def create_train_state(
    params: Any,
    batch_stats: Any,
    optimizer: optax.GradientTransformation,
    averages_params: bool = False,
    seed: int = 0,
) -> TrainState:
    """Returns the state before the first step, packed.

    Args:
      params, batch_stats: pytrees of float32 arrays.
      optimizer: from `optim.make_optimizer`.
      averages_params: whether a moving average of params is kept.
      seed: of the run.
    """

    @jax.jit  # as one program: array by array, JAX would compile one for each shape
    def create(params: Any, batch_stats: Any) -> tuple[Packed, Packed, Any, Packed | None]:
        packed = pack(params)
        # A copy: the step gives up the memory of both.
        average = jax.tree.map(jnp.copy, packed) if averages_params else None
        return packed, pack(batch_stats), optimizer.init(packed), average

    return TrainState(jnp.zeros((), jnp.int32), jnp.uint32(seed), *create(params, batch_stats))


@jax.jit
def unpack_state(state: TrainState) -> TrainState:
    """Returns a packed state with pytrees of arrays, new ones, in place of the vectors."""
    return unpack_nodes(state)


@jax.jit
def pack_state(like: TrainState, state: TrainState) -> TrainState:
    """Returns the state that `unpack_state` made `state` of; `like` is another such state."""
    return pack_like(like, state)


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
