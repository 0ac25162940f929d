"""The fused depthwise block on an NVIDIA GPU, as two Pallas kernels.

As on a CPU, memory traffic is the block's cost, which these kernels reduce. Bytes moved for each
value of x, in bfloat16 and at stride 1:

  forward: 10 as separate operations (norm and ReLU6 4, convolution 4, statistics 2), 4 here;
  backward: 24 as separate operations (gradient of y 6, of the activation 4, of the weights 4,
  norm's sums 4, gradient of x 6), 8 here; the gradient through the statistics of x is left to the
  caller, at most 6 more.

A lane of a program has one channel of a few neighbouring columns and goes down the rows of an
image. The window of its 3×3 filters slides in registers, so a value is loaded and normalised one
and a half times, not nine times, which would cost more than the memory traffic. Each program
writes its sums, without atomics, and XLA adds them: results are deterministic.

On an H200 these kernels are the fastest implementation of every layer of both networks
(`ops/measured/`); the numbers of lanes, columns and warps were not tuned there. `blocks` has their
place among the kernels of whole blocks.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hccr_jax.ops.pallas import ALIGNMENT, RELU6_LIMIT, Weight, call

# Two lanes a thread, loading 4 bytes at once in bfloat16. Compiled for Hopper the kernels then take
# up to 91 and 168 registers a thread; with four lanes the backward kernel's sums fill all 255.
WARPS = 4
LANES = 256
RUN = 4
# A program goes down this many rows if that leaves enough programs to fill a GPU: each loads the
# filters once and writes its sums once.
MIN_ROWS = 32
MIN_PROGRAMS = 1024


@functools.partial(jax.jit, static_argnames="stride")
def block_forward(
    x: jax.Array, norm: jax.Array, weight: jax.Array, stride: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the depthwise 3×3 convolution of ReLU6 of normalised x, and its mean and variance.

    Args:
      x: (B, H, W, C) float.
      norm: (3, C) float32, rows mean, slope and bias: norm is (x − mean) · slope + bias.
      weight: (3, 3, C) float; one pixel of zeros surrounds the activated image.
      stride: 1 or 2.

    Returns:
      y (B, ⌈H/stride⌉, ⌈W/stride⌉, C) like x; the mean and the biased variance of y as stored,
      rounded to its dtype, float32 (C,).

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979), for the merging of means and variances.
    """
    y, (means, squares) = forward(x, norm, Weight.of(weight), stride)
    batch, tiling = len(x), _tiling(y.shape)
    images = np.full((tiling.programs, 1), tiling.passes * tiling.images, np.float32)
    images[-1] = batch - images[:-1].sum()
    mean = (images / batch * means).sum(0)
    count = np.float32(y.shape[1] * y.shape[2])
    spread = squares + count * images * jnp.square(means - mean[None])
    return y, mean, spread.sum(0) / (count * batch)


@functools.partial(jax.jit, static_argnames="stride")
def forward(
    x: jax.Array, norm: jax.Array, weight: Weight, stride: int
) -> tuple[jax.Array, jax.Array]:
    """Returns y as `block_forward` does, and moments of the images of each program.

    These are float32 (2, P, C), means and sums of squared deviations of y as stored, of
    `images_each` images, fewer in the last.
    """
    y = jax.ShapeDtypeStruct(_out_shape(x.shape, stride), x.dtype)
    tiling = _tiling(y.shape)
    moments = jax.ShapeDtypeStruct((2, tiling.programs, x.shape[-1]), jnp.float32)
    return _call(_forward_kernel, tiling, stride, (y, moments), x, norm, weight)


def images_each(shape: tuple[int, ...]) -> int:
    """Returns the images of each program but the last, for y of this shape."""
    tiling = _tiling(shape)
    return tiling.passes * tiling.images


