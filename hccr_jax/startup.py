"""A process before its first step: settings that must come before JAX starts, and a stopwatch."""

import os
import time

# XLA reads these when it starts; what the environment variable XLA_FLAGS holds comes after them and
# so has the last word. docs/benchmarks.md tells which flags were measured.
XLA_FLAGS: tuple[str, ...] = ()


class Timeline:
    """Where the time before the first step went."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase, which began where the one before it ended."""
        now = time.monotonic()
        self._phases[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases.items())
        return f"first step done after {self._last - self._start:.1f} s: {phases}"


def prepare_process() -> None:
    """Prepares the process for JAX: flags, memory, and compiled programs kept from run to run.

    Compiled programs are kept in ~/.cache/hccr_jax/compiled, or where JAX_COMPILATION_CACHE_DIR
    says; JAX_ENABLE_COMPILATION_CACHE=false keeps none. To be called before JAX runs anything.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The threads of SciPy's BLAS, which JAX calls for eigenvectors on a CPU, wait in busy loops:
    # where other work shares the cores, these make it a hundred times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
    import jax

    from hccr_jax.ops import native

    native.keep_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(native.cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
