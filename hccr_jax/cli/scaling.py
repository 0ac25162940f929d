"""Predicts how training scales over many GPUs, from one GPU's speed and the links between them.

Examples:

  hccr scaling --config=configs/v2.py --images_per_second=279000
  hccr scaling --config=configs/v1.py --images_per_second=372000 --gpus=8,16,32

Each GPU takes --batch_size images a step. What devices exchange in a step is read off the compiled
program: the gradients, and with model.batch_norm="global" the sums of every batch norm, forward and
backward, which wait for one another. A reduction of b bytes over g GPUs a machine and m machines
takes

  latency(g m) + 2 b (g − 1)/g / nvlink + 2 (b/g) (m − 1)/m / network,
  latency(n) = latency_us + 2 hop_us log2(m)

(a ring inside each machine, which leaves each GPU a g-th of the sums to exchange with its fellows
in the other machines; small messages climb and descend a tree). Nothing is taken to overlap with
computing, so the true efficiency lies higher.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.inference.network import create_module
from hccr_jax.models.functional import split_model
from hccr_jax.report.markdown import to_table
from hccr_jax.runtime import sharding
from hccr_jax.runtime.startup import prepare_process
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


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 wrong request."""
    own = _define_flags()
    try:
        command.parse(own, argv)
        if own.help:
            print(f"{__doc__}\nFlags:{own.get_help()}")
            return 0
        if own.images_per_second is None:
            raise InputError("--images_per_second is missing: what one GPU reaches")
        wrong = [text for text in own.gpus if not text.isdecimal() or int(text) < 1]
        if wrong:
            raise InputError(f"--gpus={wrong[0]}: must be whole numbers, such as 8,64,512")
        prepare_process()
        print(_table(own))
    except InputError as error:
        return command.report_error(error)
    return 0


def _define_flags() -> flags.FlagValues:
    own = command.define_config_flags()
    for name, default, text in (
        ("images_per_second", None, "What one GPU reaches with this batch, from the benchmark."),
        ("nvlink_gigabytes", 476.0, "A GPU sends a second inside a machine."),
        ("network_gigabytes", 47.0, "A GPU sends a second out of its machine."),
        ("latency_us", 26.0, "A small reduction takes inside a machine."),
        ("hop_us", 5.0, "Each hop between machines adds."),
    ):
        flags.DEFINE_float(name, default, text, lower_bound=1e-9, flag_values=own)
    flags.DEFINE_integer("batch_size", 1024, "Images a GPU and step.", 1, flag_values=own)
    flags.DEFINE_integer("num_classes", 3755, "Characters.", 2, flag_values=own)
    flags.DEFINE_integer("node_gpus", 8, "GPUs in one machine.", 1, flag_values=own)
    flags.DEFINE_list("gpus", ["8", "64", "512"], "How many, one or several.", flag_values=own)
    return own


def _table(values: flags.FlagValues) -> str:
    links = Links(
        values.node_gpus,
        values.nvlink_gigabytes * 1e9,
        values.network_gigabytes * 1e9,
        values.latency_us * 1e-6,
        values.hop_us * 1e-6,
    )
    seconds = values.batch_size / values.images_per_second
    lines = [["batch norm", "gradients in", "MB a step", "reductions that wait"]]
    lines[0] += [f"{int(count):,} GPUs" for count in values.gpus]
    for norm, dtype in (("global", "float32"), ("local", "float32"), ("local", "bfloat16")):
        config = values.config.copy_and_resolve_references()
        config.model.batch_norm, config.reduce_dtype = norm, dtype
        last, waiting = exchanges(config, values.num_classes)
        shares = [efficiency(seconds, last, waiting, links, int(n)) for n in values.gpus]
        cells = [norm, dtype, f"{(last + sum(waiting)) / 1e6:.1f}", str(len(waiting) + 1)]
        lines.append(cells + [f"{share:.1%}" for share in shares])
    return to_table(lines)
