"""Settings that must precede the start of JAX, and a stopwatch of the phases of startup."""

import ctypes
import functools
import os
import time

from hccr_jax.runtime.xla_flags import set_flags


class Timeline:
    """The duration of each phase before the first step."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Ends a phase, which began at the end of the previous one."""
        now = time.monotonic()
        self._phases[phase] = now - self._last
        self._last = now

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases.items())
        return f"first step done after {self._last - self._start:.1f} s: {phases}"


def prepare_process() -> None:
    """Prepares the process for JAX: memory, threads, XLA's flags and the compilation cache.

    The cache is in `native.cache_folder`, or JAX_COMPILATION_CACHE_DIR where it is set;
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. To be called before JAX runs anything.
    """
    keep_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The threads of SciPy's BLAS, which JAX calls for eigenvectors on a CPU, wait in busy loops:
    # where other work shares the cores, these make it a hundred times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    set_flags()
    import jax

    from hccr_jax.ops import native

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(native.cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache
def keep_memory() -> None:
    """Makes glibc keep freed memory in the process, on huge pages; does nothing elsewhere.

    XLA allocates a step's working memory, hundreds of megabytes, in every step. By default glibc
    maps it from the kernel and returns it each time, and the kernel clears every page on its first
    touch: that made a step of `v2_best` 1.6 times as long. The price is memory: that training
    holds 6.7 GB instead of 2.7. To be called before the process starts its first thread: once a
    thread has an arena of its own, JAX's threads share it, and such an arena always maps large
    blocks.
    """
    if os.name != "posix":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)
    libc.mallopt(m_arena_max, 1)
    _use_huge_pages(libc)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Reserves heap addresses, without memory behind them yet, and requests huge pages there."""
    huge_page, madv_hugepage = 2**21, 14
    libc.malloc.restype = ctypes.c_void_p
    for size in (2**33, 2**31):  # Linux refuses more addresses than the machine has memory
        if (block := libc.malloc(ctypes.c_size_t(size))) is not None:
            start = (block + huge_page - 1) // huge_page * huge_page
            whole = ctypes.c_size_t(block + size - start)
            libc.madvise(ctypes.c_void_p(start), whole, madv_hugepage)
            libc.free(ctypes.c_void_p(block))
            return
