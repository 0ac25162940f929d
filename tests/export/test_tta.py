"""Files with test-time augmentation inside reproduce our evaluation with as many views."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from hccr_jax.cli import command
from hccr_jax.export import exporter, graph, onnx_file, stablehlo_file
from hccr_jax.inference.steps import Variables, make_logits_step
from hccr_jax.inference.tta import create_tta_views
from hccr_jax.models.functional import split_model
from hccr_jax.models.registry import create_model
from hccr_jax.runtime.sharding import create_mesh

SIDE, CLASSES = 32, 8
IMAGES = np.random.default_rng(0).integers(0, 256, (8, SIDE, SIDE), np.uint8)
VIEWS = create_tta_views(5, flips=True, upright_prior=0.4)


def small_network() -> nnx.Module:
    network = create_model("lenet5", num_classes=CLASSES, image_px=SIDE, rngs=nnx.Rngs(0))
    weight = network.classifier.weight
    weight[...] = 20 * weight[...]  # so that views differ in certainty
    return network


def our_log_probabilities(model: nnx.Module) -> np.ndarray:
    apply, params, batch_stats = split_model(model)
    step = make_logits_step(apply, create_mesh(), VIEWS)
    (logits,) = step(Variables(params, batch_stats), IMAGES)
    return log_softmax(np.asarray(logits, np.float64), axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3)])
def test_onnx_combines_the_views_as_our_evaluation_does(
    dtype: str, tolerance: float, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    model = small_network()
    expected = our_log_probabilities(model)
    path = tmp_path / "a.onnx"
    onnx_file.write(path, graph.fold(model), SIDE, {}, dtype, views=VIEWS)
    session = onnx_file.create_session(path)
    logits, probabilities = session.run(None, {"images": IMAGES})
    np.testing.assert_allclose(log_softmax(logits, axis=1), expected, atol=tolerance, rtol=1e-5)
    np.testing.assert_allclose(probabilities, np.exp(expected), atol=tolerance)
    for batch in (1, 3):
        (some,) = session.run(["probabilities"], {"images": IMAGES[:batch]})
        np.testing.assert_allclose(some, probabilities[:batch], atol=tolerance)
    one_view = softmax(graph.run(graph.fold(model), IMAGES), axis=1)
    assert np.abs(one_view - np.exp(expected)).max() > 0.05


def test_int8_leaves_the_views_in_float(tmp_path: Path) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, path = small_network(), tmp_path / "a.onnx"
    onnx_file.write(path, graph.fold(model), SIDE, {}, "int8", IMAGES, VIEWS)
    probabilities = onnx_file.load(path)(IMAGES)
    np.testing.assert_allclose(probabilities, np.exp(our_log_probabilities(model)), atol=0.2)
    quantised = {
        source
        for node in onnx.load(path).graph.node
        if node.op_type == "QuantizeLinear"
        for source in node.input
    }
    assert not {name for name in quantised if name.startswith("tta.")}


def test_stablehlo_combines_the_views_as_our_evaluation_does(tmp_path: Path) -> None:
    model, path = small_network(), tmp_path / "a"
    stablehlo_file.write(path, graph.fold(model), SIDE, views=VIEWS)
    predict = stablehlo_file.load(path)
    expected = np.exp(our_log_probabilities(model))
    for batch in (8, 3):
        np.testing.assert_allclose(predict(IMAGES[:batch]), expected[:batch], atol=1e-5)


@pytest.fixture(scope="module")
def augmented(train: Callable[..., Path]) -> Path:
    """Returns the workdir of a tiny run that is evaluated on three views."""
    return train(8, "--config.eval.tta_views=3")


def test_an_exported_file_has_the_accuracy_of_the_evaluation(
    augmented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    scores = json.loads((augmented / "eval.json").read_text())
    for flags, key, factor in ((["--tta"], "tta", 3), ([], "network", 1)):
        output = tmp_path / f"{key}.onnx"
        request = [f"--checkpoint={augmented}", "--format=onnx", f"--output={output}"]
        assert command.main(["export", *request, *flags]) == 0
        description = exporter.read_golden(output).description
        assert description["multiply_adds"] == factor * scores["multiply_adds"]
        capsys.readouterr()
        assert command.main(["export", *request, "--verify"]) == 0
        assert f"{scores[key]['top1']:.2%} of the file" in capsys.readouterr().out


@pytest.mark.parametrize("file_format", ["litert", "safetensors"])
def test_formats_without_a_graph_for_the_views_are_refused(
    file_format: str, augmented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a"
    request = [f"--checkpoint={augmented}", f"--format={file_format}", f"--output={output}"]
    assert command.main(["export", *request, "--tta"]) == 2
    assert capsys.readouterr().err == (
        f"--tta: --format={file_format} has no graph for the views; onnx and stablehlo have\n"
    )
    assert not output.exists()


def test_a_run_of_one_view_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = [f"--checkpoint={finished}", "--format=stablehlo", f"--output={tmp_path / 'a'}"]
    assert command.main(["export", *request, "--tta"]) == 2
    assert "is evaluated on one view of an image" in capsys.readouterr().err
