"""What the Pallas kernels for NVIDIA GPUs share: the call, weights, masks and tiles.

Why Pallas's Triton backend, deprecated from JAX 0.11 on and still running in 0.12: it takes plain
array code, which a CPU can interpret, so that every kernel is held to float64 without a GPU; and it
serves any GPU since Ampere. Mosaic GPU, its successor, is for Hopper and later, with copies,
barriers and register layouts by hand; CUDA through XLA's FFI needs a compiler at the user's. The
price: when the backend goes, GPUs run the plain form, XLA's operations, which every version of JAX
can, until these kernels are written anew. Only what `dispatch` sends here imports this module.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from hccr_jax.ops import target

RELU6_LIMIT = 6.0
# Matrices begin at multiples of this many values of a vector, so that wide loads are aligned.
ALIGNMENT = 16
ROWS = 64  # of a tile of a map, as a matrix (rows, channels)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["vector", "place"], meta_fields=["shape"]
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter as kernels read it: at some place of a vector, which may hold others.

    The place is an argument and no constant, so that equal layers share compiled kernels.

    Attributes:
      vector: (L,).
      place: int32 (1,), where it begins; of more than one axis, as a multiple of `ALIGNMENT`.
      shape: of the parameter, stored row by row.
    """

    vector: jax.Array
    place: Any
    shape: tuple[int, ...]

    @classmethod
    def at(cls, vector: jax.Array, offset: int, shape: tuple[int, ...]) -> "Weight":
        """Returns the parameter that begins at `offset`."""
        if len(shape) > 1 and offset % ALIGNMENT:
            return cls.of(lax.slice(vector, (offset,), (offset + math.prod(shape),)).reshape(shape))
        unit = ALIGNMENT if len(shape) > 1 else 1
        return cls(vector, np.array([offset // unit], np.int32), shape)

    @classmethod
    def of(cls, array: jax.Array) -> "Weight":
        """Returns an ordinary array as a parameter."""
        return cls.at(array.reshape(-1), 0, array.shape)


def call(
    kernel: Callable[..., None], grid: tuple[int, ...], out_shape: Any, *arguments: Any,
    flops: int = 0, warps: int = 4, stages: int = 3,
) -> Any:  # fmt: skip
    """Runs a kernel over a grid of programs.

    Args:
      kernel: is passed a reference of every array; of a `Weight` two, its place and its vector.
      grid: number of programs along up to three axes.
      out_shape: a tuple of `jax.ShapeDtypeStruct`.
      *arguments: arrays and weights.
      flops: floating-point operations, for the declared cost; bytes are those of all arrays once.
      warps: of a program.
      stages: of software pipelining.
    """
    arrays, read = [], 0
    for argument in arguments:
        weight = isinstance(argument, Weight)
        kind = argument.vector.dtype if weight else argument.dtype
        read += math.prod(argument.shape) * kind.itemsize
        arrays += [argument.place, argument.vector] if weight else [argument]
    bytes_accessed = read + sum(out.size * out.dtype.itemsize for out in out_shape)
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interprets(),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=0, bytes_accessed=bytes_accessed
        ),
        # The lowering drops the estimate; this reaches the compiled program, for `bench/hlo.py`.
        metadata={"cost": f"bytes={bytes_accessed} flops={flops}"},
    )(*arrays)


def interprets() -> bool:
    """Returns whether kernels are interpreted, as on a CPU, for tests."""
    return target.is_cpu()


def iota(size: int, axis: int) -> jax.Array:
    """Returns 0, 1, … along one of two axes, the other of size 1."""
    return lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def load(ref: Any, at: tuple, *masks: jax.Array | None) -> jax.Array:
    """Loads values, 0 where one of the masks is False; None is a mask that is True throughout."""
    known = [mask for mask in masks if mask is not None]
    if not known:
        return plt.load(ref.at[at])
    return plt.load(ref.at[at], mask=functools.reduce(jnp.logical_and, known), other=0)


def store(ref: Any, at: tuple, value: jax.Array, *masks: jax.Array | None) -> None:
    """Stores values where all masks are True."""
    known = [mask for mask in masks if mask is not None]
    if known:
        plt.store(ref.at[at], value, mask=functools.reduce(jnp.logical_and, known))
    else:
        plt.store(ref.at[at], value)


def load_weight(refs: Any, columns: int, row: Any, column: Any, *masks: Any) -> jax.Array:
    """Loads entries of a matrix of so many columns; `refs` are those of a `Weight`."""
    place_ref, ref = refs
    start = place_ref[0] * ALIGNMENT
    return load(ref, (start + row * columns + column,), *masks)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """Returns the float32 product of two tiles, summed over an axis of each."""
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def load_vector(refs: Any, index: jax.Array, mask: Any) -> jax.Array:
    """Loads entries of a `Weight` of one axis."""
    place_ref, ref = refs
    return load(ref, (place_ref[0] + index,), mask)


def below(index: jax.Array, limit: int, covered: int) -> jax.Array | None:
    """Returns the mask of what is below a limit; None where all indices, `covered`, are."""
    return None if covered <= limit else index < limit


@dataclasses.dataclass(frozen=True)
class Rows:
    """How programs share the rows of a map: each goes through `passes` tiles of `ROWS`."""

    count: int
    passes: int
    programs: int

    @classmethod
    def split(cls, count: int, columns: int, programs: int) -> "Rows":
        """Returns a division of `count` rows.

        Args:
          count: number of rows.
          columns: programs side by side, each of which works on all rows.
          programs: about as many as there are to be in all.
        """
        steps = pl.cdiv(count, ROWS)
        passes = max(1, pl.cdiv(steps * columns, programs))
        return cls(count, passes, pl.cdiv(steps, passes))

    @property
    def each(self) -> int:
        """Number of rows of each program but the last."""
        return self.passes * ROWS

    def tile(self, program: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the rows of a program's tile, (ROWS, 1), and which of them exist."""
        rows = (program * self.passes + index) * ROWS + iota(ROWS, 0)
        return rows, below(rows, self.count, self.each * self.programs)


def tile_size(size: int, *choices: int, extra: int = 32) -> int:
    """Returns the width of tiles that cover `size` at least cost, each `extra` more than its width.

    >>> tile_size(96, 16, 32, 64, 128), tile_size(160, 16, 32, 64, 128), tile_size(24, 16, 32)
    (128, 64, 32)
    """
    return min(choices, key=lambda width: pl.cdiv(size, width) * (width + extra))


def padded(size: int) -> int:
    """Returns the power of two, at least 16, that holds a dimension as one tile."""
    return max(16, pl.next_power_of_2(size))
