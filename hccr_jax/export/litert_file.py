"""Writes a network to a LiteRT flatbuffer (.tflite), for phones, without TensorFlow.

Input `images` uint8 (batch, S, S), ink high; outputs `logits` and `probabilities`, float32
(batch, K), under these names in the signature "serving_default". Maps are (batch, H, W, C).

Source: the operators and their options are those of LiteRT's schema,
https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.models.folding import INPUT, Layer

SIGNATURE = "serving_default"
PRODUCER = "hccr_jax"
ALIGNMENT = 16  # of every array in the file, in bytes, as the schema requires
_FUSED = {"": "NONE", "tanh": "NONE", "relu": "RELU", "relu6": "RELU6"}
# The lowest version of an operator that supports its use here, where it is not the first.
_VERSIONS = {("DEQUANTIZE", "float16"): 3, ("DEQUANTIZE", "int8"): 5}


def write(
    path: Path,
    layers: Sequence[Layer],
    image_px: int,
    description: dict[str, Any],
    dtype: str = "float32",
) -> None:
    """Writes a network to a LiteRT file.

    Args:
      path: of the file.
      layers: from `graph.fold`.
      image_px: side S of the images.
      description: JSON object, stored in the metadata "hccr_jax".
      dtype: of the weights: "float32", "float16", or "int8" with a scale per output channel; all
        arithmetic is in float32.
    """
    import flatbuffers

    model = _ModelBuilder(dtype).build(layers, image_px, description)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


def load(path: Path, threads: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a file's network: uint8 (B, S, S) to probabilities (B, K); 0 threads for all."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads or None)
    (images,) = interpreter.get_input_details()
    outputs = {row["name"]: row["index"] for row in interpreter.get_output_details()}
    shape: tuple[int, ...] = ()

    def predict(batch: np.ndarray) -> np.ndarray:
        nonlocal shape
        if shape != batch.shape:
            interpreter.resize_tensor_input(images["index"], batch.shape)
            interpreter.allocate_tensors()
            shape = batch.shape
        interpreter.set_tensor(images["index"], batch)
        interpreter.invoke()
        return interpreter.get_tensor(outputs["probabilities"])

    return predict


class _ModelBuilder:
    """Builds a model; tensors are identified by their indices."""

    def __init__(self, dtype: str) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.dtype = schema, dtype
        self.graph, self.model = schema.SubGraphT(), schema.ModelT()
        self.graph.tensors, self.graph.operators = [], []
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []  # the first is empty
        self.codes: dict[tuple[str, int], int] = {}

    def build(self, layers: Sequence[Layer], image_px: int, description: dict[str, Any]) -> Any:
        graph, model, schema = self.graph, self.model, self.schema
        images = self.tensor(INPUT, (image_px, image_px), "uint8")
        x = self.put("CAST", "images.float", [images], (image_px, image_px))
        x = self.put("DIV", "images.scaled", [x, self.constant("white", np.float32(255))],
                     (image_px, image_px))  # fmt: skip
        x = self.reshape("images.maps", x, (image_px, image_px, 1))
        outputs = {INPUT: x}
        for layer in layers:
            outputs[layer.name] = self.layer(layer, [outputs[name] for name in layer.inputs])
        last = outputs[layers[-1].name]
        logits = self.reshape("logits", last, self.shape(last))
        options = schema.SoftmaxOptionsT()
        options.beta = 1.0
        probabilities = self.put(
            "SOFTMAX", "probabilities", [logits], self.shape(logits), SoftmaxOptions=options
        )
        graph.inputs, graph.outputs = [images], [logits, probabilities]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
        signature.inputs = [self.named(INPUT, images)]
        signature.outputs = [
            self.named("logits", logits), self.named("probabilities", probabilities)
        ]  # fmt: skip
        metadata = schema.MetadataT()
        metadata.name = PRODUCER
        metadata.buffer = self.buffer(json.dumps(description, ensure_ascii=False).encode())
        model.version, model.description = 3, PRODUCER
        model.subgraphs, model.signatureDefs, model.metadata = [graph], [signature], [metadata]
        return model

    def layer(self, layer: Layer, inputs: list[int]) -> int:
        """Adds a layer and returns its output."""
        schema, name = self.schema, layer.name
        if layer.activation == "tanh":
            name = f"{name}.linear"
        height, width, channels = (*self.shape(inputs[0]), 0, 0)[:3]
        match layer.kind:
            case "conv" | "depthwise":
                y = self.convolution(name, layer, inputs[0])
            case "dense":
                assert layer.weight is not None
                weight = self.weight(f"{layer.name}.weight", layer.weight.T, axis=0)
                y = self.put(
                    "FULLY_CONNECTED", name, [inputs[0], weight, self.bias(layer)],
                    (layer.weight.shape[1],),
                    FullyConnectedOptions=self.fused(schema.FullyConnectedOptionsT(), layer),
                )  # fmt: skip
            case "add":
                options = self.fused(schema.AddOptionsT(), layer)
                y = self.put("ADD", name, inputs, self.shape(inputs[0]), AddOptions=options)
            case "max_pool" | "average_pool":
                y = self.pool(name, layer, inputs[0])
            case "mean":
                axes = self.constant(f"{name}.axes", np.array([1, 2], np.int32))
                options = schema.ReducerOptionsT()
                y = self.put(
                    "MEAN", name, [inputs[0], axes], (channels,), ReducerOptions=options
                )  # fmt: skip
            case "flatten":
                y = self.reshape(name, inputs[0], (height * width * channels,))
        if layer.activation == "tanh":
            y = self.put("TANH", layer.name, [y], self.shape(y))
        return y

    def convolution(self, name: str, layer: Layer, x: int) -> int:
        assert layer.weight is not None
        schema, is_depthwise = self.schema, layer.kind == "depthwise"
        kernel, channels = len(layer.weight), layer.weight.shape[-1]
        # "SAME" pads symmetrically, as here, only where the stride is 1.
        is_same = layer.stride == 1 and 2 * layer.padding == kernel - 1
        if not is_same:
            x = self.pad(name, x, layer.padding)
        height, width, _ = self.shape(x)
        reach = 0 if is_same else kernel - 1
        shape = ((height - reach - 1) // layer.stride + 1, (width - reach - 1) // layer.stride + 1)
        kind = schema.DepthwiseConv2DOptionsT if is_depthwise else schema.Conv2DOptionsT
        options = self.fused(kind(), layer)
        options.padding = schema.Padding.SAME if is_same else schema.Padding.VALID
        options.strideH = options.strideW = layer.stride
        if is_depthwise:
            options.depthMultiplier = 1
            weight = self.weight(f"{layer.name}.weight", layer.weight[None], axis=3)
            op, field = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        else:
            filters = layer.weight.transpose(3, 0, 1, 2)
            weight = self.weight(f"{layer.name}.weight", filters, axis=0)
            op, field = "CONV_2D", "Conv2DOptions"
        inputs = [x, weight, self.bias(layer)]
        return self.put(op, name, inputs, (*shape, channels), **{field: options})

    def pool(self, name: str, layer: Layer, x: int) -> int:
        schema, is_max = self.schema, layer.kind == "max_pool"
        x = self.pad(name, x, layer.padding)
        height, width, channels = self.shape(x)
        options = self.fused(schema.Pool2DOptionsT(), layer)
        options.padding = schema.Padding.VALID
        options.filterHeight = options.filterWidth = 3 if is_max else 2
        options.strideH = options.strideW = 2
        rows, columns = ((side - options.filterHeight) // 2 + 1 for side in (height, width))
        op = "MAX_POOL_2D" if is_max else "AVERAGE_POOL_2D"
        return self.put(op, name, [x], (rows, columns, channels), Pool2DOptions=options)

    def pad(self, name: str, x: int, padding: int) -> int:
        """Adds a border of zeros, which does not change a maximum of ReLU outputs."""
        if not padding:
            return x
        height, width, channels = self.shape(x)
        edges = np.array([[0, 0], [padding] * 2, [padding] * 2, [0, 0]], np.int32)
        shape = (height + 2 * padding, width + 2 * padding, channels)
        return self.put("PAD", f"{name}.padded", [x, self.constant(f"{name}.edges", edges)], shape)

    def reshape(self, name: str, x: int, shape: tuple[int, ...]) -> int:
        options = self.schema.ReshapeOptionsT()
        options.newShape = [-1, *shape]
        wanted = self.constant(f"{name}.shape", np.array(options.newShape, np.int32))
        return self.put("RESHAPE", name, [x, wanted], shape, ReshapeOptions=options)

    def fused(self, options: Any, layer: Layer) -> Any:
        """Sets the activation in an operator's options, and returns them."""
        kinds = self.schema.ActivationFunctionType
        options.fusedActivationFunction = getattr(kinds, _FUSED[layer.activation])
        return options

    def bias(self, layer: Layer) -> int:
        assert layer.bias is not None
        return self.constant(f"{layer.name}.bias", layer.bias)

    def weight(self, name: str, value: np.ndarray, axis: int) -> int:
        """Adds a weight, stored in `dtype`; `axis` is the axis of its output channels."""
        if self.dtype == "float32":
            return self.constant(name, value)
        stored = f"{name}.{self.dtype}"
        if self.dtype == "float16":
            number = self.constant(stored, value.astype(np.float16))
        else:
            others = tuple(place for place in range(value.ndim) if place != axis)
            largest = np.abs(value).max(others, keepdims=True)
            scale = np.where(largest > 0, largest, 1) / 127
            number = self.constant(stored, np.rint(value / scale).astype(np.int8))
            quantization = self.schema.QuantizationParametersT()
            quantization.scale = scale.ravel().astype(np.float32)
            quantization.zeroPoint = np.zeros(scale.size, np.int64)
            quantization.quantizedDimension = axis
            self.graph.tensors[number].quantization = quantization
        tensor = self.tensor(name, value.shape, "float32", has_batch=False)
        version = _VERSIONS["DEQUANTIZE", self.dtype]
        self.operate("DEQUANTIZE", [number], tensor, version)
        return tensor

    def constant(self, name: str, value: Any) -> int:
        array = np.asarray(value)
        number = self.tensor(name, array.shape, array.dtype.name, has_batch=False)
        self.graph.tensors[number].buffer = self.buffer(np.ascontiguousarray(array).tobytes())
        return number

    def put(
        self, op: str, name: str, inputs: list[int], shape: tuple[int, ...], **options: Any
    ) -> int:
        """Adds an operator with one output (batch, *shape), float32, and returns the output."""
        output = self.tensor(name, shape, "float32")
        self.operate(op, inputs, output, 1, **options)
        return output

    def operate(
        self, op: str, inputs: list[int], output: int, version: int, **options: Any
    ) -> None:
        schema, operator = self.schema, self.schema.OperatorT()
        if (op, version) not in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, op)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            self.codes[op, version] = len(self.codes)
            self.model.operatorCodes.append(code)
        operator.opcodeIndex = self.codes[op, version]
        operator.inputs, operator.outputs = inputs, [output]
        for name, value in options.items():
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            operator.builtinOptions = value
        self.graph.operators.append(operator)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: str, has_batch: bool = True) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.buffer = name, 0
        tensor.type = getattr(self.schema.TensorType, dtype.upper())
        tensor.shape = [1, *shape] if has_batch else list(shape)
        if has_batch:
            tensor.shapeSignature = [-1, *shape]
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Returns the shape of a tensor that has a batch, without it."""
        return tuple(self.graph.tensors[tensor].shape[1:])

    def buffer(self, data: bytes) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        pack = buffer.Pack

        def pack_aligned(builder: Any) -> int:
            builder.Prep(ALIGNMENT, len(data))
            return pack(builder)

        buffer.Pack = pack_aligned
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def named(self, name: str, tensor: int) -> Any:
        pair = self.schema.TensorMapT()
        pair.name, pair.tensorIndex = name, tensor
        return pair
