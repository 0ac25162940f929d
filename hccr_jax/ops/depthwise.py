"""3×3 depthwise convolution, in two implementations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hccr_jax.ops import target


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
    x: jax.Array, weight: jax.Array, stride: int = 1, implementation: str | None = None
) -> jax.Array:
    """Returns the 3×3 depthwise convolution of x with one pixel of zero padding.

    Args:
      x: (B, H, W, C) float.
      weight: (3, 3, C), of the same dtype.
      stride: 1 or 2, along both axes.
      implementation: "grouped" or "shifted", see `dispatch`; None for "shifted" on a CPU and
        "grouped" elsewhere.

    Returns:
      (B, ⌈H/stride⌉, ⌈W/stride⌉, C): out[h, w] = Σ_ij x[h·stride+i−1, w·stride+j−1] · weight[i, j].

    Source: section 3.1 of the paper; equal to `lax.conv_general_dilated` with
    `feature_group_count=C`, which XLA runs many times slower on a CPU.
    """
    if _is_shifted(implementation):
        return shifted_sum(x, weight, stride)
    return grouped_conv(x, weight, stride)


def _is_shifted(implementation: str | None) -> bool:
    return implementation == "shifted" or (implementation is None and target.is_cpu())


def _forward(x: jax.Array, weight: jax.Array, stride: int, implementation: str | None):
    return depthwise_conv(x, weight, stride, implementation), (x, weight)


def _backward(stride: int, implementation: str | None, saved, gradient: jax.Array):
    x, weight = saved
    if _is_shifted(implementation):
        return _data_gradient(x, weight, gradient, stride), _weight_gradient(x, gradient, stride)
    return jax.vjp(lambda x, weight: grouped_conv(x, weight, stride), x, weight)[1](gradient)


depthwise_conv.defvjp(_forward, _backward)


def shifted_sum(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """Returns `depthwise_conv` as the sum of nine shifted products: elementwise, on any device."""
    products = [
        tap * weight[k // 3, k % 3][None, None, None] for k, tap in enumerate(taps(x, 3, stride, 1))
    ]
    return functools.reduce(jnp.add, products)


def taps(x: Any, kernel: int, stride: int, padding: int, array: Any = jnp) -> list[Any]:
    """Returns the inputs of each tap of a square filter, row by row of the filter.

    Args:
      x: (B, H, W, C), an array of the module `array`: `jax.numpy` or `numpy`.
      kernel: side of the filter.
      stride: step of the filter along both axes.
      padding: zeros added at each border.

    Returns:
      kernel² arrays (B, ⌊(H + 2 · padding − kernel)/stride⌋ + 1, …, C).
    """
    padded = array.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    rows, columns = ((size + 2 * padding - kernel) // stride * stride + 1 for size in x.shape[1:3])
    return [
        padded[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(kernel)
        for j in range(kernel)
    ]


def _data_gradient(x: jax.Array, weight: jax.Array, gradient: jax.Array, stride: int) -> jax.Array:
    """Returns the gradient of x: the output's, dilated, convolved with the flipped filter."""
    bottom, right = (x.shape[a] - (gradient.shape[a] - 1) * stride - 1 for a in (1, 2))
    spread = [(0, 0, 0), (0, bottom, stride - 1), (0, right, stride - 1), (0, 0, 0)]
    spaced = lax.pad(gradient, jnp.zeros((), gradient.dtype), spread)
    return shifted_sum(spaced, weight[::-1, ::-1], 1)


def _weight_gradient(x: jax.Array, gradient: jax.Array, stride: int) -> jax.Array:
    """Returns the gradient of the weights, (3, 3, C).

    On a CPU image by image, since one image fits the cache; on other devices, which that would not
    fill, in nine sums over the whole batch.
    """

    def sums(x: jax.Array, gradient: jax.Array) -> jax.Array:
        products = (tap * gradient for tap in taps(x, 3, stride, 1))
        return jnp.stack([product.sum((0, 1, 2), dtype=jnp.float32) for product in products])

    def add(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        image, image_gradient = pair
        return total + sums(image[None], image_gradient[None]), None

    if target.is_cpu():
        total, _ = lax.scan(add, jnp.zeros((9, x.shape[-1]), jnp.float32), (x, gradient))
    else:
        total = sums(x, gradient)
    return total.astype(gradient.dtype).reshape(3, 3, -1)


def grouped_conv(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    """Returns `depthwise_conv` as XLA's grouped convolution."""
    return lax.conv_general_dilated(
        x,
        weight[:, :, None, :],
        window_strides=(stride, stride),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def out_shape(x: jax.Array, stride: int) -> tuple[int, int, int, int]:
    """Returns the shape of `depthwise_conv`'s result."""
    batch, height, width, channels = x.shape
    return batch, (height - 1) // stride + 1, (width - 1) // stride + 1, channels
