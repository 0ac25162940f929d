"""How fast a network could run on a device: its roofline.

A layer takes as long as the slower of its memory traffic at the device's copy bandwidth and its
arithmetic at the device's rate of matrix products; the layers follow one another:

  seconds an image = Σ over layers of max(bytes / bandwidth, operations / rate)

The traffic is counted in reads and writes of a layer's input I and output O, every array read or
written as a whole once for each kernel that needs it. Batch norm and ReLU6 belong to the
convolution before them. Training, at three levels of fusion:

| kernel | unfused | fused | one backward kernel |
|---|---|---|---|
| convolution | I O | I O | I O |
| statistics of its output | O | | |
| normalise, ReLU6 | 2 O | | |
| sums for the gradient of batch norm (its input, gradient) | 2 O | | |
| gradient of batch norm (its input, gradient, result) | 3 O | | |
| gradient of the input | O I | 2 O 2 I | 2 O 2 I |
| gradient of the weights | O I | 2 O I | |
| together | 3 I + 11 O | 4 I + 5 O | 3 I + 3 O |

*Fused*: each convolution normalises its input as it reads it and sums the statistics of its output
as it writes it. In the backward pass a kernel makes the convolution's gradient on the fly from two
arrays of size O (the convolution's output, and the gradient behind its batch norm); the gradient of
the input is masked by the ReLU6 before, for which I is read. *One backward kernel*: both gradients
of a layer from one reading. **"The roofline" is the fused level**: what a compiler's or a library's
fusion can reach at best.

The first layer needs no gradient of its input. The dense layer has no batch norm, and its output
is float32 logits, which the loss reads once and replaces by their gradient: 3 I + 5 O, or 3 I + 4 O
with one backward kernel. The forward pass alone is I + O a layer at any level. A multiply-add is
two operations, three times over in training (forward and two gradients).

The weights are moved once a step, whatever the batch: ten times four bytes each in training (read
forward and backward, gradient written, Adam reads weight, gradient and two moments and writes three
of them), once in the forward pass.

Left out, so that the true limit lies somewhat lower: the additions of shortcuts (about 1 % of
MobileNet V2's traffic), the images themselves, launches, and that depthwise convolutions cannot use
matrix units. Caches are left out too, so on a CPU with a small batch it may lie higher.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hccr_jax.bench.timing import measure, repeated
from hccr_jax.models.costs import count_costs
from hccr_jax.runtime import sharding

# Reads and writes of a layer's (input, output) in training, as in the table above.
TRAFFIC = {
    "unfused": {"first": (2, 10), "convolution": (3, 11), "dense": (3, 5)},
    "fused": {"first": (2, 3), "convolution": (4, 5), "dense": (3, 5)},
    "one backward kernel": {"first": (2, 3), "convolution": (3, 3), "dense": (3, 4)},
}
WEIGHT_BYTES = 40  # moved a weight and training step


class Layer(NamedTuple):
    """One layer's cost for one image.

    Attributes:
      kind: "first", "convolution" or "dense".
      inputs, outputs: values.
      weights: values; those of batch norm are not worth counting.
      multiply_adds: of the forward pass.
    """

    kind: str
    inputs: int
    outputs: int
    weights: int
    multiply_adds: int


class Speeds(NamedTuple):
    """What devices can do, all of a mesh together: bytes moved and operations a second."""

    bandwidth: float
    operations: float


def count_layers(model: nnx.Module, image_px: int, channels: int = 1) -> list[Layer]:
    """Returns the convolutions and dense layers of a network that is a chain of layers.

    Args:
      model: from `registry.create_model`.
      image_px, channels: of the images.
    """
    layers: list[Layer] = []
    inputs = image_px * image_px * channels
    for cost in count_costs(model, image_px, channels):
        outputs = math.prod(cost.output)
        if cost.multiply_adds:
            kind = "dense" if cost.kind == "dense" else "convolution" if layers else "first"
            layers.append(Layer(kind, inputs, outputs, cost.parameters, cost.multiply_adds))
        inputs = outputs
    return layers


def training_rate(
    layers: list[Layer], speeds: Speeds, batch_size: int, value_bytes: int, level: str = "fused"
) -> float:
    """Returns the most images a second of training.

    Args:
      layers: from `count_layers`.
      speeds: of the devices.
      batch_size: images a step.
      value_bytes: of one activation: 2 in bfloat16.
      level: a key of `TRAFFIC`.
    """
    seconds = sum(layer.weights for layer in layers) * WEIGHT_BYTES / speeds.bandwidth / batch_size
    for layer in layers:
        of_inputs, of_outputs = TRAFFIC[level][layer.kind]
        moved = _bytes(layer, value_bytes, of_inputs, of_outputs)
        products = 2 if layer.kind == "first" else 3
        operations = 2 * products * layer.multiply_adds
        seconds += max(moved / speeds.bandwidth, operations / speeds.operations)
    return 1 / seconds


def forward_rate(layers: list[Layer], speeds: Speeds, batch_size: int, value_bytes: int) -> float:
    """Returns the most images a second of the forward pass alone; arguments as above."""
    seconds = sum(layer.weights for layer in layers) * 4 / speeds.bandwidth / batch_size
    for layer in layers:
        moved = _bytes(layer, value_bytes, 1, 1)
        seconds += max(moved / speeds.bandwidth, 2 * layer.multiply_adds / speeds.operations)
    return 1 / seconds


def _bytes(layer: Layer, value_bytes: int, of_inputs: int, of_outputs: int) -> int:
    output_bytes = 4 if layer.kind == "dense" else value_bytes
    return of_inputs * layer.inputs * value_bytes + of_outputs * layer.outputs * output_bytes


def measure_speeds(mesh: Mesh, dtype: jnp.dtype, seconds: float) -> Speeds:
    """Measures the devices of a mesh, all at work: a copy and a square matrix product.

    Args:
      mesh: from `sharding.create_mesh`.
      dtype: of the matrices.
      seconds: how long a repeat lasts at least; the best of five counts.
    """
    # Devices of a CPU share one memory and the same cores.
    on_cpu = jax.default_backend() == "cpu"
    words, height, side = (
        (2**26, 2048, 2048) if on_cpu else (2**28 * mesh.size, 8192 * mesh.size, 8192)
    )
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    line = jax.jit(lambda: jnp.zeros(words, jnp.float32), out_shardings=rows)()
    left = jax.jit(lambda: jnp.ones((height, side), dtype), out_shardings=rows)()
    right = jax.jit(lambda: jnp.ones((side, side), dtype), out_shardings=whole)()
    copy, product = jax.jit(lambda x: x + 1), jax.jit(jnp.dot)
    runs = {
        "copy": repeated(lambda: copy(line), jax.block_until_ready),
        "product": repeated(lambda: product(left, right), jax.block_until_ready),
    }
    for run in runs.values():
        run(1)  # compiles
    rates = measure(runs, seconds, repeats=5)
    return Speeds(
        bandwidth=max(rates["copy"]) * 2 * line.nbytes,
        operations=max(rates["product"]) * 2 * left.size * side,
    )
