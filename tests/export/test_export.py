"""Exported files reproduce the network in runtimes that do not depend on this package."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from hccr_jax.cli import command
from hccr_jax.cli.export import FORMATS as REQUIREMENTS
from hccr_jax.data.from_config import load
from hccr_jax.errors import InputError
from hccr_jax.export import (
    exporter,
    graph,
    litert_file,
    onnx_file,
    safetensors_file,
    stablehlo_file,
)
from hccr_jax.inference.pretrained import Pretrained, load_pretrained
from hccr_jax.models.registry import create_model

# ml_collections loads a config file in a way that Python 3.12 drops.

SIDE, CLASSES = 32, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE), np.uint8)
NETWORKS = {
    "mobilenet_v1": {"width": 0.1},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v2, whole strides": {"width": 0.1, "stem_stride": 1, "first_stride": 1},
    "lenet5": {},
    "alexnet": {},
    "resnet50": {},
}


@functools.cache
def random_network(name: str, num_classes: int = CLASSES) -> nnx.Module:
    """Returns a network with random batch-norm statistics, scales and offsets."""
    model = create_model(
        name.partition(",")[0], num_classes=num_classes, image_px=SIDE, rngs=nnx.Rngs(0),
        **NETWORKS[name],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "variance"):
            for vector, low, high in (
                (module.mean, -0.3, 0.3), (module.variance, 0.2, 2.0),
                (module.scale, 0.7, 1.3), (module.bias, -0.3, 0.5),
            ):  # fmt: skip
                vector[...] = np.asarray(rng.uniform(low, high, vector.shape), np.float32)
    return model


@functools.cache
def logits_of(model: nnx.Module) -> np.ndarray:
    """Returns a network's logits for `IMAGES`."""
    return np.asarray(jax.jit(model)((IMAGES / np.float32(255))[..., None]))


def probabilities_of(model: nnx.Module) -> np.ndarray:
    return graph.softmax(logits_of(model))


@pytest.fixture(scope="module")
def pretrained(finished: Path) -> Pretrained:
    return load_pretrained(finished)


