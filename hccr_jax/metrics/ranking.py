"""Ranking by a score: ROC curve, risk against coverage, detection."""

from typing import Any

import numpy as np


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the chance that a positive scores above a negative, a tie counting as half.

    The area under the curve of the receiver operating characteristic.

    >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    ordered = np.sort(negative)
    below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(negative))


def risk_coverage(scores: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how large a share of the accepted answers is wrong, against how many are accepted.

    Args:
      scores: float (N,); the highest are accepted first.
      is_right: bool (N,); False for what has no right answer.

    Returns:
      (coverage, risk), float64 (N,) each: after the best one, two, ….

    Source: El-Yaniv and Wiener, "On the foundations of noise-free selective classification", JMLR
    11 (2010).

    >>> coverage, risk = risk_coverage(np.array([2, 3, 1]), np.array([False, True, True]))
    >>> coverage.round(2).tolist(), risk.round(2).tolist()
    ([0.33, 0.67, 1.0], [0.0, 0.5, 0.33])
    """
    wrong = 1.0 - np.asarray(is_right, np.float64)[np.argsort(-np.asarray(scores), kind="stable")]
    number = np.arange(1, len(wrong) + 1)
    return number / len(wrong), np.cumsum(wrong) / number


def detection(losses: np.ndarray, wrong: np.ndarray) -> dict[str, Any]:
    """Returns how well the loss tells wrong labels from right ones.

    Args:
      losses: float (N,).
      wrong: bool (N,), which labels are known to be wrong; some are and some are not.

    Returns:
      `count` of wrong labels; `auroc`, the probability that a wrong label has a higher loss than a
      right one; `found`, the share of wrong labels among as many rows of the highest loss, which
      is precision and recall at once.

    >>> detection(np.array([3.0, 0.1, 2.0, 0.2]), np.array([True, False, False, True]))
    {'count': 2, 'auroc': 0.75, 'found': 0.5}
    """
    count = int(wrong.sum())
    right = np.sort(losses[~wrong])
    below = [np.searchsorted(right, losses[wrong], side) for side in ("left", "right")]
    worst = np.argsort(-losses, kind="stable")[:count]
    return {
        "count": count,
        "auroc": float(np.mean(below) / len(right)),  # a tie counts half
        "found": float(wrong[worst].mean()),
    }
