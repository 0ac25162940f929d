"""Times the depthwise layers of a network in every form they can take: `ops/measured/` holds it."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hccr_jax.bench.timing import Run, measure, repeated
from hccr_jax.models.layers import count_costs
from hccr_jax.ops import forms
from hccr_jax.ops.depthwise_block import depthwise_block_train


def depthwise_layers(model: nnx.Module, image_px: int) -> list[tuple[int, int, int, int]]:
    """Returns (H, W, C, stride) of each kind of depthwise layer of a network, H×W its input."""
    layers: list[tuple[int, int, int, int]] = []
    shape: tuple[int, ...] = (image_px, image_px, 1)
    for cost in count_costs(model, image_px):
        if cost.kind.startswith("depthwise"):
            stride = math.ceil(shape[0] / cost.output[0])
            layers.append((shape[0], shape[1], cost.output[2], stride))
        shape = cost.output
    return list(dict.fromkeys(layers))


def time_forms(
    layer: tuple[int, int, int, int], dtype: jnp.dtype, batch_size: int, seconds: float,
    repeats: int,
) -> Iterator[tuple[str, list[float] | Exception]]:  # fmt: skip
    """Yields each form that the devices can run with its images a second, repeat by repeat.

    What is timed is a layer as networks have it, batch norm and ReLU6 on both sides: forward, and
    the gradients of everything. A form that fails is yielded with the reason.

    Args:
      layer: from `depthwise_layers`.
      dtype: of the arithmetic.
      batch_size: images a call, on one device.
      seconds, repeats: as in `timing.measure`.
    """
    height, width, channels, stride = layer
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    x = jax.device_put(drawn(batch_size, height, width, channels)).astype(dtype)
    ones = jax.device_put(np.ones(channels, np.float32))
    vectors = ones, ones
    weight = jax.device_put(drawn(3, 3, channels)).astype(dtype)
    runs: dict[str, Run] = {}
    failed: dict[str, Exception] = {}
    for form in forms.possible(x):

        def layer_of(x, affine, weight, form=form):
            y, *_ = depthwise_block_train(x, affine, weight, vectors, stride, 1e-3, None, form=form)
            return y

        def both(x, affine, weight, layer_of=layer_of):
            y, pull = jax.vjp(layer_of, x, affine, weight)
            return pull(y)

        try:
            compiled = jax.jit(both).lower(x, vectors, weight).compile()
            runs[form] = repeated(
                functools.partial(compiled, x, vectors, weight), jax.block_until_ready
            )
            runs[form](1)
        except Exception as error:  # a compiler may refuse a form on this device
            runs.pop(form, None)
            failed[form] = error
    calls = measure(runs, seconds, repeats)
    yield from ((form, [rate * batch_size for rate in rates]) for form, rates in calls.items())
    yield from failed.items()
