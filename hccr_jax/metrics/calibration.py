"""Calibration of probabilities: one temperature, and the expected calibration error.

Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017.
"""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

BINS = 15
FIT_IMAGES = 8192  # of the validation split; more hardly change one number
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_ROWS = 1024  # in float64 at a time


def probabilities(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Returns float64 (N, K): the softmax of logits (N, K) / temperature.

    >>> probabilities(np.log([[0.8, 0.1, 0.1]]), 1.0).round(6).tolist()
    [[0.8, 0.1, 0.1]]
    """
    return softmax(np.asarray(logits, np.float64) / temperature, axis=1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the temperature that minimises the cross-entropy, which has a single minimum.

    Args:
      logits: float (N, K), of images that the network was not trained on.
      labels: int (N,).

    Returns:
      From `MIN_TEMPERATURE` to `MAX_TEMPERATURE`; below 1 for an underconfident network.

    >>> logits = np.log([[0.9, 0.1]] * 4)  # confidence 90 %, accuracy 75 %
    >>> round(fit_temperature(logits, np.array([0, 0, 0, 1])), 4)  # log 9 / log 3
    2.0
    """

    def loss(log_temperature: float) -> float:
        total = 0.0
        for start in range(0, len(labels), _ROWS):
            rows = np.asarray(logits[start : start + _ROWS], np.float64) / np.exp(log_temperature)
            labelled = rows[np.arange(len(rows)), labels[start : start + _ROWS]]
            total += (logsumexp(rows, axis=1) - labelled).sum()
        return total / len(labels)

    bounds = np.log((MIN_TEMPERATURE, MAX_TEMPERATURE))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-7}).x))


def calibration_bins(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Returns the bin, int (N,), of each confidence (N,): equal widths, upper borders included.

    >>> calibration_bins(np.array([0.0, 0.1, 0.11, 1.0]), 10).tolist()
    [0, 0, 1, 9]
    """
    return np.clip(np.ceil(np.asarray(confidence, np.float64) * bins).astype(int) - 1, 0, bins - 1)


def calibration_error(confidence: np.ndarray, is_right: np.ndarray, bins: int = BINS) -> float:
    """Returns the expected calibration error: the mean gap between confidence and accuracy.

    The mean over all predictions of |accuracy − mean confidence| of their bin.

    Args:
      confidence: float (N,), the probability of each prediction.
      is_right: bool (N,).
      bins: see `calibration_bins`.

    >>> round(calibration_error(np.array([0.9, 0.9, 0.6, 0.6]), np.array([1, 1, 1, 0]) > 0), 6)
    0.1
    """
    gaps = np.bincount(calibration_bins(confidence, bins), weights=is_right - confidence)
    return float(np.abs(gaps).sum() / len(confidence))
