"""Layers of the networks, as Flax NNX modules.

A network is called as `network(images, train=False, dropout_keys=None, axis_name=None)`. In
training the batch-norm layers store the statistics of the batch in their `BatchStat` variables; the
training step computes the running averages.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hccr_jax.models.costs import record_cost
from hccr_jax.ops import target
from hccr_jax.ops.batch_norm import batch_norm, batch_norm_train
from hccr_jax.ops.depthwise import depthwise_conv, taps
from hccr_jax.ops.pointwise import pointwise_conv

PATCHES = 32  # inputs of an output up to which a convolution is a product of patches

Initial = Callable[[jax.Array, tuple[int, ...], int, int], jax.Array]


def xavier_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Returns initial weights, float32, uniform in ±√(6 / (fan_in + fan_out)).

    Args:
      key: a concrete key, not one being traced.
      shape: of the weights.
      fan_in, fan_out: inputs per output and outputs per input.

    Source: Glorot and Bengio, AISTATS 2010; the initialisation of the paper's code.
    """
    return _uniform(key, shape, math.sqrt(6.0 / (fan_in + fan_out)))


def he_uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int, fan_out: int) -> jax.Array:
    """Returns initial weights, float32, uniform in ±√(6 / fan_in); arguments as above.

    For ReLU without batch norm: it preserves the variance from layer to layer.

    Source: He et al., https://arxiv.org/abs/1502.01852, section 2.2.
    """
    return _uniform(key, shape, math.sqrt(6.0 / fan_in))


def _uniform(key: jax.Array, shape: tuple[int, ...], limit: float) -> jax.Array:
    """Draws on the host: compiling a program for each of some fifty shapes takes seconds."""
    words = np.asarray(jax.random.key_data(key), np.uint64)
    bits = np.random.Philox(key=words).random_raw(math.prod(shape))
    # Raw bits, because NumPy guarantees no stable stream of any distribution.
    values = ((bits >> np.uint64(11)) * 2.0**-53 * 2.0 - 1.0) * limit
    return jax.device_put(values.reshape(shape).astype(np.float32))


def _filled(size: int, value: float) -> jax.Array:
    return jax.device_put(np.full(size, value, np.float32))  # compiles nothing, as above


class Conv(nnx.Module):
    """A square convolution.

    Args:
      channels_in, channels_out: C of the input and of the output.
      kernel: side of the filter.
      stride: of the filter, along both axes.
      padding: P, zeros added at each border; None for half the kernel.
      bias: whether a bias is added.
      initial: draws the weights: `xavier_uniform` or `he_uniform`.
      dtype: compute dtype; the weights are float32.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, *,
        padding: int | None = None, bias: bool = False, initial: Initial = xavier_uniform,
        dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        shape = (kernel, kernel, channels_in, channels_out)
        area = kernel * kernel
        fans = (area * channels_in, area * channels_out)
        self.weight = nnx.Param(initial(rngs.params(), shape, *fans))
        self.bias = nnx.Param(_filled(channels_out, 0.0)) if bias else None
        self.stride = stride
        self.padding = kernel // 2 if padding is None else padding
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌊(H + 2P − kernel)/stride⌋ + 1, …, C')."""
        kernel, _, channels_in, channels_out = self.weight.shape
        weight, x = self.weight[...].astype(self.dtype), x.astype(self.dtype)
        rows = (x.shape[1] + 2 * self.padding - kernel) // self.stride + 1
        if kernel == 1 and self.stride == 1:
            y = pointwise_conv(x, weight[0, 0])
        elif channels_in * kernel**2 <= PATCHES or (rows < kernel and target.is_cpu()):
            # On a CPU, patches and one matrix product are faster than a convolution of so few
            # inputs; of a filter larger than the map, XLA's takes up to 90 times as long.
            patches = jnp.concatenate(taps(x, kernel, self.stride, self.padding), axis=-1)
            y = pointwise_conv(patches, weight.reshape(-1, channels_out))
        else:
            y = lax.conv_general_dilated(
                x, weight, (self.stride, self.stride), [(self.padding, self.padding)] * 2,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
        positions = y.shape[1] * y.shape[2]
        record_cost(self, f"conv {kernel}×{kernel}/{self.stride}", y, positions * weight.size)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(self.dtype).reshape(1, 1, 1, -1)


class MaxPool(nnx.Module):
    """Overlapping max pooling, 3×3 with stride 2.

    The input has no negative values: a border of `padding` zeros changes no maximum.
    """

    def __init__(self, padding: int = 0) -> None:
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌊(H + 2P − 3)/2⌋ + 1, …, C)."""
        y = functools.reduce(jnp.maximum, taps(x, 3, 2, self.padding))
        record_cost(self, "max pooling 3×3/2", y, 0)
        return y


class AveragePool(nnx.Module):
    """Average pooling, 2×2 with stride 2."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌊H/2⌋, ⌊W/2⌋, C)."""
        y = functools.reduce(jnp.add, taps(x, 2, 2, 0)) / 4
        record_cost(self, "average pooling 2×2/2", y, 0)
        return y


