"""Whole blocks of both MobileNets in training, as Pallas kernels for NVIDIA GPUs.

The cost of a block is its memory traffic and, in small batches, its launches. Each product and each
depthwise convolution takes ReLU6 and the batch norm before it along, and moments of what it
stores, so that a map is stored once, as it was before its norm, and loaded once by the next
kernel. On the way back the gradient of a product's output is nowhere stored either
(`product_gradients`). What flows through the statistics of MobileNet V2's wide maps would be an
addition over each; as such a map is the product of a narrow one, the kernel computes it again.

With batch norm over several devices there are two collectives a norm, which depend on one another:
its statistics forward, their gradients backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hccr_jax.ops import depthwise_pallas, one_pass_gradients, product_gradients, products, sums
from hccr_jax.ops.pallas import RELU6_LIMIT
from hccr_jax.ops.product_gradients import OutputGradient

# Both gradients in one pass, up to so many columns or inputs: more do not fit the registers.
NARROW_OUTPUT = 64
NARROW_INPUT = 32


class Hidden(NamedTuple):
    """The output of a product before its batch norm.

    Attributes:
      y: (B, H, W, C).
      statistics: float32 (2, C), mean and biased variance of y.
      norm: float32 (3, C), rows mean, slope and bias of the norm. It follows from the statistics
        and the norm's parameters, through which alone gradients flow.
    """

    y: jax.Array
    statistics: jax.Array
    norm: jax.Array


class Options(NamedTuple):
    """What a block is compiled for.

    Attributes:
      epsilon: constant added to the variances.
      axis_name: mesh axis over which batch norm takes its statistics, or None.
      stride: of the depthwise convolution.
      linear: whether the last norm, without an activation, belongs to the block.
      wants_input: whether the gradient of the input of a `pointwise` is needed.
      shortcut: whether there is one around a `pointwise` and its block.
    """

    epsilon: float
    axis_name: str | None
    stride: int = 1
    linear: bool = False
    wants_input: bool = True
    shortcut: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def pointwise(x: jax.Array, parameters: Any, weights: Any, options: Options) -> Any:
    """Returns the product of x and a matrix, with statistics of the result.

    Args:
      x: (B, H, W, K) float.
      parameters: float32; the matrix (K, C), and scale and bias (C,) of the norm that follows.
      weights: the same parameters as kernels read them, each a `Weight`; matrices and filters in
        the dtype of x. No gradient flows through them.
      options: see there.

    Returns:
      `Hidden`; with a shortcut also x, for the shortcut to begin at, so that the two gradients of x
      are added in the kernel.
    """
    return _pointwise_forward(x, parameters, weights, options)[0]


def _pointwise_forward(x, parameters, weights, options):
    weight, scale, bias = weights
    hidden = _product(x, None, weight, scale, bias, options)
    return (hidden, x) if options.shortcut else hidden, (x, weight, hidden)


def _pointwise_backward(options, saved, gradient):
    x, weight, hidden = saved
    gradient, *shortcut = gradient if options.shortcut else (gradient,)
    shortcut = _rows(shortcut[0]) if shortcut else None
    g, d_statistics = _rows(gradient.y), _sum(gradient.statistics, options)
    rows, count = _rows(x), _count(x, options)
    if x.shape[-1] <= NARROW_INPUT:
        d_x, parts = one_pass_gradients.wide_gradients(
            rows, weight, g, hidden.statistics, d_statistics, count, options.wants_input, shortcut
        )
    else:
        after = OutputGradient(g, _rows(hidden.y), hidden.statistics, d_statistics, None)
        d_x, _ = product_gradients.input_gradient(after, weight, count, None, shortcut)
        parts = product_gradients.weight_gradient(rows, None, after, count)
    d_x = jnp.zeros_like(x) if d_x is None else d_x.reshape(x.shape)
    return d_x, (sums.sum_parts(parts), *_no_gradient(hidden)), None


def _no_gradient(hidden):
    """Returns gradients of scale and bias: they only shape `Hidden.norm`."""
    return (jnp.zeros_like(hidden.statistics[0]),) * 2


pointwise.defvjp(_pointwise_forward, _pointwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block(
    hidden: Hidden, shortcut: jax.Array | None, parameters: Any, weights: Any,
    options: Options,
) -> tuple[Any, jax.Array, jax.Array]:  # fmt: skip
    """Returns norm, ReLU6, depthwise 3×3, norm, ReLU6 and a product, of some hidden map.

    Args:
      hidden: (B, H, W, E), of a product.
      shortcut: like the output, is added to it; or None. Only of a linear block.
      parameters: float32; scale and bias (E,) of the norm of `hidden`; the filters (3, 3, E); scale
        and bias (E,) of their norm; the matrix (E, C); scale and bias (C,) of its norm.
      weights, options: as for `pointwise`.

    Returns:
      (B, ⌈H/stride⌉, ⌈W/stride⌉, C), normalised, of a linear block; else the `Hidden` of the
      product. Statistics, float32 (2, …), of the depthwise convolution and of the product; through
      these no gradient flows.
    """
    return _block_forward(hidden, shortcut, parameters, weights, options)[0]


def _block_forward(hidden, shortcut, parameters, weights, options):
    _, _, filters, scale, bias, matrix, last_scale, last_bias = weights
    x, stride = hidden.y, options.stride
    u, moments = depthwise_pallas.forward(x, hidden.norm, filters, stride)
    each = depthwise_pallas.images_each(u.shape) * u.shape[1] * u.shape[2]
    norm, statistics = _statistics(moments, each, u, scale, bias, options)
    after = _product(u, norm, matrix, last_scale, last_bias, options)
    saved = hidden, u, norm, statistics, filters, matrix, after, shortcut is not None
    out = after
    if options.linear:
        mean, slope, bias = (row[None, None, None] for row in after.norm)
        out = ((after.y.astype(jnp.float32) - mean) * slope + bias).astype(x.dtype)
        out = out if shortcut is None else shortcut + out
    return (out, statistics, after.statistics), saved


def _block_backward(options, saved, gradients):
    hidden, u, norm, statistics, filters, matrix, after, has_shortcut = saved
    epsilon, count = options.epsilon, _count(u, options)
    if options.linear:
        g, slope = gradients[0], after.norm
        found = sums.gradient_sums(_rows(g), _rows(after.y), after.norm)
        d_last, flow = sums.finish_gradients(found, after.norm, after.statistics, epsilon)
        d_last = (d_last[1], d_last[0])
    else:
        g, flow, slope = gradients[0].y, gradients[0].statistics, None
        d_last = _no_gradient(after)
    flow = _sum(flow, options)
    of_y = OutputGradient(_rows(g), _rows(after.y), after.statistics, flow, slope)
    passed, found, parts = _product_gradients(_rows(u), norm, of_y, matrix, count)
    d_norm, flow, d_matrix = sums.finish_gradients(found, norm, statistics, epsilon, parts)
    d_x, found = depthwise_pallas.backward(
        hidden.y, hidden.norm, filters, u, norm, _sum(flow, options), passed.reshape(u.shape),
        options.stride, count,
    )  # fmt: skip
    d_first, flow = sums.finish_gradients(found, hidden.norm, hidden.statistics, epsilon)
    d_parameters = (
        d_first[10], d_first[9], d_first[:9].reshape(filters.shape), d_norm[1], d_norm[0], d_matrix,
        *d_last,
    )  # fmt: skip
    d_hidden = Hidden(d_x, flow, jnp.zeros_like(hidden.norm))
    return d_hidden, g if has_shortcut else None, d_parameters, None


def _product_gradients(u, norm, after, matrix, count):
    if matrix.shape[1] <= NARROW_OUTPUT:
        return one_pass_gradients.narrow_gradients(u, norm, after, matrix, count)
    passed, found = product_gradients.input_gradient(after, matrix, count, (u, norm))
    return passed, found, product_gradients.weight_gradient(u, norm, after, count)


block.defvjp(_block_forward, _block_backward)


def activate(hidden: Hidden, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Returns ReLU6 of a normalised hidden map, with XLA's operations: for the last of a network.

    Args:
      hidden: (B, H, W, C).
      scale, bias: float32 (C,), of its norm.
      epsilon: constant added to the variance.
    """
    mean, variance = (row[None, None, None] for row in hidden.statistics)
    slope = scale[None, None, None] * lax.rsqrt(variance + epsilon)
    scaled = (hidden.y.astype(jnp.float32) - mean) * slope + bias[None, None, None]
    return jnp.clip(scaled, 0.0, RELU6_LIMIT).astype(hidden.y.dtype)


