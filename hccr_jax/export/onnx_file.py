"""A network as an ONNX file, written node by node, and run by ONNX Runtime.

Input `images` uint8 (batch, S, S), ink high; outputs `logits` and `probabilities`, float32
(batch, K). Maps lie channels first, as ONNX has them.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.export.graph import RELU6_LIMIT
from hccr_jax.models.folding import INPUT, Layer

OPSET, IR_VERSION = 17, 8  # of 2022: runtimes on phones lag behind
KEY = "hccr_jax"  # of the description among the file's properties
_CALIBRATION_ROWS = 64  # a batch
_FLOAT_SHARE = 0.0065  # of the weights: the first layers that int8 leaves in float


def write(
    path: Path,
    layers: Sequence[Layer],
    image_px: int,
    description: dict[str, Any],
    dtype: str = "float32",
    calibration: np.ndarray | None = None,
) -> None:
    """Writes a network to an ONNX file.

    Args:
      path: of the file.
      layers: from `graph.fold`.
      image_px: side S of the images.
      description: JSON object, kept in the file's properties.
      dtype: of weights and arithmetic: "float32", "float16" or "int8".
      calibration: uint8 (N, S, S), for int8: the range of every activation is taken from them.
    """
    import onnx

    model = _build(layers, image_px, np.dtype(np.float16 if dtype == "float16" else np.float32))
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


def _build(layers: Sequence[Layer], image_px: int, dtype: np.dtype) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    nodes: list[Any] = []
    constants: dict[str, np.ndarray] = {}

    def put(op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(name: str, value: np.ndarray) -> str:
        constants[name] = np.ascontiguousarray(value)
        return name

    element = helper.np_dtype_to_tensor_dtype(dtype)
    white = constant("white", np.array(255, dtype))
    axis = constant("channel_axis", np.array([1], np.int64))
    put("Cast", "images.float", [INPUT], to=element)
    put("Div", "images.scaled", ["images.float", white])
    put("Unsqueeze", "images.maps", ["images.scaled", axis])
    outputs = {INPUT: "images.maps"}

    for layer in layers:
        inputs = [outputs[name] for name in layer.inputs]
        name = f"{layer.name}.linear" if layer.activation else layer.name
        if layer.weight is not None and layer.bias is not None:
            weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
            inputs += [weight, constant(bias, layer.bias.astype(dtype))]
        match layer.kind:
            case "conv" | "depthwise":
                assert layer.weight is not None
                is_depthwise = layer.kind == "depthwise"
                filters = layer.weight[:, :, None] if is_depthwise else layer.weight
                constant(weight, filters.transpose(3, 2, 0, 1).astype(dtype))
                put(
                    "Conv", name, inputs,
                    kernel_shape=filters.shape[:2], strides=[layer.stride] * 2,
                    pads=[layer.padding] * 4, group=filters.shape[3] if is_depthwise else 1,
                )  # fmt: skip
            case "dense":
                assert layer.weight is not None
                constant(weight, layer.weight.astype(dtype))
                put("Gemm", name, inputs)
            case "add":
                put("Add", name, inputs)
            case "max_pool":
                pads = [layer.padding] * 4
                put("MaxPool", name, inputs, kernel_shape=[3, 3], strides=[2, 2], pads=pads)
            case "average_pool":
                put("AveragePool", name, inputs, kernel_shape=[2, 2], strides=[2, 2])
            case "mean":
                put("Flatten", name, [put("GlobalAveragePool", f"{name}.maps", inputs)])
            case "flatten":
                last = put("Transpose", f"{name}.channels_last", inputs, perm=[0, 2, 3, 1])
                put("Flatten", name, [last])
        outputs[layer.name] = layer.name
        match layer.activation:
            case "relu6":
                limits = (("zero", 0.0), ("six", RELU6_LIMIT))
                bounds = [constant(key, np.array(value, dtype)) for key, value in limits]
                put("Clip", layer.name, [name, *bounds])
            case "relu":
                put("Relu", layer.name, [name])
            case "tanh":
                put("Tanh", layer.name, [name])

    last, classes = layers[-1].name, layers[-1].bias
    assert classes is not None
    put("Cast", "logits", [last], to=TensorProto.FLOAT)
    put("Softmax", "probabilities", ["logits"], axis=1)
    answers = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(classes)])
        for name in ("logits", "probabilities")
    ]
    images = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", image_px, image_px])
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "hccr_jax", [images], answers, tensors)
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="hccr_jax",
    )


def _first_layers(layers: Sequence[Layer]) -> list[str]:
    """Returns the names of the layers that come before all but a small share of the weights."""
    sizes = np.array([0 if layer.weight is None else layer.weight.size for layer in layers])
    is_first = np.cumsum(sizes) <= _FLOAT_SHARE * sizes.sum()
    return [layer.name for layer, first in zip(layers, is_first, strict=True) if first]


def _quantize(model: Any, calibration: np.ndarray, first_layers: Sequence[str]) -> Any:
    """Returns a float model in int8, statically: a scale for each channel of the weights.

    The first layers stay in float: their rounding costs most, their weights hardly a byte. Weights
    have 7 bits: on x86-64 processors without VNNI, ONNX Runtime adds two products up in 16 bits,
    and with 8 these overflow. A range is a moving mean over batches, so that one odd image hardly
    moves it.
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

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(model.SerializeToString())
        logging.disable(logging.WARNING)  # it asks for a preparation that has nothing to do here
        try:
            quantization.quantize_static(
                source, target, Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "Add", "Clip", "Relu", "GlobalAveragePool",
                                      "MaxPool", "AveragePool", "Flatten"],
                per_channel=True,
                reduce_range=True,
                nodes_to_exclude=[*first_layers, *(f"{name}.linear" for name in first_layers)],
                extra_options={"CalibMovingAverage": True},
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        finally:
            logging.disable(logging.NOTSET)
        return _without_zeros(onnx.load(target))


def _without_zeros(model: Any) -> Any:
    """Returns a quantised model without the zero points of its biases, which are all zero.

    They are optional, and as large as the biases.
    """
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
