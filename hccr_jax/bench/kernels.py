"""Times every implementation of a network's depthwise layers; `ops/measured/` holds results."""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hccr_jax.bench.timing import Run, measure, repeated
from hccr_jax.models.costs import count_costs
from hccr_jax.ops import dispatch
from hccr_jax.ops.depthwise_block import depthwise_block_train
from hccr_jax.runtime.worker_pool import cpu_count

Layer = tuple[int, int, int, int]  # H, W, C and the stride, H×W of the input


def depthwise_layers(model: nnx.Module, image_px: int) -> list[Layer]:
    """Returns (H, W, C, stride) of each kind of depthwise layer of a network, H×W its input."""
    layers: list[Layer] = []
    shape: tuple[int, ...] = (image_px, image_px, 1)
    for cost in count_costs(model, image_px):
        if cost.kind.startswith("depthwise"):
            stride = math.ceil(shape[0] / cost.output[0])
            layers.append((shape[0], shape[1], cost.output[2], stride))
        shape = cost.output
    return list(dict.fromkeys(layers))


def time_kernels(
    layers: Sequence[Layer], dtype: jnp.dtype, batch_size: int, seconds: float, repeats: int,
) -> Iterator[tuple[Layer, str, list[float] | Exception]]:  # fmt: skip
    """Yields (layer, implementation, images a second by repeat) for all that the devices can run.

    A layer is timed as networks have it, with batch norm and ReLU6 on both sides: forward, and all
    gradients. A failing implementation is yielded with its exception.

    Args:
      layers: from `depthwise_layers`.
      dtype: of the arithmetic.
      batch_size: images a call, on one device.
      seconds, repeats: as in `timing.measure`.
    """
    programs: dict[Layer, dict[str, Future[Any]]] = {}
    with ThreadPoolExecutor(cpu_count()) as pool:  # to compile takes longer than to measure
        for layer in layers:
            shapes = _shapes(layer, dtype, batch_size)
            programs[layer] = {
                name: pool.submit(_compile, name, shapes, layer[-1])
                for name in dispatch.available(shapes[0])
            }
    for layer in layers:
        shapes = _shapes(layer, dtype, batch_size)
        kinds, structure = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(kinds))
        arrays = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, kinds, strict=True)]
        arguments = jax.tree.unflatten(structure, arrays)
        runs: dict[str, Run] = {}
        failed: dict[str, Exception] = {}
        for name, program in programs[layer].items():
            try:
                run = functools.partial(program.result(), *arguments)
                runs[name] = repeated(run, jax.block_until_ready)
                runs[name](1)
            except Exception as error:  # a compiler or a device may refuse one
                runs.pop(name, None)
                failed[name] = error
        calls = measure(runs, seconds, repeats)
        for name, rates in calls.items():
            yield layer, name, [rate * batch_size for rate in rates]
        for name in failed:
            yield layer, name, failed[name]


def _shapes(layer: Layer, dtype: jnp.dtype, batch_size: int) -> tuple[Any, ...]:
    """Returns the shapes of a layer's input, norms' scale and bias, and weight."""
    height, width, channels, _ = layer
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    return (
        jax.ShapeDtypeStruct((batch_size, height, width, channels), dtype),
        (vector, vector),
        jax.ShapeDtypeStruct((3, 3, channels), dtype),
        (vector, vector),
    )


def _compile(implementation: str, shapes: tuple[Any, ...], stride: int) -> Any:
    """Returns the program that runs a layer forward and backward."""

    def layer(x, affine, weight, affine_after):
        return depthwise_block_train(
            x, affine, weight, affine_after, stride, 1e-3, None, implementation=implementation
        )[0]

    def both(*arguments):
        y, pull = jax.vjp(layer, *arguments)
        return pull(y)

    return jax.jit(both).lower(*shapes).compile()
