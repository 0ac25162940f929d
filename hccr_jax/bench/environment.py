"""The machine and software that a benchmark ran on."""

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from hccr_jax.runtime.worker_pool import cpu_count


def describe_environment() -> dict[str, Any]:
    """Returns `device`, `cores`, `commit` and `versions`."""
    return {
        "device": f"{jax.device_count()} × {_device_kind()}",
        "cores": cpu_count(),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def _device_kind() -> str:
    """Returns the name of the devices; JAX calls every CPU "cpu"."""
    cpuinfo = Path("/proc/cpuinfo")
    if jax.default_backend() == "cpu" and cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return jax.devices()[0].device_kind


def _commit() -> str | None:
    """Returns the commit of the code, with "-dirty" where files differ; None without git."""
    if shutil.which("git") is None:
        return None
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
