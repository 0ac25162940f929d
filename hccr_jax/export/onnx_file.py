"""Writes a network to an ONNX file node by node, and runs it with ONNX Runtime.

Input `images` uint8 (batch, S, S), ink high; outputs `logits` and `probabilities`, float32
(batch, K). Inside, maps are (batch, C, H, W), as ONNX requires.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.export import tta
from hccr_jax.export.graph import RELU6_LIMIT
from hccr_jax.inference.tta import TtaViews
from hccr_jax.models.folding import INPUT, Layer

OPSET, IR_VERSION = 17, 8  # of 2022: runtimes on phones lag behind
KEY = "hccr_jax"  # of the description in the file's metadata
_CALIBRATION_ROWS = 64  # a batch
_FLOAT_SHARE = 0.0065  # of the weights: the first layers, which int8 keeps in float


def write(
    path: Path,
    layers: Sequence[Layer],
    image_px: int,
    description: dict[str, Any],
    dtype: str = "float32",
    calibration: np.ndarray | None = None,
    views: TtaViews | None = None,
) -> None:
    """Writes a network to an ONNX file.

    Args:
      path: of the file.
      layers: from `graph.fold`.
      image_px: side S of the images.
      description: JSON object, stored in the file's metadata.
      dtype: of weights and arithmetic: "float32", "float16" or "int8".
      calibration: uint8 (N, S, S), for int8: images that set the range of every activation.
      views: of test-time augmentation inside the file; None for one view.
    """
    import onnx

    arithmetic = np.dtype(np.float16 if dtype == "float16" else np.float32)
    model = _GraphBuilder(arithmetic).build(layers, image_px, views)
    if dtype == "int8":
        assert calibration is not None
        model = _quantize(model, calibration, _first_layers(layers))
    onnx.helper.set_model_props(model, {KEY: json.dumps(description, ensure_ascii=False)})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def load(path: Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a file's network: uint8 (B, S, S) to probabilities (B, K); 0 threads for all."""
    session = create_session(path, threads)
    return lambda images: session.run(["probabilities"], {INPUT: images})[0]


