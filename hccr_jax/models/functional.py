"""Networks as pure functions of plain dicts of parameters and batch statistics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.registry import create_model

# apply(params, batch_stats, images, train, dropout_keys, axis_name) -> (logits, batch_stats)
Apply = Callable[..., tuple[jax.Array, Any]]


def split_model(model: nnx.Module) -> tuple[Apply, dict, dict]:
    """Returns a network as a pure function, its parameters and its batch statistics.

    The latter are plain dicts: a step over Flax's state containers costs the host twice the time.
    """
    definition, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    initial_params, initial_stats = map(nnx.to_pure_dict, states)

    def apply(params, batch_stats, images, train=False, dropout_keys=None, axis_name=None):
        network = nnx.merge(definition, params, batch_stats, copy=True)
        logits = network(images, train, dropout_keys, axis_name)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return apply, initial_params, initial_stats


def ensemble_with_mqdf(
    apply: Apply, batch_stats: dict, weight: float, num_classes: int
) -> tuple[Apply, dict, nnx.Module]:
    """Returns a network that asks the classical recogniser as well, except in training.

    Its logits are the logarithm of its probabilities plus `weight` times that of the recogniser's.
    The parameters of the recogniser are fitted, not trained: they are `batch_stats["mqdf"]`, which
    training hands on as they are.

    Args:
      apply, batch_stats: of the network, from `split_model`.
      weight: of the recogniser.
      num_classes: K; what the network gives beside K logits stays.

    Returns:
      (apply, batch_stats, the recogniser).

    Source: Wang, Li, Liu, Ding and Chen, "An MQDF-CNN hybrid model for offline handwritten Chinese
    character recognition", ICFHR 2014.
    """
    mqdf = create_model("mqdf", num_classes=num_classes, rngs=nnx.Rngs(0))
    apply_mqdf, fitted, _ = split_model(mqdf)

    def apply_both(params, batch_stats, images, train=False, dropout_keys=None, axis_name=None):
        own, fitted = without_mqdf(batch_stats), batch_stats["mqdf"]
        outputs, own = apply(params, own, images, train, dropout_keys, axis_name)
        if not train:
            second, _ = apply_mqdf(fitted, {}, images.astype(jnp.float32))
            logits = jax.nn.log_softmax(outputs[:, :num_classes])
            logits += weight * jax.nn.log_softmax(second)
            outputs = jnp.concatenate([logits, outputs[:, num_classes:]], axis=1)
        return outputs, own | {"mqdf": fitted}

    return apply_both, batch_stats | {"mqdf": fitted}, mqdf


def without_mqdf(batch_stats: dict) -> dict:
    """Returns the batch statistics of the network alone."""
    return {name: values for name, values in batch_stats.items() if name != "mqdf"}


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
