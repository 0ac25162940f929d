"""How training scales over many GPUs: what a step exchanges, and what that takes."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
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

    def seconds(self, exchange: "Exchange", num_gpus: int) -> float:
        """Returns how long an exchange over some GPUs takes."""
        inside = min(self.gpus, num_gpus)
        machines = num_gpus / inside
        if num_gpus == 1:
            return 0.0
        latency = self.latency + 2 * self.hop * math.log2(machines)
        num_bytes = exchange.num_bytes
        if exchange.gathers:  # each GPU gets those of all others
            others = num_bytes * (num_gpus - 1) / self.nvlink
            return latency + others + num_bytes * (machines - 1) / self.network
        ring = 2 * num_bytes * (inside - 1) / inside / self.nvlink
        between = 2 * num_bytes / inside * (machines - 1) / machines / self.network
        return latency + ring + between


class Exchange(NamedTuple):
    """What devices exchange at once: the bytes of each, added up or gathered."""

    num_bytes: int
    gathers: bool = False


def count_exchanges(config: ConfigDict, num_classes: int) -> list[Exchange]:
    """Returns what devices exchange in a training step's program, in order, one after another.

    At the end come gradients, batch statistics and metrics. Before, a batch norm with global
    statistics gathers two arrays forward and adds up two backward, which the next layer waits for.
    The program is one for two CPU devices; one has nothing to exchange.
    """
    model = create_module(config, num_classes)
    apply, params, batch_stats = split_model(model)
    optimizer = optim.make_optimizer("adam", lambda step: 1e-3)
    mesh = Mesh(jax.devices("cpu")[:2], (sharding.DATA_AXIS,), axis_types=(AxisType.Auto,))
    step: Any = make_train_step(
        apply,
        optimizer,
        lambda keys, images: images,
        mesh,
        StepOptions(
            global_batch_norm=config.model.batch_norm == "global",
            reduce_dtype=jnp.dtype(config.reduce_dtype),
        ),
    )
    state = jax.eval_shape(lambda: create_train_state(params, batch_stats, optimizer))
    size, rows = config.data.image_px, mesh.size
    images = jax.ShapeDtypeStruct((rows, size, size), jnp.uint8)
    text = step.lower(state, images, jax.ShapeDtypeStruct((rows,), jnp.int32)).as_text()
    found = re.findall(r"stablehlo\.all_(reduce|gather).*?[)>] : \((.*?)\) ->", text, re.S)
    return [
        Exchange(sum(map(_num_bytes, re.findall(r"tensor<(.*?)>", types))), kind == "gather")
        for kind, types in found
    ]


def _num_bytes(tensor: str) -> int:
    """Returns the size of a tensor from its type in a program's text.

    >>> _num_bytes("3x3x16xf32"), _num_bytes("f32")
    (576, 4)
    """
    *shape, dtype = tensor.split("x")
    return math.prod(map(int, shape)) * _BYTES[dtype]


def efficiency(seconds: float, exchanges: Sequence[Exchange], links: Links, num_gpus: int) -> float:
    """Returns the share of a step that is spent on computing.

    Args:
      seconds: of a step on one GPU.
      exchanges: of a step, each waiting for the one before.
      links: between the GPUs.
      num_gpus: of them.
    """
    waits = sum(links.seconds(exchange, num_gpus) for exchange in exchanges)
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
    lines = [["batch norm", "gradients in", "MB a step", "exchanges"]]
    lines[0] += [f"{count:,} GPUs" for count in gpus]
    for norm, dtype in (("global", "float32"), ("local", "float32"), ("local", "bfloat16")):
        changed = config.copy_and_resolve_references()
        changed.model.batch_norm, changed.reduce_dtype = norm, dtype
        exchanges = count_exchanges(changed, num_classes)
        shares = [efficiency(seconds, exchanges, links, count) for count in gpus]
        size = sum(exchange.num_bytes for exchange in exchanges)
        cells = [norm, dtype, f"{size / 1e6:.1f}", str(len(exchanges))]
        lines.append(cells + [f"{share:.1%}" for share in shares])
    return lines
