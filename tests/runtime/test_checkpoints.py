"""Checkpoints on real folders: bit-exact round trips, retention, damage."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hccr_jax.errors import InputError
from hccr_jax.models.packing import pack, unpack_nodes
from hccr_jax.runtime import sharding
from hccr_jax.runtime.checkpoint_seal import find_damage
from hccr_jax.runtime.checkpoints import Checkpoints, check_classes
from hccr_jax.train import optim

METADATA = {"classes": ["啊", "阿"], "config": {"batch_size": 8, "model": {"name": "mobilenet_v1"}}}


def on_devices(tree: Any) -> Any:
    return jax.device_put(tree, sharding.replicated(sharding.create_mesh()))


def some_items(seed: int = 0) -> dict[str, Any]:
    """Returns small items like a run's: unusual bit patterns, scalars and optimizer states."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 600, np.uint32).view(np.float32).reshape(20, 30)
    params = {
        "stem": {"kernel": jnp.asarray(np.where(np.isnan(bits), 0, bits)), "bias": jnp.ones(3)},
        "edge": jnp.asarray([-0.0, np.inf, np.nan, 1e-45, np.finfo(np.float32).max], jnp.float32),
    }
    schedule = optim.make_schedule("exponential", 1e-3, total_steps=9, decay_steps=3)
    optimizer = optim.make_optimizer("adamw", schedule, weight_decay=0.1, clip_norm=1.0)
    packed = pack(params)
    opt_state = optimizer.init(packed)
    with jax.numpy_dtype_promotion("standard"):
        _, opt_state = optimizer.update(jax.tree.map(jnp.ones_like, packed), opt_state, packed)
    progress = {"step": jnp.int32(2**24 + 1), "opt_state": unpack_nodes(opt_state)}
    return on_devices({"params": params, "progress": progress})


def assert_same_bits(one: Any, other: Any) -> None:
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder: Path, scores: list[float | None], latest: int, best: int) -> None:
    """Saves steps 1, 2, … with the given validation top-1."""
    with Checkpoints(folder, keep_latest=latest, keep_best=best) as checkpoints:
        start = (checkpoints.latest_step() or 0) + 1
        for step, score in enumerate(scores, start):
            items = on_devices({"params": {"w": jnp.full(4, float(step))}})
            checkpoints.save(step, items, METADATA, None if score is None else {"top1": score})


def test_a_network_without_batch_statistics_is_restored(tmp_path: Path) -> None:
    saved = some_items() | {"eval_batch_stats": {}}
    with Checkpoints(tmp_path, keep_latest=1, keep_best=1) as checkpoints:
        checkpoints.save(1, saved, METADATA, {"top1": 0.5})
        restored = checkpoints.restore(1, saved, sharding.replicated(sharding.create_mesh()))
    assert_same_bits(restored, saved)


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    items, everywhere = some_items(), sharding.replicated(sharding.create_mesh())
    scores = {"top1": 0.1, "loss": 1 / 3}
    with Checkpoints(tmp_path / "c", keep_latest=1) as checkpoints:
        checkpoints.save(7, items, METADATA, scores)
    abstract = jax.eval_shape(lambda: items)
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [7]
        restored = checkpoints.restore(7, abstract, everywhere)
        assert checkpoints.metadata(7) == METADATA
        assert checkpoints.metrics(7) == scores
    assert_same_bits(restored, items)
    assert restored["progress"]["step"].dtype == jnp.int32
    assert int(restored["progress"]["step"]) == 2**24 + 1, "more than a float32 can hold"
    assert isinstance(restored["progress"]["opt_state"][1], optax.ScaleByAdamState)
    assert all(leaf.sharding == everywhere for leaf in jax.tree.leaves(restored))


def test_one_item_can_be_restored_alone_and_on_fewer_devices(tmp_path: Path) -> None:
    items = some_items()
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, items, METADATA, None)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(1, {"params": items["params"]}, one)
    assert list(restored) == ["params"]
    assert_same_bits(restored["params"], items["params"])


def test_saved_values_are_those_of_the_call(tmp_path: Path) -> None:
    # The training step overwrites its input while the save goes on in the background.
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = on_devices({"w": jnp.zeros((1000, 1000))})
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, {"params": tree}, METADATA, None)
        for _ in range(20):
            tree = step(tree)
        abstract = jax.eval_shape(lambda: {"params": tree})
        restored = checkpoints.restore(checkpoints.steps()[0], abstract, tree["w"].sharding)
    assert float(jnp.abs(restored["params"]["w"]).max()) == 0.0


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    save(tmp_path, [0.5, 0.9, None, 0.7, None, None], latest=2, best=1)
    assert steps_on_disk(tmp_path) == [2, 5, 6]
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 6)
    # The scores of the steps that were there before count in the next session.
    save(tmp_path, [0.8], latest=2, best=1)
    assert steps_on_disk(tmp_path) == [2, 6, 7]
    save(tmp_path, [0.9, None, None], latest=2, best=2)
    assert steps_on_disk(tmp_path) == [2, 8, 9, 10]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 8, "of equals the later one"
        assert checkpoints.metrics(10) == {}


def test_the_best_step_is_known_during_a_save(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_latest=5, keep_best=1) as checkpoints:
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.7)):
            params = on_devices({"w": jnp.zeros((1000, 1000))})
            checkpoints.save(step, {"params": params}, METADATA, {"top1": score})
            assert checkpoints.best_step() == min(step, 2)
            assert checkpoints.metadata(checkpoints.steps()[-1]) == METADATA


