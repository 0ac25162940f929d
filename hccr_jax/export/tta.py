"""Test-time augmentation inside an exported file: ONNX nodes for the views and their combination.

The views of an image are fixed, so the positions and weights of `ops.warp` are constants; in the
file an image is padded once and gathered four times for each view. All of this is in float32.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from hccr_jax.inference.tta import TtaViews
from hccr_jax.ops.warp import sampling_grid

PREFIX = "tta."  # of all nodes, which int8 leaves in float


def add_views(graph: Any, images: str, views: TtaViews, image_px: int) -> str:
    """Adds the nodes that show images in each view, like `steps.show_views`.

    Args:
      graph: the `_GraphBuilder` of `onnx_file`.
      images: name of the input, uint8 (B, S, S).
      views: V of them.
      image_px: S.

    Returns:
      The name of the output, float32 (B · V, S, S), 0 to 255, the views of an image in a row.
    """
    from onnx import TensorProto

    maps = jnp.asarray(views.maps)
    grid = sampling_grid(maps, jnp.zeros(maps.shape[:2]), image_px)
    corner, right, bottom = (np.asarray(array) for array in grid)
    line = image_px + 3
    node, constant = graph.node, _constants(graph)
    node("Cast", "tta.float", [images], to=TensorProto.FLOAT)
    node("Pad", "tta.padded", ["tta.float", constant("pads", np.array([0, 1, 1, 0, 2, 2]))])
    node("Reshape", "tta.flat", ["tta.padded", constant("lines", np.array([-1, line * line]))])
    constant("corner", corner)
    taps = []
    for number, offset in enumerate((0, 1, line, line + 1)):
        step = constant(f"offset{number}", np.array(offset, corner.dtype))
        index = node("Add", f"tta.index{number}", ["tta.corner", step])
        taps.append(node("Gather", f"tta.tap{number}", ["tta.flat", index], axis=1))

    def blend(name: str, first: str, second: str, weight: np.ndarray) -> str:
        weights = constant(f"{name}.rest", 1 - weight), constant(f"{name}.weight", weight)
        pair = zip((first, second), weights, strict=True)
        parts = [node("Mul", f"tta.{name}{i}", list(inputs)) for i, inputs in enumerate(pair)]
        return node("Add", f"tta.{name}", parts)

    upper = blend("upper", taps[0], taps[1], right)
    lower = blend("lower", taps[2], taps[3], right)
    blend("seen", upper, lower, bottom)
    shape = constant("image", np.array([-1, image_px, image_px]))
    return node("Reshape", "tta.images", ["tta.seen", shape])


def add_combination(graph: Any, logits: str, output: str, views: TtaViews, classes: int) -> str:
    """Adds the nodes that combine the views' probabilities, like `steps.combine_tta`.

    Args:
      graph: the `_GraphBuilder` of `onnx_file`.
      logits: name of the input, float32 (B · V, K).
      output: name to give the output.
      views: V of them.
      classes: K.

    Returns:
      The name of the output, float32 (B, K).
    """
    node, constant = graph.node, _constants(graph)
    classes_axis, views_axis = constant("axis2", np.array([2])), constant("axis1", np.array([1]))
    shape = constant("views", np.array([-1, len(views.weights), classes]))
    node("Reshape", "tta.logits", [logits, shape])
    node("LogSoftmax", "tta.logs", ["tta.logits"], axis=2)
    node("Exp", "tta.probabilities", ["tta.logs"])
    node("Mul", "tta.terms", ["tta.probabilities", "tta.logs"])
    node("ReduceSum", "tta.information", ["tta.terms", classes_axis], keepdims=1)  # −entropy
    most = constant("most", np.array(math.log(classes), np.float32))
    one, least = (constant(str(value), np.array(value, np.float32)) for value in (1.0, 1e-6))
    node("Div", "tta.ratio", ["tta.information", most])
    node("Add", "tta.positive", ["tta.ratio", one])
    node("Max", "tta.certainty", ["tta.positive", least])
    weights = constant("prior", views.weights[None, :, None])
    node("Mul", "tta.weights", ["tta.certainty", weights])
    node("Mul", "tta.weighted", ["tta.probabilities", "tta.weights"])
    node("ReduceSum", "tta.sum", ["tta.weighted", views_axis], keepdims=0)
    node("ReduceSum", "tta.total", ["tta.weights", views_axis], keepdims=0)
    node("Div", "tta.mean", ["tta.sum", "tta.total"])
    return node("Log", output, ["tta.mean"])


def _constants(graph: Any) -> Any:
    return lambda name, value: graph.constant(f"{PREFIX}{name}", value)
