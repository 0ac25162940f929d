"""A trained network as a plain list of layers, batch norms folded into the convolutions.

A convolution followed by a batch norm with fixed statistics is a convolution with a bias. What is
left needs no framework: every layer is a record of NumPy arrays and numbers, from which the files
of `hccr_jax.formats` are written.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax import nnx

from hccr_jax.errors import InputError
from hccr_jax.models.alexnet import CONVOLUTIONS, AlexNet
from hccr_jax.models.layers import BatchNorm, Conv, ConvNorm, Dense, DepthwiseConv
from hccr_jax.models.lenet import LeNet5
from hccr_jax.models.mobilenet_v1 import MobileNetV1
from hccr_jax.models.mobilenet_v2 import MobileNetV2
from hccr_jax.models.resnet import ResNet

INPUT = "images"
RELU6_LIMIT = 6.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer; its name is also that of its output.

    Attributes:
      name: where the layer lies in the network.
      kind: "conv", "depthwise", "dense", "add", "max_pool" (3×3, 2 apart), "average_pool" (2×2, 2
        apart), "mean" (of each map) or "flatten" ((B, H, W, C) to (B, H · W · C)).
      inputs: names of the layers it reads; "images" is the network's input.
      weight: float; conv (K, K, C, C'), depthwise (K, K, C), dense (C, C'); else None.
      bias: float (C',), where there is a weight.
      stride: of a convolution.
      padding: zeros added at each border of a convolution or of the maximum.
      activation: "", "relu", "relu6" or "tanh".
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    stride: int = 1
    padding: int = 0
    activation: str = ""


class _Folding:
    """Collects a network's layers; every method adds one and returns its name."""

    def __init__(self, model: nnx.Module) -> None:
        self._names = {
            id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)
        }
        self.layers: list[Layer] = []

    def conv(self, x: str, module: Conv | ConvNorm, activation: str = "") -> str:
        conv, norm = (module.conv, module.norm) if isinstance(module, ConvNorm) else (module, None)
        where = {"stride": conv.stride, "padding": conv.padding, "activation": activation}
        return self._weighted("conv", x, conv, conv.bias, norm, **where)

    def depthwise(self, x: str, module: DepthwiseConv, norm: BatchNorm) -> str:
        return self._weighted("depthwise", x, module, None, norm, stride=module.stride, padding=1)

    def dense(self, x: str, module: Dense, activation: str = "") -> str:
        return self._weighted("dense", x, module, module.bias, None, activation=activation)

    def classify(self, x: str, module: Dense) -> str:
        return self.dense(self.plain("mean", x), module)

    def plain(self, kind: str, *inputs: str, activation: str = "", padding: int = 0) -> str:
        name = f"{inputs[0]}.{kind}"
        return self._put(Layer(name, kind, inputs, padding=padding, activation=activation))

    def _weighted(
        self, kind: str, x: str, module: Any, bias: Any, norm: BatchNorm | None, **options: Any
    ) -> str:
        weight = np.asarray(module.weight[...], np.float64)
        shift = np.zeros(weight.shape[-1]) if bias is None else np.asarray(bias[...], np.float64)
        if norm is not None:
            scale, offset, mean, variance = (
                np.asarray(vector[...], np.float64)
                for vector in (norm.scale, norm.bias, norm.mean, norm.variance)
            )
            factor = scale / np.sqrt(variance + norm.epsilon)
            weight, shift = weight * factor, (shift - mean) * factor + offset
            options["activation"] = "relu6" if norm.relu6 else options.get("activation", "")
        arrays = weight.astype(np.float32), shift.astype(np.float32)
        return self._put(Layer(self._names[id(module)], kind, (x,), *arrays, **options))

    def _put(self, layer: Layer) -> str:
        self.layers.append(layer)
        return layer.name


def fold(model: nnx.Module) -> tuple[Layer, ...]:
    """Returns a network's layers in order; the last one gives the logits.

    Args:
      model: a trained network, with the statistics to evaluate with.

    Raises:
      InputError: there is no such form of this network.
    """
    way = next((way for kind, way in _WAYS.items() if isinstance(model, kind)), None)
    if way is None:
        raise InputError(
            f"{type(model).__name__}: cannot be exported; what can: mobilenet_v1, mobilenet_v2, "
            f"lenet5, alexnet, resnet18, resnet34, resnet50"
        )
    folding = _Folding(model)
    way(folding, model)
    return tuple(folding.layers)


