"""Gradients of matrix products with batch norm around them, as Pallas kernels.

The gradient of a product's output y is nowhere stored. Its batch norm's statistics depend on y, so
it is a sum, `OutputGradient`, which each kernel computes where it loads the addends.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hccr_jax.ops.pallas import (
    RELU6_LIMIT,
    ROWS,
    Rows,
    Weight,
    below,
    call,
    dot,
    iota,
    load,
    load_weight,
    store,
    tile_size,
)  # fmt: skip
from hccr_jax.ops.products import activate

PROGRAMS = (
    264  # two for each multiprocessor of an H200: each writes a whole gradient of its weights
)


class OutputGradient(NamedTuple):
    """slope · g + (d_mean + 2 · d_variance · (y − mean)) / count, the gradient of y.

    Attributes:
      g: (N, M), the gradient of norm(y), or of y with its statistics held fixed.
      y: (N, M).
      statistics: float32 (2, M), mean and variance of y.
      d_statistics: float32 (2, M), the gradients of these.
      norm: float32 (3, M), the second row the slope; or None: the slope is 1.
    """

    g: jax.Array
    y: jax.Array
    statistics: jax.Array
    d_statistics: jax.Array
    norm: jax.Array | None

    def arrays(self) -> list[jax.Array]:
        """Returns the arrays for a kernel."""
        return [array for array in self if array is not None]


def gradient_of_y(refs, row, column, row_exists, exists, count):
    """Returns a tile of an `OutputGradient`, float32, 0 where it does not exist."""
    g_ref, y_ref, statistics_ref, flow_ref, *norm_ref = refs
    at = row, column
    g, y = (load(ref, at, row_exists, exists).astype(jnp.float32) for ref in (g_ref, y_ref))
    mean = load(statistics_ref, (0, column), exists)
    d_mean, d_variance = (load(flow_ref, (k, column), exists) for k in range(2))
    if norm_ref:
        g *= load(norm_ref[0], (1, column), exists)
    d_y = g + (d_mean + 2.0 * d_variance * (y - mean)) * (1.0 / count)
    return d_y if row_exists is None else jnp.where(row_exists, d_y, 0.0)


def open_gates(deviation, gradient, norm):
    """Returns a gradient behind ReLU6 of deviation · slope + bias."""
    _, slope, bias = norm
    scaled = deviation * slope + bias
    return jnp.where((scaled > 0.0) & (scaled < RELU6_LIMIT), gradient, 0.0)


@functools.partial(jax.jit, static_argnames="count")
def input_gradient(
    after: OutputGradient, weight: Weight, count: int,
    before: tuple[jax.Array, jax.Array] | None, shortcut: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Returns the gradient of a product's input.

    Args:
      after: of the product's output, (N, M).
      weight: (K, M).
      count: rows over which the output's statistics are taken.
      before: u (N, K) and norm (3, K), where the input is ReLU6 of normalised u; or None.
      shortcut: (N, K), is added; only without `before`.

    Returns:
      (N, K) like g, behind ReLU6 if there is a norm; then also float32 (2, P, K), the programs'
      sums of the first result, and of it times u − mean.
    """
    rows_count, depth = after.g.shape
    width = weight.shape[0]
    tile = tile_size(width, 16, 32, 64, 128)
    rows = Rows.split(rows_count, pl.cdiv(width, tile), 2 * PROGRAMS)
    out = [jax.ShapeDtypeStruct((rows_count, width), after.g.dtype)]
    if before:
        out.append(jax.ShapeDtypeStruct((2, rows.programs, width), jnp.float32))
    kernel = functools.partial(
        _input_kernel, rows=rows, tile=tile, step=tile_size(depth, 16, 32, 64, extra=16),
        shape=weight.shape, count=float(count), scaled=after.norm is not None,
        kind="norm" if before else "sum" if shortcut is not None else "plain",
    )  # fmt: skip
    extra = before or (() if shortcut is None else (shortcut,))
    grid = (pl.cdiv(width, tile), rows.programs)
    flops = 2 * rows_count * depth * width
    warps = 8 if tile == 128 else 4  # or registers spill
    arguments = (*after.arrays(), weight, *extra)
    dx, *sums = call(kernel, grid, tuple(out), *arguments, flops=flops, warps=warps)
    return dx, sums[0] if sums else None


