"""Ranking by a score: ROC curve, risk against coverage, detection."""

from typing import Any

import numpy as np


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the area under the receiver operating characteristic.

    It is the probability that a positive scores above a negative, a tie counting as half.

    >>> auroc(np.array([3.0, 2.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata  # half a second to import

    ranks = rankdata(np.concatenate([positive, negative]))[: len(positive)]
    return float((ranks.mean() - (len(positive) + 1) / 2) / len(negative))


def risk_coverage(scores: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the error rate of the accepted predictions against the share accepted.

    Args:
      scores: float (N,); the highest are accepted first.
      is_right: bool (N,); False for images of no class.

    Returns:
      (coverage, risk), float64 (N,) each, of the 1, 2, … highest scores.

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
    """Returns how well the loss detects wrong labels.

    Args:
      losses: float (N,).
      wrong: bool (N,), the labels known to be wrong; some are and some are not.

    Returns:
      `count` of wrong labels; `auroc` of the loss; `found`, the share of wrong labels among the
      `count` rows of highest loss, which is precision and recall at once.

    >>> detection(np.array([3.0, 0.1, 2.0, 0.2]), np.array([True, False, False, True]))
    {'count': 2, 'auroc': 0.75, 'found': 0.5}
    """
    count = int(wrong.sum())
    worst = np.argsort(-losses, kind="stable")[:count]
    return {
        "count": count,
        "auroc": auroc(losses[wrong], losses[~wrong]),
        "found": float(wrong[worst].mean()),
    }