def _mobilenet_v1(folding: _Folding, model: MobileNetV1) -> None:
    x = folding.conv(INPUT, model.stem)
    for block in model.blocks:
        x = folding.depthwise(x, block.depthwise, block.norm)
        x = folding.conv(x, block.pointwise)
    folding.classify(x, model.classifier)


def _mobilenet_v2(folding: _Folding, model: MobileNetV2) -> None:
    x = folding.conv(INPUT, model.stem)
    for block in model.blocks:
        y = folding.conv(x, block.expand) if block.expand else x
        y = folding.depthwise(y, block.depthwise, block.norm)
        y = folding.conv(y, block.project)
        x = folding.plain("add", y, x) if block.shortcut else y
    folding.classify(folding.conv(x, model.head), model.classifier)


def _resnet(folding: _Folding, model: ResNet) -> None:
    x = folding.conv(INPUT, model.stem, "relu")
    x = folding.plain("max_pool", x, padding=model.pool.padding)
    for block in model.blocks:
        y = folding.conv(x, block.first, "relu")
        y = folding.conv(y, block.middle, "relu") if hasattr(block, "middle") else y
        y = folding.conv(y, block.last)
        beside = folding.conv(x, block.projection) if block.projection else x
        x = folding.plain("add", y, beside, activation="relu")
    folding.classify(x, model.classifier)


def _lenet5(folding: _Folding, model: LeNet5) -> None:
    x = INPUT
    for conv in (model.conv1, model.conv3):
        x = folding.plain("average_pool", folding.conv(x, conv, "tanh"))
    x = folding.plain("flatten", x)
    for hidden in (model.conv5, model.hidden6):
        x = folding.dense(x, hidden, "tanh")
    folding.dense(x, model.classifier)


def _alexnet(folding: _Folding, model: AlexNet) -> None:
    x = INPUT
    for conv, (_, _, pooled) in zip(model.convolutions, CONVOLUTIONS, strict=True):
        x = folding.conv(x, conv, "relu")
        x = folding.plain("max_pool", x) if pooled else x
    x = folding.plain("flatten", x)
    for hidden in (model.hidden1, model.hidden2):
        x = folding.dense(x, hidden, "relu")
    folding.dense(x, model.classifier)


_WAYS: dict[type, Callable[[_Folding, Any], None]] = {
    MobileNetV1: _mobilenet_v1,
    MobileNetV2: _mobilenet_v2,
    ResNet: _resnet,
    LeNet5: _lenet5,
    AlexNet: _alexnet,
}

Convolve = Callable[[Any, np.ndarray, int, int], Any]


def convolve(x: np.ndarray, weight: np.ndarray, stride: int, padding: int) -> np.ndarray:
    """Returns a convolution, in NumPy.

    Args:
      x: (B, H, W, C).
      weight: (K, K, C, C'), or (K, K, C) for one of each channel by itself.
      stride, padding: see `Layer`.

    >>> x = np.arange(9.0).reshape(1, 3, 3, 1)
    >>> convolve(x, np.ones((3, 3, 1)), stride=2, padding=1)[0, ..., 0].tolist()
    [[8.0, 12.0], [20.0, 24.0]]
    """
    taps = _taps(x, len(weight), stride, padding, np)
    if weight.ndim == 3:
        pairs = zip(taps, weight.reshape(-1, weight.shape[-1]), strict=True)
        return functools.reduce(np.add, (tap * row for tap, row in pairs))
    return np.concatenate(taps, axis=-1) @ weight.reshape(-1, weight.shape[-1])


def run(
    layers: Sequence[Layer], images: Any, array: Any = np, convolution: Convolve = convolve
) -> Any:
    """Returns the logits (B, K), float32; the arithmetic is in the weights' dtype.

    Args:
      layers: from `fold`.
      images: uint8 (B, S, S), ink high.
      array: the module of the array functions, `numpy` or `jax.numpy`.
      convolution: as `convolve`, for these arrays.
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
                y = functools.reduce(array.maximum, _taps(x, 3, 2, layer.padding, array))
            case "average_pool":
                y = functools.reduce(array.add, _taps(x, 2, 2, 0, array)) / 4
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


def _taps(x: Any, kernel: int, stride: int, padding: int, array: Any) -> list[Any]:
    """Returns what each place of a square filter sees of x, zeros around it: kernel² arrays."""
    height, width = x.shape[1:3]
    padded = array.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = (
        (size + 2 * padding - kernel) // stride * stride + 1 for size in (height, width)
    )
    return [
        padded[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]
