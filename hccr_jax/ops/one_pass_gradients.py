"""Both gradients of a matrix product in one pass over its larger side, as Pallas kernels.

For products of few columns or of few inputs, whose whole weights' gradient fits the registers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from hccr_jax.ops.pallas import (
    ROWS,
    Rows,
    Weight,
    below,
    call,
    dot,
    iota,
    load,
    load_weight,
    padded,
    store,
    tile_size,
)  # fmt: skip
from hccr_jax.ops.product_gradients import (
    PROGRAMS,
    OutputGradient,
    add_sums,
    gradient_of_y,
    open_gates,
)  # fmt: skip
from hccr_jax.ops.products import activate


@functools.partial(jax.jit, static_argnames="count")
def narrow_gradients(
    u: jax.Array, norm: jax.Array, after: OutputGradient, weight: Weight, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `input_gradient` and its sums, and `weight_gradient`, of a product of few columns.

    All columns of the output are in one tile, so both gradients come from one pass over u.
    """
    rows_count, depth = u.shape
    width = weight.shape[1]
    tile = tile_size(depth, 32, 64)
    rows = Rows.split(rows_count, pl.cdiv(depth, tile), PROGRAMS)
    out = (
        jax.ShapeDtypeStruct((rows_count, depth), u.dtype),
        jax.ShapeDtypeStruct((2, rows.programs, depth), jnp.float32),
        jax.ShapeDtypeStruct((rows.programs, depth, width), jnp.float32),
    )
    kernel = functools.partial(
        _narrow_kernel, rows=rows, tile=tile, shape=weight.shape, count=float(count),
        scaled=after.norm is not None,
    )  # fmt: skip
    grid = (pl.cdiv(depth, tile), rows.programs)
    flops = 4 * rows_count * depth * width
    return call(kernel, grid, out, *after.arrays(), weight, u, norm, flops=flops)


def _narrow_kernel(*refs, rows, tile, shape, count, scaled):
    after, refs = refs[: 4 + scaled], refs[4 + scaled :]
    *weight, u_ref, norm_ref, dx_ref, sums_ref, parts_ref = refs
    depth, width = shape
    group = pl.program_id(1)
    column, down = (pl.program_id(0) * tile + iota(tile, axis) for axis in (1, 0))
    covered = pl.cdiv(depth, tile) * tile
    exists, down_exists = below(column, depth, covered), below(down, depth, covered)
    at = iota(padded(width), 1)
    inside = below(at, width, padded(width))
    w = load_weight(weight, width, down, at, down_exists, inside)
    norm = [load(norm_ref, (k, column), exists) for k in range(3)]

    def one_pass(index, carry):
        *sums, total = carry
        row, row_exists = rows.tile(group, index)
        d_y = gradient_of_y(after, row, at, row_exists, inside, count).astype(w.dtype)
        u = load(u_ref, (row, column), row_exists, exists)
        active = activate(u, norm_ref, column, depth, tile).astype(w.dtype)
        total += dot(active, d_y, (0, 0))
        deviation = u.astype(jnp.float32) - norm[0]
        dx = open_gates(deviation, dot(d_y, w, (1, 1)), norm).astype(dx_ref.dtype)
        store(dx_ref, (row, column), dx, row_exists, exists)
        return (*add_sums(sums, dx.astype(jnp.float32), deviation), total)

    zero = jnp.zeros((1, tile), jnp.float32)
    start = (zero, zero, jnp.zeros((tile, padded(width)), jnp.float32))
    *sums, total = lax.fori_loop(0, rows.passes, one_pass, start)
    for k, part in enumerate(sums):
        store(sums_ref, (k, group, column), part, exists)
    store(parts_ref, (group, down, at), total, down_exists, inside)


