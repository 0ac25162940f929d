"""Multiply-adds and parameters of networks, depthwise-separable and with standard convolutions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hccr_jax.models.costs import Cost, recording
from hccr_jax.models.layers import Conv, DepthwiseConv

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


def create_tables(costs: Sequence[tuple[str, Cost]]) -> list[list[list[str]]]:
    """Returns the tables of a network: of its pairs and totals, or of its layers without pairs."""
    if pairs := find_pairs(costs):
        return [_pair_rows(pairs, 0), _pair_rows(pairs, 1), _total_rows(costs)]
    return [_layer_rows(costs)]


def to_columns(rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in plain text, its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    )


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
