"""Writes a network as StableHLO, serialised by `jax.export`, for CPUs and NVIDIA GPUs.

The file's function takes uint8 images (B, S, S), ink high, for any B, and returns logits and
probabilities, float32 (B, K). It contains no custom kernels of `hccr_jax.ops`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from hccr_jax.export.graph import run
from hccr_jax.inference.steps import combine_tta, show_views
from hccr_jax.inference.tta import TtaViews
from hccr_jax.models.folding import Layer
from hccr_jax.ops.depthwise import grouped_conv, shifted_sum

PLATFORMS = ("cpu", "cuda")


def write(
    path: Path,
    layers: Sequence[Layer],
    image_px: int,
    dtype: str = "float32",
    views: TtaViews | None = None,
) -> None:
    """Writes a network to a file that `jax.export.deserialize` reads.

    Args:
      path: of the file.
      layers: from `graph.fold`.
      image_px: side S of the images.
      dtype: of weights and arithmetic: "float32" or "float16".
      views: of test-time augmentation inside the file; None for one view.
    """
    cast = [_cast(layer, np.dtype(dtype)) for layer in layers]

    @jax.jit
    def recognise(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        if views is None:
            logits = run(cast, images, jnp, _convolve)
        else:
            seen = show_views(images.astype(jnp.float32), views)
            logits = run(cast, seen.reshape(-1, image_px, image_px), jnp, _convolve)
            logits = logits.reshape(*seen.shape[:2], -1)
            logits = combine_tta(logits, jnp.asarray(views.weights))
        return logits, jax.nn.softmax(logits)

    shape = export.symbolic_shape(f"batch, {image_px}, {image_px}")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    with jax.default_matmul_precision("highest"):  # GPUs would round float32 to fewer digits
        exported = export.export(recognise, platforms=PLATFORMS)(images)
    path.write_bytes(exported.serialize())


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a file's network: uint8 (B, S, S) to probabilities (B, K)."""
    call = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: np.asarray(call(images)[1])


def _cast(layer: Layer, dtype: np.dtype) -> Layer:
    if layer.weight is None or layer.bias is None:
        return layer
    weight, bias = layer.weight.astype(dtype), layer.bias.astype(dtype)
    return dataclasses.replace(layer, weight=weight, bias=bias)


def _convolve(x: jax.Array, weight: np.ndarray, stride: int, padding: int) -> jax.Array:
    if weight.ndim == 3:
        # XLA's grouped convolution is many times slower on a CPU; the file contains both.
        shifted = functools.partial(shifted_sum, stride=stride)
        grouped = functools.partial(grouped_conv, stride=stride)
        return lax.platform_dependent(x, jnp.asarray(weight), cpu=shifted, default=grouped)
    return lax.conv_general_dilated(
        x, jnp.asarray(weight), (stride, stride), [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
