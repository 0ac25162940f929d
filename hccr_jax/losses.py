"""Losses."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Returns the softmax cross-entropy of each row.

    Args:
      logits: float32 (B, K).
      labels: int32 (B,), classes.
      label_smoothing: ε; the target is 1 − ε + ε/K on the class and ε/K elsewhere.

    Returns:
      float32 (B,), in nats.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).tolist() == [float(jnp.log(4.0))]
    True
    """
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    if label_smoothing == 0.0:
        return -chosen
    return -(1 - label_smoothing) * chosen - label_smoothing * log_probabilities.mean(axis=1)
