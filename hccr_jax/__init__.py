"""High-throughput training of handwritten-Chinese-character recognisers in JAX.

`Recognizer` and `create_model` load on first use, so that `import hccr_jax` stays fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hccr_jax.inference.recognizer import Recognizer as Recognizer
    from hccr_jax.models.registry import create_model as create_model

__version__ = "0.2.0"
_LAZY = {
    "Recognizer": "hccr_jax.inference.recognizer",
    "create_model": "hccr_jax.models.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hccr_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
