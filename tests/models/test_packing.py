"""Packed pytrees: nothing is lost, places are where values are, checkpoints keep their items."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hccr_jax.models import packing
from hccr_jax.models.functional import split_model
from hccr_jax.models.layers import ConvNorm
from hccr_jax.train.optim import make_optimizer

SHAPES = {"a": {"bias": (3755,), "weight": (3, 5)}, "b": {0: {"weight": (4, 16), "scale": (32,)}}}


def some_tree() -> dict:
    rng = np.random.default_rng(0)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=is_shape)


def test_what_is_unpacked_is_what_was_packed():
    tree = some_tree()
    packed = packing.pack(tree)
    assert packed.vector.shape == (3755 + 15 + 64 + 32,)
    jax.tree.map(np.testing.assert_array_equal, packed.unpack(), tree)
    again = packing.pack_like(packed, packing.unpack_nodes(packed))
    assert again.layout is packed.layout
    np.testing.assert_array_equal(again.vector, packed.vector)


def test_weights_come_first_and_odd_sizes_shift_no_other():
    layout = packing.layout_of(some_tree())
    offsets = jax.tree.unflatten(layout.treedef, layout.offsets)
    # 4 × 16 and 3 × 5 weights, then vectors of 32 and of 3,755 values.
    assert offsets["b"][0] == {"weight": 0, "scale": 79}
    assert offsets["a"] == {"weight": 64, "bias": 111}
    assert layout.matrix_values == 79


def test_matrices_are_the_leaves_of_more_than_one_axis():
    tree = some_tree()
    kept = packing.pack(tree).matrices().unpack()
    exact = jax.tree.map(lambda leaf: leaf if leaf.ndim > 1 else np.zeros_like(leaf), tree)
    jax.tree.map(np.testing.assert_array_equal, kept, exact)


def test_an_empty_pytree_is_an_empty_vector():
    packed = packing.pack({})
    assert packed.vector.shape == (0,)
    assert packed.unpack() == {}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_of_packed_parameters_is_the_same_function(dtype):
    """Values and gradients, and each parameter knows where it lies."""
    places = {}

    class Layer(ConvNorm):
        def __call__(self, x, train, dropout_keys, axis_name):
            for name, param in {"weight": self.conv.weight, "scale": self.norm.scale}.items():
                vector, offset = packing.place_of(param, dtype)
                values = vector[offset : offset + param.size].reshape(param.shape)
                places[name] = values, param[...].astype(dtype)
            return super().__call__(x, train, axis_name)

    layer = Layer(16, 32, 1, epsilon=1e-3, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    apply, params, batch_stats = split_model(layer)
    x = jnp.array(np.random.default_rng(0).normal(size=(2, 3, 3, 16)), jnp.float32)

    def loss(params, packed):
        y, _ = apply(params, batch_stats, x, True, None, None, packed)
        return jnp.square(y.astype(jnp.float32) - 1.0).sum()

    packed = packing.pack(params)
    ours = jax.value_and_grad(loss)(params, packed)
    exact = jax.value_and_grad(loss)(params, None)
    jax.tree.map(np.testing.assert_array_equal, ours, exact)
    with jax.disable_jit():
        loss(params, packed)
    for values, leaf in places.values():
        np.testing.assert_array_equal(values, leaf)
    assert places["weight"][0].dtype == dtype


def reference_optimizer(name: str) -> optax.GradientTransformation:
    """What version 0.2 made of Optax's parts, on arrays one by one."""
    decay = optax.add_decayed_weights(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    rate = optax.scale_by_learning_rate(lambda step: 0.1)
    if name == "sgd":
        return optax.chain(decay, optax.trace(0.9, nesterov=True), rate)
    adam = optax.scale_by_adam(0.9, 0.999)
    if name == "adam":
        return optax.chain(adam, rate)
    if name == "muon":
        numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
        muon = optax.chain(
            optax.contrib.scale_by_muon(
                weight_dimension_numbers=lambda p: jax.tree.map(lambda x: numbers, p)
            ),
            optax.stateless_with_tree_map(lambda u, p: u),
        )

        def label(params):
            return jax.tree.map(lambda x: "muon" if x.ndim == 4 else "other", params)

        adam = optax.partition({"muon": muon, "other": adam}, label)
    return optax.chain(adam, decay, rate)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_an_unpacked_optimiser_state_has_the_arrays_of_earlier_checkpoints(name):
    params = some_tree() | {"conv": np.zeros((1, 1, 4, 8), np.float32)}
    optimizer = make_optimizer(name, lambda step: 0.1, weight_decay=0.1)
    state = packing.unpack_nodes(optimizer.init(packing.pack(params)))
    exact = reference_optimizer(name).init(params)
    assert jax.tree.structure(state) == jax.tree.structure(exact)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, exact)
