"""Losses."""

import jax
import jax.numpy as jnp

from hccr_jax.ops.cross_entropy import cross_entropy


def training_loss(
    logits: jax.Array,
    labels: jax.Array,
    *,
    label_smoothing: float,
    noise_rate: float,
    uniform_target: jax.Array | None,
    teacher_logits: jax.Array | None,
    teacher_weight: float,
    teacher_temperature: float,
) -> jax.Array:
    """Returns the loss of each row: cross-entropy, and distillation where there is a teacher.

    Args:
      logits, labels, label_smoothing, noise_rate: as for `cross_entropy`.
      uniform_target: bool (B,), rows that are no character: their target is the uniform
        distribution, and the teacher has no weight. None: no such rows.
      teacher_logits: float32 (B, K), or None.
      teacher_weight: w; the loss is (1 − w) · cross-entropy + w · distillation.
      teacher_temperature: of the distillation.

    Returns:
      float32 (B,), in nats.
    """
    smoothing: float | jax.Array = label_smoothing
    weight: float | jax.Array = teacher_weight
    if uniform_target is not None:
        smoothing = jnp.where(uniform_target, 1.0, label_smoothing)
        weight = jnp.where(uniform_target, 0.0, teacher_weight)
    rows = cross_entropy(logits, labels, smoothing, noise_rate)
    if teacher_logits is None:
        return rows
    distilled = distillation(logits, teacher_logits, teacher_temperature)
    return (1 - weight) * rows + weight * distilled


def is_correct(logits: jax.Array, labels: jax.Array, uniform_target: jax.Array | None) -> jax.Array:
    """Returns which rows are predicted correctly, bool (B,); arguments as for `training_loss`.

    For what is no character, a prediction is correct if no class has half of the probability.
    """
    correct = logits.argmax(-1) == labels
    if uniform_target is None:
        return correct
    return jnp.where(uniform_target, jax.nn.softmax(logits).max(-1) < 0.5, correct)


def distillation(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
    """Returns the distillation loss of each row: T² · KL(teacher ∥ student).

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
