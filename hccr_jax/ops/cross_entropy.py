"""Softmax cross-entropy."""

import math

import jax
import jax.numpy as jnp


def cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float | jax.Array = 0.0,
    noise_rate: float = 0.0,
) -> jax.Array:
    """Returns the softmax cross-entropy of each row.

    With a noise rate ε a label is assumed to be drawn from all K classes at random with probability
    ε, so its probability is (1 − ε)·p + ε/K where the network predicts p. The row's gradient is
    then that of −log p times the probability that the label is no such draw: close to 1 where p is
    well above chance, 0 where the network rules the label out.

    Args:
      logits: float32 (B, K).
      labels: int32 (B,).
      label_smoothing: s, a number or (B,): target 1 − s + s/K on the label and s/K elsewhere.
      noise_rate: ε, below 1; applies to the label's part of the target.

    Returns:
      float32 (B,), in nats.

    Source: forward correction with a uniform transition matrix, Patrini, Rozza, Menon, Nock and Qu,
    "Making deep neural networks robust to label noise: a loss correction approach", CVPR 2017.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2])).tolist() == [float(jnp.log(4.0))]
    True
    """
    log_probabilities = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)[:, 0]
    if noise_rate > 0.0:
        by_chance = math.log(noise_rate / logits.shape[1])
        chosen = jnp.logaddexp(chosen + math.log1p(-noise_rate), by_chance)
    if isinstance(label_smoothing, float) and label_smoothing == 0.0:
        return -chosen
    return -(1 - label_smoothing) * chosen - label_smoothing * log_probabilities.mean(axis=1)
