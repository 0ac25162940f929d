"""Predicts how training scales over many GPUs, from one GPU's speed and the links between them.

Examples:

  hccr scaling --config=configs/v2.py --images_per_second=279000
  hccr scaling --config=configs/v1.py --images_per_second=372000 --gpus=8,16,32

Each GPU takes --batch_size images a step. What devices exchange in a step is read from the compiled
program: the gradients, and with model.batch_norm="global" the sums of every batch norm, forward and
backward, which wait for one another. A reduction of b bytes over g GPUs a machine and m machines
takes

  latency(g m) + 2 b (g − 1)/g / nvlink + 2 (b/g) (m − 1)/m / network,
  latency(n) = latency_us + 2 hop_us log2(m)

(a ring inside each machine, after which each GPU exchanges a g-th of the sums with its counterparts
in the other machines; small messages go up and down a tree). No overlap with computing is assumed,
so the true efficiency is higher.
"""

from types import SimpleNamespace

from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process

TAKES_CONFIG = True


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    for name, default, text in (
        ("images_per_second", None, "What one GPU reaches with this batch, from the benchmark."),
        ("nvlink_gigabytes", 476.0, "A GPU sends a second inside a machine."),
        ("network_gigabytes", 47.0, "A GPU sends a second out of its machine."),
        ("latency_us", 26.0, "A small reduction takes inside a machine."),
        ("hop_us", 5.0, "Each hop between machines adds."),
    ):
        flags.DEFINE_float(name, default, text, lower_bound=1e-9, flag_values=values)
    flags.DEFINE_integer("batch_size", 1024, "Images a GPU and step.", 1, flag_values=values)
    flags.DEFINE_integer("num_classes", 3755, "Characters.", 2, flag_values=values)
    flags.DEFINE_integer("node_gpus", 8, "GPUs in one machine.", 1, flag_values=values)
    flags.DEFINE_list("gpus", ["8", "64", "512"], "How many, one or several.", flag_values=values)


def run(values: SimpleNamespace) -> None:
    """Runs the command."""
    command.require(
        values, config="for example --config=v2", images_per_second="what one GPU reaches"
    )
    wrong = [text for text in values.gpus if not text.isdecimal() or int(text) < 1]
    if wrong:
        raise InputError(f"--gpus={wrong[0]}: must be whole numbers, such as 8,64,512")
    prepare_process()
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    from hccr_jax.bench.scaling import Links, create_table
    from hccr_jax.report.markdown import to_table

    links = Links(
        values.node_gpus,
        values.nvlink_gigabytes * 1e9,
        values.network_gigabytes * 1e9,
        values.latency_us * 1e-6,
        values.hop_us * 1e-6,
    )
    seconds, gpus = values.batch_size / values.images_per_second, [int(n) for n in values.gpus]
    print(to_table(create_table(values.config, values.num_classes, seconds, links, gpus)))
