"""The random keys of a run, and one for each row of a batch."""

import functools

import jax
import jax.numpy as jnp

# Streams: keys are fold_in(key(seed), stream), then fold_in(step). Never renumber.
INIT, AUGMENT, DROPOUT = 0, 1, 2


def stream_key(seed: int | jax.Array, stream: int) -> jax.Array:
    """Returns the key of one random stream of a run."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def row_keys(seed: int | jax.Array, stream: int, step: jax.Array, rows: int) -> jax.Array:
    """Returns one key (B,) for each row of a step's global batch.

    With one key a row, the random numbers do not depend on the layout over devices.
    """
    key = jax.random.fold_in(stream_key(seed, stream), step)
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