def _input_kernel(*refs, rows, tile, step, shape, count, scaled, kind):
    after, refs = refs[: 4 + scaled], refs[4 + scaled :]
    weight, refs = refs[:2], refs[2:]
    width, depth = shape
    group = pl.program_id(1)
    column, down = (pl.program_id(0) * tile + iota(tile, axis) for axis in (1, 0))
    covered = pl.cdiv(width, tile) * tile
    exists, down_exists = below(column, width, covered), below(down, width, covered)
    dtype = weight[1].dtype
    if kind == "norm":
        u_ref, norm_ref, dx_ref, sums_ref = refs
        norm = [load(norm_ref, (k, column), exists) for k in range(3)]
    else:
        *shortcut, dx_ref = refs

    def one_pass(index, sums):
        row, row_exists = rows.tile(group, index)

        def add(k, dx):
            at = k * step + iota(step, 1)
            inside = below(at, depth, pl.cdiv(depth, step) * step)
            d_y = gradient_of_y(after, row, at, row_exists, inside, count).astype(dtype)
            w = load_weight(weight, depth, down, at, down_exists, inside)
            return dx + dot(d_y, w, (1, 1))

        dx = lax.fori_loop(0, pl.cdiv(depth, step), add, jnp.zeros((ROWS, tile), jnp.float32))
        if kind == "sum":
            extra = load(shortcut[0], (row, column), row_exists, exists)
            dx += extra.astype(jnp.float32)
        if kind == "norm":
            u = load(u_ref, (row, column), row_exists, exists).astype(jnp.float32)
            dx = open_gates(u - norm[0], dx, norm)
        stored = dx.astype(dx_ref.dtype)
        store(dx_ref, (row, column), stored, row_exists, exists)
        if kind == "norm":
            sums = add_sums(sums, stored.astype(jnp.float32), u - norm[0])
        return sums

    zero = jnp.zeros((1, tile), jnp.float32)
    start = (zero, zero) if kind == "norm" else ()
    for k, total in enumerate(lax.fori_loop(0, rows.passes, one_pass, start)):
        store(sums_ref, (k, group, column), total, exists)


def add_sums(sums, gradient, deviation):
    """Returns the sums of a gradient, and of it times a deviation, with those of one more tile."""
    passed, deviated = sums
    passed += gradient.sum(0, keepdims=True)
    return passed, deviated + (gradient * deviation).sum(0, keepdims=True)


@functools.partial(jax.jit, static_argnames="count")
def weight_gradient(
    x: jax.Array, norm: jax.Array | None, after: OutputGradient, count: int
) -> jax.Array:
    """Returns the gradient of a product's weights, as float32 (P, K, M): a part a program.

    Args:
      x, norm: as for `products.product`.
      after: of the product's output, (N, M).
      count: rows over which the output's statistics are taken.
    """
    (rows_count, depth), width = x.shape, after.g.shape[1]
    tall, tile = tile_size(depth, 16, 32, 64), tile_size(width, 16, 32, 64, 128)
    tiles = pl.cdiv(depth, tall) * pl.cdiv(width, tile)
    rows = Rows.split(rows_count, tiles, PROGRAMS)
    kernel = functools.partial(
        _weight_kernel, rows=rows, tall=tall, tile=tile, shape=(depth, width), count=float(count),
        scaled=after.norm is not None,
    )  # fmt: skip
    out = (jax.ShapeDtypeStruct((rows.programs, depth, width), jnp.float32),)
    arguments = [*after.arrays(), x, *([] if norm is None else [norm])]
    flops = 2 * rows_count * depth * width
    (parts,) = call(kernel, (tiles, rows.programs), out, *arguments, flops=flops)
    return parts


def _weight_kernel(*refs, rows, tall, tile, shape, count, scaled):
    after, (x_ref, *norm_ref, parts_ref) = refs[: 4 + scaled], refs[4 + scaled :]
    depth, width = shape
    tiles = pl.cdiv(width, tile)
    group = pl.program_id(1)
    at, down = (pl.program_id(0) // tiles * tall + iota(tall, axis) for axis in (1, 0))
    column = pl.program_id(0) % tiles * tile + iota(tile, 1)
    covered = pl.cdiv(depth, tall) * tall
    inside, exists = below(at, depth, covered), below(column, width, tiles * tile)

    def one_pass(index, total):
        row, row_exists = rows.tile(group, index)
        x = load(x_ref, (row, at), row_exists, inside)
        if norm_ref:
            x = activate(x, norm_ref[0], at, depth, tall).astype(x.dtype)
        d_y = gradient_of_y(after, row, column, row_exists, exists, count).astype(x.dtype)
        return total + dot(x, d_y, (0, 0))

    total = lax.fori_loop(0, rows.passes, one_pass, jnp.zeros((tall, tile), jnp.float32))
    store(parts_ref, (group, down, column), total, below(down, depth, covered), exists)
