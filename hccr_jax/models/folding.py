"""A trained network as a plain list of layers, batch norms folded into the convolutions.

A convolution followed by a batch norm with fixed statistics is a convolution with a bias. What is
left needs no framework: every layer is a record of NumPy arrays and numbers, from which
`hccr_jax.export` writes files. Each network's `fold` method adds its layers in order.
"""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx

from hccr_jax.models.layers import BatchNorm, Conv, ConvNorm, Dense, DepthwiseConv

INPUT = "images"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer; its name is also that of its output.

    Attributes:
      name: path of the module in the network.
      kind: "conv", "depthwise", "dense", "add", "max_pool" (3×3, stride 2), "average_pool" (2×2,
        stride 2), "mean" (of each map) or "flatten" ((B, H, W, C) to (B, H · W · C)).
      inputs: names of the layers it takes; "images" is the network's input.
      weight: float; conv (K, K, C, C'), depthwise (K, K, C), dense (C, C'); else None.
      bias: float (C',), where there is a weight.
      stride: of a convolution.
      padding: zeros added at each border by a convolution or a maximum.
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


class Folding:
    """Collects a network's layers; every method adds one to its inputs and returns its name."""

    def __init__(self, model: nnx.Module) -> None:
        self._names = {
            id(module): ".".join(map(str, path)) for path, module in nnx.iter_modules(model)
        }
        self.layers: list[Layer] = []

    def conv(self, x: str, module: Conv | ConvNorm, activation: str = "") -> str:
        """Adds a convolution, with its batch norm where it has one."""
        conv, norm = (module.conv, module.norm) if isinstance(module, ConvNorm) else (module, None)
        options = {"stride": conv.stride, "padding": conv.padding, "activation": activation}
        return self._weighted("conv", x, conv, conv.bias, norm, **options)

    def depthwise(self, x: str, module: DepthwiseConv, norm: BatchNorm) -> str:
        """Adds a depthwise convolution with its batch norm."""
        return self._weighted("depthwise", x, module, None, norm, stride=module.stride, padding=1)

    def dense(self, x: str, module: Dense, activation: str = "") -> str:
        """Adds a dense layer."""
        return self._weighted("dense", x, module, module.bias, None, activation=activation)

    def classifier(self, x: str, module: Dense) -> str:
        """Adds the mean of each map and a dense layer: `layers.Classifier`."""
        return self.dense(self.unweighted("mean", x), module)

    def unweighted(self, kind: str, *inputs: str, activation: str = "", padding: int = 0) -> str:
        """Adds a layer without weights."""
        name = f"{inputs[0]}.{kind}"
        return self._append(Layer(name, kind, inputs, padding=padding, activation=activation))

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
        return self._append(Layer(self._names[id(module)], kind, (x,), *arrays, **options))

    def _append(self, layer: Layer) -> str:
        self.layers.append(layer)
        return layer.name
