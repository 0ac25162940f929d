"""Writes a trained network to a file for other programs, or checks such a file.

Examples:

  hccr export --checkpoint=runs/v2 --format=onnx --output=v2.onnx
  hccr export --checkpoint=runs/v2 --format=onnx --output=v2.int8.onnx --dtype=int8
  hccr export --checkpoint=runs/v2 --format=litert --output=v2.tflite --dtype=float16
  hccr export --checkpoint=runs/v2 --format=stablehlo --output=v2.stablehlo
  hccr export --checkpoint=runs/v2 --format=safetensors --output=v2.safetensors
  hccr export --checkpoint=runs/v2 --format=onnx --output=v2.tta.onnx --tta
  hccr export --checkpoint=runs/v2 --format=onnx --output=v2.onnx --verify

The network is that of the run's best step, its batch norms folded into the convolutions. But for
safetensors it takes `images` uint8 (batch, S, S) in normal form (`data/images/normalize.py`: ink
255, paper 0) and gives `logits` and `probabilities`, float32 (batch, K). A file of safetensors
has the weights and the list of layers.

  format        dtypes                            runs in                  needs
  onnx          float32, float16, int8            ONNX Runtime             hccr_jax[export]
  litert        float32, float16, int8 (weights)  LiteRT, on phones        hccr_jax[litert]
  stablehlo     float32, float16                  JAX, on CPU and CUDA     hccr_jax[export]
  safetensors   float32, float16 (weights)        anything; here in NumPy  hccr_jax[export]

int8 of ONNX is calibrated on images of the training split; the first layers, with 0.65 % of the
weights, stay in float32. Where it says weights, only they are stored so, and all arithmetic is in
float32. FILE.golden.npz is written next to FILE: a description in JSON (also in the file itself,
but for StableHLO), 16 images by a simulated writer and the file's outputs for them, which any other
program that runs the file should reproduce.

--tta puts the test-time augmentation of the run (`eval.tta_views`, `eval.tta_flips`) into a file of
ONNX or StableHLO: it takes the same images, shows the network all views of each, and combines their
probabilities, at so many times the cost.

--verify writes nothing: it runs FILE in its own runtime on the test split and reports how its
probabilities and its top-1 differ from the checkpoint's, and how long one image takes (ONNX and
LiteRT on one core); it fails if the golden probabilities differ by more than the tolerance.

Exit codes: 0 done, 1 the work failed, 2 wrong request.
"""

import importlib.util
import os
from types import SimpleNamespace

from absl import flags

from hccr_jax.cli import command
from hccr_jax.errors import InputError
from hccr_jax.runtime.startup import prepare_process

TTA_FORMATS = ("onnx", "stablehlo")
DTYPES = ("float32", "float16", "int8")
# Of each format: its dtypes, the optional packages it requires, and their extra.
FORMATS = {
    "onnx": (DTYPES, ("onnx", "onnxruntime"), "export"),
    "litert": (DTYPES, ("flatbuffers", "ai_edge_litert"), "litert"),
    "stablehlo": (("float32", "float16"), ("flatbuffers",), "export"),
    "safetensors": (("float32", "float16"), ("safetensors",), "export"),
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    command.define_path("checkpoint", "A run, or its folder checkpoints.", values)
    flags.DEFINE_enum("format", None, list(FORMATS), "Of the file.", flag_values=values)
    command.define_path("output", "The file.", values)
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of weights and arithmetic.", flag_values=values)
    command.define_path(
        "data_dir",
        "Folder of all data sets, for int8 and --verify; the run's where not given.",
        values,
    )
    flags.DEFINE_bool(
        "tta", False, "Put the run's test-time augmentation into the file.", flag_values=values
    )
    flags.DEFINE_bool("verify", False, "Check a file that is there.", flag_values=values)


def run(values: SimpleNamespace) -> int:
    """Runs the command and returns its exit code."""
    check(values)
    prepare_process()
    import numpy as np

    from hccr_jax.data.from_config import load
    from hccr_jax.export import exporter
    from hccr_jax.inference.pretrained import load_pretrained, set_mqdf_weight

    output = values.output
    pretrained = load_pretrained(values.checkpoint)
    if pretrained.config.model.mqdf_weight > 0.0:
        pretrained = set_mqdf_weight(pretrained, 0.0)
        print("the network alone: no file holds the MQDF that it is ensembled with")
    config, views = pretrained.config, None
    if values.tta:
        views = pretrained.network.tta_views
        if views is None:
            raise InputError(
                f"--tta: {pretrained.source} is evaluated on one view of an image; "
                f"config.eval.tta_views and config.eval.tta_flips of a run say how many"
            )
    if values.data_dir:
        config.data.data_dir = str(values.data_dir)
    if values.verify:
        verification = exporter.verify(
            pretrained, values.format, output, load(config, config.data.test_split)
        )
        print(f"{output}: {values.format}, against {pretrained.source}\n{verification}")
        return 0 if verification.passed() else 1
    calibration = None
    if values.format == "onnx" and values.dtype == "int8":
        images = load(config, config.data.train_split).images
        count = min(len(images), exporter.CALIBRATION_IMAGES)
        calibration = images[np.linspace(0, len(images) - 1, count).astype(int)]
    golden = exporter.export(pretrained, values.format, output, values.dtype, calibration, views)
    difference = np.abs(golden.probabilities - golden.reference).max()
    print(
        f"{output}: {values.format}, {values.dtype}, {output.stat().st_size:,} bytes, "
        f"{len(pretrained.classes):,} classes, step {pretrained.step:,}\n"
        f"  {exporter.GOLDEN_PAIRS} golden pairs next to it: largest difference of a probability "
        f"from the checkpoint {difference:.2g}"
    )
    return 0


def check(values: SimpleNamespace) -> None:
    """Checks the request as far as can be before anything is loaded.

    Raises:
      InputError: a flag is missing or wrong, or a package is not installed.
    """
    command.require(values, checkpoint="see --help", format="see --help", output="see --help")
    dtypes, packages, extra = FORMATS[values.format]
    if values.dtype not in dtypes:
        raise InputError(
            f"--dtype={values.dtype}: --format={values.format} has {', '.join(dtypes)}"
        )
    if values.tta and values.format not in TTA_FORMATS:
        raise InputError(
            f"--tta: --format={values.format} has no graph for the views; "
            f"{' and '.join(TTA_FORMATS)} have"
        )
    missing = [package for package in packages if not importlib.util.find_spec(package)]
    if missing:
        raise InputError(
            f"--format={values.format}: needs {missing[0]}: pip install 'hccr_jax[{extra}]'"
        )
    output = values.output
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"--output={output}: not a file in a folder that can be written")