@functools.partial(jax.jit, static_argnames="stride")
def block_backward(
    x: jax.Array, norm: jax.Array, weight: jax.Array,
    y: jax.Array, norm_after: jax.Array, gradient: jax.Array, stride: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradients of the block: norm, ReLU6, convolution, norm and ReLU6.

    Args:
      x, norm, weight, stride: as in `block_forward`.
      y: its first result.
      norm_after: (5, C) float32: mean, slope and bias of the norm of y; p and q of y's gradient,
        slope · passed − p − q · (y − mean), where passed is `gradient` behind ReLU6.
      gradient: of the block's output, like y.

    Returns:
      The gradient of x, with the statistics of its norm held fixed, like x; float32 (11, C): the
      gradients of the nine weights, of the first norm's bias and of its slope.
    """
    # The kernel has gradients of mean and variance in place of p and q.
    flow = jnp.stack([-norm_after[3], -0.5 * norm_after[4]])
    weights = Weight.of(weight)
    dx, sums = backward(x, norm, weights, y, norm_after[:3], flow, gradient, stride, 1)
    return dx, sums.sum(1)


@functools.partial(jax.jit, static_argnames=("stride", "count"))
def backward(
    x: jax.Array, norm: jax.Array, weight: Weight, y: jax.Array, norm_after: jax.Array,
    d_statistics: jax.Array, gradient: jax.Array, stride: int, count: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns the gradient of x as `block_backward` does, and its sums by program, (11, P, C).

    Args:
      x, norm, weight, y, gradient, stride: as there.
      norm_after: (3, C) float32, of the norm of y.
      d_statistics: (2, C) float32, the gradients of mean and variance of y.
      count: rows over which these are taken.
    """
    tiling = _tiling(y.shape)
    sums = jax.ShapeDtypeStruct((11, tiling.programs, x.shape[-1]), jnp.float32)
    dx = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = functools.partial(_backward_kernel, count=float(count))
    arguments = (x, norm, weight, y, norm_after, d_statistics, gradient)
    return _call(kernel, tiling, stride, (dx, sums), *arguments)


def _out_shape(shape: tuple[int, ...], stride: int) -> tuple[int, ...]:
    batch, height, width, channels = shape
    return batch, -(-height // stride), -(-width // stride), channels


class _Tiling(NamedTuple):
    """The tiling of the work by programs; Triton's arrays have sizes of powers of two.

    A program takes `passes` times `images` images and `channels` channels; one pass works on a row
    of y in each, as `runs` runs of `run` columns.
    """

    images: int
    runs: int
    run: int
    channels: int
    passes: int
    tiles: int  # programs along the channels
    programs: int  # along the batch


def _tiling(shape: tuple[int, ...]) -> _Tiling:
    batch, height, width, channels = shape
    divisor = channels & -channels  # the largest power of two
    tile = min(max(divisor, 16), 64)
    run = min(RUN, pl.next_power_of_2(width))
    runs = pl.next_power_of_2(pl.cdiv(width, run))
    images = max(1, LANES // (runs * tile))
    tiles, groups = pl.cdiv(channels, tile), pl.cdiv(batch, images)
    passes = max(1, min(MIN_ROWS // height, tiles * groups // MIN_PROGRAMS))
    return _Tiling(images, runs, run, tile, passes, tiles, pl.cdiv(groups, passes))


def _call(kernel, tiling, stride, out_shape, *arguments):
    """Runs a kernel."""
    return call(
        functools.partial(kernel, stride=stride, tiling=tiling),
        (tiling.tiles, tiling.programs),
        out_shape,
        *arguments,
        flops=18 * out_shape[0].size,
        warps=WARPS,
    )


def _lanes(tiling: _Tiling):
    """Returns each lane's first image and column, (P, 1), and its channel, (1, tile)."""
    lane = lax.broadcasted_iota(jnp.int32, (tiling.images * tiling.runs, 1), 0)
    image = pl.program_id(1) * (tiling.passes * tiling.images) + lane // tiling.runs
    channel = lax.broadcasted_iota(jnp.int32, (1, tiling.channels), 1)
    column = lane % tiling.runs * tiling.run
    return image, column, pl.program_id(0) * tiling.channels + channel


def _read(ref: Any, at: tuple, mask: jax.Array) -> jax.Array:
    return plt.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def _read_filters(place_ref: Any, ref: Any, channel: jax.Array, channels: int, real: jax.Array):
    """Returns the nine weights of each channel, from the references of a `Weight`."""
    start = place_ref[0] * ALIGNMENT + channel
    return [
        [_read(ref, (start + (3 * i + j) * channels,), real) for j in range(3)] for i in range(3)
    ]


def _between(index: jax.Array, limit: int) -> jax.Array:
    return (index >= 0) & (index < limit)


def _write_sums(ref: Any, sums: list[jax.Array], channel: jax.Array) -> None:
    """Stores each (1, tile) sum as this program's."""
    for k, total in enumerate(sums):
        at = (k, pl.program_id(1), channel)
        plt.store(ref.at[at], total, mask=channel < ref.shape[-1])


def _forward_kernel(x_ref, norm_ref, place_ref, weight_ref, y_ref, moments_ref, *, stride, tiling):
    batch, height, width, channels = x_ref.shape
    _, out_height, out_width, _ = y_ref.shape
    first_image, column, channel = _lanes(tiling)
    real = channel < channels
    mean, slope, bias = (_read(norm_ref, (k, channel), real) for k in range(3))
    weight = _read_filters(place_ref, weight_ref, channel, channels, real)
    run_length = jnp.clip(out_width - column, 0, tiling.run).astype(jnp.float32)

    def one_pass(index, moments):
        image = first_image + index * tiling.images
        here = (image < batch) & real

        def active_row(row):
            """Returns the activated row of x under the filter, all columns of the lane's run."""

            def active(k):
                at = column * stride + k
                seen = here & _between(row, height) & _between(at, width)
                scaled = (_read(x_ref, (image, row, at, channel), seen) - mean) * slope + bias
                return jnp.where(seen, jnp.clip(scaled, 0.0, RELU6_LIMIT), 0.0)

            return [active(k) for k in range(-1, (tiling.run - 1) * stride + 2)]

        def one_row(row, carry):
            window, means, squares = carry
            window = window + [active_row(row * stride + k) for k in range(2 - stride, 2)]
            values = []
            for k in range(tiling.run):
                inside = here & (column + k < out_width)
                total = sum(
                    window[i][k * stride + j] * weight[i][j] for i in range(3) for j in range(3)
                )
                stored = total.astype(y_ref.dtype)
                plt.store(y_ref.at[image, row, column + k, channel], stored, mask=inside)
                values.append((stored.astype(jnp.float32), inside))
            # A running mean and sum of squared deviations: a mean far from zero costs no digits.
            run_mean = sum(jnp.where(inside, value, 0.0) for value, inside in values)
            run_mean /= jnp.maximum(run_length, 1.0)
            for value, inside in values:
                squares += jnp.square(jnp.where(inside, value - run_mean, 0.0))
            seen_rows = (index * out_height + row).astype(jnp.float32)
            deviation = jnp.where(here, run_mean - means, 0.0)
            means += deviation / (seen_rows + 1.0)
            squares += jnp.square(deviation) * run_length * (seen_rows / (seen_rows + 1.0))
            return window[stride:], means, squares

        window = [active_row(jnp.int32(k)) for k in range(-1, 2 - stride)]
        return lax.fori_loop(0, out_height, one_row, (window, *moments))[1:]

    zeros = jnp.zeros((tiling.images * tiling.runs, tiling.channels), jnp.float32)
    means, squares = lax.fori_loop(0, tiling.passes, one_pass, (zeros, zeros))
    passes = jnp.clip((batch - first_image + tiling.images - 1) // tiling.images, 0, tiling.passes)
    count = (passes * out_height).astype(jnp.float32) * run_length
    mean = (count * means).sum(0, keepdims=True) / count.sum(0, keepdims=True)
    squares += count * jnp.square(means - mean)
    _write_sums(moments_ref, [mean, squares.sum(0, keepdims=True)], channel)


def _backward_kernel(
    x_ref, norm_ref, place_ref, weight_ref, y_ref, after_ref, flow_ref, gradient_ref, dx_ref,
    sums_ref, *, stride, tiling, count,
):  # fmt: skip
    batch, height, width, channels = x_ref.shape
    _, out_height, out_width, _ = y_ref.shape
    first_image, column, channel = _lanes(tiling)
    real = channel < channels
    mean, slope, bias = (_read(norm_ref, (k, channel), real) for k in range(3))
    weight = _read_filters(place_ref, weight_ref, channel, channels, real)
    y_mean, y_slope, y_bias = (_read(after_ref, (k, channel), real) for k in range(3))
    d_mean, twice = (_read(flow_ref, (k, channel), real) * ((k + 1) / count) for k in range(2))
    # Row stride · r + a of x met tap i in row r + (a + 1 − i) / stride of y, where that divides;
    # likewise the columns. This is the least of these offsets.
    first = stride - 2

    def one_pass(index, sums):
        image = first_image + index * tiling.images
        here = (image < batch) & real

        def gradient_row(row):
            """Returns a row of the gradient of y: all columns that met the lane's run."""

            def d_y(k):
                at = (image, row, column + k, channel)
                seen = here & _between(row, out_height) & _between(column + k, out_width)
                deviation = _read(y_ref, at, seen) - y_mean
                scaled = deviation * y_slope + y_bias
                is_open = (scaled > 0.0) & (scaled < RELU6_LIMIT)
                passed = jnp.where(is_open, _read(gradient_ref, at, seen), 0.0)
                return jnp.where(seen, y_slope * passed + d_mean + twice * deviation, 0.0)

            return [d_y(k) for k in range(first, tiling.run + 1)]

        def one_row(row, carry):
            window, sums = [*carry[0], gradient_row(row + 1)], list(carry[1])
            for a, b in itertools.product(range(stride), range(tiling.run * stride)):
                at = (image, row * stride + a, column * stride + b, channel)
                seen = here & (at[1] < height) & (at[2] < width)
                deviation = _read(x_ref, at, seen) - mean
                scaled = deviation * slope + bias
                active = jnp.where(seen, jnp.clip(scaled, 0.0, RELU6_LIMIT), 0.0)
                total = jnp.zeros_like(active)
                for i in range((a + 1) % stride, 3, stride):
                    for j in range((b + 1) % stride, 3, stride):
                        d_y = window[(a + 1 - i) // stride - first][(b + 1 - j) // stride - first]
                        total += d_y * weight[i][j]
                        sums[3 * i + j] += d_y * active
                total = jnp.where(seen & (scaled > 0.0) & (scaled < RELU6_LIMIT), total, 0.0)
                sums[9] += total
                sums[10] += total * deviation
                plt.store(dx_ref.at[at], (total * slope).astype(dx_ref.dtype), mask=seen)
            return window[1:], sums

        window = [gradient_row(jnp.int32(k)) for k in range(first, 1)]
        return lax.fori_loop(0, out_height, one_row, (window, sums))[1]

    zeros = [jnp.zeros((tiling.images * tiling.runs, tiling.channels), jnp.float32)] * 11
    sums = lax.fori_loop(0, tiling.passes, one_pass, zeros)
    _write_sums(sums_ref, [total.sum(0, keepdims=True) for total in sums], channel)
