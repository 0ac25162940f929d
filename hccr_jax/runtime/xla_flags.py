"""Flags of XLA that a run sets, by version; those of the environment have the last word."""

import importlib.metadata
import importlib.util
import os

# From which version of jaxlib on, and the flag.
GPU_FLAGS = (
    # The steps of one execution are one CUDA graph: otherwise the host reads the loop's condition
    # before each step. Versions of 2025 crashed in the second execution (openxla/xla#35760).
    ((0, 10), "--xla_gpu_enable_command_buffer=+WHILE"),
)
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def gpu_flags(jaxlib: str) -> list[str]:
    """Returns the flags for NVIDIA GPUs of a version of jaxlib.

    >>> gpu_flags("0.9.2")
    []
    """
    version = tuple(int(part) for part in jaxlib.split(".")[:2])
    return [flag for least, flag in GPU_FLAGS if version >= least]


def set_flags() -> None:
    """Adds the flags to the environment where JAX has a CUDA plugin; before JAX is imported."""
    if any(map(importlib.util.find_spec, _PLUGINS)):
        own = gpu_flags(importlib.metadata.version("jaxlib"))
        # Of a flag that is there twice, the later counts.
        given = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in own if flag not in given]
        os.environ["XLA_FLAGS"] = " ".join([*flags, *given])