class DepthwiseConv(nnx.Module):
    """A 3×3 depthwise convolution without bias."""

    def __init__(
        self, channels: int, stride: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(xavier_uniform(rngs.params(), (3, 3, channels), 9, 9))
        self.stride = stride
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, C)."""
        weight = self.weight[...].astype(self.dtype)
        y = depthwise_conv(x.astype(self.dtype), weight, self.stride)
        self.record(y)
        return y

    def record(self, y: jax.Array) -> None:
        """Records the cost of y, the layer's output."""
        positions = y.shape[1] * y.shape[2]
        record_cost(self, f"depthwise 3×3/{self.stride}", y, positions * self.weight.size)


class BatchNorm(nnx.Module):
    """Batch normalisation, optionally followed by ReLU6."""

    def __init__(self, channels: int, *, relu6: bool, epsilon: float) -> None:
        self.scale = nnx.Param(_filled(channels, 1.0))
        self.bias = nnx.Param(_filled(channels, 0.0))
        self.mean = nnx.BatchStat(_filled(channels, 0.0))
        self.variance = nnx.BatchStat(_filled(channels, 1.0))
        self.relu6 = relu6
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, train: bool, axis_name: str | None) -> jax.Array:
        """Maps (..., C) to the same shape; in training stores the statistics of the batch."""
        scale, bias = self.scale[...], self.bias[...]
        if train:
            y, mean, variance = batch_norm_train(
                x, scale, bias, self.relu6, self.epsilon, axis_name
            )
            self.mean[...], self.variance[...] = mean, variance
        else:
            mean, variance = self.mean[...], self.variance[...]
            y = batch_norm(x, mean, variance, scale, bias, self.relu6, self.epsilon)
        self.record(y)
        return y

    def record(self, y: jax.Array) -> None:
        """Records the cost of y, the layer's output."""
        record_cost(self, "batch norm" + " + ReLU6" * self.relu6, y, 0)

    def store(self, statistics: jax.Array) -> None:
        """Stores the batch's statistics, rows mean and variance (2, C)."""
        self.mean[...], self.variance[...] = lax.stop_gradient(statistics)

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """Returns scale and bias, (C,)."""
        return self.scale[...], self.bias[...]


class Dense(nnx.Module):
    """Dropout and a dense layer."""

    def __init__(
        self, channels: int, outputs: int, dropout_rate: float = 0.0, *,
        initial: Initial = xavier_uniform, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        shape = (channels, outputs)
        self.weight = nnx.Param(initial(rngs.params(), shape, *shape))
        self.bias = nnx.Param(_filled(outputs, 0.0))
        self.dropout_rate = dropout_rate
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, C) to (B, K) float32.

        `dropout_keys` (B,) has a key per image, so that masks do not depend on the sharding of the
        batch; required only in training with a dropout rate.
        """
        if train and self.dropout_rate > 0:
            keep = 1.0 - self.dropout_rate
            mask = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))
            x = jnp.where(mask(dropout_keys), x / keep, 0.0)
        weight = self.weight[...].astype(self.dtype)
        y = jnp.dot(x.astype(self.dtype), weight, preferred_element_type=jnp.float32)
        record_cost(self, "dense", y, weight.size)
        return y + self.bias[...][None]


class Classifier(Dense):
    """Global average, dropout and a dense layer: feature map to float32 logits."""

    def __call__(
        self, x: jax.Array, train: bool = False, dropout_keys: jax.Array | None = None
    ) -> jax.Array:
        """Maps (B, H, W, C) to (B, K) float32; dropout_keys as in `Dense`."""
        return super().__call__(x.astype(jnp.float32).mean((1, 2)), train, dropout_keys)


class ConvNorm(nnx.Module):
    """Convolution, batch norm and optional ReLU6."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, *,
        relu6: bool = True, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.conv = Conv(channels_in, channels_out, kernel, stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(channels_out, relu6=relu6, epsilon=epsilon)

    def __call__(self, x: jax.Array, train: bool, axis_name: str | None) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, C')."""
        return self.norm(self.conv(x), train, axis_name)
