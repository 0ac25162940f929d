"""How sure an accuracy is, and a difference of two."""

import math

import numpy as np

LEVEL_Z = 1.959963984540054  # of 95 %, two-sided
ROUNDS = 2000


def wilson(hits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 95 % interval of a share, float64 of the arguments' shape each.

    Args:
      hits: number of right answers, of independent trials.
      counts: of all answers, at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927).

    >>> [round(float(bound), 4) for bound in wilson(np.array(8), np.array(10))]
    [0.4902, 0.9433]
    """
    share, z2 = hits / counts, LEVEL_Z**2
    middle = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = np.sqrt(share * (1 - share) / counts + z2 / (4 * counts**2)) / (1 + z2 / counts)
    half = LEVEL_Z * half
    return middle - half, middle + half


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of a mean, whole groups being drawn again and again.

    The images of one writer are alike, so that the writers and not the images are the sample.

    Args:
      values: float or bool (N,).
      groups: (N,), which of them belong together.
      seed: of the draws.

    Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, percentile interval.
    """
    _, place = np.unique(groups, return_inverse=True)
    sums = np.bincount(place, weights=values)
    counts = np.bincount(place)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(ROUNDS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Returns how likely so uneven a count is if two networks are equally good, exact, two-sided.

    Args:
      only_first, only_second: images that one names and the other does not.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12 (1947).

    >>> round(mcnemar(1, 9), 6)
    0.021484
    """
    count, fewer = only_first + only_second, min(only_first, only_second)
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        for k in range(fewer + 1)
    ]
    tail = math.fsum(math.exp(log - count * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)
