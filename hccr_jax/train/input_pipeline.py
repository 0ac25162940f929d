"""Batches for training, on the devices when they are needed.

One execution of the compiled program runs a chunk of steps and needs as many batches. Two sources
give the same batches: `HostBatches` reads ahead on the host; `DeviceBatches` keeps the whole split
in the devices' memory, draws the order there and transfers nothing.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from hccr_jax.data.epoch_order import batch_rows, permutation
from hccr_jax.data.splits import Split
from hccr_jax.errors import InputError
from hccr_jax.runtime import sharding
from hccr_jax.runtime.sharding import process_rows

PREFETCH_BATCHES = 8

Arrays = tuple[jax.Array, ...]


class Chunk(NamedTuple):
    """The steps of one execution: their number, and the arrays that hold their batches."""

    num_steps: int
    arrays: Arrays


def training_arrays(split: Split) -> tuple[np.ndarray, ...]:
    """Returns the arrays a training step reads: images, labels and teacher logits, if any."""
    teacher_logits = () if split.teacher_logits is None else (split.teacher_logits,)
    return (split.images, split.labels, *teacher_logits)


def chunk_lengths(
    first_step: int, last_step: int, max_steps: int, every: list[int]
) -> Iterator[int]:
    """Yields the lengths of the chunks from first_step to last_step.

    Args:
      first_step, last_step: half-open range.
      max_steps: of a chunk.
      every: a chunk ends at each multiple of each of these.

    >>> list(chunk_lengths(0, 20, 8, [10, 15]))
    [8, 2, 5, 5]
    """
    step = first_step
    while step < last_step:
        ends = [
            step + max_steps,
            last_step,
            *(step // stride * stride + stride for stride in every),
        ]
        yield min(ends) - step
        step = min(ends)


def stream_batches(
    split: Split, *, seed: int, batch_size: int, first_step: int, last_step: int
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields this process's rows of `training_arrays`, for steps first_step to last_step − 1.

    Step s always yields the same records, wherever the stream starts, so a resumed run needs
    nothing but its step.

    Args:
      split: from `load_split`.
      seed: of the run.
      batch_size: of the global batch.
      first_step, last_step: half-open range.
    """
    mine, arrays = process_rows(batch_size), training_arrays(split)

    def read(step: int) -> tuple[np.ndarray, ...]:
        rows = batch_rows(seed, step, batch_size, len(split.labels))[mine]
        return tuple(array[rows] for array in arrays)

    steps = grain.MapDataset.range(first_step, last_step).map(read)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(steps.to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class BatchSource:
    """The training batches of a run, by chunks of several steps.

    Attributes:
      split: from `load_split`.
      mesh: from `sharding.create_mesh`.
      seed, batch_size: of the run.
      max_steps: steps that the arrays of a chunk have room for.
    """

    name: ClassVar[str]
    split: Split
    mesh: Mesh
    seed: int
    batch_size: int
    max_steps: int

    def chunks(self, first_step: int, lengths: list[int]) -> Iterator[Chunk]:
        """Yields the chunks from first_step on, of the given numbers of steps."""
        raise NotImplementedError

    @staticmethod
    def get_batch(arrays: Arrays, step: jax.Array | int) -> Arrays:
        """Returns a step's rows of `training_arrays`, from the arrays of its chunk."""
        raise NotImplementedError


class HostBatches(BatchSource):
    """Batches read ahead on the host; a chunk's arrays are (max_steps, B, …), one row a step."""

    name = "stream"

    def chunks(self, first_step: int, lengths: list[int]) -> Iterator[Chunk]:
        batches = stream_batches(
            self.split,
            seed=self.seed,
            batch_size=self.batch_size,
            first_step=first_step,
            last_step=first_step + sum(lengths),
        )
        for count in lengths:
            steps = [next(batches) for _ in range(count)]
            filling = [tuple(map(np.zeros_like, steps[0]))] * (self.max_steps - count)
            stacked = tuple(map(np.stack, zip(*steps, *filling, strict=True)))
            yield Chunk(count, sharding.shard_batch(stacked, self.mesh, axis=1))

    @staticmethod
    def get_batch(arrays: Arrays, step: jax.Array | int) -> Arrays:
        return tuple(array[step] for array in arrays)


class DeviceBatches(BatchSource):
    """The whole split on every device; a chunk's arrays are rows (max_steps, B) and the split's."""

    name = "device"

    def chunks(self, first_step: int, lengths: list[int]) -> Iterator[Chunk]:
        whole = sharding.replicate(training_arrays(self.split), self.mesh)
        num_records, room = len(self.split.labels), self.max_steps * self.batch_size

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        def draw(seed, epoch):
            return permutation(jnp, seed, epoch, num_records)

        @functools.partial(jax.jit, out_shardings=sharding.batch_sharding(self.mesh, axis=1))
        def cut(place, *epochs):
            rows = lax.dynamic_slice(jnp.concatenate(epochs), (place,), (room,))
            return rows.reshape(self.max_steps, self.batch_size)

        # So many epochs that `room` records follow any place in the first.
        num_epochs = 1 + -(-room // num_records)
        seed = np.uint32(self.seed)
        epochs: dict[int, jax.Array] = {}
        step = first_step
        for count in lengths:
            epoch, place = divmod(step * self.batch_size, num_records)
            needed = range(epoch, epoch + num_epochs)
            epochs = {e: epochs[e] if e in epochs else draw(seed, np.uint32(e)) for e in needed}
            yield Chunk(count, (cut(np.int32(place), *epochs.values()), *whole))
            step += count

    @staticmethod
    def get_batch(arrays: Arrays, step: jax.Array | int) -> Arrays:
        rows, *whole = arrays
        read = functools.partial(jnp.take, indices=rows[step], axis=0, mode="clip")
        return tuple(map(read, whole))


BATCH_SOURCES = {source.name: source for source in (HostBatches, DeviceBatches)}


def choose_placement(placement: str, split: Split, mesh: Mesh) -> str:
    """Returns "stream" or "device" for a config's `data.placement`.

    "auto" is "device" on an accelerator half of whose free memory holds the split. On a CPU the
    split's file, mapped into memory, is as near as a second copy of it would be.

    Raises:
      InputError: the split does not fit, for "device".
    """
    needed = sum(array.nbytes for array in training_arrays(split))
    statistics = mesh.local_devices[0].memory_stats() or {}
    free = statistics.get("bytes_limit", 0) - statistics.get("bytes_in_use", 0)
    if placement == "auto":
        return "device" if needed <= free / 2 else "stream"
    if placement == "device" and statistics and needed > free:
        raise InputError(
            f"config.data.placement='device': the training split needs {needed / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free on each device; use 'stream'"
        )
    return placement
