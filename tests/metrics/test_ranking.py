"""Ranking metrics against SciPy's Mann-Whitney statistic and known values."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from hccr_jax.metrics.ranking import auroc, detection, risk_coverage


def test_auroc_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(4)
    positive, negative = rng.integers(0, 9, 57), rng.integers(0, 7, 33)  # ties as well
    expected = mannwhitneyu(positive, negative).statistic / (57 * 33)
    assert auroc(positive, negative) == pytest.approx(expected, rel=1e-12)


def test_risk_at_full_coverage_is_the_error_rate() -> None:
    rng = np.random.default_rng(5)
    is_right = rng.random(200) < 0.8
    coverage, risk = risk_coverage(rng.normal(size=200), is_right)
    assert (coverage[-1], risk[-1]) == (1.0, pytest.approx(1 - is_right.mean()))
    perfect = risk_coverage(is_right + 0.1 * rng.random(200), is_right)[1]
    assert (perfect[: is_right.sum()] == 0).all()


def test_detection_is_the_rank_statistic() -> None:
    generator = np.random.default_rng(0)
    losses = generator.integers(0, 50, 400).astype(np.float32)  # with ties
    wrong = generator.random(400) < 0.2
    losses[wrong] += 20
    expected = mannwhitneyu(losses[wrong], losses[~wrong]).statistic
    found = detection(losses, wrong)
    assert found["count"] == wrong.sum()
    assert found["auroc"] == pytest.approx(expected / (wrong.sum() * (~wrong).sum()))
    assert detection(wrong.astype(np.float32), wrong) == {
        "count": wrong.sum(),
        "auroc": 1.0,
        "found": 1.0,
    }
