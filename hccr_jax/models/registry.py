"""Networks by name: which there are, which options each takes, and how one is created."""

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from hccr_jax.configs import default

if TYPE_CHECKING:
    from flax import nnx

# "module:attribute" below `hccr_jax.models`, so that names are known without importing JAX.
MODELS = {
    "mobilenet_v1": "mobilenet_v1:MobileNetV1",
    "mobilenet_v2": "mobilenet_v2:MobileNetV2",
    "lenet5": "lenet:LeNet5",
    "alexnet": "alexnet:AlexNet",
    "resnet18": "resnet:resnet18",
    "resnet34": "resnet:resnet34",
    "resnet50": "resnet:resnet50",
    "mqdf": "mqdf:MQDF",
}


def network_options(name: str) -> tuple[str, ...]:
    """Returns the keys of `config.model` that a network's class takes.

    >>> network_options("alexnet")
    ('dropout_rate', 'stem_stride')
    """
    keys = default.get_config().model
    return tuple(key for key in keys if key in _parameters(name) and key != "dtype")


def create_model(
    name: str, *, num_classes: int, channels: int = 1, image_px: int | None = None,
    dtype: Any = "float32", rngs: "nnx.Rngs", **options: Any,
) -> "nnx.Module":  # fmt: skip
    """Returns a freshly initialised network.

    Args:
      name: a key of `MODELS`.
      num_classes: K.
      channels: image channels, C.
      image_px: side of the images, for networks with a dense layer over a whole map; None for the
        default of `config.data`.
      dtype: compute dtype, for networks that support others than float32.
      rngs: keys of the initial weights.
      **options: of `network_options`; those not given are the defaults of `config.model`.

    Raises:
      KeyError: no network has this name.
      InputError: the images are too small for the network.

    >>> from flax import nnx
    >>> network = create_model("mobilenet_v2", num_classes=10, rngs=nnx.Rngs(0))
    >>> network.classifier.weight.shape
    (1280, 10)
    """
    config = default.get_config()
    context = {
        "num_classes": num_classes, "channels": channels, "dtype": np.dtype(dtype), "rngs": rngs,
        "image_px": config.data.image_px if image_px is None else image_px,
    }  # fmt: skip
    taken = {key: value for key, value in context.items() if key in _parameters(name)}
    defaults = {key: config.model[key] for key in network_options(name)}
    return _network_class(name)(**taken, **defaults | options)


def _network_class(name: str) -> Any:
    module, attribute = MODELS[name].split(":")
    return getattr(importlib.import_module(f"hccr_jax.models.{module}"), attribute)


@functools.cache
def _parameters(name: str) -> frozenset[str]:
    """Returns the names of the arguments of a network's class."""
    network = _network_class(name)
    # Flax's metaclass hides the signature of a class; the ResNets are partial functions of one.
    return frozenset(inspect.signature(getattr(network, "func", network).__init__).parameters)
