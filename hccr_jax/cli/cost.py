"""What depthwise-separable convolutions save in a network: section 3.2 of the paper as a tool.

Examples:

  hccr cost --config=configs/v2.py
  hccr cost --config=configs/v1.py --num_classes=100 --markdown
  hccr cost --config=configs/resnet18.py --config.data.image_px=96

For an output of H×W pixels, N channels in, M channels out and a filter of K×K weights:

                        multiply-adds      parameters
  standard              H W K² N M         K² N M
  depthwise separable   H W N (K² + M)     N (K² + M)
  ratio                 1/M + 1/K²         1/M + 1/K²

Each row is a depthwise convolution of the network with the pointwise one behind it, "predicted" by
these formulas and "counted" layer by layer as the network runs; the standard convolution is one
that takes and gives maps of the same sizes. Then the whole network as it is, and with a standard
convolution in the place of each pair and of the batch norm inside it. A network without such pairs
is listed layer by layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.inference.network import create_module
from hccr_jax.models.costs import Cost, named_costs, recording
from hccr_jax.models.layers import Conv, DepthwiseConv
from hccr_jax.report.markdown import to_table
from hccr_jax.runtime.startup import prepare_process

# An amount is an int array of two: multiply-adds for one image, and parameters.
WHAT = ("multiply-adds", "parameters")


class Pair(NamedTuple):
    """A depthwise convolution and the pointwise one behind it.

    Attributes:
      name: of the depthwise layer.
      sizes: H, W (of the output), N, M and K.
      separable: counted amount of both.
      between: of the batch norm between the two.
      standard: of the standard convolution in their place.
    """

    name: str
    sizes: tuple[int, int, int, int, int]
    separable: np.ndarray
    between: np.ndarray
    standard: np.ndarray


def predict_standard(height: int, width: int, inputs: int, outputs: int, kernel: int) -> np.ndarray:
    """Returns the amount of a standard convolution; the arguments are `Pair.sizes`.

    Source: section 3.2 of the paper, H W K² N M.

    >>> predict_standard(2, 2, inputs=4, outputs=8, kernel=3).tolist()
    [1152, 288]
    """
    weights = kernel**2 * inputs * outputs
    return np.array([height * width * weights, weights])


def predict_separable(
    height: int, width: int, inputs: int, outputs: int, kernel: int
) -> np.ndarray:
    """Returns the amount of a depthwise-separable convolution; the arguments are `Pair.sizes`.

    Source: section 3.2 of the paper, H W N (K² + M).

    >>> predict_separable(2, 2, inputs=4, outputs=8, kernel=3).tolist()
    [272, 68]
    """
    weights = inputs * (kernel**2 + outputs)
    return np.array([height * width * weights, weights])


def find_pairs(costs: Sequence[tuple[str, Cost]]) -> list[Pair]:
    """Returns the depthwise-separable pairs of a network.

    Args:
      costs: its layers, from `costs.named_costs`.
    """
    pairs = []
    layers = [cost for _, cost in costs]
    for index, (name, depthwise) in enumerate(costs):
        if isinstance(layer := depthwise.layer, DepthwiseConv):
            norm, pointwise = layers[index + 1 : index + 3]
            height, width, outputs = pointwise.output
            kernel, _, inputs = layer.weight.shape
            standard = Conv(inputs, outputs, kernel, layer.stride, rngs=nnx.Rngs(0))
            shape = (1, height * layer.stride, width * layer.stride, inputs)
            with recording() as counted:
                jax.eval_shape(standard, jax.ShapeDtypeStruct(shape, jnp.float32))
            sizes = (height, width, inputs, outputs, kernel)
            separable = _amount(depthwise, pointwise)
            pairs.append(Pair(name, sizes, separable, _amount(norm), _amount(*counted)))
    return pairs


def totals(costs: Sequence[tuple[str, Cost]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the amounts of a network as it is and with a standard convolution for each pair."""
    whole = _amount(*(cost for _, cost in costs))
    saved = sum(pair.standard - pair.separable - pair.between for pair in find_pairs(costs))
    return whole, whole + saved


def _amount(*costs: Cost) -> np.ndarray:
    return np.array([[cost.multiply_adds, cost.parameters] for cost in costs]).sum(0)


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 wrong request."""
    own = command.define_config_flags()
    flags.DEFINE_integer(
        "num_classes", None, "Characters; the config's data.synthetic.num_characters where not "
        "given.", lower_bound=2, flag_values=own,
    )  # fmt: skip
    flags.DEFINE_bool("markdown", False, "Print Markdown tables.", flag_values=own)
    try:
        command.parse(own, argv)
        if own.help:
            print(f"{__doc__}\nFlags:{own.get_help()}")
            return 0
        prepare_process()
        config = own.config
        model = create_module(config, own.num_classes or config.data.synthetic.num_characters)
        costs = named_costs(model, config.data.image_px)
    except InputError as error:
        return command.report_error(error)
    pairs = find_pairs(costs)
    tables = (
        [_pair_rows(pairs, 0), _pair_rows(pairs, 1), _total_rows(costs)]
        if pairs
        else [_layer_rows(costs)]
    )
    form = to_table if own.markdown else _to_columns
    print("\n\n".join(form(rows) for rows in tables))
    return 0


def _pair_rows(pairs: Sequence[Pair], index: int) -> list[list[str]]:
    """Returns the pairs' table, its head first, of an amount's multiply-adds or parameters."""
    amounts_head = ("standard, predicted", "counted", "separable, predicted", "counted")
    rows = [[WHAT[index], "H×W", "N", "M", *amounts_head, "1/M + 1/K²", "counted"]]
    for pair in pairs:
        height, width, inputs, outputs, kernel = pair.sizes
        amounts = (
            predict_standard(*pair.sizes), pair.standard,
            predict_separable(*pair.sizes), pair.separable,
        )  # fmt: skip
        ratios = 1 / outputs + 1 / kernel**2, pair.separable[index] / pair.standard[index]
        rows.append(
            [pair.name, f"{height}×{width}", f"{inputs:,}", f"{outputs:,}"]
            + [f"{amount[index]:,}" for amount in amounts]
            + [f"{ratio:.4f}" for ratio in ratios]
        )
    return rows


def _total_rows(costs: Sequence[tuple[str, Cost]]) -> list[list[str]]:
    whole, standard = totals(costs)
    return [
        ["whole network", *WHAT],
        ["with standard convolutions", *(f"{count:,}" for count in standard)],
        ["as it is", *(f"{count:,}" for count in whole)],
        ["ratio", *(f"{ratio:.4f}" for ratio in whole / standard)],
    ]


def _layer_rows(costs: Sequence[tuple[str, Cost]]) -> list[list[str]]:
    rows = [["layer", "kind", "output", *WHAT]]
    for name, cost in costs:
        output = "×".join(map(str, cost.output))
        rows.append([name, cost.kind, output, *(f"{count:,}" for count in _amount(cost))])
    return [*rows, ["total", "", "", *(f"{count:,}" for count in totals(costs)[0])]]


def _to_columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    )
