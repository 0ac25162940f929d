"""Networks as pure functions of plain dicts of parameters and batch statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.packing import set_places

# apply(params, batch_stats, images, train, dropout_keys, axis_name, packed) -> (logits, stats);
# `packed` is None, or the same params as one vector (`packing.Packed`), for kernels to read them at
# their place; the gradient flows through params.
Apply = Callable[..., tuple[jax.Array, Any]]


def split_model(model: nnx.Module) -> tuple[Apply, dict, dict]:
    """Returns a network as a pure function, its parameters and its batch statistics.

    The latter are plain dicts: a step over Flax's state containers costs the host twice the time.
    """
    definition, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    initial_params, initial_stats = map(nnx.to_pure_dict, states)

    def apply(
        params, batch_stats, images, train=False, dropout_keys=None, axis_name=None, packed=None
    ):
        network = nnx.merge(definition, params, batch_stats, copy=True)
        if packed is not None:
            set_places(network, packed)
        logits = network(images, train, dropout_keys, axis_name)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return apply, initial_params, initial_stats


def expose_features(params: dict) -> dict:
    """Returns parameters with which a network outputs its logits followed by its features.

    The features (B, F) are the input of the last layer, `classifier`, whose weights become
    (F, K + F): an identity matrix is appended to them.
    """
    weight, bias = (params["classifier"][name] for name in ("weight", "bias"))
    unit = jnp.eye(len(weight), dtype=weight.dtype)
    widened = {
        "weight": jnp.concatenate([weight, unit], axis=1),
        "bias": jnp.concatenate([bias, jnp.zeros(len(weight), bias.dtype)]),
    }
    return {**params, "classifier": widened}


def count_parameters(params: Any) -> int:
    """Returns the number of trained values in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
