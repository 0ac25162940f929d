"""Batch norm and ReLU6 before and after a depthwise convolution, as one operation.

Both MobileNets consist of this pattern and 1×1 convolutions. Its cost is memory traffic: in the
fused implementations the normalised input and the gradient of the convolution's output never reach
memory.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hccr_jax.ops import dispatch
from hccr_jax.ops.batch_norm import (
    batch_norm,
    batch_norm_train,
    batch_statistics,
    mean_gradients,
    norm_gradient_sums,
    over_devices,
)
from hccr_jax.ops.depthwise import depthwise_conv, out_shape

Vectors = tuple[jax.Array, jax.Array]


def depthwise_block(
    x: jax.Array, statistics: Vectors, affine: Vectors, weight: jax.Array,
    statistics_after: Vectors, affine_after: Vectors, stride: int, epsilon: float,
) -> jax.Array:  # fmt: skip
    """Returns x after batch norm, ReLU6, depthwise 3×3 convolution, batch norm and ReLU6.

    Args:
      x: (B, H, W, C) float.
      statistics, statistics_after: mean and variance, float32 (C,), of the two norms.
      affine, affine_after: scale and bias, float32 (C,), of the two norms.
      weight: (3, 3, C), of x's dtype.
      stride: of the convolution, 1 or 2.
      epsilon: constant added to the variances.

    Returns:
      (B, ⌈H/stride⌉, ⌈W/stride⌉, C) like x.
    """
    implementation = dispatch.choose(x, stride)
    if implementation != "kernels":
        active = batch_norm(x, *statistics, *affine, True, epsilon)
        y = depthwise_conv(active, weight, stride, _unfused(implementation))
        return batch_norm(y, *statistics_after, *affine_after, True, epsilon)
    call = jax.ffi.ffi_call("hccr_block_inference", _like(out_shape(x, stride)))
    norm = _rows(statistics, affine, epsilon)
    norm_after = _rows(statistics_after, affine_after, epsilon)
    return call(x, norm, weight, norm_after, stride=np.int64(stride))


def depthwise_block_train(
    x: jax.Array, affine: Vectors, weight: jax.Array,
    affine_after: Vectors, stride: int, epsilon: float, axis_name: str | None,
    implementation: str | None = None,
) -> tuple[jax.Array, Vectors, Vectors]:  # fmt: skip
    """Returns `depthwise_block` of x with the statistics of the batch, and those statistics.

    Args:
      axis_name: mesh axis over which the batch is sharded, or None.
      x, affine, weight, affine_after, stride, epsilon: as in `depthwise_block`.
      implementation: one of `dispatch.available(x)`; None for `dispatch.choose`.

    Returns:
      The block's output; mean and variance before and after the convolution, through which no
      gradient flows.
    """
    implementation = implementation or dispatch.choose(x, stride)
    if implementation not in FUSED:
        active, mean, variance = batch_norm_train(x, *affine, True, epsilon, axis_name)
        y = depthwise_conv(active, weight, stride, implementation)
        out, *after = batch_norm_train(y, *affine_after, True, epsilon, axis_name)
        return out, (mean, variance), (after[0], after[1])
    statistics = batch_statistics(x, axis_name)
    norm = _rows(statistics, affine, epsilon)
    out, *after = _block(x, norm, weight, *affine_after, stride, epsilon, axis_name, implementation)
    return out, lax.stop_gradient(statistics), (after[0], after[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _block(x, norm, weight, scale, bias, stride, epsilon, axis_name, implementation):
    return _forward(x, norm, weight, scale, bias, stride, epsilon, axis_name, implementation)[0]


def _forward(x, norm, weight, scale, bias, stride, epsilon, axis_name, implementation):
    y, mean, variance = FUSED[implementation][0](x, norm, weight, stride)
    mean, variance = over_devices(mean, variance, axis_name)
    out = batch_norm(y, mean, variance, scale, bias, True, epsilon)
    return (out, mean, variance), (x, norm, weight, y, mean, variance, scale, bias)


def _backward(stride, epsilon, axis_name, implementation, saved, gradients):
    x, norm, weight, y, mean, variance, scale, bias = saved
    gradient = gradients[0]
    inverse = lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    d_bias, d_scale = norm_gradient_sums(y, gradient, mean, inverse, scale, bias, True)
    mean_bias, mean_scale = mean_gradients((d_bias, d_scale), y, axis_name)
    # The gradient of y is slope · passed − p − q · (y − mean), where `passed` is behind ReLU6.
    p, q = slope * mean_bias, slope * inverse * mean_scale
    norm_after = jnp.stack([mean, slope, bias, p, q])
    dx, sums = FUSED[implementation][1](x, norm, weight, y, norm_after, gradient, stride)
    d_norm = jnp.stack([-norm[1] * sums[9], sums[10], sums[9]])
    d_weight = sums[:9].reshape(weight.shape).astype(weight.dtype)
    return dx, d_norm, d_weight, d_scale, d_bias


_block.defvjp(_forward, _backward)


def _kernel_forward(x, norm, weight, stride):
    channel = _like(norm.shape[1:])
    call = jax.ffi.ffi_call("hccr_block_forward", (_like(out_shape(x, stride)), channel, channel))
    return call(x, norm, weight, stride=np.int64(stride))


def _kernel_backward(x, norm, weight, y, norm_after, gradient, stride):
    call = jax.ffi.ffi_call("hccr_block_backward", (_like(x.shape), _like((11, x.shape[-1]))))
    return call(x, norm, weight, y, norm_after, gradient, stride=np.int64(stride))


def _pallas_forward(*arguments):
    from hccr_jax.ops import depthwise_pallas  # Pallas takes a tenth of a second to import

    return depthwise_pallas.block_forward(*arguments)


def _pallas_backward(*arguments):
    from hccr_jax.ops import depthwise_pallas

    return depthwise_pallas.block_backward(*arguments)


# Of each fused implementation: norm and convolution, and the gradients of the whole block.
FUSED = {
    "kernels": (_kernel_forward, _kernel_backward),
    "pallas": (_pallas_forward, _pallas_backward),
}


def _unfused(implementation: str) -> str | None:
    return None if implementation in FUSED else implementation


def _rows(statistics: Vectors, affine: Vectors, epsilon: float) -> jax.Array:
    """Returns mean, slope and bias (3, C) of (x − mean) · slope + bias."""
    (mean, variance), (scale, bias) = statistics, affine
    return jnp.stack([mean, scale * lax.rsqrt(variance + epsilon), bias])


def _like(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
