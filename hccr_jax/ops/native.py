"""Builds and registers the CPU kernels of `cpu_kernels.cc`.

The kernels are compiled once for the machine they run on (a few seconds, cached in the user's cache
folder). Without a C++ compiler everything runs on XLA's operations: the same numbers to rounding,
at about half the speed.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import tempfile

import jax
import jax.numpy as jnp
from absl import logging

from hccr_jax.ops import target

SOURCE = pathlib.Path(__file__).with_name("cpu_kernels.cc")
TARGETS = (
    "hccr_batch_statistics",
    "hccr_norm_gradient_sums",
    "hccr_block_forward",
    "hccr_block_inference",
    "hccr_block_backward",
    "hccr_weight_gradient",
)
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w")
LANES = 16  # the kernels work on groups of this many channels


@functools.cache
def available() -> bool:
    """Builds and registers the CPU kernels on the first call, and returns whether that succeeded.

    The environment variable HCCR_CPU_KERNELS=0 disables them.
    """
    if os.environ.get("HCCR_CPU_KERNELS") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        logging.warning(
            "No C++ compiler found: training on this CPU will be about two times slower. "
            "Install one (Debian: apt install g++) to use the built-in kernels."
        )
        return False
    try:
        library = ctypes.CDLL(str(_build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        logging.warning("CPU kernels failed to build, using XLA's operations: %s", detail)
        return False
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return True


def supports(x: jax.Array) -> bool:
    """Returns whether the kernels support this array: float32, at least 16 channels, on a CPU."""
    fits = x.dtype == jnp.float32 and x.shape[-1] >= LANES
    return fits and target.is_cpu() and available()


def cache_folder() -> pathlib.Path:
    """Returns the folder of this machine's compiled code, created.

    It is in XDG_CACHE_HOME or ~/.cache; without a home, or where that cannot be written, it is one
    of the user's own among the temporary files.
    """
    named = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    root = named if os.path.isabs(named) else os.path.expanduser("~/.cache")  # as its rules say
    if os.path.isabs(root):
        folder = pathlib.Path(root, "hccr_jax")
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    folder = pathlib.Path(tempfile.gettempdir(), f"hccr_jax-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    # Code is run from it, so it must be nobody else's.
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o22:
        return folder
    return pathlib.Path(tempfile.mkdtemp(prefix="hccr_jax-"))


def _build(compiler: str) -> pathlib.Path:
    """Returns the library for this source, compiler, processor and JAX; builds it if new."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
    ).stdout
    parts = (SOURCE.read_text("utf-8"), version, _processor(), jax.__version__, " ".join(FLAGS))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = cache_folder()
    library = cache / f"cpu_kernels-{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = pathlib.Path(scratch) / library.name
            include = f"-I{jax.ffi.include_dir()}"
            command = [compiler, *FLAGS, include, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
            built.replace(library)  # atomic: two processes may build at once
    return library


def _processor() -> str:
    """Returns a text that identifies the processor's instruction set."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
