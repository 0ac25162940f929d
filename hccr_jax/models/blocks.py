"""The blocks of MobileNet V1 and V2, as Flax NNX modules."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.models.layers import PATCHES, BatchNorm, ConvNorm, DepthwiseConv
from hccr_jax.models.packing import exact, place_of
from hccr_jax.ops import dispatch
from hccr_jax.ops.depthwise import taps
from hccr_jax.ops.depthwise_block import depthwise_block, depthwise_block_train

if TYPE_CHECKING:
    from hccr_jax.ops.blocks import Hidden


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


def fuses(before: ConvNorm, train: bool) -> bool:
    """Returns whether a block after this layer runs as kernels of whole blocks."""
    kernel, _, channels_in, _ = before.conv.weight.shape
    product = kernel == 1 or channels_in * kernel**2 <= PATCHES
    return train and product and dispatch.fuses_blocks()


def _for_kernels(params: Any, dtype: Any, shapes: Any) -> tuple[Any, Any]:
    """Returns parameters as float32 arrays of some shapes, and as kernels read them in place."""
    from hccr_jax.ops.pallas import Weight

    arrays = tuple(exact(p).reshape(shape) for p, shape in zip(params, shapes, strict=True))
    dtypes = [dtype if len(shape) > 1 else jnp.float32 for shape in shapes]
    places = (place_of(param, kind) for param, kind in zip(params, dtypes, strict=True))
    return arrays, tuple(
        Weight.at(*place, shape) for place, shape in zip(places, shapes, strict=True)
    )


def hidden_map(
    layer: ConvNorm, x: jax.Array, axis_name: str | None, wants_input: bool = True,
    shortcut: bool = False,
) -> Any:  # fmt: skip
    """Returns a layer's output before its norm, `Hidden`, and stores the statistics of the batch.

    Args:
      layer: `fuses` blocks.
      x: (B, H, W, C), its input.
      axis_name: mesh axis over which the batch is sharded, or None.
      wants_input: whether the gradient of x is needed.
      shortcut: whether x, for a shortcut, is returned too.
    """
    from hccr_jax.ops import blocks  # Pallas takes a tenth of a second to import

    conv, norm = layer.conv, layer.norm
    x, kernel = x.astype(conv.dtype), conv.weight.shape[0]
    if kernel > 1:
        x = jnp.concatenate(taps(x, kernel, conv.stride, conv.padding), axis=-1)
    width = conv.weight.shape[-1]
    shape = conv.weight.size // width, width
    params = (conv.weight, norm.scale, norm.bias)
    parameters, weights = _for_kernels(params, conv.dtype, [shape, (width,), (width,)])
    options = blocks.Options(
        norm.epsilon, axis_name, wants_input=wants_input, shortcut=shortcut
    )  # fmt: skip
    out = blocks.pointwise(x, parameters, weights, options)
    norm.store((out[0] if shortcut else out).statistics)
    return out


def hidden_block(
    hidden: "Hidden", before: BatchNorm, depthwise: DepthwiseConv, norm: BatchNorm,
    product: ConvNorm, axis_name: str | None, shortcut: jax.Array | None = None,
) -> Any:  # fmt: skip
    """Returns product(norm(depthwise(before(hidden)))), and stores the statistics of the batch.

    The result is a `Hidden` where the norm of `product` has an activation, as MobileNet V1's has:
    it is left to the next block. A linear norm is applied, and the shortcut added.
    """
    from hccr_jax.ops import blocks

    linear = not product.norm.relu6
    options = blocks.Options(before.epsilon, axis_name, stride=depthwise.stride, linear=linear)
    last, dtype = product.conv.weight, product.conv.dtype
    params = (
        before.scale, before.bias, depthwise.weight, norm.scale, norm.bias, last,
        product.norm.scale, product.norm.bias,
    )  # fmt: skip
    shapes = [param.shape if param is not last else param.shape[2:] for param in params]
    parameters, weights = _for_kernels(params, dtype, shapes)
    out, *statistics = blocks.block(hidden, shortcut, parameters, weights, options)
    norm.store(statistics[0])
    product.norm.store(statistics[1])
    return out


def activated(hidden: "Hidden", norm: BatchNorm) -> jax.Array:
    """Returns the output of the layer that `hidden` is of."""
    from hccr_jax.ops import blocks

    return blocks.activate(hidden, *norm.affine(), norm.epsilon)


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

    def fused(self, hidden: "Hidden", before: ConvNorm, axis_name: str | None) -> "Hidden":
        """Maps the hidden map of `before` to that of `pointwise`, in training."""
        return hidden_block(
            hidden, before.norm, self.depthwise, self.norm, self.pointwise, axis_name
        )


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
        if expand is not None and fuses(expand, train):
            hidden = hidden_map(expand, x, axis_name, stem is None, self.shortcut)
            hidden, shortcut = hidden if self.shortcut else (hidden, None)
            return hidden_block(
                hidden, expand.norm, self.depthwise, self.norm, self.project, axis_name, shortcut
            )
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
