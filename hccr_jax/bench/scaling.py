"""How training scales over many GPUs: what a step exchanges, and what that takes."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from hccr_jax.inference.network import create_module
from hccr_jax.models.functional import split_model
from hccr_jax.runtime import sharding
from hccr_jax.train import optim
from hccr_jax.train.state import create_train_state
from hccr_jax.train.step import StepOptions, make_train_step

_BYTES = {"f32": 4, "bf16": 2, "i32": 4}


class Links(NamedTuple):
    """What connects GPUs: seconds, and bytes a second for each GPU.

    Attributes:
      gpus: in one machine.
      nvlink, network: bytes a second that a GPU sends inside and out of its machine.
      latency, hop: seconds of a small reduction in a machine, and of each hop between machines.
    """

    gpus: int
    nvlink: float
    network: float
    latency: float
    hop: float

    def seconds(self, num_bytes: float, num_gpus: int) -> float:
        """Returns how long a reduction over some GPUs takes."""
        inside = min(self.gpus, num_gpus)
        machines = num_gpus / inside
        if num_gpus == 1:
            return 0.0
        latency = self.latency + 2 * self.hop * math.log2(machines)
        ring = 2 * num_bytes * (inside - 1) / inside / self.nvlink
        between = 2 * num_bytes / inside * (machines - 1) / machines / self.network
        return latency + ring + between


def count_reductions(config: ConfigDict, num_classes: int) -> tuple[list[int], list[int]]:
    """Returns the bytes of each reduction in a training step's program, and of each gradient."""
    model = create_module(config, num_classes)
    apply, params, batch_stats = split_model(model)
    optimizer = optim.make_optimizer("adam", lambda step: 1e-3)
    step: Any = make_train_step(
        apply,
        optimizer,
        lambda keys, images: images,
        sharding.create_mesh(),
        StepOptions(
            global_batch_norm=config.model.batch_norm == "global",
            reduce_dtype=jnp.dtype(config.reduce_dtype),
        ),
    )
    state = jax.eval_shape(lambda: create_train_state(params, batch_stats, optimizer))
    size, rows = config.data.image_px, jax.device_count()
    images = jax.ShapeDtypeStruct((rows, size, size), jnp.uint8)
    text = step.lower(state, images, jax.ShapeDtypeStruct((rows,), jnp.int32)).as_text()
    found = re.findall(r"stablehlo\.all_reduce.*?\) : \((.*?)\) ->", text, re.S)
    sizes = [sum(map(_num_bytes, re.findall(r"tensor<(.*?)>", types))) for types in found]
    width = jnp.dtype(config.reduce_dtype).itemsize
    return sizes, [leaf.size * width for leaf in jax.tree.leaves(params)]


def _num_bytes(tensor: str) -> int:
    """Returns the size of a tensor from its type in a program's text.

    >>> _num_bytes("3x3x16xf32"), _num_bytes("f32")
    (576, 4)
    """
    *shape, dtype = tensor.split("x")
    return math.prod(map(int, shape)) * _BYTES[dtype]


def exchanges(config: ConfigDict, num_classes: int) -> tuple[int, list[float]]:
    """Returns the bytes reduced together at a step's end, and those of each reduction that waits.

    A batch norm with global statistics adds up two arrays forward and two backward; each two travel
    together, and the next layer waits for them.
    """
    sizes, gradients = count_reductions(config, num_classes)
    if config.model.batch_norm == "local":
        return sum(sizes), []  # the statistics go with the gradients
    count = (len(sizes) - len(gradients) - 2) // 2  # two metrics go with the gradients as well
    size = sum(sizes) - sum(gradients) - 8
    return sum(gradients) + 8, [size / count] * count


def efficiency(
    seconds: float, last: float, waiting: Sequence[float], links: Links, num_gpus: int
) -> float:
    """Returns the share of a step that is spent on computing.

    Args:
      seconds: of a step on one GPU.
      last: bytes reduced together, once a step.
      waiting: bytes of the reductions that wait for one another.
      links: between the GPUs.
      num_gpus: of them.
    """
    waits = sum(links.seconds(size, num_gpus) for size in (last, *waiting))
    return seconds / (seconds + waits)


def create_table(
    config: ConfigDict,
    num_classes: int,
    seconds: float,
    links: Links,
    gpus: Sequence[int],
) -> list[list[str]]:
    """Returns a table of how efficient data parallelism is, its head first.

    Args:
      config: the network's.
      num_classes: of the network.
      seconds: of a step on one GPU.
      links: between the GPUs.
      gpus: how many, a column each.
    """
    lines = [["batch norm", "gradients in", "MB a step", "reductions that wait"]]
    lines[0] += [f"{count:,} GPUs" for count in gpus]
    for norm, dtype in (("global", "float32"), ("local", "float32"), ("local", "bfloat16")):
        changed = config.copy_and_resolve_references()
        changed.model.batch_norm, changed.reduce_dtype = norm, dtype
        last, waiting = exchanges(changed, num_classes)
        shares = [efficiency(seconds, last, waiting, links, count) for count in gpus]
        cells = [norm, dtype, f"{(last + sum(waiting)) / 1e6:.1f}", str(len(waiting) + 1)]
        lines.append(cells + [f"{share:.1%}" for share in shares])
    return lines
