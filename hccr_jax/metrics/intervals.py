"""Confidence intervals of an accuracy and of a difference, and a test of two networks."""

import functools

import numpy as np

ROUNDS = 2000


def wilson(hits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 95 % interval of a proportion, float64 of the arguments' shape each.

    Args:
      hits: number of correct predictions, of independent trials.
      counts: of all predictions, at least 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927).

    >>> [round(float(bound), 4) for bound in wilson(np.array(8), np.array(10))]
    [0.4902, 0.9433]
    """
    return np.vectorize(_wilson, otypes=(float, float))(hits, counts)


@functools.cache
def _wilson(hits: float, count: int) -> tuple[float, float]:
    from scipy.stats import binomtest  # half a second to import

    interval = binomtest(int(hits), int(count)).proportion_ci(method="wilson")
    return interval.low, interval.high


def bootstrap(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Returns the 95 % interval of a mean, from whole groups resampled with replacement.

    The images of one writer are alike, so the writers and not the images are the sample.

    Args:
      values: float or bool (N,).
      groups: (N,), such as the writer of each value.
      seed: of the resampling.

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
    """Returns the p-value of so uneven a count if two networks are equally good: exact, two-sided.

    Args:
      only_first, only_second: images that one network classifies correctly and the other does not.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12 (1947).

    >>> round(mcnemar(1, 9), 6)
    0.021484
    """
    from scipy.stats import binomtest

    count = int(only_first + only_second)
    return float(binomtest(int(only_first), count).pvalue) if count else 1.0
