"""Writes a trained network to a file for other programs, or checks such a file.

Examples:

  python -m hccr_jax.export --checkpoint=runs/v2 --format=onnx --output=v2.onnx
  python -m hccr_jax.export --checkpoint=runs/v2 --format=onnx --output=v2.int8.onnx --dtype=int8
  python -m hccr_jax.export --checkpoint=runs/v2 --format=litert --output=v2.tflite --dtype=float16
  python -m hccr_jax.export --checkpoint=runs/v2 --format=stablehlo --output=v2.stablehlo
  python -m hccr_jax.export --checkpoint=runs/v2 --format=safetensors --output=v2.safetensors
  python -m hccr_jax.export --checkpoint=runs/v2 --format=onnx --output=v2.onnx --verify

The network is that of the run's best step, its batch norms folded into the convolutions. But for
safetensors it takes `images` uint8 (batch, S, S) in normal form (`data/canvas.py`: ink 255, paper
0) and gives `logits` and `probabilities`, float32 (batch, K). A file of safetensors holds the
weights and the list of layers.

  format        dtypes                            runs in                  needs
  onnx          float32, float16, int8            ONNX Runtime             hccr_jax[export]
  litert        float32, float16, int8 (weights)  LiteRT, on phones        hccr_jax[litert]
  stablehlo     float32, float16                  JAX, on CPU and CUDA     hccr_jax[export]
  safetensors   float32, float16 (weights)        anything; here in NumPy  hccr_jax[export]

int8 of ONNX is calibrated on images of the training split; the first layers, with 0.65 % of the
weights, stay in float32. Where it says weights, only they are stored so, and all arithmetic is in
float32. Beside FILE lies FILE.golden.npz: a description in JSON (also in the file itself, but for
StableHLO), 16 images by a simulated writer and the file's answers to them, which any other program
that runs the file should give, too.

--verify writes nothing: it runs FILE in its own runtime on the test split and says how its
probabilities and its top-1 differ from the checkpoint's, and how long one image takes (ONNX and
LiteRT on one core); it fails if the golden answers are missed by more than the tolerance.

Exit codes: 0 done, 1 the work failed, 2 wrong request.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

import hccr_jax
from hccr_jax import cli
from hccr_jax import config as config_lib
from hccr_jax.checkpoint import check_classes
from hccr_jax.data import canvas
from hccr_jax.data.handwriting import create_writer, draw
from hccr_jax.data.splits import Split
from hccr_jax.errors import InputError
from hccr_jax.formats import litert_file, onnx_file, safetensors_file, stablehlo_file
from hccr_jax.formats.folded import fold
from hccr_jax.job import load
from hccr_jax.models.registry import split_model
from hccr_jax.network import create_module
from hccr_jax.pretrained import NORMAL_FORM, Pretrained, load_pretrained, weigh_second
from hccr_jax.startup import prepare_process
from hccr_jax.train_step import to_float

# The dtypes, the optional packages and their extra, of each format.
FORMATS = {
    "onnx": (("float32", "float16", "int8"), ("onnx", "onnxruntime"), "export"),
    "litert": (("float32", "float16", "int8"), ("flatbuffers", "ai_edge_litert"), "litert"),
    "stablehlo": (("float32", "float16"), ("flatbuffers",), "export"),
    "safetensors": (("float32", "float16"), ("safetensors",), "export"),
}
# How far probabilities may lie from the golden ones; those of int8 depend on how a runtime rounds.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "int8": 5e-2}
GOLDEN_PAIRS = 16
CALIBRATION_IMAGES = 2048
BATCH = 128
TIMED, WARM_UP = 200, 20  # of one image alone

Answer = Callable[[np.ndarray], np.ndarray]  # uint8 (B, S, S) to probabilities (B, K)


class Golden(NamedTuple):
    """What lies beside an exported file.

    Attributes:
      images: uint8 (16, S, S), characters of a simulated writer, evenly from all classes.
      probabilities: float32 (16, K), the file's answers when it was written.
      reference: float32 (16, K), those of the checkpoint's network in float32.
      description: what the network is and what it takes, JSON.
    """

    images: np.ndarray
    probabilities: np.ndarray
    reference: np.ndarray
    description: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verification:
    """How an exported file differs from the checkpoint.

    Attributes:
      count: characters of the test split.
      difference: the largest one of a probability, on the split.
      top1: of the file (share of 1).
      reference_top1: of the checkpoint.
      golden_difference: the largest one from the golden answers.
      tolerance: of the golden answers.
      milliseconds: median time of one image alone; of ONNX and LiteRT on one core.
    """

    count: int
    difference: float
    top1: float
    reference_top1: float
    golden_difference: float
    tolerance: float
    milliseconds: float

    def passed(self) -> bool:
        """Returns whether the file gives the golden answers."""
        return self.golden_difference <= self.tolerance

    def __str__(self) -> str:
        change = 100 * (self.top1 - self.reference_top1)
        return (
            f"  {self.count:,} test characters: largest difference of a probability "
            f"{self.difference:.2g}; top-1 {self.reference_top1:.2%} of the checkpoint, "
            f"{self.top1:.2%} of the file ({change:+.2f} points)\n"
            f"  golden pairs: largest difference {self.golden_difference:.2g}, tolerance "
            f"{self.tolerance:g}: {'passed' if self.passed() else 'FAILED'}\n"
            f"  one image alone: {self.milliseconds:.2f} ms, median of {TIMED}"
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
) -> Golden:
    """Writes a network to a file, and what belongs to it beside.

    Args:
      pretrained: the network.
      file_format: of `FORMATS`.
      output: the file.
      dtype: one of the format's.
      calibration: uint8 (N, S, S) in normal form, for int8.

    Returns:
      What lies beside the file.

    Raises:
      InputError: this network cannot be exported.
      FloatingPointError: the file's answers are not the network's; nothing was written.
    """
    model = trained_module(pretrained)
    layers = fold(model)
    description = describe(pretrained, dtype)
    images = golden_images(pretrained)
    image_px = pretrained.config.data.image_px
    part = output.with_name(f"{output.name}.part")
    try:
        match file_format:
            case "onnx":
                onnx_file.write(part, layers, image_px, description, dtype, calibration)
            case "litert":
                litert_file.write(part, layers, image_px, description, dtype)
            case "stablehlo":
                stablehlo_file.write(part, layers, image_px, dtype)
            case "safetensors":
                safetensors_file.write(part, layers, description, dtype)
        probabilities, reference = _open(part, file_format)(images), _reference(model)(images)
        difference = np.abs(probabilities - reference).max()
        # What fewer digits cost is for the user to judge, unless the answers are no numbers.
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
    """Returns how an exported file differs from the checkpoint it was made from.

    Args:
      pretrained: the checkpoint's network.
      file_format: of the file, of `FORMATS`.
      output: the file; its golden pairs lie beside it.
      split: to compare on.

    Raises:
      InputError: the file or its golden pairs are missing or damaged, or they, the checkpoint and
        the split have different classes.
    """
    golden = read_golden(output)
    check_classes(golden.description["classes"], pretrained.classes, output)
    check_classes(pretrained.classes, split.classes, pretrained.source)
    answer = _open(output, file_format)
    reference = _reference(trained_module(pretrained))
    ours, theirs = (_in_batches(function, split.images) for function in (answer, reference))
    return Verification(
        count=len(split.labels),
        difference=float(np.abs(ours - theirs).max()),
        top1=float((ours.argmax(1) == split.labels).mean()),
        reference_top1=float((theirs.argmax(1) == split.labels).mean()),
        golden_difference=float(np.abs(answer(golden.images) - golden.probabilities).max()),
        tolerance=golden.description["tolerance"],
        milliseconds=_latency(_open(output, file_format, threads=1), golden.images[:1]),
    )


def describe(pretrained: Pretrained, dtype: str) -> dict[str, Any]:
    """Returns what a program needs to know to use a network, as a JSON object."""
    config = pretrained.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(pretrained.network.params))
    return {
        "version": hccr_jax.__version__,
        "model": {"name": config.model.name} | config_lib.model_options(config),
        "dtype": dtype,
        "parameters": parameters,
        "multiply_adds": pretrained.network.multiply_adds,
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
    """Returns uint8 (16, S, S): characters in normal form, always the same for the same classes."""
    classes, data = pretrained.classes, pretrained.config.data
    writer, rng = create_writer(0), np.random.default_rng(0)
    rows = np.linspace(0, len(classes) - 1, GOLDEN_PAIRS).round().astype(int)
    form = [data[key] for key in NORMAL_FORM]
    return np.stack([canvas.normal_form(draw(classes[row], writer, rng), *form) for row in rows])


def read_golden(output: Path) -> Golden:
    """Returns what lies beside an exported file.

    Raises:
      InputError: nothing does, or it is damaged.
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


