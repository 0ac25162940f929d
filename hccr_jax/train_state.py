"""Everything that changes from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

# Streams of randomness: keys are fold_in(key(seed), stream), then fold_in(step). Never renumber.
INIT, AUGMENT, DROPOUT = 0, 1, 2


@struct.dataclass
class TrainState:
    """One training run at one moment; a pytree.

    Attributes:
      step: int32 scalar, updates done.
      params: nested dict of float32 arrays.
      batch_stats: nested dict, running averages of the batch-norm statistics.
      opt_state: the optimiser's.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


def create_train_state(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step."""
    step = jnp.zeros((), jnp.int32)
    # Compiled as one program: leaf by leaf, JAX would compile one for each shape.
    return TrainState(step, params, batch_stats, jax.jit(optimizer.init)(params))


def stream_key(seed: int, stream: int) -> jax.Array:
    """Returns the key of one stream of randomness of a run."""
    return jax.random.fold_in(jax.random.key(seed), stream)
