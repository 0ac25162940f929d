"""Sums over the programs of other Pallas kernels, and what batch norm makes of them.

Each program writes its sums, without atomics, and these kernels add them in a fixed order: results
are deterministic.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from hccr_jax.ops.pallas import (
    ROWS,
    Rows,
    Weight,
    below,
    call,
    iota,
    load,
    load_vector,
    store,
    tile_size,
)

CHANNELS = 16  # of a program
ADDENDS = 64  # are loaded at once
PROGRAMS = 528


@functools.partial(jax.jit, static_argnames=("each", "count", "epsilon"))
def finish_moments(
    moments: jax.Array, each: int, count: int, scale: Weight, bias: Weight, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the rows of a norm, and the statistics of all rows.

    Args:
      moments: float32 (2, P, C), means and sums of squared deviations of P groups of rows.
      each: rows of each group but the last, which has the rest.
      count: all rows.
      scale, bias: float32 (C,), of the norm.
      epsilon: constant added to the variance.

    Returns:
      float32 (3, C), rows mean, slope and bias of the norm, (x − mean) · slope + bias; float32
      (2, C), mean and biased variance.
    """
    _, groups, channels = moments.shape
    kernel = functools.partial(_moments_kernel, epsilon=epsilon)
    out = (
        jax.ShapeDtypeStruct((3 * channels,), jnp.float32),
        jax.ShapeDtypeStruct((2 * channels,), jnp.float32),
    )
    sizes = _sizes(groups, channels, each, count)
    grid = (pl.cdiv(channels, CHANNELS),)
    norm, statistics = call(kernel, grid, out, sizes, moments.reshape(-1), scale, bias)
    return norm.reshape(3, -1), statistics.reshape(2, -1)


def _sizes(*sizes: int) -> np.ndarray:
    """Returns sizes as an argument of a kernel, so that one is compiled for all layers."""
    return np.array(sizes, np.int32)


def _moments_kernel(
    sizes_ref, moments_ref, scale_at, scale_ref, bias_at, bias_ref, norm_ref, statistics_ref, *,
    epsilon,
):  # fmt: skip
    groups, channels, each, count = (sizes_ref[k] for k in range(4))
    channel = pl.program_id(0) * CHANNELS + iota(CHANNELS, 1)
    exists = channel < channels
    pivot = load(moments_ref, (channel,), exists)

    def add(index, sums):
        group = index * ADDENDS + iota(ADDENDS, 0)
        inside = (group < groups) & exists
        rows = jnp.clip(count - group * each, 0, each).astype(jnp.float32)
        away = load(moments_ref, (group * channels + channel,), inside) - pivot
        offset, square, squares = sums
        squares += load(moments_ref, ((groups + group) * channels + channel,), inside)
        return offset + rows * away, square + rows * jnp.square(away), squares

    zeros = jnp.zeros((ADDENDS, CHANNELS), jnp.float32)
    sums = lax.fori_loop(0, pl.cdiv(groups, ADDENDS), add, (zeros,) * 3)
    share = 1.0 / count.astype(jnp.float32)
    offset, square, squares = (total.sum(0, keepdims=True) * share for total in sums)
    # About a group's mean, which is near that of all: no digits are lost.
    mean, variance = pivot + offset, squares + jnp.maximum(square - jnp.square(offset), 0.0)
    slope = load_vector((scale_at, scale_ref), channel, exists) * lax.rsqrt(variance + epsilon)
    bias = load_vector((bias_at, bias_ref), channel, exists)
    for k, row in enumerate((mean, slope, bias)):
        store(norm_ref, (k * channels + channel,), row, exists)
    for k, row in enumerate((mean, variance)):
        store(statistics_ref, (k * channels + channel,), row, exists)


