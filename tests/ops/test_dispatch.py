"""The choice of a depthwise layer's implementation, which changes nothing but the speed."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hccr_jax.bench.kernels import depthwise_layers
from hccr_jax.models.registry import create_model
from hccr_jax.ops import dispatch
from hccr_jax.ops.depthwise_block import depthwise_block_train

LAYER = (8, 8, 32)

on_a_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU's measurements")


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that replaces `measured/` by (layer, implementation, images/s)."""

    def put(*speeds: tuple) -> None:
        kind = jax.devices()[0].device_kind
        rows = [
            {
                "row": f"depthwise/{implementation}",
                "about": {"layer": layer, "device_kind": kind, "dtype": "float32"},
                **({"images_per_second": speed} if speed else {"error": "out of memory"}),
            }
            for layer, implementation, speed in speeds
        ]
        (tmp_path / "here.json").write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(dispatch, "MEASURED", tmp_path)
        dispatch._rankings.cache_clear()

    yield put
    dispatch._rankings.cache_clear()


def x_of(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.ones((2, *shape), dtype)


@on_a_cpu
def test_the_fastest_implementation_of_the_layer_is_chosen(measured) -> None:
    measured(
        ((8, 8, 8, 1), "shifted", 10.0),
        ((8, 8, 8, 1), "grouped", 20.0),
        ((8, 8, 8, 2), "shifted", 20.0),
        ((8, 8, 8, 2), "grouped", None),
        ((4, 4, 8, 1), "pallas", 30.0),
        ((4, 4, 8, 1), "shifted", 20.0),
        ((4, 4, 8, 1), "grouped", 10.0),
    )
    assert dispatch.choose(x_of(8, 8, 8), 1) == "grouped"
    assert dispatch.choose(x_of(8, 8, 8), 2) == "shifted"
    assert "pallas" not in dispatch.available(x_of(4, 4, 8))
    assert dispatch.choose(x_of(4, 4, 8), 1) == "shifted"


def test_a_layer_that_was_not_measured_takes_the_most_frequent_winner(measured) -> None:
    measured(
        ((8, 8, 8, 1), "grouped", 9.0),
        ((4, 4, 8, 1), "shifted", 9.0),
        ((2, 2, 8, 1), "shifted", 9.0),
    )
    assert dispatch.choose(x_of(3, 3, 8), 1) == "shifted"


@on_a_cpu
def test_without_measurements_a_default_is_chosen(measured) -> None:
    measured()
    kernels = "kernels" in dispatch.available(x_of(*LAYER))
    assert dispatch.choose(x_of(*LAYER), 1) == ("kernels" if kernels else "shifted")
    assert dispatch.choose(x_of(*LAYER, dtype=jnp.bfloat16), 1) == "shifted"


@on_a_cpu
def test_every_layer_of_the_networks_was_measured_on_a_cpu() -> None:
    for name in ("mobilenet_v1", "mobilenet_v2"):
        model = create_model(name, num_classes=2, rngs=nnx.Rngs(0))
        for layer in depthwise_layers(model, 64):
            assert layer in dispatch._rankings()["cpu", "float32"]


def test_the_layers_of_mobilenet_v1_are_those_of_its_table() -> None:
    # Table 1 of https://arxiv.org/abs/1704.04861 at 64 instead of 224 pixels.
    model = create_model("mobilenet_v1", num_classes=2, rngs=nnx.Rngs(0))
    assert depthwise_layers(model, 64) == [
        (32, 32, 32, 1), (32, 32, 64, 2), (16, 16, 128, 1), (16, 16, 128, 2), (8, 8, 256, 1),
        (8, 8, 256, 2), (4, 4, 512, 1), (4, 4, 512, 2), (2, 2, 1024, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("stride", [1, 2])
def test_all_implementations_agree(stride: int) -> None:
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    x, weight = 2 * drawn(3, 5, 6, 24), drawn(3, 3, 24)
    affine, affine_after = (drawn(24), drawn(24) + 2), (drawn(24), drawn(24) + 2)

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(x, affine, weight, affine_after, implementation):
        def block(x, affine, weight, affine_after):
            return depthwise_block_train(
                x, affine, weight, affine_after, stride, 1e-3, None, implementation=implementation
            )

        y, pull = jax.vjp(lambda *a: block(*a)[0], x, affine, weight, affine_after)
        return block(x, affine, weight, affine_after), pull(jnp.cos(y))

    results = {
        implementation: run(x, affine, weight, affine_after, implementation)
        for implementation in {*dispatch.available(x), "pallas"}  # which a CPU interprets
    }
    expected = results.pop("shifted")
    for implementation, result in results.items():
        jax.tree.map(
            lambda ours, theirs, implementation=implementation: np.testing.assert_allclose(
                ours, theirs, rtol=1e-4, atol=1e-4, err_msg=implementation
            ),
            result,
            expected,
        )
