"""The order of the records is a function of the seed and the step, and of nothing else."""

import numpy as np
import pytest

from hccr_jax.data.input_pipeline import gather, stream_batches
from hccr_jax.data.order import batch_rows
from hccr_jax.data.splits import Split


def walk(seed: int, batch_size: int, num_records: int, num_epochs: int) -> np.ndarray:
    """Returns the record numbers of whole epochs, (num_epochs, num_records)."""
    steps = -(-num_records * num_epochs // batch_size)
    rows = np.concatenate([batch_rows(seed, s, batch_size, num_records) for s in range(steps)])
    return rows[: num_records * num_epochs].reshape(num_epochs, num_records)


@pytest.mark.parametrize(("batch_size", "num_records"), [(5, 10), (7, 10), (3, 1000), (64, 65)])
def test_every_epoch_holds_every_record_once(batch_size: int, num_records: int) -> None:
    for epoch in walk(3, batch_size, num_records, num_epochs=4):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(num_records))


def test_the_batch_size_cuts_one_and_the_same_sequence() -> None:
    np.testing.assert_array_equal(walk(3, 7, 100, 3), walk(3, 32, 100, 3))


def test_a_batch_may_hold_several_epochs() -> None:
    rows = batch_rows(0, 0, 10, 4)
    np.testing.assert_array_equal(np.sort(rows[:4]), np.arange(4))
    np.testing.assert_array_equal(np.sort(rows[4:8]), np.arange(4))


def test_epochs_and_seeds_differ() -> None:
    epochs = [*walk(0, 10, 1000, 3), *walk(1, 10, 1000, 3), *walk(2**31 - 1, 10, 1000, 1)]
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            # Two random orders agree in one place on average; eight has probability 1e-6.
            assert (one == other).sum() < 8
    assert (epochs[0] == np.arange(1000)).sum() < 8


def philox_4x64(key: tuple[int, int], count: int, first: int = 1) -> list[int]:
    """Returns `count` numbers of Philox4x64-10, its counter at `first` (NumPy starts at 1) and on.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    mask, numbers = 2**64 - 1, list[int]()
    for counter in range(first, first - (-count // 4)):
        (x0, x1, x2, x3), (k0, k1) = (counter, 0, 0, 0), key
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * x0, 0xCA5A826395121157 * x2
            x0, x1 = (right >> 64) ^ x1 ^ k0, right & mask
            x2, x3 = (left >> 64) ^ x3 ^ k1, left & mask
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
        numbers += [x0, x1, x2, x3]
    return numbers[:count]


def test_philox_written_anew_gives_the_published_numbers() -> None:
    # Random123, tests/kat_vectors, line "philox4x64 10" with counter and key zero.
    published = "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"
    assert " ".join(f"{x:016x}" for x in philox_4x64((0, 0), 4, first=0)) == published


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 3), (2**31 - 1, 45)])
def test_an_epoch_is_the_order_of_its_philox_numbers(seed: int, epoch: int) -> None:
    numbers = philox_4x64((seed, epoch), 50)
    expected = sorted(range(50), key=numbers.__getitem__)
    assert batch_rows(seed, epoch, 50, 50).tolist() == expected


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
        np.testing.assert_array_equal(batch.images, expected.images)
        np.testing.assert_array_equal(batch.labels, expected.labels)
        assert (batch.images.dtype, batch.labels.dtype) == (np.uint8, np.int32)
