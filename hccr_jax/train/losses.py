"""Losses."""

import jax
import jax.numpy as jnp

from hccr_jax.ops.cross_entropy import cross_entropy


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
