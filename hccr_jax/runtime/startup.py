"""A process before its first step: settings that must come before JAX starts, and a stopwatch."""

import ctypes
import functools
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
    keep_memory()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The threads of SciPy's BLAS, which JAX calls for eigenvectors on a CPU, wait in busy loops:
    # where other work shares the cores, these make it a hundred times slower.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, os.environ.get("XLA_FLAGS", "")]).strip()
    import jax

    from hccr_jax.ops import native

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(native.cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@functools.cache
def keep_memory() -> None:
    """Tells glibc to keep freed memory in the process, on huge pages; does nothing elsewhere.

    XLA allocates a step's working memory, hundreds of megabytes, anew each step. By default glibc
    maps it from the kernel and gives it back every time, and every page is cleared again on its
    first touch; and ordinary pages are so small that finding them takes a share of the time. To be
    called before the process starts its first thread: where one has a heap of its own, JAX's
    threads come to use it too, and such a heap maps large blocks whatever it is told.
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
    """Grows the heap, in addresses and not yet in memory, and asks for huge pages there."""
    huge_page, madv_hugepage = 2**21, 14
    libc.malloc.restype = ctypes.c_void_p
    for size in (2**33, 2**31):  # Linux refuses more addresses than the machine has memory
        if (block := libc.malloc(ctypes.c_size_t(size))) is not None:
            start = (block + huge_page - 1) // huge_page * huge_page
            whole = ctypes.c_size_t(block + size - start)
            libc.madvise(ctypes.c_void_p(start), whole, madv_hugepage)
            libc.free(ctypes.c_void_p(block))
            return
