"""Losses."""

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

    With a noise rate ε the label is taken to be drawn from all K classes at random in a share ε of
    the rows, so its probability is (1 − ε)·p + ε/K where the network gives it p. The row's gradient
    is then that of −log p times the probability that this label is no such draw: close to 1 where p
    is well above chance, 0 where the network rules the label out.

    Args:
      logits: float32 (B, K).
      labels: int32 (B,), classes.
      label_smoothing: s, one for all rows or (B,); the target is 1 − s + s/K on the class and s/K
        elsewhere.
      noise_rate: ε, below 1; of the class's part of the target.

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


def training_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float = 0.0,
    noise_rate: float = 0.0,
    unknown: jax.Array | None = None,
    teacher_logits: jax.Array | None = None,
    teacher_weight: float = 0.5,
    teacher_temperature: float = 1.0,
) -> jax.Array:
    """Returns the loss of each row: cross-entropy, and distillation where there is a teacher.

    Args:
      logits, labels, label_smoothing, noise_rate: as for `cross_entropy`.
      unknown: bool (B,), rows that are no character: every class is to be as likely, and the
        teacher is not heard.
      teacher_logits: float32 (B, K).
      teacher_weight: w; the loss is (1 − w) · cross-entropy + w · distillation.
      teacher_temperature: of the distillation.

    Returns:
      float32 (B,), in nats.
    """
    smoothing: float | jax.Array = label_smoothing
    weight: float | jax.Array = teacher_weight
    if unknown is not None:
        smoothing = jnp.where(unknown, 1.0, label_smoothing)
        weight = jnp.where(unknown, 0.0, teacher_weight)
    rows = cross_entropy(logits, labels, smoothing, noise_rate)
    if teacher_logits is None:
        return rows
    away = distillation(logits, teacher_logits, teacher_temperature)
    return (1 - weight) * rows + weight * away


def hits(logits: jax.Array, labels: jax.Array, unknown: jax.Array | None = None) -> jax.Array:
    """Returns which rows are answered rightly, bool (B,); arguments as for `training_loss`.

    The right answer to what is no character is one that gives no class half of the probability.
    """
    right = logits.argmax(-1) == labels
    if unknown is None:
        return right
    return jnp.where(unknown, jax.nn.softmax(logits).max(-1) < 0.5, right)


def distillation(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns how far each row is from a teacher's answer: T² · KL(teacher ∥ student).

    Args:
      logits, teacher_logits: float32 (B, K); both are divided by T.
      temperature: T; its square keeps the gradient's size whatever T is.

    Returns:
      float32 (B,), in nats.

    Source: Hinton, Vinyals and Dean, https://arxiv.org/abs/1503.02531.
    """
    student = jax.nn.log_softmax(logits / temperature)
    teacher = jax.nn.log_softmax(teacher_logits / temperature)
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(axis=1)
