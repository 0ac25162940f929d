"""A trained network folded into a plain list of layers, and that list run by NumPy or JAX."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from hccr_jax.errors import InputError
from hccr_jax.models.folding import INPUT, Folding, Layer
from hccr_jax.ops.depthwise import taps

RELU6_LIMIT = 6.0


def fold(model: nnx.Module) -> tuple[Layer, ...]:
    """Returns a network's layers in order; the last one gives the logits.

    Args:
      model: a trained network, with the batch-norm statistics to evaluate with.

    Raises:
      InputError: the network's class has no `fold` method.
    """
    if not hasattr(model, "fold"):
        raise InputError(f"{type(model).__name__}: cannot be exported: it has no list of layers")
    folding = Folding(model)
    model.fold(folding)
    return tuple(folding.layers)


Convolve = Callable[[Any, np.ndarray, int, int], Any]


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Returns a convolution, computed by NumPy.

    Args:
      x: (B, H, W, C).
      weight: (K, K, C, C'), or (K, K, C) of a depthwise convolution.
      stride, padding: see `Layer`.

    >>> x = np.arange(9.0).reshape(1, 3, 3, 1)
    >>> convolve(x, np.ones((3, 3, 1)), stride=2, padding=1)[0, ..., 0].tolist()
    [[8.0, 12.0], [20.0, 24.0]]
    """
    inputs = taps(x, len(weight), stride, padding, np)
    if weight.ndim == 3:
        pairs = zip(inputs, weight.reshape(-1, weight.shape[-1]), strict=True)
        return functools.reduce(np.add, (tap * row for tap, row in pairs))
    return np.concatenate(inputs, axis=-1) @ weight.reshape(-1, weight.shape[-1])


def run(
    layers: Sequence[Layer], images: Any, array: Any = np, convolution: Convolve = convolve
) -> Any:
    """Returns the logits (B, K), float32; the arithmetic is in the weights' dtype.

    Args:
      layers: from `fold`.
      images: uint8 (B, S, S), ink high.
      array: module of the array functions, `numpy` or `jax.numpy`.
      convolution: like `convolve`, for arrays of that module.
    """
    dtype = next(layer.weight.dtype for layer in layers if layer.weight is not None)
    values = {INPUT: (images.astype(np.float32) / 255.0).astype(dtype)[..., None]}
    for layer in layers:
        x = values[layer.inputs[0]]
        match layer.kind:
            case "conv" | "depthwise":
                assert layer.weight is not None
                y = _add_bias(convolution(x, layer.weight, layer.stride, layer.padding), layer)
            case "dense":
                y = _add_bias(x @ layer.weight, layer)
            case "add":
                y = x + values[layer.inputs[1]]
            case "max_pool":
                y = functools.reduce(array.maximum, taps(x, 3, 2, layer.padding, array))
            case "average_pool":
                y = functools.reduce(array.add, taps(x, 2, 2, 0, array)) / 4
            case "mean":
                y = x.mean((1, 2))
            case "flatten":
                y = x.reshape(x.shape[0], -1)
        values[layer.name] = _activate(y, layer.activation, array)
    return values[layers[-1].name].astype(np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the probabilities (B, K) of logits (B, K).

    >>> softmax(np.array([[1.0, 1.0]])).tolist()
    [[0.5, 0.5]]
    """
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _add_bias(y: Any, layer: Layer) -> Any:
    assert layer.bias is not None
    return y + layer.bias.reshape((1,) * (y.ndim - 1) + (-1,))


def _activate(y: Any, activation: str, array: Any) -> Any:
    match activation:
        case "relu":
            return array.maximum(y, 0)
        case "relu6":
            return array.clip(y, 0, RELU6_LIMIT)
        case "tanh":
            return array.tanh(y)
    return y
