"""Intervals and the test of two networks against their formulas."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from hccr_jax.metrics import intervals


def test_wilson_interval_solves_its_quadratic() -> None:
    # Wilson 1927: the bounds p satisfy |p − hits/count| = z · √(p(1 − p)/count).
    hits, counts = np.array([0, 3.0, 60, 9640]), np.array([5, 7, 60, 10000])
    z = NormalDist().inv_cdf(0.975)
    for bounds in intervals.wilson(hits, counts):
        deviation = z * np.sqrt(bounds * (1 - bounds) / counts)
        np.testing.assert_allclose(np.abs(bounds - hits / counts), deviation, atol=1e-9)


@pytest.mark.parametrize(("one", "other"), [(0, 0), (0, 5), (7, 7), (43, 80), (400, 300)])
def test_mcnemar_sums_the_binomial_tails(one: int, other: int) -> None:
    count, fewer = one + other, min(one, other)
    tail = sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count
    assert intervals.mcnemar(one, other) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_bootstrap_interval_is_that_of_the_group_means() -> None:
    """With groups of one size, a mean over groups has the spread of theirs over the root."""
    rng = np.random.default_rng(0)
    skill = rng.normal(0.0, 1.0, 400)
    groups = np.repeat(np.arange(400), 25)
    values = skill[groups] + rng.normal(0.0, 0.1, 10_000)
    low, high = intervals.bootstrap(values, groups)
    means = values.reshape(400, 25).mean(axis=1)
    half = 1.96 * means.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    # Each image by itself would give a fifth of that.
    assert high - low > 4 * 2 * 1.96 * values.std() / 100


def test_bootstrap_of_equal_values_is_a_point() -> None:
    assert intervals.bootstrap(np.ones(9), np.arange(9)) == (1.0, 1.0)
