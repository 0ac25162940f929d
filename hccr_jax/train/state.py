"""Everything that changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """One training run at one moment; a pytree.

    Attributes:
      step: int32 scalar, updates done.
      seed: uint32 scalar, of the run. An argument of the compiled programs and no part of them, so
        that runs of other seeds need no compilation of their own.
      params: nested dict of float32 arrays.
      batch_stats: nested dict, running averages of the batch-norm statistics.
      opt_state: the optimiser's.
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
    """Returns the state before the first step."""
    step = jnp.zeros((), jnp.int32)
    # Compiled as one program: leaf by leaf, JAX would compile one for each shape.
    opt_state = jax.jit(optimizer.init)(params)
    # A copy: the step gives up the memory of both.
    copy = jax.jit(lambda params: jax.tree.map(jnp.copy, params))
    average = copy(params) if averages_params else None
    return TrainState(step, jnp.uint32(seed), params, batch_stats, opt_state, average)