def test_without_a_validation_the_latest_is_the_best(tmp_path: Path) -> None:
    save(tmp_path, [None, None], latest=1, best=1)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2


def test_an_empty_folder(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.best_step() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("killed_step", [2, 3])
def test_an_unfinished_step_is_removed_by_the_next_save(tmp_path: Path, killed_step: int) -> None:
    save(tmp_path, [0.5], latest=2, best=1)
    left = tmp_path / f"{killed_step}.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "1", left)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    assert left.exists(), "a reader must not disturb a run that is saving"
    save(tmp_path, [0.6], latest=2, best=1)
    assert steps_on_disk(tmp_path) == [1, 2]


def test_other_arrays_are_refused(tmp_path: Path) -> None:
    save(tmp_path, [0.5], latest=1, best=1)
    everywhere = sharding.replicated(sharding.create_mesh())
    others = {
        r"Requested shape: \(5,\) .* stored shape: \(4,\)": {"params": {"w": jnp.zeros(5)}},
        "more": {"params": {"w": jnp.zeros(4), "more": jnp.zeros(1)}},
        "v: ": {"params": {"v": jnp.zeros(4)}},
        "parameters": {"parameters": {"w": jnp.zeros(4)}},
    }
    with Checkpoints(tmp_path) as checkpoints:
        for reason, abstract in others.items():
            with pytest.raises(InputError, match=reason) as caught:
                checkpoints.restore(1, abstract, everywhere)
            text = str(caught.value)
            assert text.startswith(f"{tmp_path / '1'}: not a checkpoint of this network: ")
            assert "\n" not in text
            assert len(text) < len(str(tmp_path)) + 300


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "appended": lambda data: data + b"\n",
    "zeroed": lambda data: bytes(len(data)),
}


def replace(path: Path, data: bytes | None) -> None:
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


def test_damage_to_any_file_is_found(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_latest=1) as checkpoints:
        checkpoints.save(1, some_items(), METADATA, {"top1": 0.5})
    step = tmp_path / "1"
    assert find_damage(step) is None
    files = [path for path in step.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        for kind, change in DAMAGE.items():
            replace(path, change(data))
            found = find_damage(step)
            assert found, f"{path.relative_to(step)} {kind}"
            if path.name != "manifest.json":
                assert found.startswith(f"{path.relative_to(step)}: "), kind
            path.write_bytes(data)
    rng = np.random.default_rng(0)
    sizes = np.array([path.stat().st_size for path in files])
    for _ in range(1000):
        path = files[rng.choice(len(files), p=sizes / sizes.sum())]
        data = path.read_bytes()
        flipped = np.frombuffer(data, np.uint8).copy()
        place = rng.integers(len(data))
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped.tobytes())
        assert find_damage(step), f"bit in byte {place} of {path.relative_to(step)}"
        path.write_bytes(data)
    assert find_damage(step) is None


@pytest.mark.parametrize("name", ["about/metadata", "params/_METADATA", "manifest.json"])
def test_a_damaged_step_is_reported_and_skipped(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, [0.5, 0.6, 0.4], latest=3, best=1)
    for step in (2, 3):
        path = tmp_path / str(step) / name
        path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (1, 1)
        assert checkpoints.metadata(1) == METADATA
    reported = capfd.readouterr().err
    for step in (2, 3):
        assert f"{tmp_path / str(step)}: damaged ({name}: " in reported
    assert steps_on_disk(tmp_path) == [1, 2, 3], "reading changes nothing"
    save(tmp_path, [0.7], latest=3, best=1)  # step 2 again: the damaged ones were renamed
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1, 2]
    assert (tmp_path / "3.damaged" / name).exists()


def test_a_step_without_a_seal_was_never_finished(tmp_path: Path) -> None:
    save(tmp_path, [0.5, 0.6], latest=2, best=1)
    (tmp_path / "2" / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
    save(tmp_path, [0.7], latest=2, best=1)
    assert steps_on_disk(tmp_path) == [1, 2]


def test_a_failed_save_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    size = 1 << 20
    code = f"""
import resource, sys
import jax.numpy as jnp
from hccr_jax.runtime.checkpoints import Checkpoints
with Checkpoints(sys.argv[1], keep_latest=2) as checkpoints:
    checkpoints.save(1, {{"params": {{"w": jnp.zeros(9)}}}}, {{}}, None)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    try:
        checkpoints.save(2, {{"params": {{"w": jnp.arange(4.0 * {size})}}}}, {{}}, None)
        checkpoints.wait()
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{tmp_path / '2'}: could not be saved: "), done.stdout
    assert done.stdout.count("\n") == 1
    assert steps_on_disk(tmp_path) == [1]


@pytest.mark.parametrize(
    ("saved", "current", "difference"),
    [
        ("啊阿埃", "啊阿挨", "(3 classes, the data set has 3; class 2 is 埃 there and 挨 here)"),
        ("啊阿", "啊阿埃", "(2 classes, the data set has 3; class 2 is none there and 埃 here)"),
        ("啊阿埃", "啊阿", "(3 classes, the data set has 2; class 2 is 埃 there and none here)"),
    ],
)
def test_other_classes_are_refused(saved: str, current: str, difference: str) -> None:
    check_classes(list(current), tuple(current), "run")
    with pytest.raises(InputError) as caught:
        check_classes(list(saved), tuple(current), "runs/v2/checkpoints")
    assert str(caught.value) == f"runs/v2/checkpoints: trained on another class list {difference}"
