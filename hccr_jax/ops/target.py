"""The device that programs are compiled for."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_target: contextvars.ContextVar[Any] = contextvars.ContextVar("target", default=None)


def device() -> Any:
    """Returns the device that programs are compiled for: this process's first, unless told else."""
    return _target.get() or jax.devices()[0]


def is_cpu() -> bool:
    """Returns whether programs are compiled for a CPU."""
    return device().platform == "cpu"


@contextlib.contextmanager
def compiling_for(target: Any) -> Iterator[None]:
    """Compiles, in this context, for a device that need not be there.

    Args:
      target: of a topology (`jax.experimental.topologies`).
    """
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)
