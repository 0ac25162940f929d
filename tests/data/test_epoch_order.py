"""The order of the records depends only on the seed and the step."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from hccr_jax.data.epoch_order import batch_rows, permutation, threefry_2x32


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


# Random123, tests/kat_vectors, lines "threefry2x32 20": counter, key and result.
@pytest.mark.parametrize(
    ("counter", "key", "published"),
    [
        ("00000000 00000000", "00000000 00000000", "6b200159 99ba4efe"),
        ("ffffffff ffffffff", "ffffffff ffffffff", "1cb996fc bb002be7"),
        ("243f6a88 85a308d3", "13198a2e 03707344", "c4923a9c 483df7a0"),
    ],
)
@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_threefry_gives_the_published_numbers(xp, counter, key, published) -> None:
    def words(text: str) -> tuple:
        return tuple(xp.asarray([int(word, 16)], dtype=xp.uint32) for word in text.split())

    numbers = threefry_2x32(words(key), words(counter))
    assert " ".join(f"{int(x[0]):08x}" for x in numbers) == published


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (7, 3), (2**31 - 1, 45)])
@pytest.mark.parametrize("count", [1, 50, 51])
def test_an_epoch_is_the_order_of_its_random_numbers(seed: int, epoch: int, count: int) -> None:
    # JAX's own generator is the same Threefry; its first numbers by another way.
    half = (count + 1) // 2
    key = jnp.array([seed, epoch], jnp.uint32)
    counters = jnp.concatenate([jnp.arange(half, dtype=jnp.uint32), jnp.zeros(half, jnp.uint32)])
    numbers = jax.extend.random.threefry_2x32(key, counters)[:count].tolist()
    expected = sorted(range(count), key=numbers.__getitem__)
    assert batch_rows(seed, epoch, count, count).tolist() == expected


def test_the_order_is_the_same_on_host_and_device() -> None:
    on_device = jax.jit(lambda seed, epoch: permutation(jnp, seed, epoch, 897_758))
    ours = on_device(np.uint32(3), np.uint32(45))
    np.testing.assert_array_equal(ours, permutation(np, 3, 45, 897_758))
    assert ours.dtype == np.int32