@pytest.fixture(scope="module")
def exported(pretrained: Pretrained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a StableHLO file, with its golden pairs in the same folder."""
    path = tmp_path_factory.mktemp("exported") / "a"
    exporter.export(pretrained, "stablehlo", path)
    return path


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """Returns a copy of the file that may be changed."""
    for path in exported.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / exported.name


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_layers_compute_the_network(name: str) -> None:
    expected = logits_of(random_network(name))
    assert expected.std() > 0.01
    found = graph.run(graph.fold(random_network(name)), IMAGES)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_network_without_a_fold_method_is_refused() -> None:
    mqdf = create_model("mqdf", num_classes=CLASSES, image_px=SIDE, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="MQDF: cannot be exported"):
        graph.fold(mqdf)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "alexnet"])
def test_onnx_runtime_computes_the_network_for_any_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model, path = random_network(name), tmp_path / "network.onnx"
    onnx_file.write(path, graph.fold(model), SIDE, {})
    session = onnx_file.create_session(path, threads=1)
    for count in (1, 7):
        logits, probabilities = session.run(["logits", "probabilities"], {"images": IMAGES[:count]})
        expected = logits_of(model)[:count]
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(probabilities, graph.softmax(expected), atol=1e-5)


@pytest.mark.parametrize(("name", "blocks"), [("mobilenet_v1", 13), ("mobilenet_v2", 17)])
def test_the_onnx_graph_has_native_depthwise_convolutions(
    name: str, blocks: int, tmp_path: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    description = {"classes": ["啊", "阿"]}
    onnx_file.write(tmp_path / "a.onnx", graph.fold(random_network(name)), SIDE, description)
    model = onnx.load(tmp_path / "a.onnx")
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    pairs = [
        (next(a.i for a in node.attribute if a.name == "group"), shapes[node.input[1]])
        for node in convolutions
    ]
    depthwise = [(group, shape) for group, shape in pairs if group > 1]
    assert len(depthwise) == blocks
    assert all(shape == (group, 1, 3, 3) for group, shape in depthwise)
    kinds = {node.op_type for node in model.graph.node}
    assert {"Clip", "GlobalAveragePool", "Gemm"} <= kinds
    assert "BatchNormalization" not in kinds
    (images,) = model.graph.input
    dims = images.type.tensor_type.shape.dim
    assert (images.name, images.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", SIDE, SIDE]
    assert [opset.version for opset in model.opset_import] == [17]
    assert {p.key: json.loads(p.value) for p in model.metadata_props} == {"hccr_jax": description}


def test_float16_onnx_has_float32_outputs(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = random_network("mobilenet_v2")
    onnx_file.write(tmp_path / "a.onnx", graph.fold(model), SIDE, {}, "float16")
    kinds = {t.data_type for t in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    found = onnx_file.load(tmp_path / "a.onnx")(IMAGES)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, probabilities_of(model), atol=5e-3)


def test_int8_onnx_is_small_and_accurate(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = random_network("mobilenet_v1", num_classes=3755)
    layers = graph.fold(model)
    onnx_file.write(tmp_path / "float.onnx", layers, SIDE, {})
    onnx_file.write(tmp_path / "int8.onnx", layers, SIDE, {}, "int8", IMAGES)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "int8")]
    assert sizes[0] >= 3 * sizes[1]  # of small layers the scales are a larger share
    nodes = onnx.load(tmp_path / "int8.onnx").graph
    made_by = {name: node.op_type for node in nodes.node for name in node.output}
    products = [node for node in nodes.node if node.op_type in ("Conv", "Gemm")]
    quantized = [{made_by.get(name) for name in n.input} == {"DequantizeLinear"} for n in products]
    num_float = quantized.index(True)
    assert all(quantized[num_float:])
    weights = [layer.weight.size for layer in layers if layer.weight is not None]
    assert sum(weights[:num_float]) <= 0.0065 * sum(weights) < sum(weights[: num_float + 1])
    for tensor in map(onnx.numpy_helper.to_array, nodes.initializer):
        assert tensor.dtype != np.int8 or np.abs(tensor).max(initial=0) <= 64
    expected = logits_of(model)
    session = onnx_file.create_session(tmp_path / "int8.onnx", threads=1)
    found = session.run(["logits"], {"images": IMAGES})[0]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "alexnet"])
def test_litert_computes_the_network_for_any_batch(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    expected = probabilities_of(random_network(name))
    for dtype, tolerance in (("float32", 1e-5), ("float16", 1e-3), ("int8", 1e-2)):
        path = tmp_path / f"{dtype}.tflite"
        litert_file.write(path, graph.fold(random_network(name)), SIDE, {}, dtype)
        predict = litert_file.load(path, threads=1)
        for count in (1, 7, 1):
            np.testing.assert_allclose(predict(IMAGES[:count]), expected[:count], atol=tolerance)


def test_a_litert_file_follows_its_schema(tmp_path: Path) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    path, layers = tmp_path / "a.tflite", graph.fold(random_network("mobilenet_v2"))
    litert_file.write(path, layers, SIDE, {"classes": ["啊", "阿"]}, "int8")
    data = path.read_bytes()
    assert data[4:8] == b"TFL3"
    model = schema.ModelT.InitFromPackedBuf(data)
    (signature,) = model.signatureDefs
    (subgraph,) = model.subgraphs
    named = {pair.name: subgraph.tensors[pair.tensorIndex] for pair in signature.outputs}
    assert {name: tensor.shapeSignature.tolist() for name, tensor in named.items()} == {
        b"logits": [-1, CLASSES], b"probabilities": [-1, CLASSES]
    }  # fmt: skip
    (metadata,) = model.metadata
    text = bytes(model.buffers[metadata.buffer].data).decode()
    assert json.loads(text) == {"classes": ["啊", "阿"]}
    kinds = [
        model.operatorCodes[operator.opcodeIndex].builtinCode for operator in subgraph.operators
    ]
    assert kinds.count(schema.BuiltinOperator.DEPTHWISE_CONV_2D) == 17
    packed = schema.Model.GetRootAs(data)
    for number in range(1, packed.BuffersLength()):
        start = packed.Buffers(number)._tab
        place = start.Vector(start.Offset(4))
        assert place % 16 == 0
    # What is stored is the weight, to half a step of its channel's scale.
    stored = {tensor.name.decode(): tensor for tensor in subgraph.tensors}
    for layer in layers:
        if layer.weight is not None:
            tensor = stored[f"{layer.name}.weight.int8"]
            whole = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.int8)
            axis, scale = tensor.quantization.quantizedDimension, tensor.quantization.scale
            shape = np.ones(len(tensor.shape), int)
            shape[axis] = -1
            found = whole.reshape(tensor.shape) * scale.reshape(shape)
            expected = layer.weight[None] if layer.kind == "depthwise" else layer.weight
            if layer.kind != "depthwise":
                expected = np.moveaxis(expected, -1, 0)
            assert (np.abs(found - expected) <= scale.reshape(shape) * 0.501).all()


def test_stablehlo_round_trip(tmp_path: Path) -> None:
    model = random_network("mobilenet_v2")
    stablehlo_file.write(tmp_path / "a.stablehlo", graph.fold(model), SIDE)
    predict = stablehlo_file.load(tmp_path / "a.stablehlo")
    for count in (1, 7):
        expected = probabilities_of(model)[:count]
        np.testing.assert_allclose(predict(IMAGES[:count]), expected, atol=1e-5)
    exported = jax.export.deserialize(bytearray((tmp_path / "a.stablehlo").read_bytes()))
    assert exported.platforms == ("cpu", "cuda")
    calls = re.findall(r"custom_call @(\w+)", exported.mlir_module())
    assert set(calls) == {"shape_assertion"}, "no kernels of ours, only the check of the batch"


def test_safetensors_hold_all_weights_and_layers(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = random_network("mobilenet_v2")
    layers = graph.fold(model)
    safetensors_file.write(tmp_path / "a.safetensors", layers, {"step": 7})
    # The format, parsed by hand: the header's length, the header, the arrays.
    data = (tmp_path / "a.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert json.loads(header["__metadata__"]["hccr_jax"]) == {"step": 7}
    for layer in layers:
        if layer.weight is not None:
            entry = header[f"{layer.name}.weight"]
            assert (entry["dtype"], entry["shape"]) == ("F32", list(layer.weight.shape))
            start, stop = entry["data_offsets"]
            assert data[end + start : end + stop] == layer.weight.tobytes()
    found = safetensors_file.load(tmp_path / "a.safetensors")(IMAGES)
    np.testing.assert_allclose(found, probabilities_of(model), atol=1e-5)


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = command.main(["export", *flags])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


FORMATS = [
    ("onnx", "float32"), ("onnx", "float16"), ("onnx", "int8"),
    ("litert", "float32"), ("litert", "int8"), ("stablehlo", "float32"), ("safetensors", "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("file_format", "dtype"), FORMATS)
def test_a_run_is_exported_and_verified(
    file_format: str, dtype: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in REQUIREMENTS[file_format][1]:
        pytest.importorskip(package)
    path = tmp_path / "network"
    flags = [f"--checkpoint={finished}", f"--format={file_format}", f"--output={path}"]
    code, out, err = run(capsys, *flags, f"--dtype={dtype}")
    assert (code, err) == (0, "")
    step = json.loads((finished / "eval.json").read_text())["step"]
    assert f"{file_format}, {dtype}, {path.stat().st_size:,} bytes, 8 classes, step {step}" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["network", "network.golden.npz"]
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    code, out, err = run(capsys, *flags, "--verify")
    assert (code, err) == (0, "")
    assert "  24 test characters: largest difference of a probability" in out
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_golden_file_describes_the_network(pretrained: Pretrained, exported: Path) -> None:
    golden = exporter.read_golden(exported)
    metadata = golden.description
    assert "".join(metadata["classes"]) == "丁七三上万下一丈"
    assert metadata["step"] == pretrained.step
    assert metadata["model"]["name"] == "mobilenet_v1"
    form = {"image_px": 32, "margin_px": 2, "aspect": "keep"}
    assert form.items() <= metadata["preprocessing"].items()
    assert golden.images.shape == (16, 32, 32)
    assert golden.images.dtype == np.uint8
    assert golden.images[:, 0].max() == 0, "the margin is paper"
    assert golden.images.max() > 127, "ink is high"
    module = jax.jit(exporter.trained_module(pretrained))
    expected = graph.softmax(np.asarray(module((golden.images / np.float32(255))[..., None])))
    np.testing.assert_allclose(golden.reference, expected, atol=1e-4)
    np.testing.assert_allclose(golden.probabilities, expected, atol=1e-4)


def test_a_file_that_differs_from_its_golden_probabilities_fails(
    pretrained: Pretrained, finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = exporter.read_golden(copy)
    text = np.array(json.dumps(golden.description))
    moved = np.roll(golden.probabilities, 1, axis=1)
    changed = golden._replace(description=text, probabilities=moved)
    np.savez(exporter._golden_path(copy), **changed._asdict())
    flags = [f"--checkpoint={finished}", "--format=stablehlo", f"--output={copy}", "--verify"]
    code, out, _ = run(capsys, *flags)
    assert code == 1
    assert "FAILED" in out
    split = load(pretrained.config, "test")
    verification = exporter.verify(pretrained, "stablehlo", copy, split)
    assert verification.difference < 1e-4, "the file itself is right"
    assert verification.top1 == verification.reference_top1
    expected = np.abs(moved - golden.probabilities).max()
    assert verification.golden_difference == pytest.approx(expected, abs=1e-4)


def test_a_network_too_large_for_float16_is_not_written(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    params = dict(pretrained.network.params)
    params["classifier"] = jax.tree.map(lambda leaf: leaf + 1e5, params["classifier"])
    network = dataclasses.replace(pretrained.network, params=params)
    too_large = dataclasses.replace(pretrained, network=network)
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(FloatingPointError, match="not written: in float16 its probabilities differ"),
    ):
        exporter.export(too_large, "stablehlo", tmp_path / "a", "float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint="], "--checkpoint=: an empty path"),
        (["--format="], "--format=: value should be one of <onnx|litert|stablehlo|safetensors>"),
        (["--format=tflite"], "value should be one of <onnx|litert|stablehlo|safetensors>"),
        (["--output="], "--output=: an empty path"),
        (["--dtype=int4"], "value should be one of <float32|float16|int8>"),
        (["--dtype=int8"], "--dtype=int8: --format=stablehlo has float32, float16"),
        (["--checkpoint=none"], "none: no such folder; give the --workdir of a run"),
        (["--output=none/a"], "--output=none/a: not a file in a folder that can be written"),
        (["--verify"], "a.golden.npz: no such file; it is written together with a"),
        (["--quality=9"], "Unknown command line flag 'quality'"),
        (["more"], "unexpected argument 'more'"),
    ],
)
def test_a_wrong_request_is_one_line_on_stderr(
    flags: list[str],
    message: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = [f"--checkpoint={finished}", "--format=stablehlo", f"--output={tmp_path / 'a'}"]
    code, out, err = run(capsys, *right, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_one_line_on_stderr(
    finished: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy.write_bytes(copy.read_bytes()[:1000])
    flags = [f"--checkpoint={finished}", "--format=stablehlo", f"--output={copy}", "--verify"]
    code, out, err = run(capsys, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{copy}: not a valid stablehlo file" in err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "hccr export --checkpoint=runs/v2 --format=onnx --output=v2.onnx\n" in out
