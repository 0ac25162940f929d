"""Label noise: deliberately wrong labels, to measure the robustness of training."""

import numpy as np


def shuffle_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels of which exactly round(share · N) are wrong.

    The rows are drawn without replacement and each gets one of the other classes, all equally
    likely, from NumPy's `default_rng(seed)`.

    Args:
      labels: int32 (N,), classes; left as they are.
      share: 0 to 1, of the rows.
      num_classes: K, at least 2.
      seed: of the run; the same seed shuffles the same rows.

    Returns:
      int32 (N,).

    >>> labels = np.zeros(10, np.int32)
    >>> int((shuffle_labels(labels, 0.3, num_classes=4, seed=0) != labels).sum())
    3
    """
    generator = np.random.default_rng(seed)
    count = round(share * len(labels))
    rows = generator.choice(len(labels), count, replace=False)
    shifts = generator.integers(1, num_classes, count, dtype=labels.dtype)
    shuffled = labels.copy()
    shuffled[rows] = (labels[rows] + shifts) % num_classes
    return shuffled
