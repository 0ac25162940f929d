"""Counts what depthwise-separable convolutions save in a network, as section 3.2 of the paper.

Examples:

  hccr cost --config=configs/v2.py
  hccr cost --config=configs/v1.py --num_classes=100 --markdown
  hccr cost --config=configs/resnet18.py --config.data.image_px=96

For an output of H×W pixels, N channels in, M channels out and a filter of K×K weights:

                        multiply-adds      parameters
  standard              H W K² N M         K² N M
  depthwise separable   H W N (K² + M)     N (K² + M)
  ratio                 1/M + 1/K²         1/M + 1/K²

Each row is a depthwise convolution of the network and the pointwise one that follows, "predicted"
by these formulas and "counted" layer by layer as the network runs; the standard convolution is one
with input and output of the same sizes. Then the whole network as it is, and with a standard
convolution instead of each pair and of the batch norm inside it. A network without such pairs is
listed layer by layer.
"""

from types import SimpleNamespace

from absl import flags

from hccr_jax.cli import command
from hccr_jax.runtime.startup import prepare_process

TAKES_CONFIG = True


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_integer(
        "num_classes", None, "Characters; default the config's data.synthetic.num_characters.",
        lower_bound=2, flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("markdown", False, "Print Markdown tables.", flag_values=values)


def run(values: SimpleNamespace) -> None:
    """Runs the command."""
    command.require(values, config="for example --config=v2")
    prepare_process()
    from hccr_jax.bench.cost import create_tables, to_columns
    from hccr_jax.inference.network import create_module
    from hccr_jax.models.costs import named_costs
    from hccr_jax.report.markdown import to_table

    config = values.config
    model = create_module(config, values.num_classes or config.data.synthetic.num_characters)
    tables = create_tables(named_costs(model, config.data.image_px))
    print("\n\n".join(map(to_table if values.markdown else to_columns, tables)))