def _latency(answer: Answer, image: np.ndarray) -> float:
    """Returns the median time of an answer to one image (1, S, S) in milliseconds."""
    seconds = []
    for _ in range(TIMED + WARM_UP):
        start = time.perf_counter()
        answer(image)
        seconds.append(time.perf_counter() - start)
    return 1e3 * median(seconds[WARM_UP:])


def _open(path: Path, file_format: str, threads: int = 0) -> Answer:
    """Returns an exported file's network, in the runtime of its format.

    Args:
      path: the file.
      file_format: of `FORMATS`.
      threads: of ONNX Runtime and LiteRT; 0 for one a core.
    """
    loaders: dict[str, Callable[[Path], Answer]] = {
        "onnx": functools.partial(onnx_file.load, threads=threads),
        "litert": functools.partial(litert_file.load, threads=threads),
        "stablehlo": stablehlo_file.load,
        "safetensors": safetensors_file.load,
    }
    if not path.is_file():
        raise InputError(f"--output={path}: no such file; without --verify it is written")
    try:
        return loaders[file_format](path)
    except Exception as error:  # each runtime has exceptions of its own
        raise InputError(f"{path}: not a sound {file_format} file: {error}") from error


def _reference(model: nnx.Module) -> Answer:
    """Returns the checkpoint's network, each batch norm still by itself."""
    apply, params, batch_stats = split_model(model)

    @jax.jit
    def answer(params, batch_stats, images):
        with jax.default_matmul_precision("highest"):
            logits, _ = apply(params, batch_stats, to_float(images)[..., None])
        return jax.nn.softmax(logits)

    return lambda images: np.asarray(answer(params, batch_stats, images))


