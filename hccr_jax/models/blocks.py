"""The blocks of MobileNet V1 and V2, as Flax NNX modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.layers import BatchNorm, ConvNorm, DepthwiseConv
from hccr_jax.ops.depthwise_block import depthwise_block, depthwise_block_train


def conv_depthwise(
    before: ConvNorm, depthwise: DepthwiseConv, norm: BatchNorm, x: jax.Array, train: bool,
    axis_name: str | None,
) -> jax.Array:  # fmt: skip
    """Returns norm(depthwise(before(x))), fused from the norm of `before` on."""
    hidden = before.conv(x)
    weight, stride = depthwise.weight[...].astype(depthwise.dtype), depthwise.stride
    affine, affine_after, epsilon = before.norm.affine(), norm.affine(), norm.epsilon
    if train:
        y, statistics, statistics_after = depthwise_block_train(
            hidden, affine, weight, affine_after, stride, epsilon, axis_name
        )
        before.norm.mean[...], before.norm.variance[...] = statistics
        norm.mean[...], norm.variance[...] = statistics_after
    else:
        statistics = before.norm.mean[...], before.norm.variance[...]
        statistics_after = norm.mean[...], norm.variance[...]
        y = depthwise_block(
            hidden, statistics, affine, weight, statistics_after, affine_after, stride, epsilon
        )
    before.norm.record(hidden)
    depthwise.record(y)
    norm.record(y)
    return y


class DepthwiseSeparable(nnx.Module):
    """MobileNet V1's block: depthwise 3×3 and pointwise 1×1, each with batch norm and ReLU6.

    Source: section 3.1 and Figure 8 of the paper; https://arxiv.org/abs/1704.04861.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, *,
        epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        self.depthwise = DepthwiseConv(channels_in, stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(channels_in, relu6=True, epsilon=epsilon)
        self.pointwise = ConvNorm(
            channels_in, channels_out, 1, epsilon=epsilon, dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: jax.Array, before: ConvNorm, train: bool, axis_name: str | None
    ) -> jax.Array:
        """Maps the input of `before`, the preceding layer, to that of `pointwise`.

        `pointwise` itself is computed in the next block: a convolution is fused with the depthwise
        one after it (`conv_depthwise`).
        """
        return conv_depthwise(before, self.depthwise, self.norm, x, train, axis_name)


class InvertedResidual(nnx.Module):
    """MobileNet V2's block: expand 1×1, depthwise 3×3, linear project 1×1, and a shortcut.

    The shortcut exists where input and output have the same shape; an expansion of 1 has no
    expanding layer.

    Source: section 4.2 and Table 2 of the paper; https://arxiv.org/abs/1801.04381.
    """

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, expansion: int, *,
        epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs,
    ) -> None:  # fmt: skip
        common: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype, "rngs": rngs}
        hidden = channels_in * expansion
        self.expand = ConvNorm(channels_in, hidden, 1, **common) if expansion > 1 else None
        self.depthwise = DepthwiseConv(hidden, stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(hidden, relu6=True, epsilon=epsilon)
        self.project = ConvNorm(hidden, channels_out, 1, relu6=False, **common)
        self.shortcut = stride == 1 and channels_in == channels_out

    def __call__(
        self, x: jax.Array, train: bool, axis_name: str | None, stem: ConvNorm | None = None
    ) -> jax.Array:
        """Maps (B, H, W, C) to (B, ⌈H/stride⌉, ⌈W/stride⌉, C').

        A block without an expanding layer accepts `stem`, the preceding layer, and that layer's
        input: the two are faster fused (`conv_depthwise`).
        """
        if stem is not None and self.shortcut:
            x, stem = stem(x, train, axis_name), None  # the shortcut needs the stem's output
        expand = self.expand if stem is None else stem
        if expand is None:
            y = self.norm(self.depthwise(x), train, axis_name)
        else:
            y = conv_depthwise(expand, self.depthwise, self.norm, x, train, axis_name)
        y = self.project(y, train, axis_name)
        return x + y if self.shortcut else y


def scaled_channels(channels: int, width: float) -> int:
    """Returns channels · width rounded to a multiple of 8, at least 8 and 90 % of the product.

    Source: the reference implementation of https://arxiv.org/abs/1801.04381.

    >>> scaled_channels(32, 1.0), scaled_channels(32, 0.35), scaled_channels(24, 0.75)
    (32, 16, 24)
    """
    target = channels * width
    rounded = max(8, int(target + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * target else rounded
