"""Which records a training step sees: a pure function of the seed and the step."""

import functools

import numpy as np


def batch_rows(seed: int, step: int, batch_size: int, num_records: int) -> np.ndarray:
    """Returns the record numbers of one step's global batch, int64 (batch_size,).

    Epochs follow one another without a gap: the steps walk through a fresh permutation of all
    records for each epoch, and a batch may hold the end of one and the start of the next.

    Args:
      seed: of the run.
      step: counted from 0.
      batch_size: records a step.
      num_records: in the split.

    >>> epoch = np.concatenate([batch_rows(0, step, 5, 10) for step in (0, 1)])
    >>> sorted(epoch.tolist()) == list(range(10))
    True
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_records)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = _permutation(seed, int(epoch), num_records)[places[here]]
    return rows


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    # Sorting the raw bits of a counter-based generator: NumPy promises these never to change, but
    # not the output of Generator.permutation.
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_records)
    return np.argsort(bits, kind="stable")