def _in_batches(answer: Answer, images: np.ndarray) -> np.ndarray:
    """Returns the answers to all images; a last batch is filled up, so that one program serves."""
    parts = []
    for start in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        parts.append(answer(images[rows]))
    return np.concatenate(parts)[: len(images)]


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit code: 0 done, 1 failed, 2 wrong request."""
    try:
        values = _parse(argv)
        if values.help:
            print(f"{__doc__}\nFlags:{values.get_help()}")
            return 0
        prepare_process()
        return _run(values)
    except InputError as error:
        return cli.report_error(error)
    except (FloatingPointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _run(values: flags.FlagValues) -> int:
    output = Path(values.output).expanduser()
    pretrained = load_pretrained(values.checkpoint)
    if pretrained.config.model.mqdf_weight > 0.0:
        pretrained = weigh_second(pretrained, 0.0)
        print("the network alone: no file holds the classical recogniser beside it")
    config = pretrained.config
    if values.data_dir:
        config.data.data_dir = values.data_dir
    if values.verify:
        verification = verify(
            pretrained, values.format, output, load(config, config.data.test_split)
        )
        print(f"{output}: {values.format}, against {pretrained.source}\n{verification}")
        return 0 if verification.passed() else 1
    calibration = None
    if values.format == "onnx" and values.dtype == "int8":
        images = load(config, config.data.train_split).images
        count = min(len(images), CALIBRATION_IMAGES)
        calibration = images[np.linspace(0, len(images) - 1, count).astype(int)]
    golden = export(pretrained, values.format, output, values.dtype, calibration)
    difference = np.abs(golden.probabilities - golden.reference).max()
    print(
        f"{output}: {values.format}, {values.dtype}, {output.stat().st_size:,} bytes, "
        f"{len(pretrained.classes):,} classes, step {pretrained.step:,}\n"
        f"  {GOLDEN_PAIRS} golden pairs beside it: largest difference of a probability from the "
        f"checkpoint {difference:.2g}"
    )
    return 0


def _parse(argv: list[str]) -> flags.FlagValues:
    """Returns the parsed flags, the request checked as far as can be before anything is loaded."""
    own = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "A run, or its folder checkpoints.", flag_values=own)
    flags.DEFINE_enum("format", None, list(FORMATS), "Of the file.", flag_values=own)
    flags.DEFINE_string("output", None, "The file.", flag_values=own)
    flags.DEFINE_enum(
        "dtype", "float32", list(TOLERANCES), "Of weights and arithmetic.", flag_values=own
    )
    flags.DEFINE_string(
        "data_dir", None, "Folder of all data sets, for int8 and --verify; the run's where not "
        "given.", flag_values=own,
    )  # fmt: skip
    flags.DEFINE_bool("verify", False, "Check a file that is there.", flag_values=own)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=own)
    cli.parse_flags(own, argv)
    if own.help:
        return own
    for required in ("checkpoint", "format", "output"):
        if not own[required].value:
            raise InputError(f"--{required} is missing: see --help")
    dtypes, packages, extra = FORMATS[own.format]
    if own.dtype not in dtypes:
        raise InputError(f"--dtype={own.dtype}: --format={own.format} has {', '.join(dtypes)}")
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        raise InputError(
            f"--format={own.format}: needs {missing[0]}: pip install 'hccr_jax[{extra}]'"
        )
    output = Path(own.output).expanduser()
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output={output}: not a file in a folder that can be written")
    return own


if __name__ == "__main__":
    sys.exit(main(sys.argv))
