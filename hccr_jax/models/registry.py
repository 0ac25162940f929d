"""Networks by name, as pure functions, and their cost layer by layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.alexnet import AlexNet
from hccr_jax.models.layers import Cost, count_costs
from hccr_jax.models.lenet import LeNet5
from hccr_jax.models.mobilenet_v1 import MobileNetV1
from hccr_jax.models.mobilenet_v2 import MobileNetV2
from hccr_jax.models.mqdf import MQDF
from hccr_jax.models.resnet import resnet18, resnet34, resnet50

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "lenet5": LeNet5,
    "alexnet": AlexNet,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "mqdf": MQDF,
}
SIZED = ("lenet5", "alexnet")  # a dense layer sees a whole map, so they must know its size

# apply(params, batch_stats, images, train, dropout_keys, axis_name) -> (logits, batch_stats)
Apply = Callable[..., tuple[jax.Array, Any]]


def create_model(name: str, *, image_px: int = 64, **arguments: Any) -> nnx.Module:
    """Returns a freshly initialised network.

    Args:
      name: a key of `MODELS`.
      image_px: side of the images; only the networks of `SIZED` need it.
      **arguments: `num_classes`, `channels`, `rngs` and whatever the network's class takes.

    Raises:
      KeyError: no network has this name.
      InputError: the images are too small for the network.

    >>> network = create_model("mobilenet_v2", num_classes=10, rngs=nnx.Rngs(0))
    >>> network.classifier.weight.shape
    (1280, 10)
    """
    if name in SIZED:
        arguments["image_px"] = image_px
    if name == "mqdf":
        arguments.pop("dtype", None)  # distances between classes need float32 everywhere
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
    mqdf = MQDF(num_classes, rngs=nnx.Rngs(0))
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
    """Returns parameters with which a network gives the input of its last layer after the logits.

    The last layer, `classifier`, becomes (F, K + F): its own weights beside a unit matrix.
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


def named_costs(model: nnx.Module, image_px: int, channels: int = 1) -> list[tuple[str, Cost]]:
    """Returns each layer's name and cost for one image, in the order of the calls."""
    names = {id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)}
    return [(names[id(cost.layer)], cost) for cost in count_costs(model, image_px, channels)]


def summarize(model: nnx.Module, image_px: int, channels: int = 1) -> tuple[str, int]:
    """Returns a table of the network's layers and its multiply-adds for one image.

    Convolutions and dense layers count, as in the paper's section 3.2; additions of bias, batch
    norm (folded away in use), pooling and activations do not.
    """
    costs = named_costs(model, image_px, channels)
    total = sum(cost.multiply_adds for _, cost in costs)
    lines = [f"{'layer':<30}{'kind':<22}{'output':>14}{'parameters':>12}{'multiply-adds':>15}"]
    lines += [
        f"{name:<30}{cost.kind:<22}{'×'.join(map(str, cost.output)):>14}"
        f"{cost.parameters:>12,}{cost.multiply_adds:>15,}"
        for name, cost in costs
    ]
    parameters = sum(cost.parameters for _, cost in costs)
    lines.append(f"{'total':<66}{parameters:>12,}{total:>15,}")
    return "\n".join(lines), total
