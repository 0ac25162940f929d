"""Batches for training, read ahead in the background."""

from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np

from hccr_jax.data.order import batch_rows
from hccr_jax.data.splits import Split

PREFETCH_BATCHES = 8


class Batch(NamedTuple):
    """This process's rows of a global batch: images uint8 (B, S, S) and labels int32 (B,)."""

    images: np.ndarray
    labels: np.ndarray


def gather(split: Split, rows: np.ndarray) -> Batch:
    """Returns the given rows of a split, copied into memory."""
    return Batch(split.images[rows], split.labels[rows])


def process_rows(batch_size: int) -> slice:
    """Returns the part of a global batch that belongs to this process."""
    local = batch_size // jax.process_count()
    return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def stream_batches(
    split: Split, *, seed: int, batch_size: int, first_step: int, last_step: int
) -> Iterator[Batch]:
    """Yields the batches of steps first_step to last_step − 1.

    Step s always yields the same records, wherever the stream starts, so a resumed run needs
    nothing but its step.

    Args:
      split: from `load_split`.
      seed: of the run.
      batch_size: of the global batch; each process gets its own rows of it.
      first_step, last_step: half-open range.
    """
    mine = process_rows(batch_size)

    def read(step: int) -> Batch:
        return gather(split, batch_rows(seed, step, batch_size, len(split.labels))[mine])

    steps = grain.MapDataset.range(first_step, last_step).map(read)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(steps.to_iter_dataset(options))
