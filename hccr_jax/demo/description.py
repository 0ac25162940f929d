"""The description (model.json) of a network that runs in the browser."""

from pathlib import Path
from typing import Any

import numpy as np

# Files of ONNX Runtime in the page's folder.
RUNTIME, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
STROKES_TYPE = "application/json"


def describe_for_browser(checkpoint: str | Path) -> dict[str, Any]:
    """Returns the content of model.json for a page that needs no server (launch/build_demo.sh).

    Args:
      checkpoint: a run's folder, or its folder checkpoints.

    Raises:
      InputError: there is no such run.
    """
    from hccr_jax.inference.pretrained import NORMAL_FORM, load_pretrained
    from hccr_jax.inference.recognizer import read_temperature

    pretrained = load_pretrained(checkpoint)
    # A run's temperature is fitted to the whole ensemble; the exported file is the network alone.
    alone = pretrained.config.model.mqdf_weight == 0.0
    temperature = read_temperature(pretrained) if alone else None
    views = pretrained.network.tta_views
    maps, weights = (views.maps, views.weights) if views else (np.eye(2)[None], np.ones(1))
    return {
        "mode": "browser",
        "model": "model.onnx",
        "runtime": RUNTIME,
        "wasm": WASM,
        "classes": list(pretrained.classes),
        "preprocessing": {key: pretrained.config.data[key] for key in NORMAL_FORM},
        "tta": {"maps": maps.tolist(), "weights": weights.tolist()},
        "temperature": temperature or 1.0,
        "calibrated": temperature is not None,
    }
