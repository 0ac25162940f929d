"""Losses of the training against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from hccr_jax.train.losses import distillation


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_divergence_of_the_softened_distributions(temperature):
    logits, teacher = 5 * np.random.default_rng(0).normal(size=(2, 6, 10))
    student_probs, teacher_probs = (softmax(x / temperature, axis=1) for x in (logits, teacher))
    exact = temperature**2 * entropy(teacher_probs, student_probs, axis=1)
    logits, teacher = jnp.array(logits, jnp.float32), jnp.array(teacher, jnp.float32)
    np.testing.assert_allclose(distillation(logits, teacher, temperature), exact, rtol=1e-5)
    # Section 2.1 of the source: (softmax(z/T) − softmax(v/T)) / T, times T².
    gradient = jax.grad(lambda x: distillation(x, teacher, temperature).sum())(logits)
    exact = temperature * (student_probs - teacher_probs)
    np.testing.assert_allclose(gradient, exact, atol=1e-5 * temperature)
    np.testing.assert_array_equal(distillation(teacher, teacher, temperature), np.zeros(6))
