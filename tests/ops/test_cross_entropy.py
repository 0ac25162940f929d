"""The cross-entropy against the smoothed target in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from hccr_jax.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_that_of_the_smoothed_target(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.normal(size=(6, 10)), rng.integers(0, 10, 6)
    target = (1 - smoothing) * np.eye(10)[labels] + smoothing / 10
    exact = -(target * log_softmax(logits, axis=1)).sum(1)
    ours = cross_entropy(jnp.array(logits, jnp.float32), jnp.array(labels), smoothing)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_cross_entropy_is_finite_for_huge_logits():
    logits = jnp.array([[1e4, -1e4, 0.0]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0])), [0.0])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])), [2e4])
