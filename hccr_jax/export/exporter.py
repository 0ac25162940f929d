"""Exports a trained network for other runtimes, and verifies the file against the network."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hccr_jax
from hccr_jax import config as config_lib
from hccr_jax.data.images.normalize import normalize
from hccr_jax.data.splits import Split, padded_rows
from hccr_jax.data.synthetic.draw import draw
from hccr_jax.data.synthetic.writer import create_writer
from hccr_jax.errors import InputError
from hccr_jax.export import litert_file, onnx_file, safetensors_file, stablehlo_file
from hccr_jax.export.graph import fold
from hccr_jax.inference.network import create_module
from hccr_jax.inference.pretrained import NORMAL_FORM, Pretrained
from hccr_jax.inference.steps import combine_tta, show_views, to_float
from hccr_jax.inference.tta import TtaViews
from hccr_jax.models.functional import split_model
from hccr_jax.runtime.checkpoints import check_classes

# Tolerances of golden probabilities; those of int8 depend on how a runtime rounds.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "int8": 5e-2}
GOLDEN_PAIRS = 16
CALIBRATION_IMAGES = 2048
BATCH = 128
TIMED, WARM_UP = 200, 20  # runs of a batch of one image

Predict = Callable[[np.ndarray], np.ndarray]  # uint8 (B, S, S) to probabilities (B, K)


class Golden(NamedTuple):
    """Golden inputs and outputs, stored with an exported file.

    Attributes:
      images: uint8 (16, S, S), characters of a simulated writer, evenly from all classes.
      probabilities: float32 (16, K), outputs of the file when it was written.
      reference: float32 (16, K), outputs of the checkpoint's network in float32.
      description: JSON object, see `describe`.
    """

    images: np.ndarray
    probabilities: np.ndarray
    reference: np.ndarray
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verification:
    """Differences of an exported file from its checkpoint.

    Attributes:
      count: characters of the test split.
      difference: largest difference of a probability on the split.
      top1: accuracy of the file, 0 to 1.
      reference_top1: accuracy of the checkpoint.
      golden_difference: largest difference from the golden probabilities.
      tolerance: of `golden_difference`.
      milliseconds: median latency of one image; for ONNX and LiteRT on one core.
    """

    count: int
    difference: float
    top1: float
    reference_top1: float
    golden_difference: float
    tolerance: float
    milliseconds: float

    def passed(self) -> bool:
        """Returns whether the file reproduces the golden probabilities."""
        return self.golden_difference <= self.tolerance

    def __str__(self) -> str:
        change = 100 * (self.top1 - self.reference_top1)
        return (
            f"  {self.count:,} test characters: largest difference of a probability "
            f"{self.difference:.2g}; top-1 {self.reference_top1:.2%} of the checkpoint, "
            f"{self.top1:.2%} of the file ({change:+.2f} points)\n"
            f"  golden pairs: largest difference {self.golden_difference:.2g}, tolerance "
            f"{self.tolerance:g}: {'passed' if self.passed() else 'FAILED'}\n"
            f"  latency of one image: {self.milliseconds:.2f} ms, median of {TIMED}"
        )


def trained_module(pretrained: Pretrained) -> nnx.Module:
    """Returns a trained network as a Flax module that computes in float32."""
    config = pretrained.config.copy_and_resolve_references()
    config.model.dtype = "float32"
    model = create_module(config, len(pretrained.classes))
    network = pretrained.network
    for kind, values in ((nnx.Param, network.params), (nnx.BatchStat, network.batch_stats)):
        state = nnx.state(model, kind)
        nnx.replace_by_pure_dict(state, values)
        nnx.update(model, state)
    return model


def export(
    pretrained: Pretrained,
    file_format: str,
    output: Path,
    dtype: str = "float32",
    calibration: np.ndarray | None = None,
    views: TtaViews | None = None,
) -> Golden:
    """Writes a network to a file, with its golden pairs in OUTPUT.golden.npz.

    Args:
      pretrained: the network.
      file_format: onnx, litert, stablehlo or safetensors.
      output: the file.
      dtype: one of the format's.
      calibration: uint8 (N, S, S), normalised images for int8.
      views: of test-time augmentation inside an onnx or stablehlo file; None for one view.

    Returns:
      The golden pairs.

    Raises:
      InputError: this network cannot be exported.
      FloatingPointError: the file's probabilities are not the network's; nothing was written.
    """
    model = trained_module(pretrained)
    layers = fold(model)
    description = describe(pretrained, dtype, views)
    images = golden_images(pretrained)
    image_px = pretrained.config.data.image_px
    part = output.with_name(f"{output.name}.part")
    try:
        match file_format:
            case "onnx":
                onnx_file.write(part, layers, image_px, description, dtype, calibration, views)
            case "litert":
                litert_file.write(part, layers, image_px, description, dtype)
            case "stablehlo":
                stablehlo_file.write(part, layers, image_px, dtype, views)
            case "safetensors":
                safetensors_file.write(part, layers, description, dtype)
        probabilities = _load(part, file_format)(images)
        reference = _make_reference(model, views)(images)
        difference = np.abs(probabilities - reference).max()
        # The loss of lower precision is for the user to judge, unless the outputs are not finite.
        if not difference <= (TOLERANCES[dtype] if dtype == "float32" else 1.0):
            raise FloatingPointError(
                f"{output}: not written: in {dtype} its probabilities differ from the checkpoint's "
                f"by {difference:.2g}"
            )
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    golden = Golden(images, probabilities, reference, description)
    text = json.dumps(description, ensure_ascii=False)
    np.savez_compressed(_golden_path(output), **golden._asdict() | {"description": np.array(text)})
    return golden


def verify(pretrained: Pretrained, file_format: str, output: Path, split: Split) -> Verification:
    """Compares an exported file with its checkpoint.

    Args:
      pretrained: the checkpoint's network.
      file_format: of the file; see `export`.
      output: the file; its golden pairs are in the same folder.
      split: to compare on.

    Raises:
      InputError: the file or its golden pairs are missing or damaged, or the classes of these, the
        checkpoint and the split differ.
    """
    golden = read_golden(output)
    check_classes(golden.description["classes"], pretrained.classes, output)
    check_classes(pretrained.classes, split.classes, pretrained.source)
    predict = _load(output, file_format)
    tta = golden.description.get("tta")
    views = TtaViews(*(np.array(tta[key], np.float32) for key in TtaViews._fields)) if tta else None
    reference = _make_reference(trained_module(pretrained), views)
    ours, theirs = (_in_batches(function, split.images) for function in (predict, reference))
    return Verification(
        count=len(split.labels),
        difference=float(np.abs(ours - theirs).max()),
        top1=float((ours.argmax(1) == split.labels).mean()),
        reference_top1=float((theirs.argmax(1) == split.labels).mean()),
        golden_difference=float(np.abs(predict(golden.images) - golden.probabilities).max()),
        tolerance=golden.description["tolerance"],
        milliseconds=_latency(_load(output, file_format, threads=1), golden.images[:1]),
    )


def describe(pretrained: Pretrained, dtype: str, views: TtaViews | None = None) -> dict[str, Any]:
    """Returns a JSON object with all that a program needs to use a network."""
    config, num_views = pretrained.config, len(views.maps) if views else 1
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pretrained.network.params))
    return {
        "version": hccr_jax.__version__,
        "model": {"name": config.model.name} | config_lib.model_options(config),
        "dtype": dtype,
        "parameters": parameters,
        "multiply_adds": num_views * pretrained.network.multiply_adds,
        "tta": {key: value.tolist() for key, value in views._asdict().items()} if views else None,
        "step": pretrained.step,
        "validation": pretrained.validation,
        "data": config.data.name,
        "input": "images: uint8 (batch, image_px, image_px), ink 255, paper 0",
        "outputs": "logits and probabilities: float32 (batch, number of classes)",
        "preprocessing": {key: config.data[key] for key in NORMAL_FORM}
        | {"ink": 255, "paper": 0, "divided_by_in_the_network": 255},
        "tolerance": TOLERANCES[dtype],
        "classes": list(pretrained.classes),
    }


def golden_images(pretrained: Pretrained) -> np.ndarray:
    """Returns normalised characters, uint8 (16, S, S), the same for the same classes."""
    classes, data = pretrained.classes, pretrained.config.data
    writer, rng = create_writer(0), np.random.default_rng(0)
    rows = np.linspace(0, len(classes) - 1, GOLDEN_PAIRS).round().astype(int)
    form = [data[key] for key in NORMAL_FORM]
    return np.stack([normalize(draw(classes[row], writer, rng), *form) for row in rows])


def read_golden(output: Path) -> Golden:
    """Returns the golden pairs of an exported file.

    Raises:
      InputError: they are missing or damaged.
    """
    path = _golden_path(output)
    if not path.is_file():
        raise InputError(f"{path}: no such file; it is written together with {output.name}")
    try:
        with np.load(path) as arrays:
            golden = Golden(*(arrays[name] for name in Golden._fields))
        return golden._replace(description=json.loads(str(golden.description)))
    except Exception as error:  # a damaged archive raises anything
        raise InputError(f"{path}: damaged: {type(error).__name__}: {error}") from error


def _golden_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.golden.npz")


def _latency(predict: Predict, image: np.ndarray) -> float:
    """Returns the median latency of one image (1, S, S) in milliseconds."""
    seconds = []
    for _ in range(TIMED + WARM_UP):
        start = time.perf_counter()
        predict(image)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[WARM_UP:])


def _load(path: Path, file_format: str, threads: int = 0) -> Predict:
    """Loads an exported file in the runtime of its format.

    Args:
      path: the file.
      file_format: see `export`.
      threads: of ONNX Runtime and LiteRT; 0 for one per core.
    """
    loaders: dict[str, Callable[[Path], Predict]] = {
        "onnx": functools.partial(onnx_file.load, threads=threads),
        "litert": functools.partial(litert_file.load, threads=threads),
        "stablehlo": stablehlo_file.load,
        "safetensors": safetensors_file.load,
    }
    if not path.is_file():
        raise InputError(f"--output={path}: no such file; run without --verify to write it")
    try:
        return loaders[file_format](path)
    except Exception as error:  # each runtime has exceptions of its own
        raise InputError(f"{path}: not a valid {file_format} file: {error}") from error


def _make_reference(model: nnx.Module, views: TtaViews | None) -> Predict:
    """Returns the checkpoint's network, batch norms not folded, with test-time augmentation."""
    apply, params, batch_stats = split_model(model)

    @jax.jit
    def predict(params, batch_stats, images):
        with jax.default_matmul_precision("highest"):
            if views is None:
                logits, _ = apply(params, batch_stats, to_float(images)[..., None])
            else:
                seen = show_views(to_float(images), views)
                inputs = seen.reshape(-1, *seen.shape[2:], 1)
                logits, _ = apply(params, batch_stats, inputs)
                logits = logits.reshape(*seen.shape[:2], -1)
                logits = combine_tta(logits, jnp.asarray(views.weights))
        return jax.nn.softmax(logits)

    return lambda images: np.asarray(predict(params, batch_stats, images))


def _in_batches(predict: Predict, images: np.ndarray) -> np.ndarray:
    """Returns the probabilities of all images; the last batch is padded to full size."""
    batches = padded_rows(len(images), BATCH)
    return np.concatenate([predict(images[rows]) for rows in batches])[: len(images)]