@functools.partial(jax.jit, static_argnames=("count", "wants_input"))
def wide_gradients(
    x: jax.Array, weight: Weight, g: jax.Array, statistics: jax.Array, d_statistics: jax.Array,
    count: int, wants_input: bool, shortcut: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array]:  # fmt: skip
    """Returns `input_gradient` and `weight_gradient` of a product of few inputs, many columns.

    The output is not loaded but computed again: the input is small, and both gradients come from
    one pass over g.

    Args:
      x: (N, K), itself the product's input.
      weight: (K, M).
      g, statistics, d_statistics: as in `OutputGradient`.
      count: rows over which the output's statistics are taken.
      wants_input: whether the first result is needed; else it is None.
      shortcut: (N, K), is added to it.
    """
    (rows_count, depth), width = x.shape, weight.shape[1]
    rows = Rows.split(rows_count, 1, PROGRAMS)
    out = [jax.ShapeDtypeStruct((rows.programs, depth, width), jnp.float32)]
    if wants_input:
        out.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    kernel = functools.partial(
        _wide_kernel, rows=rows, shape=weight.shape, count=float(count), wants_input=wants_input
    )
    arguments = [x, weight, g, statistics, d_statistics, *([] if shortcut is None else [shortcut])]
    flops = (4 + 2 * wants_input) * rows_count * depth * width
    parts, *dx = call(kernel, (rows.programs,), tuple(out), *arguments, flops=flops)
    return dx[0] if dx else None, parts


def _wide_kernel(
    x_ref, place, w_ref, g_ref, statistics_ref, flow_ref, *refs, rows, shape, count, wants_input
):
    depth, width = shape
    size = padded(depth)
    across, down = iota(size, 1), iota(size, 0)
    inside, down_inside = below(across, depth, size), below(down, depth, size)
    if wants_input:
        *shortcut, parts_ref, dx_ref = refs
    else:
        (parts_ref,) = refs
    group = pl.program_id(0)
    tiles: list[Any] = []
    for start, tile in _powers(width):
        column = start + iota(tile, 1)
        exists = below(column, width, start + tile)
        tiles.append((column, exists))

    def one_pass(index, totals):
        row, row_exists = rows.tile(group, index)
        x = load(x_ref, (row, across), row_exists, inside)
        dx, sums = jnp.zeros((ROWS, size), jnp.float32), []
        for (column, exists), total in zip(tiles, totals, strict=True):
            # Loaded again each time, from the cache: of all tiles they would not fit the registers.
            mean = load(statistics_ref, (0, column), exists)
            d_mean, d_variance = (load(flow_ref, (k, column), exists) for k in (0, 1))
            w = load_weight((place, w_ref), width, down, column, down_inside, exists)
            y = dot(x, w).astype(x.dtype).astype(jnp.float32)
            d_y = load(g_ref, (row, column), row_exists, exists).astype(jnp.float32)
            d_y += (d_mean + 2.0 * d_variance * (y - mean)) * (1.0 / count)
            if row_exists is not None:
                d_y = jnp.where(row_exists, d_y, 0.0)
            d_y = d_y.astype(x.dtype)
            if wants_input:
                dx += dot(d_y, w, (1, 1))
            sums.append(total + dot(x, d_y, (0, 0)))
        if wants_input:
            if shortcut:
                dx += load(shortcut[0], (row, across), row_exists, inside).astype(jnp.float32)
            store(dx_ref, (row, across), dx.astype(dx_ref.dtype), row_exists, inside)
        return sums

    totals = [jnp.zeros((size, tile[0].shape[1]), jnp.float32) for tile in tiles]
    totals = lax.fori_loop(0, rows.passes, one_pass, totals)
    for (column, exists), total in zip(tiles, totals, strict=True):
        store(parts_ref, (group, down, column), total, down_inside, exists)


def _powers(size: int, largest: int = 64) -> list[tuple[int, int]]:
    """Returns start and width of tiles, powers of two from 16 on, that cover a dimension."""
    tiles, start = [], 0
    while start < size:
        width = 16
        while width < largest and 2 * width <= size - start:
            width *= 2
        tiles.append((start, width))
        start += width
    return tiles
