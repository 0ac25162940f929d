"""The records of each training step: a pure function of the seed and the step."""

import functools
from types import ModuleType
from typing import Any

import numpy as np


def batch_rows(seed: int, step: int, batch_size: int, num_records: int) -> np.ndarray:
    """Returns the record numbers of one step's global batch, int32 (batch_size,).

    The steps walk through a new permutation of all records in each epoch, without a gap: a batch
    may contain the end of one epoch and the start of the next.

    Args:
      seed: of the run.
      step: counted from 0.
      batch_size: records a step.
      num_records: in the split.

    >>> epoch = np.concatenate([batch_rows(0, step, 5, 10) for step in (0, 1)])
    >>> sorted(epoch.tolist()) == list(range(10))
    True
    """
    parts, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, place = divmod(position, num_records)
        part = _permutation(seed, epoch, num_records)[place : place + end - position]
        parts.append(part)
        position += len(part)
    return np.concatenate(parts)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return permutation(np, seed, epoch, num_records)


def permutation(xp: ModuleType, seed: Any, epoch: Any, num_records: int) -> Any:
    """Returns an epoch's order of the records, int32 (num_records,).

    Args:
      xp: the array library, NumPy or jax.numpy: the order is the same.
      seed, epoch: below 2³²; they may be traced scalars.
      num_records: in the split.
    """
    half = xp.arange((num_records + 1) // 2, dtype=xp.uint32)
    # Arrays of one element: NumPy warns where scalars overflow, as they do here by design.
    key = [xp.asarray(word, dtype=xp.uint32).reshape(1) for word in (seed, epoch)]
    bits = xp.concatenate(threefry_2x32((key[0], key[1]), (half, xp.zeros_like(half))))
    return xp.argsort(bits[:num_records], stable=True).astype(xp.int32)


def threefry_2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns two random words, uint32, for each pair of counters: Threefry-2x32 of 20 rounds.

    Implemented in operations common to NumPy and JAX, so that host and device draw the same
    numbers, independent of the generators of these libraries.

    Args:
      key: two uint32 arrays (1,) of NumPy or JAX.
      counter: two uint32 arrays (N,) of the same library.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.4.
    """
    keys = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ (y << turn | y >> (32 - turn))
        x = x + keys[(group + 1) % 3]
        y = y + (keys[(group + 2) % 3] + (group + 1))
    return x, y
