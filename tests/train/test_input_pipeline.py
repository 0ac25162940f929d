"""Batches of both placements against the order, and the ends of chunks."""

import jax
import numpy as np
import pytest

from hccr_jax.data.epoch_order import batch_rows
from hccr_jax.data.splits import Split, gather
from hccr_jax.runtime import sharding
from hccr_jax.train.input_pipeline import (
    BATCH_SOURCES,
    BatchSource,
    choose_placement,
    chunk_lengths,
    stream_batches,
)


def a_split(count: int) -> Split:
    rng = np.random.default_rng(0)
    names = np.full(count, "x")
    return Split(
        images=rng.integers(0, 256, (count, 4, 4), np.uint8).view(np.memmap),
        labels=rng.integers(0, 9, count).astype(np.int32),
        classes=tuple("一二三四五六七八九"),
        writers=names,
        sources=names,
        record_numbers=np.arange(count, dtype=np.int32),
    )


@pytest.mark.parametrize("first_step", [0, 1, 13])
def test_a_stream_yields_the_records_of_its_steps(first_step: int) -> None:
    split = a_split(50)
    batches = list(stream_batches(split, seed=5, batch_size=8, first_step=first_step, last_step=20))
    assert len(batches) == 20 - first_step
    for step, batch in enumerate(batches, first_step):
        expected = gather(split, batch_rows(5, step, 8, 50))
        images, labels = batch
        np.testing.assert_array_equal(images, expected.images)
        np.testing.assert_array_equal(labels, expected.labels)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def batches_of(source: BatchSource, first_step: int, lengths: list[int]) -> list[tuple]:
    """Returns images and labels of every step, as the training program reads them."""
    get_batch = jax.jit(source.get_batch)
    return [
        tuple(map(np.asarray, get_batch(chunk.arrays, np.int32(index))))
        for chunk in source.chunks(first_step, lengths)
        for index in range(chunk.num_steps)
    ]


@pytest.mark.parametrize(
    ("first_step", "max_steps", "lengths"),
    [(0, 1, [1, 1, 1]), (5, 3, [3, 1, 3, 2]), (2, 20, [20, 7]), (6, 4, [4])],
    ids=str,
)
@pytest.mark.parametrize("placement", ["stream", "device"])
def test_both_placements_give_the_batches_of_the_order(
    placement: str, first_step: int, max_steps: int, lengths: list[int]
) -> None:
    # 50 records in batches of 8: most epochs end inside a batch, and 20 steps hold three epochs.
    split, mesh = a_split(50), sharding.create_mesh()
    source = BATCH_SOURCES[placement](split, mesh, 5, 8, max_steps)
    batches = batches_of(source, first_step, lengths)
    assert len(batches) == sum(lengths)
    for step, (images, labels) in enumerate(batches, first_step):
        expected = gather(split, batch_rows(5, step, 8, 50))
        np.testing.assert_array_equal(images, expected.images)
        np.testing.assert_array_equal(labels, expected.labels)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_chunks_end_where_something_is_due() -> None:
    lengths = list(chunk_lengths(3, 100, 16, [10, 25]))
    ends = set(np.cumsum([3, *lengths]).tolist())
    assert {*range(10, 101, 10), *range(25, 101, 25)} <= ends
    assert max(lengths) <= 16
    assert sum(lengths) == 97


def test_auto_streams_on_a_cpu() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("a CPU's rule")
    split, mesh = a_split(10), sharding.create_mesh()
    assert choose_placement("auto", split, mesh) == "stream"
    assert choose_placement("device", split, mesh) == "device"
