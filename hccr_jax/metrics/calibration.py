"""Probabilities that mean what they say: one temperature, and a measure of what it is worth.

Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.
"""

import numpy as np

BINS = 15
FIT_IMAGES = 8192  # of the validation split; more hardly change one number
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_ROWS = 1024  # in float64 at a time


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Returns float64 (N, K): the softmax of logits (N, K) / temperature.

    >>> probabilities(np.log([[0.8, 0.1, 0.1]]), 1.0).round(6).tolist()
    [[0.8, 0.1, 0.1]]
    """
    scaled = np.asarray(logits, np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature that makes the labels most likely.

    The mean loss is convex in 1 / temperature: Newton's steps, halving the range where one leaves
    it.

    Args:
      logits: float (N, K), of images that the network was not trained on.
      labels: int (N,).

    Returns:
      From `MIN_TEMPERATURE` to `MAX_TEMPERATURE`, below 1 for a network that is not sure enough.

    >>> logits = np.log([[0.9, 0.1]] * 4)  # sure to 90 %, right in three of four
    >>> round(fit_temperature(logits, np.array([0, 0, 0, 1])), 6)  # log 9 / log 3
    2.0
    """
    low, high, inverse = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE, 1.0
    for _ in range(100):
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else np.inf
        before, inverse = inverse, step if low < step < high else np.sqrt(low * high)
        if abs(inverse - before) <= 1e-12 * inverse:
            break
    return float(1 / inverse)


def calibration_error(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: how far confidence and accuracy lie apart.

    The mean over all answers of |accuracy − mean confidence| of their bin.

    Args:
      confidence: float (N,), the probability given to each answer.
      is_right: bool (N,).
      bins: of equal width, each with its upper border.

    >>> round(calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0]) > 0), 6)
    0.1
    """
    confidence = np.asarray(confidence, np.float64)
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=is_right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _derivatives(logits: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float]:
    """Returns the first and second derivative of the mean loss by 1 / temperature."""
    slope = curvature = 0.0
    for start in range(0, len(labels), _ROWS):
        rows = np.asarray(logits[start : start + _ROWS], np.float64)
        right = rows[np.arange(len(rows)), labels[start : start + _ROWS]]
        weights = probabilities(rows, 1 / inverse)
        mean = (weights * rows).sum(axis=1)
        slope += (mean - right).sum()
        curvature += (weights * (rows - mean[:, None]) ** 2).sum()
    return slope / len(labels), curvature / len(labels)
