"""1×1 convolution as a matrix product, with its gradients as the fastest products."""

import jax
import jax.numpy as jnp
from jax import lax

from hccr_jax.ops import native

MIN_ROWS = 3  # for each column of the two factors of a weight gradient
MIN_INPUTS = 8


@jax.custom_vjp
def pointwise_conv(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns x @ weight: (..., C) and (C, C') to (..., C').

    The gradient of the weight is a product of the two arrays in their memory layout: by default,
    XLA on a CPU first transposes the output's gradient, which takes longer than the product.
    """
    return x @ weight


def _forward(x: jax.Array, weight: jax.Array):
    return pointwise_conv(x, weight), (x, weight)


def _backward(saved, gradient: jax.Array):
    x, weight = saved
    dx = lax.dot_general(gradient, weight, (((gradient.ndim - 1,), (1,)), ((), ())))
    rows, gradient_rows = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    # The kernel is up to twice as fast as XLA's product where rows are many and columns few.
    tall = len(rows) >= MIN_ROWS * sum(weight.shape) and weight.shape[0] >= MIN_INPUTS
    if tall and native.supports(gradient):
        shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
        return dx, jax.ffi.ffi_call("hccr_weight_gradient", shape)(rows, gradient_rows)
    d_weight = lax.dot_general(
        rows, gradient_rows, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return dx, d_weight.astype(weight.dtype)


pointwise_conv.defvjp(_forward, _backward)
