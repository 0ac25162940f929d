"""Networks by name, as pure functions, and their cost layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.layers import recording
from hccr_jax.models.mobilenet_v1 import MobileNetV1
from hccr_jax.models.mobilenet_v2 import MobileNetV2
from hccr_jax.models.mqdf import MQDF

MODELS: dict[str, type[nnx.Module]] = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mqdf": MQDF,
}

# apply(params, batch_stats, images, train, dropout_keys, axis_name) -> (logits, batch_stats)
Apply = Callable[..., tuple[jax.Array, Any]]


def create_model(name: str, **arguments: Any) -> nnx.Module:
    """Returns a freshly initialised network.

    Args:
      name: a key of `MODELS`.
      **arguments: `num_classes`, `channels`, `rngs` and whatever the network's class takes.

    Raises:
      KeyError: no network has this name.

    >>> network = create_model("mobilenet_v2", num_classes=10, rngs=nnx.Rngs(0))
    >>> network.classifier.weight.shape
    (1280, 10)
    """
    return MODELS[name](**arguments)


def split_model(model: nnx.Module) -> tuple[Apply, dict, dict]:
    """Returns a network as a pure function with its parameters and batch statistics as plain dicts.

    Plain dicts, because a step over Flax's own state containers costs the host twice the time.
    """
    definition, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    initial_params, initial_stats = map(nnx.to_pure_dict, states)

    def apply(params, batch_stats, images, train=False, dropout_keys=None, axis_name=None):
        network = nnx.merge(definition, params, batch_stats, copy=True)
        logits = network(images, train, dropout_keys, axis_name)
        return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    return apply, initial_params, initial_stats


def count_parameters(params: Any) -> int:
    """Returns the number of trained values in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def summarize(model: nnx.Module, image_px: int, channels: int = 1) -> tuple[str, int]:
    """Returns a table of the network's layers and its multiply-adds for one image.

    Convolutions and the classifier count, as in the paper's section 3.2; additions of bias, batch
    norm (folded away in use) and activations do not.
    """
    names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    with recording() as costs:
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, image_px, image_px, channels), jnp.float32))
    total = sum(cost.multiply_adds for cost in costs)
    lines = [f"{'layer':<30}{'kind':<22}{'output':>14}{'parameters':>12}{'multiply-adds':>15}"]
    lines += [
        f"{names[id(cost.layer)]:<30}{cost.kind:<22}{'×'.join(map(str, cost.output)):>14}"
        f"{cost.parameters:>12,}{cost.multiply_adds:>15,}"
        for cost in costs
    ]
    parameters = sum(cost.parameters for cost in costs)
    lines.append(f"{'total':<66}{parameters:>12,}{total:>15,}")
    return "\n".join(lines), total