def _product(x, norm, weight, scale, bias, options):
    """Returns the `Hidden` of ReLU6 of normalised x, or of x, times a matrix."""
    rows = _rows(x)
    y, moments = products.product(rows, norm, weight)
    y = y.reshape(*x.shape[:-1], -1)
    each = products.product_rows(len(rows), weight.shape[1]).each
    norm, statistics = _statistics(moments, each, y, scale, bias, options)
    return Hidden(y, statistics, norm)


def _statistics(moments, each, y, scale, bias, options):
    """Returns rows of a norm, and statistics, from the moments of programs, over all devices."""
    finish = functools.partial(sums.finish_moments, scale=scale, bias=bias, epsilon=options.epsilon)
    norm, statistics = finish(moments, each, len(_rows(y)))
    if options.axis_name is None:
        return norm, statistics
    of_all = lax.all_gather(statistics, options.axis_name, axis=1)  # equal shards
    return finish(of_all, 1, of_all.shape[1])


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _count(x: jax.Array, options: Options) -> int:
    """Returns the number of rows over which statistics of x are taken."""
    rows = len(_rows(x))
    return rows if options.axis_name is None else rows * lax.axis_size(options.axis_name)


def _sum(flow: jax.Array, options: Options) -> jax.Array:
    """Returns gradients of statistics, over all devices."""
    return flow if options.axis_name is None else lax.psum(flow, options.axis_name)
