"""Batch normalisation and the activation after it, as one operation with a closed-form gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hccr_jax.ops import native, target

RELU6_LIMIT = 6.0


def batch_norm(
    x: jax.Array, mean: jax.Array, variance: jax.Array, scale: jax.Array, bias: jax.Array,
    relu6: bool, epsilon: float,
) -> jax.Array:  # fmt: skip
    """Returns x normalised with given statistics, scaled, shifted and optionally clipped to [0, 6].

    Args:
      x: (..., C), any float dtype; the arithmetic is float32, the result has x's dtype.
      mean, variance, scale, bias: float32 (C,).
      relu6: whether to apply ReLU6.
      epsilon: constant added to the variance.

    >>> one = jnp.ones(1)
    >>> batch_norm(jnp.array([[1.0], [9.0]]), one, one, one, one, relu6=True, epsilon=0.0).tolist()
    [[1.0], [6.0]]
    """
    factor = scale * lax.rsqrt(variance + epsilon)
    return _activate(_affine(x, factor, bias - mean * factor), relu6).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def batch_norm_train(
    x: jax.Array, scale: jax.Array, bias: jax.Array,
    relu6: bool, epsilon: float, axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Returns `batch_norm` of x with the statistics of the batch, and those statistics.

    Args:
      x: (..., C); statistics are over all axes but the last.
      scale, bias: float32 (C,).
      relu6, epsilon: as in `batch_norm`.
      axis_name: mesh axis over which the batch is sharded, or None; every device has the statistics
        of the whole batch.

    Returns:
      y like x; mean and biased variance, float32 (C,), for the running averages: no gradient flows
      through these two.

    Source: Ioffe and Szegedy, https://arxiv.org/abs/1502.03167, section 3 for the gradient.
    """
    mean, variance = batch_statistics(x, axis_name)
    return batch_norm(x, mean, variance, scale, bias, relu6, epsilon), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def batch_statistics(x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance of x (..., C) over all axes but the last, float32 (C,)."""
    channel = jax.ShapeDtypeStruct((x.shape[-1],), jnp.float32)
    if native.supports(x):
        mean, variance = jax.ffi.ffi_call("hccr_batch_statistics", (channel, channel))(x)
    elif target.is_cpu():
        wide = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        mean = wide.mean(axes)
        variance = jnp.square(wide - _row(mean, x)).mean(axes)
    else:
        mean, variance = one_pass_statistics(x)
    return over_devices(mean, variance, axis_name)


def one_pass_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of x (..., C), which is read once.

    The sums are about a pivot, the channel's first value, so that no digits are lost unless that is
    many standard deviations from the mean.
    """
    axes = tuple(range(x.ndim - 1))
    pivot = x.reshape(-1, x.shape[-1])[0].astype(jnp.float32)
    away = x.astype(jnp.float32) - _row(pivot, x)
    offset, square = away.mean(axes), jnp.square(away).mean(axes)
    return pivot + offset, jnp.maximum(square - jnp.square(offset), 0.0)


def over_devices(
    mean: jax.Array, variance: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Returns mean and variance of the whole batch from those of each device's equal shard.

    In one exchange: variances are about the device's own mean, so their sum needs all means.
    """
    if axis_name is None:
        return mean, variance
    means, variances = jnp.moveaxis(lax.all_gather(jnp.stack([mean, variance]), axis_name), 1, 0)
    whole = means.mean(0)
    return whole, (variances + jnp.square(means - whole[None])).mean(0)


def _statistics_forward(x, axis_name):
    mean, variance = batch_statistics(x, axis_name)
    return (mean, variance), (x, mean)


def _statistics_backward(axis_name, saved, gradients):
    x, mean = saved
    d_mean, d_variance = mean_gradients(gradients, x, axis_name)
    dx = _affine(x, 2.0 * d_variance, d_mean - 2.0 * d_variance * mean)
    return (dx.astype(x.dtype),)


batch_statistics.defvjp(_statistics_forward, _statistics_backward)


def mean_gradients(
    gradients: tuple[jax.Array, jax.Array], x: jax.Array, axis_name: str | None
) -> list[jax.Array]:
    """Returns the gradients of two means over the whole batch, divided by its number of rows."""
    count = x.size // x.shape[-1]
    if axis_name is not None:
        first, second = lax.psum(jnp.stack(gradients), axis_name)  # one reduction
        gradients = first, second
        count *= lax.axis_size(axis_name)
    return [gradient / count for gradient in gradients]


def _forward(x, scale, bias, relu6, epsilon, axis_name):
    y, mean, variance = batch_norm_train(x, scale, bias, relu6, epsilon, axis_name)
    return (y, mean, variance), (x, scale, bias, mean, lax.rsqrt(variance + epsilon))


def _backward(relu6, epsilon, axis_name, saved, gradients):
    x, scale, bias, mean, inverse = saved
    gradient = gradients[0]
    d_bias, d_scale = norm_gradient_sums(x, gradient, mean, inverse, scale, bias, relu6)
    mean_bias, mean_scale = mean_gradients((d_bias, d_scale), x, axis_name)
    normalized, passed = _passed(x, gradient, mean, inverse, scale, bias, relu6)
    dx = _row(scale * inverse, x) * (passed - _affine(normalized, mean_scale, mean_bias))
    return dx.astype(x.dtype), d_scale, d_bias


def norm_gradient_sums(
    x: jax.Array, gradient: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array,
    bias: jax.Array, relu6: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of batch norm's bias and scale, float32 (C,), from its output's."""
    if native.supports(x):
        channel = jax.ShapeDtypeStruct((x.shape[-1],), jnp.float32)
        call = jax.ffi.ffi_call("hccr_norm_gradient_sums", (channel, channel))
        limit = np.float32(RELU6_LIMIT if relu6 else 0.0)
        d_bias, d_scale = call(x, gradient, mean, inverse, scale, bias, limit=limit)
        return d_bias, d_scale
    normalized, passed = _passed(x, gradient, mean, inverse, scale, bias, relu6)
    axes = tuple(range(x.ndim - 1))
    return passed.sum(axes), (passed * normalized).sum(axes)


def _passed(x, gradient, mean, inverse, scale, bias, relu6):
    """Returns the normalised x and the gradient behind the activation, float32."""
    normalized = _affine(x, inverse, -mean * inverse)
    passed = gradient.astype(jnp.float32)
    if relu6:
        scaled = _affine(normalized, scale, bias)
        passed = jnp.where((scaled > 0) & (scaled < RELU6_LIMIT), passed, 0.0)
    return normalized, passed


batch_norm_train.defvjp(_forward, _backward)


def _row(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) * _row(factor, x) + _row(offset, x)


def _activate(x: jax.Array, relu6: bool) -> jax.Array:
    return jnp.clip(x, 0.0, RELU6_LIMIT) if relu6 else x
