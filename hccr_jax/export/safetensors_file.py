"""Writes a network's weights and a list of its layers, to build it in any framework."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hccr_jax.export.graph import run, softmax
from hccr_jax.models.folding import Layer

ARRAYS = ("weight", "bias")


def write(
    path: Path, layers: Sequence[Layer], description: dict[str, Any], dtype: str = "float32"
) -> None:
    """Writes a network's weights to a safetensors file.

    Args:
      path: of the file.
      layers: from `graph.fold`; they become tensors LAYER.weight and LAYER.bias, and in the
        metadata "layers", a JSON list of `folding.Layer`.
      description: JSON object, in the metadata "hccr_jax".
      dtype: of the weights: "float32" or "float16".
    """
    from safetensors.numpy import save

    tensors = {
        f"{layer.name}.{key}": np.ascontiguousarray(getattr(layer, key), dtype)
        for layer in layers
        for key in ARRAYS
        if getattr(layer, key) is not None
    }
    fields = [field.name for field in dataclasses.fields(Layer) if field.name not in ARRAYS]
    plan = [{field: getattr(layer, field) for field in fields} for layer in layers]
    metadata = {
        "hccr_jax": json.dumps(description, ensure_ascii=False),
        "layers": json.dumps(plan),
    }
    path.write_bytes(save(tensors, metadata))


def load(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a file's network: uint8 (B, S, S) to probabilities (B, K).

    It runs in NumPy, in float32 for any dtype of the weights.
    """
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    layers = []
    for plan in json.loads(metadata["layers"]):
        arrays = {key: tensors.get(f"{plan['name']}.{key}") for key in ARRAYS}
        layers.append(Layer(**plan | arrays | {"inputs": tuple(plan["inputs"])}))
    return lambda images: softmax(run(layers, images))
