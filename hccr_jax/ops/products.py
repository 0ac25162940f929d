"""Matrix products with batch norm around them, as Pallas kernels: a 1×1 convolution, forward.

Maps are matrices (rows, channels): B · H · W rows.
"""

import functools
from typing import Any

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

PROGRAMS = 528  # four for each multiprocessor of an H200


@jax.jit
def product(x: jax.Array, norm: jax.Array | None, weight: Weight) -> tuple[jax.Array, jax.Array]:
    """Returns the product of ReLU6 of normalised x and a matrix, and moments of the result.

    Args:
      x: (N, K) float.
      norm: (3, K) float32, rows mean, slope and bias of (x − mean) · slope + bias; None: x itself
        is multiplied.
      weight: (K, M) of x's dtype.

    Returns:
      y (N, M) like x; float32 (2, P, M), means and sums of squared deviations of `product_rows` of
      y as stored, rounded to its dtype.
    """
    (count, depth), width = x.shape, weight.shape[1]
    tile, rows = tile_size(width, 16, 32, 64, 128), product_rows(count, width)
    kernel = functools.partial(
        _product_kernel, rows=rows, tile=tile, step=tile_size(depth, 16, 32, 64, extra=16),
        shape=weight.shape,
    )  # fmt: skip
    out = (
        jax.ShapeDtypeStruct((count, width), x.dtype),
        jax.ShapeDtypeStruct((2, rows.programs, width), jnp.float32),
    )
    arguments = (x, weight) if norm is None else (x, weight, norm)
    grid = (pl.cdiv(width, tile), rows.programs)
    return call(kernel, grid, out, *arguments, flops=2 * count * depth * width)


def product_rows(count: int, width: int) -> Rows:
    """Returns how the programs of a `product` (count, width) share its rows."""
    return Rows.split(count, pl.cdiv(width, tile_size(width, 16, 32, 64, 128)), PROGRAMS)


def _product_kernel(x_ref, *refs, rows: Rows, tile: int, step: int, shape: tuple[int, ...]):
    *weight, y_ref, moments_ref = refs
    weight, norm = weight[:2], weight[2:]
    depth, width = shape
    group = pl.program_id(1)
    column = pl.program_id(0) * tile + iota(tile, 1)
    exists = below(column, width, pl.cdiv(width, tile) * tile)

    def one_pass(index, moments):
        row, row_exists = rows.tile(group, index)

        def add(k, y):
            across, down = (k * step + iota(step, axis) for axis in (1, 0))
            a = load(x_ref, (row, across), row_exists, below(across, depth, _covered(depth, step)))
            if norm:
                a = activate(a, norm[0], across, depth, step).astype(a.dtype)
            inside = below(down, depth, _covered(depth, step))
            return y + dot(a, load_weight(weight, width, down, column, inside, exists))

        y = lax.fori_loop(0, pl.cdiv(depth, step), add, jnp.zeros((ROWS, tile), jnp.float32))
        y = y.astype(y_ref.dtype)
        store(y_ref, (row, column), y, row_exists, exists)
        return merge(moments, y.astype(jnp.float32), row_exists, index, group, rows)

    zero = jnp.zeros((1, tile), jnp.float32)
    for k, moment in enumerate(lax.fori_loop(0, rows.passes, one_pass, (zero, zero))):
        store(moments_ref, (k, group, column), moment, exists)


def activate(x: jax.Array, norm_ref: Any, column: jax.Array, width: int, step: int) -> jax.Array:
    """Returns ReLU6 of normalised x, float32; columns that do not exist are 0."""
    inside = below(column, width, _covered(width, step))
    mean, slope, bias = (load(norm_ref, (k, column), inside) for k in range(3))
    return jnp.clip((x.astype(jnp.float32) - mean) * slope + bias, 0.0, RELU6_LIMIT)


def _covered(size: int, step: int) -> int:
    return pl.cdiv(size, step) * step


def merge(
    moments: tuple[jax.Array, jax.Array], y: jax.Array, exists: jax.Array | None,
    index: jax.Array, program: jax.Array, rows: Rows,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Returns mean and sum of squared deviations of a program's rows with one more tile.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979): a mean far from zero costs no digits.
    """
    mean, squares = moments
    before = index.astype(jnp.float32) * ROWS
    if exists is None:
        count, masked = jnp.float32(ROWS), y
    else:
        first = (program * rows.passes + index) * ROWS
        count = jnp.clip(rows.count - first, 0, ROWS).astype(jnp.float32)
        masked = jnp.where(exists, y, 0.0)
    here = masked.sum(0, keepdims=True) / jnp.maximum(count, 1.0)
    away = y - here if exists is None else jnp.where(exists, y - here, 0.0)
    squares += jnp.square(away).sum(0, keepdims=True)
    share = count / jnp.maximum(before + count, 1.0)
    squares += jnp.square(here - mean) * (before * share)
    return mean + (here - mean) * share, squares