@functools.partial(jax.jit, static_argnames="epsilon")
def finish_gradients(
    sums: jax.Array, norm: jax.Array, statistics: jax.Array, epsilon: float,
    parts: jax.Array | None = None,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """Returns gradients of a norm, and of its statistics, from the sums of programs.

    Args:
      sums: float32 (R + 2, P, C): R sums of any kind; of the gradient of norm(x) and of it times
        x − mean.
      norm: float32 (3, C), rows mean, slope and bias.
      statistics: float32 (2, C).
      epsilon: constant added to the variance.
      parts: float32 (Q, …), to be added up besides, or None.

    Returns:
      float32 (R + 2, C): the R totals, the gradients of bias and scale; float32 (2, C), the
      gradients of mean and variance; the sum of `parts`, if any.
    """
    rows, groups, channels = sums.shape
    out = [
        jax.ShapeDtypeStruct((rows * channels,), jnp.float32),
        jax.ShapeDtypeStruct((2 * channels,), jnp.float32),
    ]
    sizes, programs = [rows, groups, channels], rows * pl.cdiv(channels, CHANNELS)
    arguments = [sums.reshape(-1), norm.reshape(-1), statistics.reshape(-1)]
    if parts is not None:
        length = math.prod(parts.shape[1:])
        out.append(jax.ShapeDtypeStruct((length,), jnp.float32))
        arguments.append(parts.reshape(-1))
        sizes += [programs, len(parts), length]
        programs += pl.cdiv(length, ADDENDS)
    kernel = functools.partial(_gradients_kernel, epsilon=epsilon)
    totals, flow, *whole = call(kernel, (programs,), tuple(out), _sizes(*sizes), *arguments)
    totals, flow = totals.reshape(rows, channels), flow.reshape(2, channels)
    if parts is None:
        return totals, flow
    return totals, flow, whole[0].reshape(parts.shape[1:])


def _gradients_kernel(sizes_ref, sums_ref, norm_ref, statistics_ref, *refs, epsilon):
    program = pl.program_id(0)
    if len(refs) == 2:
        _sum_row(sizes_ref, sums_ref, norm_ref, statistics_ref, *refs, program, epsilon)
        return
    parts_ref, totals_ref, flow_ref, whole_ref = refs
    first_of_parts = sizes_ref[3]

    @pl.when(program < first_of_parts)
    def _():
        out = totals_ref, flow_ref
        _sum_row(sizes_ref, sums_ref, norm_ref, statistics_ref, *out, program, epsilon)

    @pl.when(program >= first_of_parts)
    def _():
        tile = program - first_of_parts
        _sum_part(parts_ref, whole_ref, tile, sizes_ref[4], sizes_ref[5])


def _sum_row(sizes_ref, sums_ref, norm_ref, statistics_ref, totals_ref, flow_ref, program, epsilon):
    """Adds up one of the sums for a program's channels."""
    rows, groups, channels = (sizes_ref[k] for k in range(3))
    kind = program % rows
    channel = program // rows * CHANNELS + iota(CHANNELS, 1)
    exists = channel < channels

    def add(index, total):
        group = index * ADDENDS + iota(ADDENDS, 0)
        at = (kind * groups + group) * channels + channel
        return total + load(sums_ref, (at,), (group < groups) & exists)

    zeros = jnp.zeros((ADDENDS, CHANNELS), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(groups, ADDENDS), add, zeros).sum(0, keepdims=True)
    slope = load(norm_ref, (channels + channel,), exists)
    inverse = lax.rsqrt(load(statistics_ref, (channels + channel,), exists) + epsilon)
    # slope = scale · inverse, inverse = (variance + epsilon)^−½
    of_scale = kind == rows - 1
    stored = jnp.where(of_scale, total * inverse, total)
    store(totals_ref, (kind * channels + channel,), stored, exists)
    flow = -slope * total * jnp.where(of_scale, 0.5 * inverse * inverse, jnp.ones_like(inverse))
    of_norm = exists & (kind >= rows - 2)
    store(flow_ref, ((kind - (rows - 2)) * channels + channel,), flow, of_norm)


@jax.jit
def sum_parts(parts: jax.Array) -> jax.Array:
    """Returns the sum over the first axis, float32."""
    length = math.prod(parts.shape[1:])
    out = (jax.ShapeDtypeStruct((length,), jnp.float32),)
    grid, sizes = (pl.cdiv(length, ADDENDS),), _sizes(len(parts), length)
    (whole,) = call(_parts_kernel, grid, out, sizes, parts.reshape(-1))
    return whole.reshape(parts.shape[1:])


def _parts_kernel(sizes_ref, parts_ref, whole_ref):
    _sum_part(parts_ref, whole_ref, pl.program_id(0), sizes_ref[0], sizes_ref[1])


def _sum_part(parts_ref, whole_ref, tile, groups, length):
    at = tile * ADDENDS + iota(ADDENDS, 1)

    def add(index, total):
        group = index * ADDENDS + iota(ADDENDS, 0)
        return total + load(parts_ref, (group * length + at,), (group < groups) & (at < length))

    zeros = jnp.zeros((ADDENDS, ADDENDS), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(groups, ADDENDS), add, zeros).sum(0, keepdims=True)
    store(whole_ref, (at,), total, at < length)


@jax.jit
def gradient_sums(g: jax.Array, y: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns sums over rows of the gradient of norm(y), and of it times y − mean.

    Args:
      g, y: (N, C) float.
      norm: float32 (3, C), of which the mean is read.

    Returns:
      float32 (2, P, C), sums of P programs.
    """
    count, channels = y.shape
    tile = tile_size(channels, 16, 32)
    rows = Rows.split(count, pl.cdiv(channels, tile), PROGRAMS)
    out = (jax.ShapeDtypeStruct((2, rows.programs, channels), jnp.float32),)
    kernel = functools.partial(_sums_kernel, rows=rows, tile=tile)
    (sums,) = call(kernel, (pl.cdiv(channels, tile), rows.programs), out, g, y, norm)
    return sums


def _sums_kernel(g_ref, y_ref, norm_ref, sums_ref, *, rows, tile):
    channels = y_ref.shape[1]
    group = pl.program_id(1)
    channel = pl.program_id(0) * tile + iota(tile, 1)
    exists = below(channel, channels, pl.cdiv(channels, tile) * tile)
    mean = load(norm_ref, (0, channel), exists)

    def one_pass(index, sums):
        row, row_exists = rows.tile(group, index)
        at = row, channel
        g, y = (load(ref, at, row_exists, exists).astype(jnp.float32) for ref in (g_ref, y_ref))
        return sums[0] + g, sums[1] + g * (y - mean)

    zeros = jnp.zeros((ROWS, tile), jnp.float32)
    for k, total in enumerate(lax.fori_loop(0, rows.passes, one_pass, (zeros, zeros))):
        store(sums_ref, (k, group, channel), total.sum(0, keepdims=True), exists)