def create_session(path: Path, threads: int = 0) -> Any:
    """Returns an ONNX Runtime session on the CPU; 0 threads for one a core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _GraphBuilder:
    """Collects the nodes and constants of a graph; methods that add one return its name."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def build(self, layers: Sequence[Layer], image_px: int, views: TtaViews | None) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        source = tta.add_views(self, INPUT, views, image_px) if views else INPUT
        outputs = {INPUT: self.add_input(source)}
        for layer in layers:
            outputs[layer.name] = self.add_layer(layer, [outputs[name] for name in layer.inputs])
        last, bias = layers[-1].name, layers[-1].bias
        assert bias is not None
        self.node("Cast", "logits.views" if views else "logits", [last], to=TensorProto.FLOAT)
        if views:
            tta.add_combination(self, "logits.views", "logits", views, len(bias))
        self.node("Softmax", "probabilities", ["logits"], axis=1)
        results = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(bias)])
            for name in ("logits", "probabilities")
        ]
        shape: list[str | int | None] = ["batch", image_px, image_px]
        images = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape)
        tensors = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        return helper.make_model(
            helper.make_graph(self.nodes, "hccr_jax", [images], results, tensors),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="hccr_jax",
        )

    def add_input(self, source: str) -> str:
        from onnx import helper

        white = self.constant("white", np.array(255, self.dtype))
        axis = self.constant("channel_axis", np.array([1], np.int64))
        element = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.node("Cast", "images.float", [source], to=element)
        self.node("Div", "images.scaled", ["images.float", white])
        return self.node("Unsqueeze", "images.maps", ["images.scaled", axis])

    def add_layer(self, layer: Layer, inputs: list[str]) -> str:
        name = f"{layer.name}.linear" if layer.activation else layer.name
        match layer.kind:
            case "conv" | "depthwise":
                self.convolution(name, layer, inputs)
            case "dense":
                assert layer.weight is not None
                self.node("Gemm", name, self.with_weights(layer, inputs, layer.weight))
            case "add":
                self.node("Add", name, inputs)
            case "max_pool":
                pads = [layer.padding] * 4
                self.node("MaxPool", name, inputs, kernel_shape=[3, 3], strides=[2, 2], pads=pads)
            case "average_pool":
                self.node("AveragePool", name, inputs, kernel_shape=[2, 2], strides=[2, 2])
            case "mean":
                self.node("Flatten", name, [self.node("GlobalAveragePool", f"{name}.maps", inputs)])
            case "flatten":
                last = self.node("Transpose", f"{name}.channels_last", inputs, perm=[0, 2, 3, 1])
                self.node("Flatten", name, [last])
        match layer.activation:
            case "relu6":
                limits = (("zero", 0.0), ("six", RELU6_LIMIT))
                bounds = [self.constant(key, np.array(value, self.dtype)) for key, value in limits]
                self.node("Clip", layer.name, [name, *bounds])
            case "relu":
                self.node("Relu", layer.name, [name])
            case "tanh":
                self.node("Tanh", layer.name, [name])
        return layer.name

    def convolution(self, name: str, layer: Layer, inputs: list[str]) -> None:
        assert layer.weight is not None
        is_depthwise = layer.kind == "depthwise"
        filters = layer.weight[:, :, None] if is_depthwise else layer.weight
        self.node(
            "Conv", name, self.with_weights(layer, inputs, filters.transpose(3, 2, 0, 1)),
            kernel_shape=filters.shape[:2], strides=[layer.stride] * 2,
            pads=[layer.padding] * 4, group=filters.shape[3] if is_depthwise else 1,
        )  # fmt: skip

    def with_weights(self, layer: Layer, inputs: list[str], weight: np.ndarray) -> list[str]:
        """Returns the inputs with the constants of a layer's weight and bias."""
        assert layer.bias is not None
        bias = self.constant(f"{layer.name}.bias", layer.bias.astype(self.dtype))
        return [*inputs, self.constant(f"{layer.name}.weight", weight.astype(self.dtype)), bias]

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = np.ascontiguousarray(value)
        return name


def _first_layers(layers: Sequence[Layer]) -> list[str]:
    """Returns the names of the first layers, which hold a small share of the weights."""
    sizes = np.array([0 if layer.weight is None else layer.weight.size for layer in layers])
    is_first = np.cumsum(sizes) <= _FLOAT_SHARE * sizes.sum()
    return [layer.name for layer, first in zip(layers, is_first, strict=True) if first]


def _quantize(model: Any, calibration: np.ndarray, first_layers: Sequence[str]) -> Any:
    """Returns a float model quantised statically to int8, weights with a scale per channel.

    The first layers stay in float: they lose most accuracy and save few bytes. Weights have 7 bits:
    on x86-64 processors without VNNI, ONNX Runtime adds two products in 16 bits, which overflow
    with 8. A range is a moving mean over batches, so that a single outlier hardly changes it.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        starts = iter(range(0, len(calibration), _CALIBRATION_ROWS))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self.starts, None)
            if start is None:
                return None
            return {INPUT: np.ascontiguousarray(calibration[start : start + _CALIBRATION_ROWS])}

    excluded = [*first_layers, *(f"{name}.linear" for name in first_layers)]
    excluded += [node.name for node in model.graph.node if node.name.startswith(tta.PREFIX)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model.SerializeToString())
        logging.disable(logging.WARNING)  # it recommends a preprocessing that changes nothing here
        try:
            quantization.quantize_static(
                source, target, Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "Add", "Clip", "Relu", "GlobalAveragePool",
                                      "MaxPool", "AveragePool", "Flatten"],
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=excluded,
                extra_options={"CalibMovingAverage": True},
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return _without_zeros(onnx.load(target))


def _without_zeros(model: Any) -> Any:
    """Returns a quantised model without the optional zero points of its biases, which are all 0."""
    from onnx import TensorProto

    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = set()
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == TensorProto.INT32:
            zeros.add(node.input.pop())
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in zeros]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model
