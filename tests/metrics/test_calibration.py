"""The temperature and the calibration error against their definitions."""

import numpy as np
import pytest

from hccr_jax.metrics import calibration


def some_logits(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits (500, 7) and labels drawn from them at a temperature of 0.4 · scale."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(500, 7))
    labels = (logits / 0.4 + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return (scale * logits).astype(np.float32), labels


@pytest.mark.parametrize("scale", [0.5, 2.5, 20.0])
def test_fitted_temperature_minimises_the_loss(scale: float) -> None:
    logits, labels = some_logits(scale)
    temperature = calibration.fit_temperature(logits, labels)
    # At the minimum, the mean logit under the softmax is that of the labels.
    rows = logits.astype(np.float64)
    weights = np.exp(rows / temperature)
    weights /= weights.sum(1, keepdims=True)
    labelled = rows[np.arange(len(labels)), labels]
    assert (weights * rows).sum(1).mean() == pytest.approx(labelled.mean(), rel=1e-5)
    # The labels were drawn from these logits at a temperature of 0.4.
    assert temperature == pytest.approx(0.4 * scale, rel=0.15)


def test_a_perfect_network_has_the_lowest_temperature() -> None:
    logits = np.eye(5)[np.arange(20) % 5]
    fitted = calibration.fit_temperature(logits, np.arange(20) % 5)
    assert fitted == pytest.approx(calibration.MIN_TEMPERATURE, rel=1e-3)


def test_calibration_error_by_hand() -> None:
    # Of ten bins: (0.5, 0.6] is right once in two at 0.55; (0.9, 1] three times in three at 0.96.
    confidence = np.array([0.52, 0.58, 0.94, 0.94, 1.0])
    is_right = np.array([True, False, True, True, True])
    expected = 2 / 5 * abs(0.5 - 0.55) + 3 / 5 * abs(1.0 - 0.96)
    assert calibration.calibration_error(confidence, is_right, 10) == pytest.approx(expected)
